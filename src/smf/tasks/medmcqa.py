"""MedMCQA (Pal et al. 2022): medical exam questions with four options, of which one is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError

LETTERS = "ABCD"
OPTIONS = ("opa", "opb", "opc", "opd")
KIND = "choice"
COLUMNS = ("id", "question", *OPTIONS, "cop", "choice_type")  # and "exp", where explanations are learned
EXPLANATION = "exp"
METRICS = ("acc", "answer_norm", "loss")


def select(rows: Sequence[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    """Questions with a single answer; raises DataError for a row that is not a question with four options."""
    for number, row in enumerate(rows, 1):
        for column in ("question", *OPTIONS):
            if not isinstance(row[column], str) or not row[column].strip():
                raise DataError(f"{where}, row {number}: column {column!r} is empty ({row[column]!r})")
        if row["cop"] not in (0, 1, 2, 3):
            raise DataError(f"{where}, row {number}: cop = {row['cop']!r}; expected the right option's number, 0 to 3")
    single = [row for row in rows if row["choice_type"] == "single"]
    if not single:
        raise DataError(f"{where}: no row has choice_type 'single'")
    return single


def prompt(row: Mapping[str, Any]) -> str:
    """The question and its options, up to "Answer:" (format of arXiv 2605.03229)."""
    options = "".join(f"{letter}. {row[column]}\n" for letter, column in zip(LETTERS, OPTIONS, strict=True))
    return f"Medical exam question:\nQuestion: {row['question']}\n{options}Answer:"


def choices(row: Mapping[str, Any]) -> list[str]:
    """What may follow the prompt, one text an option."""
    return [f" {letter}. {row[column]}" for letter, column in zip(LETTERS, OPTIONS, strict=True)]


def item(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked: a prompt, the texts that may follow it, and the number of the right one."""
    return {"id": str(row["id"]), "prompt": prompt(row), "choices": choices(row), "answer": int(row["cop"])}


def response(row: Mapping[str, Any], *, explanation: bool) -> str:
    """What training adds to the prompt: the right option, then the explanation where there is one."""
    text = choices(row)[int(row["cop"])]
    return f"{text}\nExplanation: {row[EXPLANATION]}" if explanation and row.get(EXPLANATION) else text
