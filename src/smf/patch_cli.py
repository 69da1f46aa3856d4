"""Patches: see what a training changed, put it in, take it out, merge and compare."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from .errors import PatchError

if TYPE_CHECKING:
    from .patch import Patch

Source = Annotated[Positional[Path], tyro.conf.arg(help="a patch file, a run's folder, or a saved adapter's")]
Sources = Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(help="patch files, runs' folders, saved adapters")]


def inspect(
    patch: Source,
    /,
    beside: tuple[Path, ...] = (),
    background: Path | None = None,
    why: tuple[str, ...] = (),
    format: Literal["table", "json"] = "table",
) -> None:
    """Show what a patch belongs to and what it changes: rows by layer, hubs, overlap, room left, size.

    Args:
        beside: other patches of the same memory, to count shared rows and the room that is left.
        background: file of `Background.save`; none: that of the run's folder, where there is one.
        why: rows, as ROW or LAYER:ROW: list the examples that wrote them instead, with their shares.
    """
    from .adapter_file import open_patch
    from .background import Background
    from .row_report import belongs, row_report

    found = open_patch(patch)
    if why:
        _print_why(found, why, format)
        return
    own = patch / "background.safetensors"
    file = background or (own if own.is_file() else None)
    read = None if file is None else Background.load(file)
    report = belongs(found, _size(patch, found), row_report(found, [open_patch(p) for p in beside], read))
    if format == "json":
        print(json.dumps(asdict(report), indent=2))
        return
    _print_report(report, _names([patch, *beside])[1:])


def _size(path: Path, patch: Patch) -> int:
    """Bytes of the patch's file; of a saved adapter's patch, of the rows."""
    file = path / "patch.smf" if path.is_dir() else path
    return (
        file.stat().st_size if file.is_file() else sum(new.numel() * new.element_size() for new in patch.new.values())
    )


def _print_report(report: Any, beside: Sequence[str]) -> None:
    from .table import print_plain

    print_plain("The patch", ["", ""], [list(item) for item in report.about.items()])
    header = ["layer", "rows changed", "of", "mean change", "largest", "hubs", "read by general text"]
    header += [f"shared with {name}" for name in beside] + ["room left", "never read"]
    rows = []
    for each in report.layers:
        known = ["-" if value is None else f"{value:,}" for value in (each.hubs, each.read, each.quiet_room)]
        sizes = [f"{each.mean_size:.3g}", f"{each.largest_size:.3g}"]
        shared = [f"{count:,}" for count in each.shared]
        row = [str(each.layer), f"{each.changed:,}", f"{each.n_rows:,}", *sizes, *known[:2], *shared]
        rows.append([*row, f"{each.room:,}", known[2]])
    print_plain("Its rows", header, rows)
    if report.metadata:
        print_plain("What trained it", ["", ""], [[key, json.dumps(value)] for key, value in report.metadata.items()])


def _print_why(patch: Patch, wanted: Sequence[str], format: str) -> None:
    """Who wrote these rows."""
    from .table import print_plain

    found = {row: patch.why(*row) for each in wanted for row in _rows_named(patch, each)}
    if format == "json":
        print(json.dumps({f"{layer}:{row}": writers for (layer, row), writers in found.items()}, indent=2))
        return
    for (layer, row), writers in found.items():
        shares = [[name, f"{share:.1%}"] for name, share in writers.items()]
        print_plain(f"Row {row} of layer {layer}, written by", ["example", "share of its way"], shares)


def _rows_named(patch: Patch, wanted: str) -> list[tuple[int, int]]:
    """Layer and row of LAYER:ROW; of ROW alone in every layer where the patch changes it."""
    layer, _, row = wanted.rpartition(":")
    if not re.fullmatch(r"(\d{1,10}:)?\d{1,10}", wanted):
        raise PatchError(f"--why {wanted!r}: expected ROW or LAYER:ROW, such as 4:1207")
    if layer:
        return [(int(layer), int(row))]
    found = [(layer, int(row)) for layer, rows in patch.rows.items() if int(row) in rows.tolist()]
    if not found:
        raise PatchError(f"--why {wanted}: the patch changes row {row} at none of its layers {list(patch.rows)}")
    return found


def forget(
    patch: Source,
    /,
    examples: Annotated[tuple[str, ...], tyro.conf.arg(metavar="IDS")],
    output: Path,
    share: float = 1.0,
) -> None:
    """Write the patch without the rows that only some examples wrote. This guarantees no unlearning.

    What these examples taught may be in rows that others wrote too, and in how those were moved.

    Args:
        examples: ids of the examples.
        output: file of the patch that is left.
        share: of the way that a row moved, at least so much is theirs; 1: no other example wrote the row.
    """
    from .adapter_file import open_patch
    from .patch_file import save_patch

    if not examples:
        raise PatchError("give the ids of the examples to forget: --examples ID ID ...")
    found = open_patch(patch)
    theirs = found.written_by(examples, share)
    save_patch(found.without(theirs), output)
    touched = found.written_by(examples, share=sys.float_info.min)
    print(
        f"reverted {_rows(theirs)} of {_rows(touched)} that these {len(set(examples))} examples wrote; the patch had "
        f"{_rows(found)}: {output}"
    )


def apply(patch: Source, /, output: Path, to: Path | None = None) -> None:
    """Write the adapter that a patch makes, where PEFT and transformers find it; the base is not loaded.

    Args:
        output: folder of the adapter: a new or empty one, or that of --to.
        to: a saved adapter to apply it to; none: the reproducible start that the patch was trained from.
    """
    from .adapter_file import fresh_adapter, open_patch, put_into_adapter, read_adapter, write_adapter

    _refuse_full(output, to)
    found = open_patch(patch)
    adapter = fresh_adapter(found) if to is None else read_adapter(to)
    put_into_adapter(found, adapter, "apply")
    write_adapter(adapter, output)
    print(f"applied {_rows(found)}: {output}")


def revert(patch: Source, /, adapter: Annotated[Path, tyro.conf.arg(name="from")], output: Path) -> None:
    """Take a patch out of a saved adapter, bit for bit.

    Args:
        adapter: folder of the adapter.
        output: folder of the adapter without the patch: a new or empty one, or the same.
    """
    from .adapter_file import open_patch, put_into_adapter, read_adapter, write_adapter

    _refuse_full(output, adapter)
    found, present = open_patch(patch), read_adapter(adapter)
    put_into_adapter(found, present, "revert")
    write_adapter(present, output)
    print(f"reverted {_rows(found)}: {output}")


def merge(
    patches: Sources,
    /,
    output: Path,
    policy: Literal["refuse", "sum", "weighted", "last"] = "refuse",
    weights: tuple[float, ...] = (),
) -> None:
    """Write one patch that does what several do; rows that several changed apart from each other are listed.

    Args:
        output: file of the merged patch.
        policy: for rows that several changed from one value: refuse; the sum of the changes; the mean of the values by
            weight; the last patch's value.
        weights: one for each patch; none: equal.
    """
    from .adapter_file import open_patch
    from .patch_file import save_patch

    found = _at_least_two(patches, open_patch)
    if policy == "refuse":
        _print_shared(found, patches)
    merged = found[0].merge(*found[1:], policy=policy, weights=list(weights) or None)
    if policy != "refuse":
        _print_shared(found, patches)
    save_patch(merged, output)
    print(f"merged {len(found)} patches, {_rows(merged)}: {output}")


def diff(one: Source, other: Source, /) -> None:
    """Show how two patches of one memory differ in what they leave."""
    from .adapter_file import open_patch
    from .table import print_plain

    found = open_patch(one).diff(open_patch(other))
    first, second = _names([one, other])
    header = ["layer", f"only {first}", f"only {second}", "both, equal", "both, apart", "mean distance"]
    rows = []
    for layer, each in found.items():
        counts = [len(ids) for ids in (each.only_first, each.only_second, each.equal, each.apart)]
        distance = f"{float(each.distances.mean()):.3g}" if len(each.apart) else "-"
        rows.append([str(layer), *(f"{count:,}" for count in counts), distance])
    print_plain("Rows", header, rows)


def _refuse_full(output: Path, source: Path | None) -> None:
    """Refuse a folder that holds something already, perhaps another adapter, unless it is that which is changed."""
    same = source is not None and source.exists() and output.exists() and output.samefile(source)
    if output.is_dir() and any(output.iterdir()) and not same:
        raise PatchError(
            f"--output {output} holds files already, which might be overwritten; give a new or empty folder"
        )


def _at_least_two(paths: Sequence[Path], read: Callable[[Path], Patch]) -> list[Patch]:
    if len(paths) < 2:
        raise PatchError(f"give at least two patches to merge; got {[str(path) for path in paths]}")
    return [read(path) for path in paths]


def _names(paths: Sequence[Path]) -> list[str]:
    """What tables call these paths: as few of their last parts as tell them apart, such as law/patch.smf."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]


def _rows(patch: Patch) -> str:
    return f"{sum(map(len, patch.rows.values())):,} rows"


def _print_shared(patches: Sequence[Patch], paths: Sequence[Path]) -> None:
    """The rows that two of the patches both changed, with the lengths of their changes."""
    from .table import print_plain

    names = _names(paths)
    header = ["patches", "layer", "rows of both", "mean change of the first", "of the second", "mean cosine"]
    rows = []
    for second in range(1, len(patches)):
        for first in range(second):
            for layer, found in patches[first].overlap(patches[second]).items():
                if len(found.ids_R):
                    sizes = [f"{float(size):.3g}" for size in found.sizes_2R.mean(1)]
                    which = f"{names[first]}, {names[second]}"
                    rows.append(
                        [which, str(layer), f"{len(found.ids_R):,}", *sizes, f"{float(found.cosine_R.mean()):.2f}"]
                    )
    if rows:
        print_plain("Rows that two patches change", header, rows)


def main(arguments: Sequence[str]) -> None:
    """`smf patch ...`."""
    commands: dict[str, Callable[..., Any]] = {
        "inspect": inspect,
        "apply": apply,
        "revert": revert,
        "merge": merge,
        "diff": diff,
        "forget": forget,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="smf patch", description=__doc__, args=list(arguments))
    except OSError as error:
        raise PatchError(f"a file cannot be read or written: {error}") from error
