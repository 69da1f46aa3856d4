"""Rows of a local file, of a data set on the hub, or of the embedded world."""

from __future__ import annotations

import difflib
import functools
import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import world
from .data import Row, numbered
from .errors import DataError, HubError, refusing
from .fingerprint import hashed, part_of
from .json_lines import as_written, broken_row, check_lines
from .recipe import Source

CACHE = "the hub's cache"  # in place of "hub": only what lies on this machine already
READERS = {".parquet": "parquet", ".csv": "csv"}  # by suffix; everything else is read as JSON lines


def load_rows(source: Source, data: str, parts: Mapping[str, float], need: Sequence[str], table: str = "") -> list[Row]:
    """Rows of a source, in the order of its file.

    Args:
        source: which file or data set, and which of its rows.
        data: the folder that `source.path` is below, "hub", CACHE or "world".
        parts: shares by name, for `source.part`.
        need: columns that every row must have.
        table: of the recipe, where messages are to name it.

    Raises:
        DataError: naming file, column or row.
        HubError: for what hub or cache do not give.
    """
    where = place(source, data)
    with refusing(DataError, where):
        return _chosen(source, data, parts, need, where, table)


def _chosen(
    source: Source, data: str, parts: Mapping[str, float], need: Sequence[str], where: str, table: str
) -> list[Row]:
    if source.part and not parts:
        raise DataError(f"{where}: a source names a part, but the recipe has no [parts] table of shares")
    rows = _read(source, data, table)
    columns = rows.column_names or []
    read = [source.column] if source.part or source.min_chars or source.sample else []
    for column in (*need, *source.where, *read):
        if column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{where} has no column {column!r}; its columns are {columns}{hint}")
    chosen = [Row.at(number, row) for number, row in enumerate(rows, 1)]
    everything = len(chosen)
    chosen = [row for row in chosen if all(row[column] in values for column, values in source.where.items())]
    if source.min_chars:
        chosen = [row for row in chosen if len(str(row[source.column] or "")) >= source.min_chars]
    if source.sample:
        different = {repr(row): row for row in reversed(chosen)}.values()  # of equal rows the first
        by_hash = sorted(different, key=lambda row: (hashed("sample", row[source.column]), row.number))
        chosen = sorted(by_hash[: source.sample], key=lambda row: row.number)
    if source.limit:
        chosen = chosen[: source.limit]
    if source.part:
        # salted, since a file may be sorted by the plain hash of its texts, and its first rows all be of one part
        chosen = [row for row in chosen if part_of(f"part\n{str(row[source.column]).strip()}", parts) == source.part]
    if source.first:
        chosen = chosen[: source.first]
    if not chosen:
        raise DataError(_nothing_left(source, where, everything, rows))
    return chosen


def load_texts(source: Source, data: str, parts: Mapping[str, float], table: str = "") -> list[Row]:
    """Rows of a source whose column is read as plain text; blank texts are among them.

    Raises:
        DataError: naming file, column and row, also where all texts are blank.
    """
    rows, where = load_rows(source, data, parts, [source.column], table), place(source, data)
    for number, row in numbered(rows):
        if not isinstance(row[source.column], str):
            raise DataError(
                f"{where}, row {number}: column {source.column!r} is {row[source.column]!r}; expected a text"
            )
    if not any(row[source.column].strip() for row in rows):
        raise DataError(f"{where}: column {source.column!r} of all {len(rows):,} rows is blank")
    return rows


def _nothing_left(source: Source, where: str, everything: int, rows: Any) -> str:
    if not everything:
        return f"{where} has no rows"
    asked = [f"{column} among {values}" for column, values in source.where.items()]
    asked += [f"{source.column!r} of {source.min_chars} characters"] if source.min_chars else []
    asked += [f"part {source.part!r}"] if source.part else []
    held = [f"{column}: {sorted(map(repr, {*rows[column]}))[:5]}" for column in source.where]
    found = f"; the columns hold {', '.join(held)}" if held else ""
    return f"{where}: none of its {everything:,} rows has {' and '.join(asked)}{found}"


def place(source: Source, data: str) -> str:
    """What messages call a source."""
    if data == "world":
        return f"the embedded world's {source.path!r}"
    return f"{source.hub} ({source.split})" if data in ("hub", CACHE) else str(Path(data) / source.path)


def _read(source: Source, data: str, table: str) -> Any:
    import datasets

    if data == "world":
        return datasets.Dataset.from_list(world.rows(source.path))
    if data in ("hub", CACHE):
        return _from_hub(source, data)
    file = Path(data) / source.path
    named = f"[{table}]" if table else "a source of the recipe"
    if not source.path:
        raise DataError(f"{named} names no path below --data {data!r}")
    if not file.is_file():
        other = f", or hub, which has {source.hub}" if source.hub else ""
        raise DataError(
            f"{named}: no data file at {file}; set its path, or give --data the folder that has {source.path!r}{other}"
        )
    if file.suffix not in READERS:
        check_lines(file)
    kind = READERS.get(file.suffix, "json")
    try:
        # escaped, since datasets takes a name for a pattern, by which another file may be found
        rows: Any = datasets.load_dataset(kind, data_files=glob.escape(str(file)), split="train")
        return _with_dates_as_written(rows, file) if kind == "json" else rows
    except Exception as error:  # datasets wraps many parsers' errors
        if isinstance(error, OSError) and error.filename and not _is_same(file, error.filename):
            raise DataError(f"the cache of datasets cannot be written: {error}; set HF_DATASETS_CACHE") from error
        if not file.stat().st_size:
            raise DataError(f"{file} has no rows: it is empty") from error
        what = "JSON lines" if kind == "json" else kind
        found = broken_row(file) if kind == "json" else None  # the parser counts rows within a piece of the file
        raise DataError(f"{file} cannot be read as {what}: {found or error.__cause__ or error}") from error


def _with_dates_as_written(rows: Any, file: Path) -> Any:
    """JSON has no dates: where all texts of a column look like some, the parser makes dates of them."""
    dates = [name for name, feature in rows.features.items() if "Value('timestamp[" in str(feature)]
    if not dates:
        return rows
    try:
        written = as_written(file)
    except ValueError:  # the parser takes more than Python's
        return rows
    if len(written) != len(rows) or not all(isinstance(row, dict) for row in written):
        return rows
    names = rows.column_names
    for name in dates:
        rows = rows.remove_columns(name).add_column(name, [row.get(name) for row in written])
    return rows.select_columns(names)


def _is_same(file: Path, named: Any) -> bool:
    return os.path.realpath(file) == os.path.realpath(os.fsdecode(named)) if isinstance(named, str | bytes) else True


def _from_hub(source: Source, data: str) -> Any:
    import datasets
    from huggingface_hub import constants, snapshot_download

    if not source.hub:
        raise DataError(f"the source {source.path!r} names no hub data set; give --data a folder that has the file")
    config = source.config or None
    try:
        if data == CACHE or constants.HF_HUB_OFFLINE:  # files of the hub's cache, which load_dataset does not look at
            folder = snapshot_download(source.hub, repo_type="dataset", revision=source.revision, local_files_only=True)
            return datasets.load_dataset(folder, config, split=source.split)
        commit = resolved(source.hub, source.revision)
        return datasets.load_dataset(source.hub, config, split=source.split, revision=commit)
    except Exception as error:  # no network, no such data set, split or revision: many classes
        raise HubError(
            f"the hub data set {source.hub} ({source.split}, revision {source.revision}) cannot be loaded: {error}. "
            "Without the hub, give --data a folder"
        ) from error


@functools.cache  # a branch may move: what is loaded and what is recorded must be one commit
def resolved(name: str, revision: str, kind: str = "dataset") -> str:
    """The commit hash that a revision of a hub repository stands for now; offline, in the hub's cache.

    Args:
        name: of the repository.
        revision: branch, tag or hash.
        kind: "dataset" or "model".

    Raises:
        DataError: where hub or cache do not know it.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        if constants.HF_HUB_OFFLINE:
            return Path(snapshot_download(name, repo_type=kind, revision=revision, local_files_only=True)).name
        return str(HfApi().repo_info(name, repo_type=kind, revision=revision).sha)
    except Exception as error:
        raise DataError(f"the hub's {kind} {name} has no revision {revision!r} that can be found: {error}") from error
