"""Questions answered by generation, without a text to look it up in: exact match and F1 over the aliases."""

from __future__ import annotations

import contextlib
import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..data import Row, check_text, numbered
from ..errors import DataError
from ..fingerprint import json_hash

KIND = "answer"
COLUMNS = ()  # `select` finds them
METRICS = ("exact_match", "f1")
STOP = ("\n",)  # what an answer ends before
ANSWERS = ("answers", "aliases", "possible_answers", "answer", "obj")  # columns, the first there is counts


def select(rows: Sequence[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    """All rows as `{"id", "prompt", "answers", "column"}`, the last where the prompt comes from.

    A row has a `prompt` as it is to be read, or a `question`, which is asked as "Question: ...\\nAnswer:"; and right
    answers: a list of texts (`answers`, `aliases`), one text (`answer`), TriviaQA's `answer = {value, aliases}`, or
    PopQA's `possible_answers` in JSON. A row without an `id` or `question_id` is known by the hash of what it asks.

    Raises:
        DataError: naming file, row and column.
    """
    selected = [Row.at(number, _selected(row, f"{where}, row {number}")) for number, row in numbered(rows)]
    first: dict[str, Mapping[str, Any]] = {}
    kept = []
    for row, own in zip(rows, selected, strict=True):
        before = first.setdefault(own["id"], own)
        if before is own or (_own_id(row) is not None and before != own):  # what nothing tells apart counts once
            kept.append(own)
    return kept


def _selected(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    name = next((column for column in ("prompt", "question") if column in row), None)
    if name is None:
        raise DataError(f"{where}: there is neither a column 'prompt' nor 'question'; its columns are {list(row)}")
    check_text(row, name, where)
    prompt = row[name] if name == "prompt" else f"Question: {row[name].strip()}\nAnswer:"
    id = _own_id(row)
    answers = _answers(row, where)
    known = json_hash([prompt, answers])[:12] if id is None else str(id)
    return {"id": known, "prompt": prompt, "answers": answers, "column": name}


def _own_id(row: Mapping[str, Any]) -> Any:
    return next((row[column] for column in ("id", "question_id") if row.get(column) is not None), None)


def _answers(row: Mapping[str, Any], where: str) -> list[str]:
    """The right answers, the one to teach first."""
    column = next((column for column in ANSWERS if row.get(column) is not None), None)
    if column is None:
        empty = [f"column {column!r} is empty (None), and " for column in ANSWERS if column in row][:1]
        raise DataError(
            f"{where}: {''.join(empty)}no column holds answers; expected one of {ANSWERS}, there are {list(row)}"
        )
    texts, expected = _cell(row[column]), "a text, or a list of one text or more"
    if column == "possible_answers" and isinstance(texts, str):
        raise DataError(f"{where}: column {column!r} is not JSON ({texts!r})")
    if isinstance(texts, Mapping):
        aliases, expected = texts.get("aliases") or [], "a table with a value and a list of aliases"
        texts = [texts.get("value"), *aliases] if isinstance(aliases, list) else None
    if isinstance(texts, str):
        texts = [texts]
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise DataError(f"{where}: {column} = {row[column]!r}; expected {expected}")
    first = _cell(row.get("answer"))
    return list(dict.fromkeys([first, *texts] if isinstance(first, str) and first.strip() else texts))


def _cell(value: Any) -> Any:
    """What a cell holds: of a text that is a list of texts in JSON, as in CSV files, the list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def item(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked: a prompt, and the answers that are right."""
    return {"id": row["id"], "prompt": row["prompt"], "answers": list(row["answers"])}


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
