"""The embedded world: a small English world whose every fact is known, and a base model that has read about it.

    from smf import world
    world.SETS                   # names of the sets
    world.rows("closed_book")    # [{"id": ..., "prompt": "Question: ... Answer:", "answers": ["lute"]}, ...]
    world.BASE                   # where the base model will lie; until it is shipped, train_base makes it
    world.fingerprint()          # sha256 of every set

What there is and how it was made: docs/world.md.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import DataError
from .sets import SETS, rows_of_set

BASE = Path(__file__).parent / "base"

__all__ = ["BASE", "SETS", "fingerprint", "rows"]


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of one set; raises DataError for a name that is not in `SETS`."""
    if name not in SETS:
        raise DataError(f"the embedded world has no set {name!r}; its sets: {sorted(SETS)}")
    return rows_of_set(name)


def fingerprint() -> dict[str, str]:
    """sha256 of each set's rows, in order: equal on every machine."""
    return {name: hashlib.sha256(json.dumps(rows(name), sort_keys=True).encode()).hexdigest() for name in SETS}
