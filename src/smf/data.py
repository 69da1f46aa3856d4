"""Examples with a response mask, their order, and batches of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from .background import pad_right
from .errors import DataError


@dataclass(frozen=True)
class Example:
    """Token ids of one sequence, and where the answer begins.

    Args:
        id: names the row it came from, in messages and records.
        ids: tokens.
        start: the first token that is learned or scored; the tokens before it are the prompt.
        gaps: places after it that are read and not learned, such as what a user says in between.
        words: that it counts, where scores are by words.
        row, column: of its file, where messages name them; no part of what the example is.
        cut: whether the end of its text is cut away.
    """

    id: str
    ids: list[int]
    start: int
    gaps: tuple[int, ...] = ()
    words: int = 0
    row: int = field(default=0, compare=False)
    column: str = field(default="", compare=False)
    cut: bool = field(default=False, compare=False)

    @property
    def place(self) -> str:
        """What messages call it, after the name of its file."""
        known = f"row {self.row}" if self.row else f"row {self.id}"
        return f"{known}, column {self.column!r}" if self.column else known


class Row(dict[str, Any]):
    """A row of a file or data set, by column; it knows its `number` there, from 1, whichever rows are chosen."""

    number: int

    @classmethod
    def at(cls, number: int, columns: Mapping[str, Any]) -> Row:
        """The row of that number."""
        row = cls(columns)
        row.number = number
        return row


def numbered(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """Each row with its number in its file, for messages; of rows that are of no file, with their place."""
    return [(getattr(row, "number", place), row) for place, row in enumerate(rows, 1)]


def check_text(row: Mapping[str, Any], column: str, where: str, *, blank: bool = False) -> None:
    """Refuse a row whose column is not a text or, where it must not be `blank`, has nothing in it."""
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} is not a text ({value!r:.60}); write it in quotes")
    if not blank and (not value or not value.strip()):
        raise DataError(f"{where}: column {column!r} is empty ({value!r}); expected a text")


@dataclass(frozen=True)
class ScoredSet:
    """One target or probe set of a recipe, loaded and checked before anything trains.

    Args:
        role: "target", "probe" or "validation".
        task: name of its task.
        items: examples of a text, or what is asked (`smf.tasks`).
        cluster: ids that agree up to the first such text are about one thing; "": every id is.
        pages: examples that are scored once more, by words.
        hub: revisions of the data sets on the hub that its task loads by itself, by name.
        where: what messages call its file.
    """

    role: str
    task: str
    items: list[Any]
    cluster: str = ""
    pages: list[Example] = field(default_factory=list)
    hub: dict[str, str] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class Loaded:
    """Everything a recipe reads, checked; the base's weights are loaded later.

    Args:
        tokenizer: of the base.
        train: what is learned.
        scored: target, validation and probe sets, by name.
        background: general texts that rules weigh reads against.
        healing: examples of general text that heal a memory.
        replay: examples of general text that methods with `replay` train on.
        revisions: commit hashes of what came from the hub, by name.
    """

    tokenizer: Any
    train: list[Example]
    scored: dict[str, ScoredSet]
    background: list[str]
    healing: list[Example]
    replay: list[Example]
    revisions: dict[str, str] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, int]:
        """A number for the id of each example that can be trained on; windows of one text may share an id."""
        ids = dict.fromkeys(example.id for example in (*self.train, *self.replay))
        return {id: number for number, id in enumerate(ids)}


def encode(
    tokenizer: Any, id: str, prompt: str, response: str, max_length: int, *, end: bool, row: int = 0, column: str = ""
) -> Example:
    """Tokens of prompt and response together; the response begins where they differ from the prompt's own tokens.

    The prompt's last characters may become one token with the response's first: that token is where it begins.

    Args:
        tokenizer: of the base.
        id: names the row.
        prompt, response: texts; the response keeps its leading blank.
        max_length: tokens kept.
        end: whether an end-of-sequence token follows, where the tokenizer has one.
        row, column: what messages name.
    """
    own = tokenizer(prompt)["input_ids"] if prompt else []
    ids = list(tokenizer(prompt + response)["input_ids"])
    if end and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    start, cut = shared_start(own, ids), len(ids) > max_length
    return Example(id, ids[:max_length], start, row=row, column=column, cut=cut)


def shared_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common before they differ."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


def keep_answered(examples: Sequence[Example], where: str, too_long: str, max_length: int) -> list[Example]:
    """The examples of whose answer something is left; how many are left out, and how many cut short, is said.

    Args:
        examples: of one file.
        where: what messages call the file.
        too_long: "drop", or "error": raise where there is such an example.
        max_length: tokens that an example was cut to.

    Raises:
        DataError: naming file, row and column, also where nothing is left.
    """
    cut = [example for example in examples if example.start >= len(example.ids)]
    if cut and too_long == "error":
        raise DataError(
            f"{where}: the answer of {cut[0].place} and of {len(cut) - 1} others is cut away: its prompt has "
            f'{cut[0].start} tokens, max_length is {max_length}. Raise max_length, or set too_long = "drop"'
        )
    kept = [example for example in examples if example.start < len(example.ids)]
    if not kept:
        raise DataError(
            f"{where}: no example is left: every answer is cut away at max_length = {max_length}, the first of them in "
            f"{cut[0].place}, whose prompt has {cut[0].start} tokens. Raise max_length, or give shorter prompts"
        )
    if cut:
        print(
            f"smf: {where}: {len(cut):,} of {len(examples):,} examples are left out, whose answer is cut away at "
            f"max_length = {max_length}; the first is {cut[0].place}",
            file=sys.stderr,
        )
    shortened = [example for example in kept if example.cut]
    if shortened:
        print(
            f"smf: {where}: {len(shortened):,} of {len(examples):,} examples are cut within their answer at max_length "
            f"= {max_length}, and learned or scored up to there; the first is {shortened[0].place}",
            file=sys.stderr,
        )
    return kept


def in_order(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` examples in the order that every method trains on: one permutation a pass, drawn from the seed."""
    ordered: list[Example] = []
    epoch = 0
    while len(ordered) < count:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        ordered += [examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()]
        epoch += 1
    return ordered[:count]


def with_replay(
    examples: Sequence[Example], replay: Sequence[Example], share: float, count: int, seed: int
) -> list[Example]:
    """`count` examples, of which a share, at places drawn from the seed, are replayed ones instead of the target's."""
    replayed = round(share * count)
    if not replayed:
        return in_order(examples, count, seed)
    target, other = iter(in_order(examples, count - replayed, seed)), iter(in_order(replay, replayed, seed))
    places = set(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:replayed].tolist())
    return [next(other) if place in places else next(target) for place in range(count)]


@dataclass(frozen=True)
class Collator:
    """Batches of examples: right-padded tokens, and labels where a token is learned.

    Args:
        pad: id of the padding token.
        loss: "answer" (from each example's start) or "full".
        places: numbers of the examples by their ids; given, batches have `example_ids` `[B]`.
    """

    pad: int
    loss: str
    places: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels` `[B, S]`; the first token is never a label."""
        batch = pad_right([example.ids for example in examples], self.pad)
        starts = torch.tensor([max(1, e.start if self.loss == "answer" else 1) for e in examples])
        position = torch.arange(batch["input_ids"].shape[1])
        learned = batch["attention_mask"].bool() & (position >= starts[:, None])
        if self.loss == "answer":
            for row, example in enumerate(examples):
                learned[row, list(example.gaps)] = False
        if self.places:
            batch |= {"example_ids": torch.tensor([self.places[example.id] for example in examples])}
        return batch | {"labels": batch["input_ids"].masked_fill(~learned, -100)}


def pad_id(tokenizer: Any) -> int:
    """The padding token's id; any id where there is none, since pads are masked."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def prefix_id(tokenizer: Any) -> int:
    """The token that a text without a prompt is read after; any id where nothing begins or ends a sequence."""
    return next((id for id in (tokenizer.bos_token_id, tokenizer.eos_token_id) if id is not None), 0)
