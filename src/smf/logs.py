"""What a run logged while it trained: the lines of its metrics.jsonl, checked, and averaged for drawings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import DataError
from .files import read_text
from .runs import LARGEST, is_number

LOGGED = 40  # points of a line over logged steps; more are averaged

Log = list[dict[str, Any]]  # the lines of a metrics.jsonl
Get = Callable[[dict[str, Any]], float | None]  # a number of a line, if it has it


def read_log(path: Path) -> Log:
    """The lines of a run's metrics file.

    Raises:
        DataError: where it cannot be drawn, saying why.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"it cannot be read as text: {error}") from error
    log = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} is not JSON: {text[:80]!r}") from error
        if not _can_be_drawn(line):
            expected = "a step, and numbers for the loss and for each layer"
            raise DataError(f"line {number} is {text[:80]!r}; expected {expected}")
        log.append(line)
    return log


def _can_be_drawn(line: Any) -> bool:
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return False
    by_layer = [line.get(key, {}) for key in ("rows", "rows_read", "hub_share", "hubs_written")]
    if not all(isinstance(each, dict) for each in by_layer):
        return False
    return all(map(is_number, [line["step"], line.get("loss", 0.0), *(v for each in by_layer for v in each.values())]))


def quantities(layer: str) -> dict[str, Get]:
    """Of a line of a metrics file, by title."""

    def of(line: dict[str, Any], key: str) -> Any:
        return line.get(key, {}).get(layer)

    def percent(part: float | None, whole: float | None) -> float | None:
        return 100 * part / whole if part is not None and whole else None

    return {
        "rows read": lambda line: of(line, "rows_read"),
        "rows written": lambda line: of(line, "rows"),
        "reads on top rows, %": lambda line: percent(of(line, "hub_share"), 1),
        "hubs written, %": lambda line: percent(of(line, "hubs_written"), of(line, "rows")),
    }


def averaged(logs: Sequence[Log], get: Get) -> tuple[list[float], list[float]]:
    """Steps and values, averaged over seeds and, of more than `LOGGED` steps, over neighbours."""
    by_step: dict[int, list[float]] = {}
    for log in logs:
        for line in log:
            value = get(line)
            if value is not None and abs(value) <= LARGEST:  # which NaN is not either
                by_step.setdefault(line["step"], []).append(value)
    several = max(map(len, by_step.values()), default=0)
    whole = sorted((step, sum(v) / len(v)) for step, v in by_step.items() if len(v) == several)
    size = max(1, math.ceil(len(whole) / LOGGED))
    blocks = [whole[start : start + size] for start in range(0, len(whole), size)]
    x, y = ([sum(point[side] for point in block) / len(block) for block in blocks] for side in (0, 1))
    return x, y
