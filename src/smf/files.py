"""Writing files so that a crash leaves either the old file or the new one, never half of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import SmfError, refusing

PART = ".part"  # ends the names of temporary files
MOST = 2**28  # bytes of a text of ours: a result with a million scored questions has some tens of millions
Check = Callable[[dict[str, Any], dict[str, Any]], None]  # of a header, and of slices by name, of which none is read


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write to a temporary file beside `path`, flush it to disk, then rename it over `path`."""
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content  # half a surrogate pair
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_text(path: Path, most: int = MOST, errors: str = "strict") -> str:
    """The text of a file, which must be a regular one: a pipe would be waited for, a device never ends.

    Args:
        path: of the file.
        most: bytes; a larger one, which need not take room on a disk, is refused before it is read.
        errors: what to do about bytes that are not UTF-8, as `open` has it.

    Raises:
        OSError, UnicodeDecodeError: where it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    size = path.stat().st_size
    if size > most:
        raise OSError(f"{path} has {size:,} bytes; expected {most:,} at most")
    return path.read_text(encoding="utf-8", errors=errors)


def remove_parts(folder: Path) -> None:
    """Remove what killed processes had begun to write below a folder that no other process writes into."""
    for part in folder.rglob(f".*{PART}"):
        part.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], kind: str, header: dict[str, Any]) -> None:
    """Write one safetensors file with a JSON header, atomically; equal content gives equal bytes."""
    ordered = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    write_atomically(path, save(ordered, metadata={f"smf_{kind}": json.dumps(header, sort_keys=True)}))


def read_tensors(
    path: Path, kind: str, newest: int, error: type[SmfError], check: Check | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file by `write_tensors`; raises `error`, saying why, for anything else.

    Args:
        path: of the file.
        kind: "patch" or "background".
        newest: the format number that this version reads.
        error: class to raise.
        check: refuses headers and safetensors' slices of the tensors, before the tensors are read.
    """
    with refusing(error, f"{path} is not a readable {kind} file; copy or make it again"):
        if not path.is_file():
            raise error(f"no {kind} file at {path}")
        with safe_open(str(path), framework="pt") as file:  # refuses offsets that overlap or lie outside
            header = json.loads((file.metadata() or {}).get(f"smf_{kind}", "null"))
            _check_format(path, header, kind, newest, error)
            names = list(file.keys())
            if check is not None:
                check(header, {name: file.get_slice(name) for name in names})
            return header, {name: file.get_tensor(name) for name in names}


def _check_format(path: Path, header: Any, kind: str, newest: int, error: type[SmfError]) -> None:
    if not isinstance(header, dict):
        raise error(f"{path} is a safetensors file, but not a {kind} of smf")
    known = header.get("format")
    if type(known) is not int or known != newest:
        newer = type(known) is int and known > newest
        advice = "update smf" if newer else "it was written by an earlier version, which is not read any more"
        raise error(f"{path} has {kind} format {known!r}; this version reads {newest}; {advice}")


def no_folder(folder: Path) -> str:
    """What errors say of a folder that is not there; --max-steps and --limit write to one of another name."""
    trial = folder.with_name(f"{folder.name}-trial") if folder.name else folder
    return f"no folder at {folder}" + (f" (there is {trial}, of a trial)" if trial.is_dir() else "")
