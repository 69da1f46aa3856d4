"""Target and probe definitions: which columns a task reads, and what is asked of a model with a row.

A task is a module with COLUMNS, KIND and METRICS (the first is shown in tables):
KIND "choice" and "answer" have `select(rows, where)`, `item(row)` and `response(row, explanation=)`; KIND "text" has
`examples(rows, column, tokenizer, max_length)`.
"""

from __future__ import annotations

from types import ModuleType

from ..errors import ConfigError
from . import choices, closed_book, medmcqa, perplexity

TASKS: dict[str, ModuleType] = {
    "choices": choices,
    "closed_book": closed_book,
    "medmcqa": medmcqa,
    "perplexity": perplexity,
}


def find_task(name: str) -> ModuleType:
    """The module of a task's name."""
    if name not in TASKS:
        raise ConfigError(f"task = {name!r} is not known; use one of {sorted(TASKS)}")
    return TASKS[name]
