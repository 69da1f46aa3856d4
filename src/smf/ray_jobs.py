"""Jobs on the machines of a Ray cluster: `smf.jobs` past one machine. What they write lies on a disk that all share."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .errors import ConfigError
from .jobs import Job, carry_out
from .stopping import end_on_sigterm

TRIES = 4  # of a job whose process or machine is lost
STORE = 80 * 2**20  # bytes of shared memory for a local Ray, the least that it takes; what is passed on is small
ASIDE = ".ray-check-"  # begins the names of folders by which machines see whether they share a disk
PATIENCE = 5.0  # seconds for an address to answer
LOOK = 0.2  # seconds between two looks at what runs
PACKAGES = ("sparse-memory-finetuning", "torch", "transformers", "peft")  # must be of one version everywhere


@contextlib.contextmanager
def on_ray(address: str, output: Path, at_once: int) -> Iterator[RayWorkers]:
    """Workers of a Ray cluster whose machines have shown that they share the output folder and run the same versions.

    Args:
        address: "local" starts Ray on this machine, for as long as this lasts; "HOST:PORT" or "auto" is a cluster that
            runs already, of which this machine is a part (`ray start --address=HOST:PORT`).
        output: folder that the jobs write into; made where it is not there.
        at_once: jobs that run at a time.

    Raises:
        ConfigError: where Ray is not installed, nothing answers at the address, or a machine lacks the folder.
    """
    if find_spec("ray") is None:
        raise ConfigError("--ray needs Ray, which is not installed: pip install 'sparse-memory-finetuning[ray]'")
    _check_address(address)
    output.mkdir(parents=True, exist_ok=True)
    share = Share.make(output)
    try:
        _connect(address, at_once)
        try:
            _check_machines(share)
            yield RayWorkers(share)
        finally:
            import ray

            ray.shutdown()
    finally:
        shutil.rmtree(share.folder, ignore_errors=True)


class RayWorkers:
    """Processes of a Ray cluster, one for each job. What is lost with its process or machine is begun again.

    A run that is begun again goes on from its last checkpoint, as after any crash.

    Args:
        share: the folder that all machines have seen.
    """

    def __init__(self, share: Share):
        import ray

        self._share = share
        # a process takes one job, so that its peak memory is its own, as that of a process of this machine
        self._remote = ray.remote(max_calls=1, max_retries=0)(_carry_out)
        resources = ray.cluster_resources()
        self._gpus = 1 if resources.get("GPU") else 0
        self._cores = int(resources.get("CPU", 1))
        self._smallest = int(min(node["Resources"].get("CPU", 1) for node in _machines()))

    def threads(self, at_once: int) -> int:
        """An equal share of the cluster's cores, as far as one machine has them."""
        return max(1, min(self._cores // at_once, self._smallest))

    def start(self, job: Job, threads: int) -> Any:
        """Queue a job until a machine has room for its threads (and a GPU, where the cluster has some)."""
        return _Task(job, threads, self._submit(job, threads))

    def _submit(self, job: Job, threads: int) -> Any:
        remote = self._remote.options(num_cpus=threads, num_gpus=self._gpus, name=job.title)
        return remote.remote(job, threads, os.getcwd(), sys.path, self._share)

    def ended(self, handles: Sequence[Any], seconds: float | None) -> dict[Any, int]:
        """Exit codes; a job whose process or machine is lost has not ended, unless it was begun often enough."""
        by_ref = {task.ref: task for task in handles}
        codes = {by_ref[ref]: self._code(by_ref[ref]) for ref in _ready(list(by_ref), min(1, len(by_ref)), seconds)}
        return {task: code for task, code in codes.items() if code is not None}

    def _code(self, task: _Task) -> int | None:
        """Exit code of a task that is ready; None where it was begun again."""
        import ray
        from ray import exceptions

        try:
            return ray.get(task.ref)
        except exceptions.OutOfMemoryError:  # of the machine: another try would end alike
            return -signal.SIGKILL
        except (exceptions.WorkerCrashedError, exceptions.NodeDiedError) as lost:
            task.tries += 1
            if task.tries > TRIES:
                return -signal.SIGKILL
            what = "machine" if isinstance(lost, exceptions.NodeDiedError) else "process"
            print(
                f"smf: {task.job.title}: its {what} is lost; begun again, from its last checkpoint (try {task.tries} "
                f"of {TRIES})",
                file=sys.stderr,
            )
            task.ref = self._submit(task.job, task.threads)
            return None
        except exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            print(f"smf: {task.job.title}: {cause or error}", file=sys.stderr)
            return 2 if isinstance(cause, ConfigError) else 1

    def stop(self, handles: Sequence[Any]) -> None:
        """As SIGTERM does: what runs saves a checkpoint first, what waits is not begun."""
        import ray

        for task in handles:
            ray.cancel(task.ref, force=False)
        _ready([task.ref for task in handles], len(handles), None)


@dataclass(eq=False)
class _Task:
    """A job, its threads, what Ray calls it, and how often it was begun."""

    job: Job
    threads: int
    ref: Any
    tries: int = 1


def _ready(refs: list[Any], count: int, seconds: float | None) -> list[Any]:
    """Those of some tasks that have ended, once so many have, or the seconds are over.

    Ray's own waiting turns what a signal's handler raises into another exit, so that SIGTERM must come between looks.
    """
    import ray

    began = time.monotonic()
    while refs:
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        if len(ready) >= count or (seconds is not None and time.monotonic() - began >= seconds):
            return ready
        time.sleep(LOOK)
    return []


# -- in a process of the cluster --------------------------------------------------------------------------------------


def _carry_out(job: Job, threads: int, folder: str, path: list[str], share: Share) -> int:
    """One job; returns its exit code."""
    share.look(folder)
    os.chdir(folder)
    sys.path += [entry for entry in path if entry not in sys.path]  # methods of one's own
    end_on_sigterm()
    signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))  # by which Ray cancels
    return carry_out(job, threads)


@dataclass(frozen=True)
class Share:
    """A folder by which machines see whether they share a disk.

    Args:
        folder: in the output folder.
        word: that a file there holds, which no other disk has.
        versions: of the packages that must be the same.
    """

    folder: Path
    word: str
    versions: dict[str, str]

    @classmethod
    def make(cls, output: Path) -> Share:
        """In an output folder, with a word nobody else has."""
        word = secrets.token_hex(8)
        folder = output.absolute() / f"{ASIDE}{word}"
        folder.mkdir()
        (folder / "word").write_text(word)
        return cls(folder, word, _versions())

    def look(self, working: str) -> str:
        """On any machine: refuse where it shares neither the output folder nor the working one, or other versions run.

        Returns:
            The machine's name, which a file in the folder says too.
        """
        host = socket.gethostname()
        try:
            seen = (self.folder / "word").read_text() == self.word
        except OSError:
            seen = False
        if not seen:
            raise ConfigError(
                f"--ray: the machine {host} does not see the output folder {self.folder.parent} of this one; give "
                "--output a folder on a disk that all machines of the cluster share, at the same path"
            )
        if not Path(working).is_dir():
            raise ConfigError(
                f"--ray: the machine {host} has no folder {working}, from which this command was started; start it in "
                "a folder on a disk that all machines of the cluster share"
            )
        own = _versions()
        if own != self.versions:
            differ = {name: (mine, own[name]) for name, mine in self.versions.items() if own[name] != mine}
            raise ConfigError(
                f"--ray: the machine {host} has other versions than this one: "
                + "; ".join(f"{name} {theirs}, here {mine}" for name, (mine, theirs) in differ.items())
            )
        name = f"{host}-{os.getpid()}"
        try:
            (self.folder / name).touch()
        except OSError as error:
            raise ConfigError(
                f"--ray: the machine {host} cannot write into {self.folder.parent}: {error.strerror}; allow it, or "
                "give another --output"
            ) from error
        return name


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


# -- the cluster ------------------------------------------------------------------------------------------------------


def _check_address(address: str) -> None:
    """Refuse what nothing answers at, before Ray waits for minutes and then ends the process."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise ConfigError(
            f'--ray {address!r}: expected "local", "auto", or HOST:PORT of a cluster\'s head as `ray start --head` '
            "prints it"
        )
    why = None
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PATIENCE) as connection:
            connection.settimeout(PATIENCE)
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            if connection.recv(9)[3:4] != b"\x04":  # a gRPC server begins with its settings, as RFC 9113 says
                why = "what answers there is no Ray"
    except (OSError, OverflowError) as error:
        why = str(error)
    if why is not None:
        raise ConfigError(
            f"--ray {address!r}: no Ray cluster can be reached there ({why}). Start one with `ray start --head` and "
            "give the address that it prints, or give --ray local"
        )


def _connect(address: str, at_once: int) -> None:
    """Start Ray on this machine, as light as it can be, or join a cluster that runs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of ours calls home
    import ray

    before = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address == "local":
        options |= {"num_cpus": max(torch.get_num_threads(), at_once), "object_store_memory": STORE}
        options |= {"include_dashboard": False}
    try:
        ray.init(address=address, **options)
    except Exception as error:
        raise ConfigError(f"--ray {address!r}: {' '.join(str(error).split())}") from error
    with contextlib.suppress(ValueError, TypeError):  # not the main thread, or a handler that is none of Python's
        signal.signal(signal.SIGTERM, before)  # Ray puts its own


def _machines() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _check_machines(share: Share) -> None:
    """Let a process of each machine look at what it shares with this one."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(max_calls=1, max_retries=0, num_cpus=0)(Share.look)
    for node in _machines():
        there = look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        try:
            name = ray.get(there.remote(share, os.getcwd()))
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ConfigError):
                raise cause from None
            raise ConfigError(
                f"--ray: the machine {node['NodeManagerHostname']} cannot run this code: {cause or error}. Install the "
                "same version of sparse-memory-finetuning there"
            ) from error
        if not (share.folder / name).exists():
            raise ConfigError(
                f"--ray: what the machine {node['NodeManagerHostname']} writes into {share.folder.parent} does not "
                "arrive here; give --output a folder on a disk that all machines of the cluster share"
            )
