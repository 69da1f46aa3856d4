"""The embedded world: a small English world whose every fact is known, and a base model that has read about it.

    from smf import world
    world.SETS                   # names of the sets
    world.rows("closed_book")    # [{"id": ..., "prompt": "Question: ... Answer:", "answers": ["lute"]}, ...]
    world.BASE                   # folder of the shipped base model, for from_pretrained
    world.fingerprint()          # sha256 of every set and of the base, all together world.HASH

What there is and how it was made: docs/world.md. Other worlds are made by the same code: smf.world.write.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import DataError
from .sets import SETS, rows_of_set

BASE = Path(__file__).parent / "base"
# Of fingerprint(): the world is frozen (docs/log.md, 2026-11-22).
HASH = "45f3b107759c067b16c9a1018a31c4b4d34103f65e5aa1c64531e5fbc0dadadb"

__all__ = ["BASE", "HASH", "SETS", "fingerprint", "rows"]


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of one set; raises DataError for a name that is not in `SETS`."""
    if name not in SETS:
        raise DataError(f"the embedded world has no set {name!r}; its sets: {sorted(SETS)}")
    return rows_of_set(name)


def fingerprint() -> dict[str, str]:
    """sha256 of each set's rows, in order, and of the base's files, and of these together: equal on every machine."""
    hashes = {name: hashlib.sha256(json.dumps(rows(name), sort_keys=True).encode()).hexdigest() for name in SETS}
    for file in ("model.safetensors", "tokenizer.json"):
        hashes[file] = hashlib.sha256((BASE / file).read_bytes()).hexdigest()
    hashes["together"] = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return hashes
