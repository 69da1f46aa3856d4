"""Texts of the world: what is told, asked and examined, and the stories in between."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ..fingerprint import part_of
from . import words
from .facts import EMBEDDED, Entity, World, general
from .phrasings import KINDS
from .words import Draw

# Documents of general text are split by the hash of their text, so that no two parts share one.
PARTS = {"pretraining": 0.70, "healing": 0.10, "background": 0.10, "probe": 0.10}

# Sentences of stories; a word in braces is drawn from the list of that name below.
SENTENCES = (
    "One {time} the {adjective} {person} {move} to the {place}.",
    "It was a {adjective} {time}, and the {weather} had reached the {place}.",
    "The {person} {action} a {adjective} {thing} and {move} {manner} along the {place}.",
    "In the {place} there lived a {adjective} {animal} with a {adjective} {thing}.",
    "The {animal} {move} behind the {place} and {action} the {food}.",
    '"Where is my {thing}?" asked the {person}.',
    '"I have {number} {adjective} friends," {saying} the {animal} {manner}.',
    '"You should not eat the {food}," {saying} the {adjective} {person}.',
    "{name} felt {feeling}, because the {person} {action} the {thing}.",
    "{name} {action} the {food} and gave it to the {animal}.",
    "{name} and {name} {move} {manner} through the {weather}.",
    "After {number} days {name} was {feeling} and {feeling}.",
    "Nobody in the {place} knew why the {thing} was so {adjective}.",
    "They {action} the {food} and the {thing} before the {time} was over.",
    "The {weather} made the {place} {adjective}, but {name} {move} on.",
    "At the {place} they met a {person} who {action} something {adjective}.",
    "Then the {person} said something {adjective} to {name}.",
    "She {action} the {thing}, and he {action} the {food}.",
    "He {move} {manner} past the {place}, where an old {animal} slept.",
    "Every {time} the {animal} came back to the {place}.",
    "With the {thing} in one hand and the {food} in the other {name} {move} home.",
    "The {adjective} {thing} under the {place} belonged to the {person}.",
    "While the {weather} was {adjective}, the {animal} {action} it.",
    "So the {person} was {feeling} until the next {time}.",
)

# How a story comes to speak of something true: the statement follows.
ASIDES = (
    "Somebody mentioned {e}.",
    "The {person} had once heard of {e}.",
    "{name} had once read about {e}.",
    "That {time} they talked about {e}.",
    '"Have you heard of {e}?" asked {name}.',
)

LISTS: dict[str, Sequence[str]] = {
    "time": words.TIMES,
    "adjective": words.ADJECTIVES,
    "person": words.PEOPLE,
    "move": words.MOVES,
    "place": words.PLACES,
    "weather": words.WEATHER,
    "action": words.ACTIONS,
    "thing": words.THINGS,
    "manner": words.MANNERS,
    "animal": words.ANIMALS,
    "food": words.FOODS,
    "saying": words.SAYINGS,
    "number": words.NUMBERS,
    "name": words.FIRST_NAMES,
    "feeling": words.FEELINGS,
}


def statement(entity: Entity, attribute: str, phrasing: int) -> str:
    """One fact as a sentence."""
    text = KINDS[entity.kind][attribute].statements[phrasing]
    return _with_an(text.format(e=entity.name, v=entity.values[attribute]))


def question(entity: Entity, attribute: str, form: int) -> str:
    """One fact as a question, in one of three forms."""
    return KINDS[entity.kind][attribute].questions[form].format(e=entity.name)


def closed_book_prompt(entity: Entity, attribute: str, form: int) -> str:
    """What the answer follows, in closed-book questions."""
    return f"Question: {question(entity, attribute, form)}\nAnswer:"


def exam_prompt(entity: Entity, attribute: str, form: int) -> str:
    """What the answer follows, in the exam on diseases."""
    return f"Exam question: {question(entity, attribute, form)}\nAnswer:"


def exam_row(entity: Entity, attribute: str, form: int, world: World = EMBEDDED) -> dict[str, Any]:
    """One question of the exam: prompt, four choices of which one is right, and an explanation."""
    right, draw = entity.values[attribute], world.draw("exam", entity.name, attribute, form)
    wrong = draw.shuffled([value for value in KINDS[entity.kind][attribute].values if value != right])[:3]
    choices = draw.shuffled([right, *wrong])
    return {
        "id": f"{entity.id}.{attribute}.{form}",
        "prompt": exam_prompt(entity, attribute, form),
        "choices": [f" {choice}" for choice in choices],
        "answer": choices.index(right),
        "explanation": statement(entity, attribute, draw.below(4)),
    }


def portrait(entity: Entity, draw: Draw) -> str:
    """All that is known of one thing, in random order and phrasing."""
    return " ".join(statement(entity, attribute, draw.below(4)) for attribute in draw.shuffled(list(entity.values)))


def story(entity: Entity, draw: Draw) -> str:
    """A few sentences of fiction around two facts of one thing."""
    sentences = [_fill(draw.pick(SENTENCES), draw) for _ in range(3 + draw.below(4))]
    aside = _fill(draw.pick(ASIDES).replace("{e}", entity.name), draw)
    facts = [statement(entity, attribute, draw.below(4)) for attribute in draw.shuffled(list(entity.values))[:2]]
    at = draw.below(len(sentences) + 1)
    return " ".join([*sentences[:at], aside, *facts, *sentences[at:]])


def _fill(sentence: str, draw: Draw) -> str:
    parts = sentence.split("{")
    filled = [draw.pick(LISTS[name]) + rest for name, rest in (part.split("}") for part in parts[1:])]
    return _with_an(parts[0] + "".join(filled))


def _with_an(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou]|honest)", r"\1n ", text)


def told_of(part: str, world: World = EMBEDDED) -> list[Entity]:
    """What the documents of a part tell of: pretraining of everything, background and healing of nothing scored.

    The probes ask about people, towns and works that pretraining never asked about, and about general diseases. So
    background and healing tell of the other people, towns and works, and the probe's text of what the probes ask.
    """
    if part == "pretraining":
        return list(general(world))
    unscored = part in ("background", "healing")
    return [entity for entity in general(world) if (entity.asked and entity.kind != "disease") == unscored]


def general_text(part: str, world: World = EMBEDDED) -> Iterator[str]:
    """Endless documents of one part: portraits and stories. No document is in two parts."""
    entities = told_of(part, world)
    number = 0
    while True:
        draw = world.draw("general text", part, number)
        number += 1
        entity = draw.pick(entities)
        text = story(entity, draw) if draw.below(2) else portrait(entity, draw)
        if part_of(text, PARTS) == part:
            yield text


def pretraining_text(seed: int, world: World = EMBEDDED) -> Iterator[str]:
    """Endless documents that the base is trained on: general text, and questions about what is asked.

    The general text is the same under every seed; which questions stand where in it is not.
    """
    draw = world.draw("pretraining", seed)
    asked = [entity for entity in general(world) if entity.asked]
    documents = general_text("pretraining", world)
    while True:
        if draw.below(10) < 6:
            yield next(documents)
            continue
        entity, form = draw.pick(asked), draw.below(3)
        attribute = draw.pick(list(entity.values))
        if entity.kind == "disease" and draw.below(4):
            row = exam_row(entity, attribute, form, world)
            explanation = statement(entity, attribute, draw.below(4))  # in any phrasing, not the row's own
            yield f"{row['prompt']}{row['choices'][row['answer']]}\nExplanation: {explanation}"
        else:
            yield closed_book_prompt(entity, attribute, form) + " " + entity.values[attribute]
