"""One process at a time in a run's folder: a lock that says which process, on which host, has it.

Locked is the folder as well as a file in it: the file can be removed while it is held, and another one made. Folders
on other machines' disks may not be lockable; there the file alone counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import BusyError, StorageError

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
    with contextlib.ExitStack() as held:
        try:
            with contextlib.suppress(OSError):
                _lock(folder, os.O_RDONLY, held, wait)
            file = _lock(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, held, wait)
        except _HeldError:
            raise BusyError(
                f"{folder} is in use by {_described(_holder(path))}; wait until it has ended, or give another --output"
            ) from None
        _tell_of_the_last(path)
        try:
            os.ftruncate(file, 0)
            os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)  # what is left by a process that could not say goodbye stays


class _HeldError(Exception):
    """Another process has it."""


def _lock(path: Path, flags: int, held: contextlib.ExitStack, wait: bool) -> int:
    """Open a file or folder and lock it, until `held` ends."""
    while True:
        handle = os.open(path, flags, 0o644)
        with contextlib.ExitStack() as undone:
            undone.callback(os.close, handle)
            if not stat.S_ISREG(mode := os.fstat(handle).st_mode) and not stat.S_ISDIR(mode):
                raise StorageError(f"{path} is not a regular file; remove it")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise _HeldError from None
            undone.callback(fcntl.flock, handle, fcntl.LOCK_UN)  # processes that were forked have it open too
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):  # else it was removed while this one waited
                    held.push(undone.pop_all())
                    return handle


def is_held(path: Path) -> bool:
    """Whether a process holds the lock at `path`, though its file was removed. Nothing is written or taken over."""
    return _is_locked(path.parent) or (path.is_file() and _is_locked(path))


def held_by(path: Path) -> tuple[str, bool] | None:
    """Who a lock names, and whether it still holds it; None where it names nobody, and nobody does."""
    holder, held = _holder(path) if path.is_file() else None, is_held(path)
    return None if holder is None and not held else (_described(holder), held)


def _is_locked(path: Path) -> bool:
    """Of what may be read only: for an instant it is shared, which a holder would not allow."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(handle)
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
