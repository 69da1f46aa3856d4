"""Jobs in processes of their own, some at a time, with what they print in logs and how far they are on the terminal.

The processes are this machine's; `smf.ray_jobs` has those of a Ray cluster.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from .errors import SmfError, Stopped
from .faults import explanation
from .locks import is_held
from .stopping import end_on_sigterm

# A server that has imported everything forks each job; not on macOS, whose libraries do not bear forking, nor beside
# CUDA, which a fork must not have touched: there each job imports for itself.
FORKS = sys.platform == "linux" and not torch.cuda.is_available()
PATIENCE = 1.0  # seconds between two looks at jobs that other processes do
GRACE = 1.0  # seconds in which jobs that were interrupted end by themselves


@dataclass(frozen=True)
class Job:
    """One call in a process of its own.

    Args:
        title: names it on the terminal.
        run: a function of a module.
        arguments: of the call; they travel to the process.
        log: file that all it prints is appended to.
        lock: file that whoever does this work holds; while another process does, other jobs go first.
    """

    title: str
    run: Callable[..., object]
    arguments: tuple[Any, ...]
    log: Path
    lock: Path | None = None


@dataclass(frozen=True)
class _Running:
    """A job, when it began, and how long its log was then."""

    job: Job
    began: float
    printed_before: int


def start_server(modules: list[str]) -> None:
    """Begin, in the background, to import modules that jobs will need, once for all of them."""
    # beside other work, threads that spin while they wait make a job many times slower (docs/decisions.md, 93)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if FORKS:
        forkserver.set_forkserver_preload(modules)
        forkserver.ensure_running()


class Workers(Protocol):
    """Where jobs run: each in a process of its own, which a handle stands for."""

    def threads(self, at_once: int) -> int:
        """Of each job, where so many run at a time."""
        ...

    def start(self, job: Job, threads: int) -> Any:
        """Begin a job; returns its handle."""
        ...

    def ended(self, handles: Sequence[Any], seconds: float | None) -> dict[Any, int]:
        """Exit codes by handle of jobs that have ended; waits for one, so many seconds at most (None: for ever)."""
        ...

    def stop(self, handles: Sequence[Any]) -> None:
        """Ask jobs to end, as SIGTERM does (a training saves a checkpoint first), and wait until they have."""
        ...


class Processes:
    """Processes of this machine."""

    def __init__(self) -> None:
        self._context: Any = multiprocessing.get_context("forkserver" if FORKS else "spawn")

    def threads(self, at_once: int) -> int:
        """An equal share of the processor's cores."""
        return max(1, torch.get_num_threads() // at_once)

    def start(self, job: Job, threads: int) -> Any:
        """The process."""
        process = self._context.Process(target=_child, args=(job, threads), name=job.title)
        process.start()
        return process

    def ended(self, handles: Sequence[Any], seconds: float | None) -> dict[Any, int]:
        """Processes that are no more."""
        ended = wait([process.sentinel for process in handles], seconds)
        found = [process for process in handles if process.sentinel in ended]
        for process in found:
            process.join()
        return {process: process.exitcode for process in found}

    def stop(self, handles: Sequence[Any]) -> None:
        """By SIGTERM, a moment after they may have ended by themselves.

        Ctrl-C reaches them too. Of two signals at once the second wakes another thread of theirs, which may take both:
        nothing would then end what the main thread waits in.
        """
        deadline = time.monotonic() + GRACE
        for process in handles:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in handles:
            process.terminate()  # nothing, where it has ended
        for process in handles:
            process.join()


def run_jobs(jobs: Sequence[Job], at_once: int, workers: Workers | None = None) -> None:
    """Run all jobs, `at_once` at a time with an equal share of the processors' cores each.

    A job that fails leaves the others alone; its exit code and the end of its log are printed. Who needs to know looks
    for what it was to make.

    Args:
        jobs: in the order in which they begin.
        at_once: how many run at a time.
        workers: where; none: on this machine.
    """
    workers = workers or Processes()
    threads = workers.threads(at_once)
    waiting = list(jobs)
    running: dict[Any, _Running] = {}  # by handle
    progress = Live(
        get_renderable=lambda: _progress(list(running.values())),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
    )
    try:
        with progress:
            while waiting or running:
                while len(running) < at_once and (job := _next(waiting)) is not None:
                    waiting.remove(job)
                    print(f"smf: {job.title}", file=sys.stderr)
                    printed_before = job.log.stat().st_size if job.log.exists() else 0
                    running[workers.start(job, threads)] = _Running(job, time.monotonic(), printed_before)
                for handle, code in workers.ended(list(running), PATIENCE if waiting else None).items():
                    _report(running.pop(handle), code)
    except BaseException:
        workers.stop(list(running))
        raise


def _next(waiting: Sequence[Job]) -> Job | None:
    """The first job that no other process is at."""
    return next((job for job in waiting if job.lock is None or not is_held(job.lock)), None)


def _child(job: Job, threads: int) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    end_on_sigterm()
    sys.exit(carry_out(job, threads))


def carry_out(job: Job, threads: int) -> int:
    """Run a job in this process, which prints into the job's log from now on; returns its exit code."""
    terminal = os.dup(2)
    try:
        _print_to(job.log)
        torch.set_num_threads(threads)
        job.run(*job.arguments)
    except Stopped as stopped:
        _say(stopped.message, terminal)
        return stopped.CODE
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        ours = error if isinstance(error, SmfError) else explanation(error, job.log.parent)
        if ours is None:
            traceback.print_exc()
            return 1
        _say(f"error: {ours}", terminal)
        return 2
    return 0


def _print_to(log: Path) -> None:
    """Append all that this process prints to a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(opened, 1)
    os.dup2(opened, 2)


def _say(words: str, terminal: int) -> None:
    """Print a last line into the log, or on the terminal where the log cannot be written."""
    line = f"smf: {words}\n".encode()
    try:
        written = os.write(2, line)
    except OSError:
        written = 0
    if written < len(line):
        os.write(terminal, line)


def _end_with(sentinel: int) -> None:
    """End this process when its parent has gone, so that a restart never meets a job that still goes on."""
    wait([sentinel])
    os._exit(1)


def _report(ended: _Running, exit_code: int) -> None:
    job = ended.job
    if exit_code == 0:
        print(f"smf: {job.title}: done in {time.monotonic() - ended.began:,.0f} s", file=sys.stderr)
        return
    killed = " (killed, as the system does when memory runs out)" if exit_code == -signal.SIGKILL else ""
    print(f"smf: {job.title}: ended with exit code {exit_code}{killed}; the end of {job.log}:", file=sys.stderr)
    print("\n".join(f"    {line}" for line in _last_lines(job.log, 20, ended.printed_before)), file=sys.stderr)


def _progress(running: Sequence[_Running]) -> Text:
    """A line for each job that runs: the last that it printed, which in training is its progress bar."""
    lines = [f"{r.job.title}  {''.join(_last_lines(r.job.log, 1, r.printed_before))}" for r in running]
    return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")


def _last_lines(log: Path, count: int, start: int = 0) -> list[str]:
    """The last lines of a log, from byte `start`, as a terminal would show them: of a progress bar its last state."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - 16_000))
            text = file.read().decode(errors="replace")
    except OSError:  # it has not begun, or could not make its folder
        return []
    shown = [next((part for part in reversed(line.split("\r")) if part.strip()), "") for line in text.split("\n")]
    return [line for line in shown if line.strip()][-count:]
