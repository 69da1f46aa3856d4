"""The sets of the embedded world: what is learned, what is scored, and general text, each as rows."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from ..fingerprint import part_of
from .facts import Entity, general, new_diseases
from .text import closed_book_prompt, exam_row, general_text
from .words import Draw

TRAINED_FORMS, HELD_OUT_FORM = (0, 1), 2  # of questions on new diseases
ALL_FORMS = (*TRAINED_FORMS, HELD_OUT_FORM)
SPLIT = {"validation": 0.2, "test": 0.8}  # of the new diseases, by name
DOCUMENTS = {"background": 1000, "healing": 4000, "probe": 1700}  # each has about 70 tokens

Row = dict[str, Any]


def _exam(entities: Sequence[Entity], forms: Sequence[int]) -> list[Row]:
    return [exam_row(entity, name, form) for entity in entities for name in entity.values for form in forms]


def _new(part: str) -> list[Entity]:
    return [entity for entity in new_diseases() if part_of(entity.name, SPLIT) == part]


def _training() -> list[Row]:
    """Every new fact in the two trained forms, with an explanation that states it.

    The exam on trained forms asks these very questions; ids of their own say that these rows are documents.
    """
    rows = _exam(new_diseases(), TRAINED_FORMS)
    return [row | {"id": f"document.{row['id']}"} for row in rows]


def _closed_book() -> list[Row]:
    """Questions on people, places and works that pretraining told about and never asked about."""
    return [
        {
            "id": f"{entity.id}.{name}.{form}",
            "prompt": closed_book_prompt(entity, name, form),
            "answers": [entity.values[name]],
        }
        for entity in general()
        if entity.kind != "disease" and not entity.asked
        for name in entity.values
        for form in ALL_FORMS
    ]


def _near_domain() -> list[Row]:
    """The exam on the general diseases, in all forms."""
    return _exam([entity for entity in general() if entity.kind == "disease"], ALL_FORMS)


def _texts(part: str) -> list[Row]:
    return [{"text": text} for text in islice(general_text(part), DOCUMENTS[part])]


SETS: dict[str, Callable[[], list[Row]]] = {
    "exam_training": _training,
    "exam_seen_validation": lambda: _exam(_new("validation"), TRAINED_FORMS),
    "exam_seen_test": lambda: _exam(_new("test"), TRAINED_FORMS),
    "exam_heldout_validation": lambda: _exam(_new("validation"), (HELD_OUT_FORM,)),
    "exam_heldout_test": lambda: _exam(_new("test"), (HELD_OUT_FORM,)),
    "near_domain": _near_domain,
    "closed_book": _closed_book,
    "general_text": lambda: _texts("probe"),
    "background": lambda: _texts("background"),
    "healing": lambda: _texts("healing"),
}


@functools.cache
def _shuffled(name: str) -> tuple[Row, ...]:
    return tuple(Draw("order", name).shuffled(SETS[name]()))


def rows_of_set(name: str) -> list[Row]:
    """The rows of one set, in an order that makes its first rows a fair sample of it."""
    return copy.deepcopy(list(_shuffled(name)))
