"""Loss on GSM8K's written solutions (Cobbe et al. 2021): what arXiv 2604.05248 and 2510.15103 measure of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..data import Example, Row, check_text, numbered
from . import responses

KIND = "response"
COLUMNS = ("question", "answer")
METRICS = ("loss", "perplexity")
WINDOW = 1024  # tokens, where the base reads as many: solutions are scored whole, however short training's examples are


def select(rows: Sequence[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    """All rows; raises DataError for one without a question or a solution."""
    for number, row in numbered(rows):
        for column in COLUMNS:
            check_text(row, column, f"{where}, row {number}")
    return list(rows)


def examples(rows: Sequence[Mapping[str, Any]], where: str, tokenizer: Any, max_length: int) -> list[Example]:
    """A question as a prompt, its solution as the response."""
    pairs = []
    for number, row in numbered(select(rows, where)):
        pair = {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}
        pairs.append(Row.at(number, pair))
    made = responses.examples(pairs, where, tokenizer, max_length)
    return [replace(example, column="question") for example in made]
