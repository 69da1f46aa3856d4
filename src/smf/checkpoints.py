"""Checkpoints that a run can go on from: those that are what their manifest says."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from .errors import StorageError
from .files import read_text, write_json
from .fingerprint import json_hash
from .locks import LOCK

MANIFEST = "smf_complete.json"  # written into a checkpoint after everything else


def seal(folder: Path, **facts: Any) -> None:
    """Write the manifest of a folder that is complete: the SHA-256 of every file in it and of `facts`, and these."""
    if not folder.is_dir():  # of an empty one made here the manifest would hold
        raise StorageError(f"there is no folder {folder} to write a manifest into")
    sums = {name: _sha256(folder / name) for name in sorted(_names(folder))}
    write_json(folder / MANIFEST, facts | {"sha256": sums | {MANIFEST: json_hash(facts)}})


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `seal` wrote."""
    return json.loads(read_text(folder / MANIFEST))


def flaw(folder: Path) -> str | None:
    """How a folder differs from its manifest, in a few words; None where it does not."""
    if not (folder / MANIFEST).is_file():
        return "it was not written to its end"
    try:
        facts = read_manifest(folder)
        sums = facts.pop("sha256")
        if sums.pop(MANIFEST) != json_hash(facts):
            return f"{MANIFEST} is not what was written"
        names = _names(folder)
        if sums.keys() - names:
            return f"{min(sums.keys() - names)} is missing"
        if names - sums.keys():
            return f"{min(names - sums.keys())} was not there when it was written"
        wrong = [name for name, expected in sums.items() if _sha256(folder / name) != expected]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"its manifest cannot be checked ({type(error).__name__}: {error})"
    return f"{wrong[0]} is not what was written" if wrong else None


def newest_complete(folder: Path, *, tidy: bool) -> Path | None:
    """The newest checkpoint whose manifest holds.

    Args:
        folder: of checkpoints.
        tidy: say which newer ones are not used, and why. One that a crash cut off is removed; one that was complete
            once is kept as "set-aside-STEP", where Trainer does not count it.
    """
    for checkpoint in found_in(folder):
        why = flaw(checkpoint)
        if why is None:
            return checkpoint
        if tidy:
            print(f"smf: set aside {checkpoint}: {why}", file=sys.stderr)
            _clear_away(checkpoint)
    return None


def found_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-", 1)[1].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was saved after, which its name says."""
    return int(checkpoint.name.split("-")[1])


def set_aside(checkpoint: Path) -> Path:
    """Keep a checkpoint under another name, which is returned, where Trainer does not count it."""
    aside = first = checkpoint.with_name(f"set-aside-{step_of(checkpoint)}")
    for number in itertools.count(2):
        if not os.path.lexists(aside):
            break
        aside = first.with_name(f"{first.name}-{number}")
    return checkpoint.rename(aside)


def _clear_away(checkpoint: Path) -> None:
    if checkpoint.is_symlink() or not checkpoint.is_dir():  # none of ours; what a link leads to stays
        checkpoint.unlink()
    elif (checkpoint / MANIFEST).is_file():
        set_aside(checkpoint)
    else:
        shutil.rmtree(checkpoint)


def _names(folder: Path) -> set[str]:
    """All files of a folder but the manifest and a lock, by their paths in it."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {MANIFEST, LOCK}


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
