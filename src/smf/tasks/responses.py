"""Prompts and responses of one's own: conversations in the model's chat template, pairs, or plain text.

A row has `messages` (a list of {"role", "content"}), or `prompt` and `completion` (two texts, or two such lists), or
`text`. Only the responses are learned and scored, of a text all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from ..data import Example, encode, numbered, shared_start
from ..errors import DataError
from ..fingerprint import json_hash

KIND = "response"
COLUMNS = ()  # `examples` finds them
METRICS = ("loss", "perplexity")
MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")  # with all the blanks and signs that Jinja allows
Messages = list[dict[str, Any]]


def select(rows: Sequence[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    """All rows; raises DataError for one that says nothing, as far as that shows without a tokenizer."""
    for number, row in numbered(rows):
        _said(row, f"{where}, row {number}")
    return list(rows)


def examples(rows: Sequence[Mapping[str, Any]], where: str, tokenizer: Any, max_length: int) -> list[Example]:
    """An example a row; a row without an `id` is known by the hash of what it says.

    Raises:
        DataError: naming file, row and column.
    """
    return [
        replace(_example(row, f"{where}, row {number}", tokenizer, max_length), row=number, column=_column(row))
        for number, row in numbered(rows)
    ]


def _column(row: Mapping[str, Any]) -> str:
    """The column that makes a row long: a long prompt cuts the response away."""
    return next(name for name in ("messages", "prompt", "text", "completion") if name in _given(row))


def _example(row: Mapping[str, Any], where: str, tokenizer: Any, max_length: int) -> Example:
    said = _said(row, where)
    given = _given(row)
    id = str(row["id"]) if row.get("id") is not None else json_hash(given)[:12]
    if isinstance(said, list):
        return _conversation(id, said, where, tokenizer, max_length)
    return encode(tokenizer, id, *said, max_length, end=True)


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("messages", "prompt", "completion", "text") if row.get(key) is not None}


def _said(row: Mapping[str, Any], where: str) -> Messages | tuple[str, str]:
    """The messages of a row, or its prompt and response."""
    given = _given(row)
    if "messages" in given:
        return _with_an_answer(_messages(row, "messages", where), where)
    if "completion" in given:
        if isinstance(given["completion"], list) or isinstance(given.get("prompt"), list):
            both = [*_messages(row, "prompt", where), *_messages(row, "completion", where)]
            return _with_an_answer(both, where)
        return _text(row, "prompt", where, may_be_empty=True), _text(row, "completion", where)
    if "text" in given:
        return "", _text(row, "text", where)
    empty = [name for name in ("messages", "prompt", "completion", "text") if name in row and name not in given]
    wanted = "expected 'messages', or 'prompt' and 'completion', or 'text'"
    if "prompt" in given:
        what = "is null or missing in this row" if "completion" in empty else "is not there"
        raise DataError(f"{where}: column 'completion' {what}, so its 'prompt' has no answer; {wanted}")
    if empty:
        raise DataError(f"{where}: of columns {empty} all are null or missing in this row; {wanted}")
    raise DataError(f"{where}: no column that is read; {wanted}; there are {list(row)}")


def _text(row: Mapping[str, Any], column: str, where: str, *, may_be_empty: bool = False) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not (text.strip() or may_be_empty):
        raise DataError(f"{where}: column {column!r} = {text!r}; expected a text")
    return text


def _messages(row: Mapping[str, Any], column: str, where: str) -> Messages:
    messages = row.get(column)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: column {column!r} = {messages!r}; expected a list of messages")
    for number, message in enumerate(messages, 1):
        parts = isinstance(message, Mapping) and [message.get("role"), message.get("content")]
        if not parts or not all(isinstance(part, str) and part.strip() for part in parts):
            raise DataError(
                f"{where}: message {number} of column {column!r} is {message!r}; expected role and content, two texts"
            )
    return [dict(message) for message in messages]


def _with_an_answer(messages: Messages, where: str) -> Messages:
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message has the role 'assistant', so there is nothing to learn")
    return messages


# -- conversations ----------------------------------------------------------------------------------------------------


def _conversation(id: str, messages: Messages, where: str, tokenizer: Any, max_length: int) -> Example:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where}: these are messages, and the base's tokenizer has no chat template; give rows with 'prompt' and "
            "'completion', or a base that was trained to chat"
        )
    try:
        ids, learned = _marked(messages, tokenizer) or _by_prefixes(messages, where, tokenizer)
    except TemplateError as error:
        raise DataError(
            f"{where}: the base's chat template refuses this conversation: {error}. Its roles are "
            f"{[message['role'] for message in messages]}; change such rows or leave them out"
        ) from error
    if not any(learned):
        raise DataError(f"{where}: the chat template leaves the assistant's messages out")
    start = learned.index(True)
    gaps = tuple(place for place in range(start, min(len(ids), max_length)) if not learned[place])
    return Example(id, ids[:max_length], start, gaps, cut=any(learned[max_length:]))


def _marked(messages: Messages, tokenizer: Any) -> tuple[list[int], list[bool]] | None:
    """Tokens, and which of them a template with {% generation %} markers says the assistant writes."""
    if not MARKER.search(tokenizer.chat_template):
        return None
    rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return list(rendered["input_ids"]), [bool(mark) for mark in rendered["assistant_masks"]]


def _by_prefixes(messages: Messages, where: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The same of a template without markers: what each assistant's message adds to the conversation before it."""
    ids = _rendered(messages, tokenizer)
    learned = [False] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _before(messages, number, tokenizer)
        after = _rendered(messages[: number + 1], tokenizer)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise DataError(
                f"{where}: the base's chat template has no {{% generation %}} markers and writes message {number + 1} "
                "otherwise when more follows, so what the assistant says cannot be told apart; give the tokenizer a "
                "template with markers, or rows that end with their only assistant's message"
            )
        learned[len(before) : len(after)] = [True] * (len(after) - len(before))
    return ids, learned


def _before(messages: Messages, number: int, tokenizer: Any) -> list[int]:
    """Tokens of the conversation up to where what a message says begins."""
    if number:
        return _rendered(messages[:number], tokenizer, add_generation_prompt=True)
    # templates need a message, and may put a system prompt of their own before it: what it begins with whatever it says
    said = messages[0]["content"]
    ids = _rendered(messages[:1], tokenizer)
    other = _rendered([messages[0] | {"content": "1" if said.lstrip().startswith("0") else "0"}], tokenizer)
    return ids[: shared_start(ids, other)]


def _rendered(messages: Messages, tokenizer: Any, **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"])
