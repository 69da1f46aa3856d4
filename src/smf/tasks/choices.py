"""Questions with any number of choices, in rows that bring prompt and choices as they are to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data import check_text, numbered
from ..errors import DataError

KIND = "choice"
PROMPT = "prompt"
COLUMNS = ("id", "prompt", "choices", "answer")  # and "explanation", where explanations are learned
EXPLANATION = "explanation"
METRICS = ("acc", "answer_norm", "loss")


def select(rows: Sequence[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    """All rows; raises DataError for one without a prompt, two choices or a right one among them."""
    for number, row in numbered(rows):
        check_text(row, "prompt", f"{where}, row {number}")
        if row["id"] is None:
            raise DataError(f"{where}, row {number}: column 'id' is empty (None); each row needs an id of its own")
        texts = row["choices"]
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts):
            raise DataError(f"{where}, row {number}: choices = {texts!r}; expected a list of two texts or more")
        if type(row["answer"]) is not int or row["answer"] not in range(len(texts)):
            raise DataError(
                f"{where}, row {number}: answer = {row['answer']!r}; expected the right choice's number, 0 to "
                f"{len(texts) - 1}"
            )
    return list(rows)


def item(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked: a prompt, the texts that may follow it, and the number of the right one."""
    return {"id": str(row["id"]), "prompt": row["prompt"], "choices": list(row["choices"]), "answer": row["answer"]}


def response(row: Mapping[str, Any], *, explanation: bool) -> str:
    """What training adds to the prompt: the right choice, then the explanation where there is one."""
    text = row["choices"][row["answer"]]
    return f"{text}\nExplanation: {row[EXPLANATION]}" if explanation and row.get(EXPLANATION) else text
