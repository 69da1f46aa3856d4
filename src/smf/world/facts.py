"""Who and what there is in the world, and what is true of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .phrasings import KINDS
from .words import DISEASE_KINDS, DISEASE_NAMES, FIRST_NAMES, LAST_NAMES, TOWNS, WORK_ADJECTIVES, WORK_NOUNS, Draw

MOST = 3  # times the counts below, of which there are names
COUNTS = {"person": 160, "town": 96, "work": 96, "disease": 180}
NEW_DISEASES = 180


@dataclass(frozen=True)
class World:
    """Which world: that of seed 0 and times 1 is the embedded one, which is frozen.

    Args:
        seed: of names, facts, what is asked, documents and order.
        times: how many times as many people, towns, works, general and new diseases as the embedded world has.

    Raises:
        ConfigError: for a number of times that there are no names for.
    """

    seed: int = 0
    times: int = 1

    def __post_init__(self):
        if not 1 <= self.times <= MOST:
            raise ConfigError(f"times is {self.times}; there are names for a world of 1 to {MOST} times the things")

    def draw(self, *key: str | int) -> Draw:
        """The choices of this world that depend on `key`."""
        return Draw(*key) if self.seed == 0 else Draw("world", self.seed, *key)

    def count(self, kind: str) -> int:
        """How many things of a kind there are; diseases: general ones."""
        return self.times * COUNTS[kind]


EMBEDDED = World()


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
def general(world: World = EMBEDDED) -> tuple[Entity, ...]:
    """What the base knows: people, places, works and general diseases."""
    names = {
        "person": _pairs(world, "person", FIRST_NAMES, LAST_NAMES),
        "town": list(TOWNS),
        "work": [f"The {name}" for name in _pairs(world, "work", WORK_ADJECTIVES, WORK_NOUNS)],
        "disease": _diseases(world),
    }
    return tuple(
        entity for kind in KINDS for entity in _entities(world, kind, names[kind][: world.count(kind)], "general")
    )


@functools.cache
def new_diseases(world: World = EMBEDDED) -> tuple[Entity, ...]:
    """What is to be learned: diseases of which the base has never read, named by words that it has."""
    names = _diseases(world)[world.count("disease") :][: world.times * NEW_DISEASES]
    return tuple(_entities(world, "disease", names, "new"))


def _diseases(world: World) -> list[str]:
    return _pairs(world, "disease", DISEASE_NAMES, DISEASE_KINDS)


def _pairs(world: World, kind: str, first: Sequence[str], second: Sequence[str]) -> list[str]:
    """All names of two words, so ordered that the words of any stretch of them are about equally frequent."""
    draw = world.draw("pairs", kind)
    rounds = draw.shuffled(range(len(second)))
    first, second = draw.shuffled(first), draw.shuffled(second)
    return [f"{a} {second[(i + r) % len(second)]}" for r in rounds for i, a in enumerate(first)]


def _entities(world: World, kind: str, names: Sequence[str], part: str) -> list[Entity]:
    draw = world.draw("facts", part, kind)
    columns = {name: draw.balanced(attribute.values, len(names)) for name, attribute in KINDS[kind].items()}
    asked = draw.balanced([True, False], len(names))
    return [
        Entity(kind, name, {attribute: column[i] for attribute, column in columns.items()}, asked[i])
        for i, name in enumerate(names)
    ]
