"""Jobs and grids on Ray: as in sequence, whatever is killed; what cannot work is refused before anything runs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from smf import ray_jobs
from smf.compare import compare, result_path
from smf.errors import ConfigError
from smf.jobs import Job, run_jobs
from smf.ray_jobs import ASIDE, Share, on_ray
from smf.recipe_file import load_recipe
from test_faults import assert_same_runs, wait_for
from test_jobs import note_times, refuse
from tiny import make_world

# -- refused, without any Ray -----------------------------------------------------------------------------------------


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray_jobs, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sparse-memory-finetuning\[ray\]'"):
        compare(load_recipe(make_world(tmp_path)), ray="local")
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def no_ray_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "find_spec", lambda name: True)
    monkeypatch.setattr(ray_jobs, "_connect", lambda *_: pytest.fail("it would have waited for minutes"))


def answer(server: socket.socket, said: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(100)
        connection.sendall(said)


@pytest.mark.parametrize("said", [None, b"HTTP/1.0 400 Bad request\r\n\r\n", b"", b"\0"])
def test_an_address_that_no_ray_answers_at_is_refused_at_once(tmp_path: Path, no_ray_started: None, said: bytes | None):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if said is None:
            server.close()
        else:
            threading.Thread(target=answer, args=(server, said), daemon=True).start()
        with pytest.raises(ConfigError, match=rf"--ray '{address}': no Ray cluster can be reached there \(.+ray start"):
            on_ray(address, tmp_path, 2).__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["", "nonsense", "host:", "host:port", ":6379", "ray://host:10001", "local:1:x"])
def test_what_is_no_address_is_refused(tmp_path: Path, no_ray_started: None, address: str):
    with pytest.raises(ConfigError, match=re.escape(f'--ray {address!r}: expected "local"')):
        on_ray(address, tmp_path, 2).__enter__()


def test_a_machine_that_shares_no_disk_or_runs_other_code_is_refused_by_name(tmp_path: Path):
    share, host = Share.make(tmp_path), socket.gethostname()
    assert (share.folder / share.look(str(tmp_path))).is_file() and share.folder.name.startswith(ASIDE)
    with pytest.raises(ConfigError, match=f"the machine {host} has no folder .*elsewhere"):
        share.look(str(tmp_path / "elsewhere"))
    older = replace(share, versions=share.versions | {"torch": "2.5.0"})
    with pytest.raises(ConfigError, match=rf"the machine {host} has other versions .*: torch .+, here 2\.5\.0$"):
        older.look(str(tmp_path))
    (share.folder / "word").write_text("of another disk")
    with pytest.raises(ConfigError, match=f"the machine {host} does not see the output folder {tmp_path} .*--output"):
        share.look(str(tmp_path))


# -- on a Ray of two workers ------------------------------------------------------------------------------------------


def last_only(file: Path, tries: int) -> None:
    """Is killed until it has been tried so often."""
    with file.open("a") as tried:
        tried.write(f"{os.getpid()}\n")
    if len(file.read_text().split()) < tries:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find the tests' modules, and this code wherever it lies."""
    paths = [str(Path(__file__).parent), str(Path(ray_jobs.__file__).parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def test_jobs_run_in_processes_of_their_own_and_a_lost_one_is_begun_again(
    tmp_path: Path, importable: None, capfd: pytest.CaptureFixture
):
    pytest.importorskip("ray")
    output = tmp_path / "output"
    tried, hopeless = tmp_path / "tried", tmp_path / "hopeless"
    jobs = [
        Job("is killed", last_only, (tried, 3), tmp_path / "0.txt"),
        Job("refuses", refuse, ("give another one",), tmp_path / "1.txt"),
        Job("is always killed", last_only, (hopeless, 99), tmp_path / "2.txt"),
        *(Job(f"works {i}", note_times, (tmp_path / f"file {i}",), tmp_path / f"log {i}") for i in range(3)),
    ]
    before = signal.getsignal(signal.SIGTERM)
    with on_ray("local", output, 2) as workers:
        assert signal.getsignal(signal.SIGTERM) == before
        assert workers.threads(1) >= 2 and workers.threads(2) == 1 == workers.threads(99)
        run_jobs(jobs, 2, workers)
    printed = capfd.readouterr().err
    assert len(set(tried.read_text().split())) == 3 and printed.count("smf: is killed: its process is lost") == 2
    assert "smf: is killed: done in" in printed and len(hopeless.read_text().split()) == ray_jobs.TRIES
    assert "smf: is always killed: ended with exit code -9" in printed
    assert "smf: refuses: ended with exit code 2" in printed and "smf: error: give another one" in printed
    noted = [(tmp_path / f"file {i}").read_text().split() for i in range(3)]
    assert len({process for _, _, process, _ in noted} | {str(os.getpid())}) == 4
    times = [(float(begun), float(ended)) for begun, ended, _, _ in noted]
    assert all(sum(b <= begun < e for b, e in times) <= 2 for begun, _ in times)
    assert not list(output.iterdir())  # what the check left


def _pid_of_holder(lock: Path) -> int:
    try:
        return json.loads(lock.read_text())["pid"]
    except (OSError, ValueError):
        return 0


@pytest.mark.slow
def test_a_grid_on_ray_whose_worker_is_killed_ends_as_in_sequence(
    tmp_path: Path, importable: None, capfd: pytest.CaptureFixture
):
    """`kill -9` of the process that trains, after a checkpoint of the middle of its steps."""
    pytest.importorskip("ray")
    world = make_world(tmp_path)
    world.write_text(
        world.read_text().replace("steps = 4\n", "steps = 60\n").replace("save_every = 2", "save_every = 7")
    )
    calm, killed = (load_recipe(world, output=str(tmp_path / name), jobs=2) for name in ("calm", "killed"))
    compare(calm, ["smf", "lora"])
    capfd.readouterr()
    deaths: list[int] = []

    def kill() -> None:
        folder = result_path(killed, "smf").parent
        wait_for(lambda: (folder / "checkpoints" / "checkpoint-14" / "smf_complete.json").is_file())
        deaths.append(_pid_of_holder(folder / "lock"))
        os.kill(deaths[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    results = compare(killed, ["smf", "lora"], ray="local")
    killer.join()
    assert deaths[0] not in (0, os.getpid()) and [r["method"] for r in results] == ["base", "smf", "lora"]
    assert "smf, lr 0.05, seed 0 (2 of 3): its process is lost; begun again" in capfd.readouterr().err
    log = result_path(killed, "smf").with_name("log.txt").read_text()
    assert "resuming from" in log and f"process {deaths[0]} on {socket.gethostname()} ended" in log
    for recipe in (calm, killed):
        for file in Path(recipe.output).glob("*/l*"):
            file.unlink()  # log.txt and lock
        for file in Path(recipe.output).glob("*/*/adapter_config.json"):  # where PEFT writes down a set, in any order
            config = json.loads(file.read_text())
            order = config["target_modules"]
            file.write_text(json.dumps(config | {"target_modules": sorted(order) if order else order}))
    assert_same_runs(calm, killed, ("base", "smf", "lora"))


@pytest.mark.slow
def test_sigterm_to_a_comparison_on_ray_stops_its_runs_with_checkpoints(world_of_many_steps: Path, importable: None):
    pytest.importorskip("ray")
    line = [sys.executable, "-m", "smf", "compare", str(world_of_many_steps), "--methods", "smf", "--ray", "local"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        folder = result_path(load_recipe(world_of_many_steps), "smf").parent
        metrics = folder / "metrics.jsonl"
        wait_for(lambda: process.poll() is not None or (metrics.is_file() and metrics.stat().st_size))
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=300)[1]
    assert process.returncode == 75 and "smf: stopped by SIGTERM; the same command goes on" in printed, printed[-2000:]
    assert len(list(folder.glob("checkpoints/checkpoint-*/smf_complete.json"))) == 1
    assert "stopped by SIGTERM after step" in (folder / "log.txt").read_text()


@pytest.fixture
def world_of_many_steps(tmp_path: Path) -> Path:
    world = make_world(tmp_path)
    text = world.read_text().replace("steps = 4\n", "steps = 99\n").replace("save_every = 2", "save_every = 99")
    world.write_text(text.replace("micro_batch_size = 2", "micro_batch_size = 8"))
    return world


@pytest.fixture
def two_machines(tmp_path: Path, importable: None) -> Iterator[tuple[str, Path]]:
    """A cluster of two nodes, the second with another disk at the output folder; its address, and the folder."""
    pytest.importorskip("ray")
    output, ray = tmp_path / "output", str(Path(sys.executable).with_name("ray"))
    output.mkdir()
    can = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", output], capture_output=True)
    if can.returncode:
        pytest.skip(f"no disk can be mounted here: {can.stderr.decode().strip()}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    small = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block"]
    head = [
        ray,
        "start",
        "--head",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        "--include-dashboard=false",
        *small,
    ]
    join = f"mount -t tmpfs tmpfs {output} && exec {ray} start --address=127.0.0.1:{port} {' '.join(small)}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    nodes = [subprocess.Popen(head, **quiet)]
    try:
        wait_for(lambda: nodes[0].poll() is not None or _answers(port))
        nodes.append(subprocess.Popen(["unshare", "-m", "sh", "-c", join], **quiet))
        yield f"127.0.0.1:{port}", output
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(60)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_a_machine_with_another_disk_is_refused_before_anything_runs(two_machines: tuple[str, Path]):
    address, output = two_machines

    def refused() -> str:
        try:
            with on_ray(address, output, 1):
                return ""
        except ConfigError as error:
            return str(error)

    wait_for(lambda: f"does not see the output folder {output}" in refused())  # until the second one has joined
    assert not list(output.iterdir())
