"""TriviaQA (Joshi et al. 2017) without documents, with the score of arXiv 2605.03229 beside the usual ones."""

from __future__ import annotations

from collections.abc import Sequence

from . import closed_book
from .closed_book import COLUMNS, KIND, item, normalise, response, select

__all__ = ["COLUMNS", "KIND", "METRICS", "STOP", "item", "marks", "response", "select"]

METRICS = ("alias", "exact_match", "f1")
STOP = ()  # the whole of what is said counts for `alias`


def marks(said: str, answers: Sequence[str]) -> dict[str, float]:
    """`alias`: whether any right answer stands somewhere in what was said; the other two look at its first line alone.

    A long answer finds an alias more easily than a short one: `alias` is there to compare with the paper.
    """
    text = normalise(said)
    found = int(any(normalise(answer) in text for answer in answers))
    return {"alias": found} | closed_book.marks(said.strip().partition("\n")[0], answers)
