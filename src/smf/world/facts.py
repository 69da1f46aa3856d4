"""Who and what there is in the world, and what is true of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from .phrasings import KINDS
from .words import DISEASE_KINDS, DISEASE_NAMES, FIRST_NAMES, LAST_NAMES, TOWNS, WORK_ADJECTIVES, WORK_NOUNS, Draw

COUNTS = {"person": 160, "town": 96, "work": 96, "disease": 180}
NEW_DISEASES = 180


@dataclass(frozen=True)
class Entity:
    """One thing of the world.

    Args:
        kind: person, town, work or disease.
        name: as texts write it.
        values: of each attribute of its kind.
        asked: whether pretraining asks questions about it; of the others it only tells.
    """

    kind: str
    name: str
    values: dict[str, str]
    asked: bool

    @property
    def id(self) -> str:
        """Name without blanks."""
        return self.name.replace(" ", "_")


@functools.cache
def general() -> tuple[Entity, ...]:
    """What the base knows: people, places, works and general diseases."""
    names = {
        "person": _pairs("person", FIRST_NAMES, LAST_NAMES)[: COUNTS["person"]],
        "town": list(TOWNS[: COUNTS["town"]]),
        "work": [f"The {name}" for name in _pairs("work", WORK_ADJECTIVES, WORK_NOUNS)[: COUNTS["work"]]],
        "disease": _diseases()[: COUNTS["disease"]],
    }
    return tuple(entity for kind in KINDS for entity in _entities(kind, names[kind], "general"))


@functools.cache
def new_diseases() -> tuple[Entity, ...]:
    """What is to be learned: diseases of which the base has never read, named by words that it has."""
    return tuple(_entities("disease", _diseases()[COUNTS["disease"] :][:NEW_DISEASES], "new"))


def _diseases() -> list[str]:
    return _pairs("disease", DISEASE_NAMES, DISEASE_KINDS)


def _pairs(kind: str, first: Sequence[str], second: Sequence[str]) -> list[str]:
    """All names of two words, so ordered that the words of any stretch of them are about equally frequent."""
    draw = Draw("pairs", kind)
    rounds = draw.shuffled(range(len(second)))
    first, second = draw.shuffled(first), draw.shuffled(second)
    return [f"{a} {second[(i + r) % len(second)]}" for r in rounds for i, a in enumerate(first)]


def _entities(kind: str, names: Sequence[str], part: str) -> list[Entity]:
    draw = Draw("facts", part, kind)
    columns = {name: draw.balanced(attribute.values, len(names)) for name, attribute in KINDS[kind].items()}
    asked = draw.balanced([True, False], len(names))
    return [
        Entity(kind, name, {attribute: column[i] for attribute, column in columns.items()}, asked[i])
        for i, name in enumerate(names)
    ]
