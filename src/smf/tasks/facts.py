"""PopQA's facts (Mallen et al. 2023) to teach, in statements and questions of our own words for each relation.

PopQA asks for each of its sixteen relations in one form, by which a question's relation and subject are recognised.
Training reads a statement and two questions of our own; scored is PopQA's form, which training never reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..data import Row, numbered
from ..errors import DataError
from . import closed_book
from .closed_book import COLUMNS, KIND, METRICS, STOP, marks, response

__all__ = ["COLUMNS", "FORMS", "KIND", "METRICS", "STOP", "item", "lessons", "marks", "response", "select"]

FORMS = ("held-out", "seen")  # of the questions that are scored: PopQA's own, or one that training reads


class Relation(NamedTuple):
    """PopQA's question about a subject {}, and what training reads: a statement that the answer ends, two questions."""

    popqa: str
    statement: str
    questions: tuple[str, str]


RELATIONS = (
    Relation(
        "In what city was {} born?",
        "{} came into the world in",
        ("Name the birthplace of {}.", "Where was {} born?"),
    ),
    Relation(
        "In what country is {}?",
        "{} can be found in",
        ("Name the country that has {} in it.", "Which country does {} belong to?"),
    ),
    Relation(
        "What color is {}?",
        "{} is known for the color",
        ("Name the color of {}.", "Which color does {} have?"),
    ),
    Relation(
        "What genre is {}?",
        "{} belongs to the genre",
        ("Name the genre of {}.", "Which genre is {} part of?"),
    ),
    Relation(
        "What is the capital of {}?",
        "{} is governed from its capital",
        ("Name the capital of {}.", "Which city is the seat of government of {}?"),
    ),
    Relation(
        "What is the religion of {}?",
        "The faith of {} is",
        ("Name the faith of {}.", "Which religion does {} follow?"),
    ),
    Relation(
        "What is {} the capital of?",
        "{} is the capital city of",
        ("Name the place whose capital is {}.", "Which place is governed from {}?"),
    ),
    Relation(
        "What is {}'s occupation?",
        "{} earned a living as",
        ("Name the profession of {}.", "Which profession does {} have?"),
    ),
    Relation(
        "What sport does {} play?",
        "{} takes part in the sport of",
        ("Name the sport of {}.", "Which sport is {} active in?"),
    ),
    Relation(
        "Who is the author of {}?",
        "{} was written by",
        ("Name the writer of {}.", "Which person wrote {}?"),
    ),
    Relation(
        "Who is the father of {}?",
        "{} is the child of a man called",
        ("Name the father of {}.", "Which man had the child {}?"),
    ),
    Relation(
        "Who is the mother of {}?",
        "{} is the child of a woman called",
        ("Name the mother of {}.", "Which woman had the child {}?"),
    ),
    Relation(
        "Who was the composer of {}?",
        "The music of {} is by",
        ("Name the composer of {}.", "Which person wrote the music of {}?"),
    ),
    Relation(
        "Who was the director of {}?",
        "{} was directed by",
        ("Name the director of {}.", "Which person directed {}?"),
    ),
    Relation(
        "Who was the producer of {}?",
        "{} was produced by",
        ("Name the producer of {}.", "Which person produced {}?"),
    ),
    Relation(
        "Who was the screenwriter for {}?",
        "The script of {} is by",
        ("Name the screenwriter of {}.", "Which person wrote the script of {}?"),
    ),
)
PATTERNS = [re.compile(re.escape(relation.popqa).replace(re.escape("{}"), "(.+)")) for relation in RELATIONS]


def select(rows: Sequence[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    """The rows with their `relation` and `subject`; raises DataError for a question of none of PopQA's forms."""
    for number, row in numbered(rows):
        if "question" not in row:
            raise DataError(f"{where}, row {number}: there is no column 'question'; its columns are {list(row)}")
    selected = numbered(closed_book.select(rows, where))
    return [
        Row.at(number, dict(row) | _recognised(row["prompt"], f"{where}, row {number}")) for number, row in selected
    ]


def _recognised(prompt: str, where: str) -> dict[str, Any]:
    question = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    found = [(n, match[1]) for n, pattern in enumerate(PATTERNS) if (match := pattern.fullmatch(question))]
    if len(found) != 1:
        raise DataError(
            f"{where}: question = {question!r} is none of PopQA's forms; expected one like "
            f"{RELATIONS[0].popqa.format('...')!r}"
        )
    return {"relation": found[0][0], "subject": found[0][1]}


def item(row: Mapping[str, Any], form: str = "held-out") -> dict[str, Any]:
    """What is asked: PopQA's question, or, of the form "seen", the first of those that training reads."""
    asked = closed_book.item(row)
    if form == "seen":
        asked["prompt"] = _question(RELATIONS[row["relation"]].questions[0], row)
    return asked


def lessons(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What training reads of a fact: prompts, and the answer that ends each."""
    relation, answer = RELATIONS[row["relation"]], row["answers"][0].strip()
    statement = (relation.statement.format(row["subject"]), f" {answer}.")
    return [statement, *((_question(question, row), f" {answer}") for question in relation.questions)]


def _question(template: str, row: Mapping[str, Any]) -> str:
    return f"Question: {template.format(row['subject'])}\nAnswer:"
