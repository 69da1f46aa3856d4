"""The sets of the embedded world: what is learned, what is scored, and general text, each as rows."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from ..fingerprint import part_of
from .facts import EMBEDDED, Entity, World, general, new_diseases
from .text import closed_book_prompt, exam_row, general_text

TRAINED_FORMS, HELD_OUT_FORM = (0, 1), 2  # of questions on new diseases
ALL_FORMS = (*TRAINED_FORMS, HELD_OUT_FORM)
SPLIT = {"validation": 0.2, "test": 0.8}  # of the new diseases, by name
DOCUMENTS = {"background": 1000, "healing": 4000, "probe": 1700}  # each has about 70 tokens

Row = dict[str, Any]


def _exam(world: World, entities: Sequence[Entity], forms: Sequence[int]) -> list[Row]:
    return [exam_row(entity, name, form, world) for entity in entities for name in entity.values for form in forms]


def _new(world: World, part: str) -> list[Entity]:
    return [entity for entity in new_diseases(world) if part_of(entity.name, SPLIT) == part]


def _training(world: World) -> list[Row]:
    """Every new fact in the two trained forms, with an explanation that states it.

    The exam on trained forms asks these very questions; ids of their own say that these rows are documents.
    """
    rows = _exam(world, new_diseases(world), TRAINED_FORMS)
    return [row | {"id": f"document.{row['id']}"} for row in rows]


def _closed_book(world: World) -> list[Row]:
    """Questions on people, places and works that pretraining told about and never asked about."""
    return [
        {
            "id": f"{entity.id}.{name}.{form}",
            "prompt": closed_book_prompt(entity, name, form),
            "answers": [entity.values[name]],
        }
        for entity in general(world)
        if entity.kind != "disease" and not entity.asked
        for name in entity.values
        for form in ALL_FORMS
    ]


def _near_domain(world: World) -> list[Row]:
    """The exam on the general diseases, in all forms."""
    return _exam(world, [entity for entity in general(world) if entity.kind == "disease"], ALL_FORMS)


def _texts(world: World, part: str) -> list[Row]:
    return [{"text": text} for text in islice(general_text(part, world), DOCUMENTS[part])]


SETS: dict[str, Callable[[World], list[Row]]] = {
    "exam_training": _training,
    "exam_seen_validation": lambda world: _exam(world, _new(world, "validation"), TRAINED_FORMS),
    "exam_seen_test": lambda world: _exam(world, _new(world, "test"), TRAINED_FORMS),
    "exam_heldout_validation": lambda world: _exam(world, _new(world, "validation"), (HELD_OUT_FORM,)),
    "exam_heldout_test": lambda world: _exam(world, _new(world, "test"), (HELD_OUT_FORM,)),
    "near_domain": _near_domain,
    "closed_book": _closed_book,
    "general_text": lambda world: _texts(world, "probe"),
    "background": lambda world: _texts(world, "background"),
    "healing": lambda world: _texts(world, "healing"),
}


@functools.cache
def _shuffled(name: str, world: World) -> tuple[Row, ...]:
    return tuple(world.draw("order", name).shuffled(SETS[name](world)))


def rows_of_set(name: str, world: World = EMBEDDED) -> list[Row]:
    """The rows of one set, in an order that makes its first rows a fair sample of it."""
    return copy.deepcopy(list(_shuffled(name, world)))
