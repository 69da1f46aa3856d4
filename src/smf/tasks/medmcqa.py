"""MedMCQA (Pal et al. 2022): medical exam questions with four options, of which one is right."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..data import check_text, numbered
from ..errors import DataError

LETTERS = "ABCD"
TYPES = ("single", "multi")
OPTIONS = ("opa", "opb", "opc", "opd")
KIND = "choice"
PROMPT = "question"
COLUMNS = ("id", "question", *OPTIONS, "cop", "choice_type")  # and "exp", where explanations are learned
EXPLANATION = "exp"
METRICS = ("acc", "answer_norm", "letter", "loss")
MANY = 20  # rows among which some have 0, where counting begins with it: by chance none has once in 300 times


def select(rows: Sequence[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    """Questions with a single answer; raises DataError for a row that is not a question with four options."""
    for number, row in numbered(rows):
        for column in ("id", "question", *OPTIONS):
            check_text(row, column, f"{where}, row {number}")
        if row["choice_type"] not in TYPES:
            raise DataError(
                f"{where}, row {number}: choice_type = {row['choice_type']!r}; expected 'single' or 'multi', of which "
                "the first have one right option and are used"
            )
    _check_right_options(rows, where)
    single = [row for row in rows if row["choice_type"] == "single"]
    if not single:
        raise DataError(f"{where}: none of {len(rows):,} rows has choice_type 'single'")
    return single


def _check_right_options(rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuse numbers outside 0 to 3; some copies of the data count from 1."""
    right = [(number, row["cop"]) for number, row in numbered(rows)]
    wrong = [(number, cop) for number, cop in right if type(cop) is not int or cop not in range(4)]
    whole = {whole for _, cop in right if (whole := _whole(cop)) is not None}
    if not wrong:
        if len(right) >= MANY and 0 not in whole:
            print(
                f"smf: warning: {where}: cop is 0 in none of {len(right):,} rows; where the file counts from 1, "
                "subtract 1 from every cop",
                file=sys.stderr,
            )
        return
    number, cop = wrong[0]
    message = f"{where}, row {number}: cop = {cop!r}; expected the right option's number, 0 to 3"
    if type(cop) is not int and _whole(cop) is not None:
        message += ", as a whole number"
    if 0 not in whole and 4 in whole:
        message += ". The file counts from 1 (no row has 0, some have 4): subtract 1 from every cop"
    elif cop == -1:
        message += ". -1 marks rows whose answer is not published, as in the test split: use another split"
    raise DataError(message)


def _whole(cop: Any) -> int | None:
    """The whole number that a text or a number stands for; None where it stands for none."""
    if isinstance(cop, str) and cop.strip().isdecimal():
        return int(cop)
    if isinstance(cop, bool) or not isinstance(cop, (int, float)) or not math.isfinite(cop):
        return None
    return int(cop) if cop == int(cop) else None


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
