"""What a parser of JSON lines cannot take, found before it reads: it would crash, fill the memory, or never end."""

from __future__ import annotations

import codecs
import gzip
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from .errors import DataError

NESTED = 500  # brackets within brackets; pyarrow's JSON parser ends the process at some ten thousand
NOT_STRUCTURE = bytes({*range(256)} - {*b'[]{}":'})
PIECE = 2**20  # bytes that are looked at at a time
LINE = 2**26  # bytes of a line at most: a row is some kilobytes, and readers hold a line whole
FORMS = 1000  # of pieces that are remembered; rows of one file are mostly alike
COLUMNS = 1000  # different keys of rows, at most; reading takes as long as all rows by all columns


def check_lines(file: Path) -> None:
    """Refuse a file that is no JSON lines in UTF-8, has rows nested too deep, or lines or columns without end.

    Of a line no more than `PIECE` bytes are held.
    """
    with opened(file) as lines:
        looked = _Looked(file)
        while piece := lines.readline(PIECE):
            looked.at(piece)
        looked.decoded(b"", ended=True)


def broken_row(file: Path) -> str | None:
    """Which row of a file of JSON lines cannot be read, and why; None where all of them can."""
    number = 0
    with opened(file) as lines:
        for number, line in enumerate((line for line in lines if line.strip(b"\xef\xbb\xbf \t\r\n")), 1):
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                return f"row {number} is not JSON ({error}): {line[:60]!r}"
            if isinstance(row, list) and number == 1:
                return None  # one list of all rows
            if not isinstance(row, dict):
                return f"row {number} is {row!r:.40}; expected an object with columns"
    return None if number else "it has no rows"


def as_written(file: Path) -> list[Any]:
    """What Python reads of a file's rows: JSON lines, objects over several lines, or one list of all rows.

    Raises:
        ValueError: for what it cannot read.
    """
    with opened(file) as content:
        text = content.read().decode("utf-8-sig").strip()
    rows, at, decoder = [], 0, json.JSONDecoder()
    while at < len(text):
        row, at = decoder.raw_decode(text, at)
        rows.append(row)
        while at < len(text) and text[at].isspace():
            at += 1
    return rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows


def opened(file: Path) -> IO[bytes]:
    """The file's bytes, unpacked where gzip packed them."""
    with file.open("rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(file)) if packed else file.open("rb")


@dataclass
class _Looked:
    """What is known of a file up to a piece of a line."""

    file: Path
    number: int = 1  # of the line
    size: int = 0  # bytes of it
    left: bytes = b""  # brackets that are open
    cut: bytes = b""  # a backslash at the end, whose character is in the next piece
    inside: bool = False  # whether a text is open
    level: int = 1  # brackets around a row's keys
    columns: set[int] = field(default_factory=set)  # hashes of these keys
    forms: set[int] = field(default_factory=set)  # hashes of pieces without their values
    decoder: Any = field(default_factory=codecs.getincrementaldecoder("utf-8"))

    def at(self, piece: bytes) -> None:
        """Look at the next piece, which a line's end ends."""
        ended = piece.endswith(b"\n")
        self.decoded(piece, ended=ended)
        if self.number == 1 and not self.size:
            self._begins(piece)
        self.size += len(piece)
        if self.size > LINE:
            raise DataError(f"{self._line} has more than {LINE >> 20} MiB; write each row on its own line")
        piece, self.cut = self.cut + piece, b""
        if not ended and (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece, self.cut = piece[:-1], b"\\"
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        parts = [b"", *parts] if self.inside else parts
        between, texts = parts[::2], parts[1::2]
        structure = b'"'.join(between).translate(None, NOT_STRUCTURE)
        line = piece if ended and self.level == 1 and len(piece) == self.size else b""
        self._count_columns(line, structure, between, texts)
        self._close(structure.translate(None, b'":'))
        self.inside = not ended and len(parts) % 2 == 0
        self.number, self.size = (self.number + 1, 0) if ended else (self.number, self.size)

    @property
    def _line(self) -> str:
        return f"{self.file}, line {self.number}"

    def decoded(self, piece: bytes, *, ended: bool) -> None:
        """Refuse what is not UTF-8."""
        try:
            self.decoder.decode(piece, ended)
        except UnicodeDecodeError as error:
            byte = error.object[error.start : error.end]
            raise DataError(f"{self._line} is not UTF-8: {byte!r} is no character; convert it") from error

    def _begins(self, piece: bytes) -> None:
        begins = piece.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if begins not in (b"", b"{", b"["):
            what = f"it begins {piece[:20]!r}"
            raise DataError(f"{self.file} is neither JSON lines, nor such lines packed by gzip; {what}")
        self.level = 2 if begins == b"[" else 1  # one list of all rows

    def _count_columns(self, line: bytes, structure: bytes, between: list[bytes], texts: list[bytes]) -> None:
        between, texts = between[self.inside :], texts[self.inside :]  # whole ones, or whose end is in the next piece
        keys = [text for text, after in zip(texts, between[1:], strict=False) if b":" in after]
        form = hash((self.left, structure, self.inside, *keys))
        if form not in self.forms:  # else its rows have keys that are known
            self.forms = (self.forms if len(self.forms) < FORMS else set()) | {form}
            found = _keys_at(self.level - len(self.left), between, texts)
            if len(set(found)) < len(found) and (key := _key_twice(line)) is not None:
                raise DataError(f"{self._line} has the key {key!r:.60} twice")
            self.columns |= {hash(key) for key in found}
        if len(self.columns) > COLUMNS:
            what = f"its rows have more than {COLUMNS:,} different keys, each of which is a column of all rows"
            raise DataError(f"{self._line}: {what}; put what differs into a column's value")

    def _close(self, brackets: bytes) -> None:
        left = self.left + brackets
        for _ in range(NESTED):
            if len(left) == len(left := left.replace(b"[]", b"").replace(b"{}", b"")):
                break
        if len(left) > NESTED:
            raise DataError(f"{self._line}: more than {NESTED} brackets are open, or do not match")
        self.left = left


def _key_twice(line: bytes) -> str | None:
    """A key that the row of a line has twice; None for what is no row by itself."""
    try:
        times = Counter(key for key, _ in json.loads(line, object_pairs_hook=list))
    except (ValueError, TypeError, RecursionError):
        return None
    return next((key for key, count in times.items() if count > 1), None)


def _keys_at(level: int, between: list[bytes], texts: list[bytes]) -> list[bytes]:
    """The keys that stand within so many brackets more than are open before.

    Args:
        level: how many.
        between: what stands between texts, first what stands before the first one.
        texts: what stands in quotes.
    """
    found, depth = list[bytes](), 0
    for before, text, after in zip(between, texts, between[1:], strict=False):
        depth += before.count(b"{") + before.count(b"[") - before.count(b"}") - before.count(b"]")
        if depth == level and b":" in after:
            found.append(text)
    return found
