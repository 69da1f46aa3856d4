"""What a machine does to a run, told as errors of ours: no room, no right to write, no memory."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from .errors import SmfError, StorageError, TrainingError

STORAGE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk's quota is used up",
    errno.EFBIG: "the file is larger than the disk or the shell's limit allows",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "there is no permission",
    errno.EPERM: "there is no permission",
    errno.EIO: "the disk has failed",
    errno.EEXIST: "a file is where a folder should be",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EISDIR: "a folder is where a file should be",
    errno.ELOOP: "a link leads nowhere",
    errno.ENAMETOOLONG: "the name is too long for this disk",
}

NO_MEMORY = r"can't allocate memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"  # torch's, of other classes
TORCH_SAVE = "PytorchStreamWriter failed|unexpected pos|iostream error"  # what it says of any disk


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Raise in place of what the machine does to work in a folder an error of ours.

    Raises:
        StorageError: where a file could not be written.
        TrainingError: where memory ran out.
    """
    try:
        yield
    except Exception as error:
        ours = explanation(error, folder)
        if ours is None:
            raise
        raise ours from error


def explanation(error: Exception, folder: Path) -> SmfError | None:
    """The error of ours that says what happened; None for anything that is no fault of the machine."""
    if isinstance(error, SmfError):
        return None
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or _number(error) == errno.ENOMEM
        or re.search(NO_MEMORY, said)
    ):
        return TrainingError(
            f"out of memory: {said}. Lower micro_batch_size ([train]) or eval_batch_size, or run fewer methods at a "
            "time (--jobs); what is finished is kept, and the same command goes on from the last checkpoint"
        )
    if isinstance(error, torch.distributed.DistError) or "gloo/transport" in said:
        return TrainingError(
            f"another rank has gone, and what it said tells why ({said}). The same command goes on from the last "
            "checkpoint; torchrun --max-restarts=N gives it by itself"
        )
    why = _storage(error)
    if why is None:
        return None
    name = getattr(error, "filename", None) or folder
    return StorageError(
        f"{name}: {why}{_room(folder)} ({said}). What is finished is kept: make room, or allow to write there, and the "
        "same command goes on from the last checkpoint"
    )


def _number(error: Exception) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def _storage(error: Exception) -> str | None:
    """Why a file could not be written, as Python, safetensors or torch say it."""
    number = _number(error)
    if (found := re.search(r"\(os error (\d+)\)", str(error))) is not None:  # safetensors, written in Rust
        number = int(found[1])
    if number is None and re.search(TORCH_SAVE, str(error)):
        return "the disk is full, or the file larger than it may be"
    return None if number is None else STORAGE.get(number)


def _room(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free"
    except OSError:
        return ""
