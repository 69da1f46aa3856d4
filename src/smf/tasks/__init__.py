"""Target and probe definitions: which columns a task reads, and what is asked of a model with a row.

A task is a module with COLUMNS, KIND and METRICS (the first is shown in tables):
KIND "choice" and "answer" have `select(rows, where)`, `item(row)` and `response(row, explanation=)`, and those of kind
"choice" PROMPT, the column that asks, those of kind "answer" STOP and `marks(said, answers)`; where training reads
several texts of a row, `lessons(row)`.
KIND "response" has `select(rows, where)` and `examples(rows, where, tokenizer, max_length)`.
KIND "text" has `examples(rows, column, tokenizer, max_length)`, and `pages(...)` where words count.
KIND "harness" is any task of lm-evaluation-harness, named "lm_eval:NAME" or "lm_eval:NAME:METRIC".
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ..errors import ConfigError
from . import (
    choices,
    closed_book,
    facts,
    gsm8k_loss,
    harness_task,
    medmcqa,
    nq_open,
    perplexity,
    responses,
    triviaqa,
    wikitext,
)

TASKS: dict[str, ModuleType] = {
    "choices": choices,
    "closed_book": closed_book,
    "facts": facts,
    "gsm8k_loss": gsm8k_loss,
    "medmcqa": medmcqa,
    "nq_open": nq_open,
    "perplexity": perplexity,
    "responses": responses,
    "triviaqa": triviaqa,
    "wikitext": wikitext,
}


def find_task(name: str) -> ModuleType:
    """The module of a task's name."""
    if name.startswith(harness_task.PREFIX):
        return harness_task
    if name not in TASKS:
        raise ConfigError(
            f"task = {name!r} is not known; use one of {sorted(TASKS)}, or lm_eval:NAME for one of "
            "lm-evaluation-harness's"
        )
    return TASKS[name]


def lessons(task: Any, row: Any, *, explanation: bool) -> list[tuple[str, str]]:
    """What training reads of a row of a task that asks questions: prompts, and the response to each."""
    if hasattr(task, "lessons"):
        return task.lessons(row)
    return [(task.item(row)["prompt"], task.response(row, explanation=explanation))]
