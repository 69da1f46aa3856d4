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
METRICS = ("acc", "answer_norm", "letter", "loss")


def select(rows: Sequence[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    """Questions with a single answer; raises DataError for a row that is not a question with four options."""
    for number, row in enumerate(rows, 1):
        for column in ("id", "question", *OPTIONS):
            if not isinstance(row[column], str) or not row[column].strip():
                raise DataError(f"{where}, row {number}: column {column!r} is empty ({row[column]!r})")
    _check_right_options([row["cop"] for row in rows], where)
    single = [row for row in rows if row["choice_type"] == "single"]
    if not single:
        raise DataError(f"{where}: none of {len(rows):,} rows has choice_type 'single'")
    return single


def _check_right_options(numbers: Sequence[Any], where: str) -> None:
    """Refuse numbers outside 0 to 3; some copies of the data count from 1."""
    wrong = [place for place, number in enumerate(numbers) if type(number) is not int or number not in range(4)]
    if not wrong:
        return
    message = f"{where}, row {wrong[0] + 1}: cop = {numbers[wrong[0]]!r}; expected the right option's number, 0 to 3"
    if {*numbers} <= {1, 2, 3, 4}:
        message += ". The file counts from 1 (no row has 0, some have 4): subtract 1 from every cop"
    elif numbers[wrong[0]] == -1:
        message += ". -1 marks rows whose answer is not published, as in the test split: use another split"
    raise DataError(message)


def prompt(row: Mapping[str, Any]) -> str:
    """The question and its options, up to "Answer:" (format of arXiv 2605.03229)."""
    options = "".join(f"{letter}. {row[column]}\n" for letter, column in zip(LETTERS, OPTIONS, strict=True))
    return f"Medical exam question:\nQuestion: {row['question']}\n{options}Answer:"


def choices(row: Mapping[str, Any]) -> list[str]:
    """What may follow the prompt, one text an option."""
    return [f" {letter}. {row[column]}" for letter, column in zip(LETTERS, OPTIONS, strict=True)]


def item(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked: a prompt, the texts that may follow it, the letters alone, and the number of the right one.

    The three scores of arXiv 2605.03229: `letter` picks among the letters alone, `acc` (there "answer") by the summed
    log-probability of letter and text, `answer_norm` by its mean over tokens.
    """
    asked = {"id": str(row["id"]), "prompt": prompt(row), "choices": choices(row), "answer": int(row["cop"])}
    return asked | {"letters": [f" {letter}" for letter in LETTERS]}


def response(row: Mapping[str, Any], *, explanation: bool) -> str:
    """What training adds to the prompt: the right option, then the explanation where there is one."""
    text = choices(row)[int(row["cop"])]
    return f"{text}\nExplanation: {row[EXPLANATION]}" if explanation and row.get(EXPLANATION) else text
