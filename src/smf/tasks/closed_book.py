"""Questions answered by generation, without a text to look it up in: exact match and F1 over the aliases."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError

KIND = "answer"
COLUMNS = ("id", "prompt", "answers")
METRICS = ("exact_match", "f1")


def select(rows: Sequence[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    """All rows; raises DataError for one without a prompt or without a right answer."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            raise DataError(f"{where}, row {number}: column 'prompt' is empty ({row['prompt']!r})")
        texts = row["answers"]
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise DataError(f"{where}, row {number}: answers = {texts!r}; expected a list of one text or more")
    return list(rows)


def item(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked: a prompt, and the answers that are right."""
    return {"id": str(row["id"]), "prompt": row["prompt"], "answers": list(row["answers"])}


def response(row: Mapping[str, Any], *, explanation: bool) -> str:
    """What training adds to the prompt: the first answer."""
    return f" {row['answers'][0].strip()}"


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and double blanks, as SQuAD compares answers (Rajpurkar et al. 2016).

    A text of which nothing would be left, such as the answer "A", keeps what it has.
    """
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split()) or " ".join((plain.strip() or text.lower()).split())


def marks(said: str, answers: Sequence[str]) -> dict[str, float]:
    """Exact match (0 or 1) and F1 over words of what was said, each against the answer that fits best."""
    words = normalise(said).split()
    best = 0.0
    for answer in answers:
        right = normalise(answer).split()
        common = sum((Counter(words) & Counter(right)).values())
        best = max(best, 2 * common / (len(words) + len(right)) if common else 0.0)
    return {"exact_match": int(normalise(said) in map(normalise, answers)), "f1": best}
