"""Perplexity of plain text: nats per token, each document read from its start, in windows of the model's length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data import Example, numbered

KIND = "text"
COLUMNS = ()
METRICS = ("nats", "perplexity")


def examples(rows: Sequence[Mapping[str, Any]], column: str, tokenizer: Any, max_length: int) -> list[Example]:
    """The windows of every text that is not blank; a document longer than a window goes on in the next one."""
    made = []
    for place, (number, row) in enumerate(numbered(rows), 1):
        ids = tokenizer(row[column])["input_ids"] if row[column].strip() else []
        windows = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
        where = {"row": number, "column": column}
        made += [Example(f"{place}.{i}", window, 0, **where) for i, window in enumerate(windows) if len(window) > 1]
    return made
