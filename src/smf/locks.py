"""One process at a time in a run's folder: a lock that says which process, on which host, has it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import BusyError

LOCK = "lock"  # name of the file, which holds its holder while it is held
MOST = 1000  # characters of it


@contextlib.contextmanager
def working_in(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold a folder's lock, which the system gives back when a process ends, however it does.

    Args:
        folder: that exists.
        wait: for another process to give it back; else refuse.

    Raises:
        BusyError: naming the process and host that have it.
    """
    path = folder / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise BusyError(
            f"{folder} is in use by {_described(_holder(path))}; wait until it has ended, or give another --output"
        ) from None
    try:
        _tell_of_the_last(path)
        path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        with contextlib.suppress(OSError):
            os.truncate(path, 0)  # what is left by a process that could not say goodbye stays
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a process holds the lock at `path`."""
    if not path.is_file():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def held_by(path: Path) -> tuple[str, bool] | None:
    """Who a lock names, and whether it still holds it; None where it names nobody. Nothing is written or taken over."""
    holder = _holder(path) if path.is_file() else None
    return None if holder is None else (_described(holder), _is_locked(path))


def _is_locked(path: Path) -> bool:
    """As `is_held`, of a file that may be read only: for an instant it is shared, which a holder would not allow."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _tell_of_the_last(path: Path) -> None:
    """Say that a process ended without giving the lock back, which is then nobody's."""
    holder = _holder(path)
    if holder is None:
        return
    line = f"smf: {path.parent}: {_described(holder)} ended before its run was done; going on with it"
    if holder[1] != socket.gethostname():
        line += ". If it still runs, this disk cannot lock between hosts: end one of the two"
    print(line, file=sys.stderr)


def _holder(path: Path) -> tuple[int, str] | None:
    """Process and host that a lock names."""
    try:
        with path.open() as file:
            found = json.loads(file.read(MOST))
        return int(found["pid"]), str(found["host"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):  # empty: nobody
        return None


def _described(holder: tuple[int, str] | None) -> str:
    return "another process" if holder is None else f"process {holder[0]} on {holder[1]}"
