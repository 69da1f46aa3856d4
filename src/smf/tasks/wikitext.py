"""WikiText (Merity et al. 2017): perplexity by sliding windows (arXiv 2605.03229), and by words, as lm-eval's task."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..data import Example, prefix_id

KIND = "text"
COLUMNS = ()
METRICS = ("nats", "perplexity", "word_perplexity")
WINDOW = 1024  # tokens, where the base reads as many
TITLE = re.compile(r"\s*= [^=].* =\s*")


def examples(rows: Sequence[Mapping[str, Any]], column: str, tokenizer: Any, max_length: int) -> list[Example]:
    """The whole text in windows: lines that are not blank, joined by blank lines, as arXiv 2605.03229 reads them.

    Each window begins half a window after the last one, and what that one has seen is not scored again.

    Args:
        rows: lines, or pages.
        column: that holds them.
        tokenizer: of the base.
        max_length: tokens of a window.
    """
    lines = [row[column].strip() for row in rows]
    ids = tokenizer("\n\n".join(line for line in lines if line))["input_ids"]
    stride = max(1, max_length // 2)
    made = []
    for number, begin in enumerate(range(0, max(1, len(ids) - (max_length - stride)), stride)):
        seen = max_length - stride if number else 0
        made.append(Example(f"window {number}", ids[begin : begin + max_length], seen))
    return [example for example in made if len(example.ids) > max(1, example.start)]


def pages(rows: Sequence[Mapping[str, Any]], column: str, tokenizer: Any, max_length: int) -> list[Example]:
    """The pages as lm-evaluation-harness's task `wikitext` reads them: its own detokenizer, one window after the other.

    Args:
        rows, column, tokenizer: as of `examples`.
        max_length: tokens of a window, with the one before what it scores: one more than lm-eval's `max_length`.
    """
    made = []
    for number, page in enumerate(_pages([row[column] for row in rows])):
        made += _page(number, page, tokenizer, max_length)
    return made


def _pages(lines: Sequence[str]) -> list[str]:
    """Lines joined from title to title; rows that are whole pages stay what they are."""
    pages: list[list[str]] = []
    for line in lines:
        if not pages or TITLE.fullmatch(line.partition("\n")[0] if line.count("\n") > 1 else line):
            pages.append([])
        pages[-1].append(line if line.endswith("\n") else f"{line}\n")
    return [text for page in pages if (text := "".join(page)).strip()]


def _page(number: int, page: str, tokenizer: Any, max_length: int) -> list[Example]:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = tokenizer(wikitext_detokenizer({"page": page}))["input_ids"]
    windows = map(make_disjoint_window, get_rolling_token_windows(ids, prefix_id(tokenizer), max_length - 1, 1))
    words = len(re.split(r"\s+", page))
    return [
        Example(f"page {number}.{i}", context + scored, len(context), words=0 if i else words)
        for i, (context, scored) in enumerate(windows)
    ]
