"""The comparison: every method of a recipe, each in a process of its own, and one table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .errors import ConfigError, TrainingError
from .files import write_atomically
from .prepare import load
from .recipe import Recipe, to_toml


def compare(recipe: Recipe, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run the methods that are not finished yet, then return the results of all, in the recipe's order.

    A method runs in a process of its own, so that its peak memory is its own and a crash takes nothing else along.

    Args:
        recipe: what to compare.
        only: names of methods, beside which the base is always shown; none: all.
    """
    unknown = [name for name in only if name not in recipe.methods]
    if unknown:
        raise ConfigError(
            f"the recipe has no [methods.{unknown[0]}]; its methods: {sorted(recipe.methods)}; separate names by blanks"
        )
    names = [name for name, m in recipe.methods.items() if not only or name in only or m.kind == "base"]
    output = Path(recipe.output)
    todo = [name for name in names if not result_path(recipe, name).is_file()]
    if todo:
        load(recipe)  # refuses what can't work before the first method spends time
        write_atomically(output / "recipe.toml", to_toml(recipe))
    failed = []
    for number, name in enumerate(names, 1):
        if name not in todo:
            print(f"smf: {name} ({number} of {len(names)}): finished, kept", file=sys.stderr)
            continue
        print(f"smf: {name} ({number} of {len(names)})", file=sys.stderr)
        command = [sys.executable, "-m", "smf", "train", str(output / "recipe.toml"), "--method", name]
        if subprocess.run(command, stdout=sys.stderr).returncode != 0:  # the one table is all of stdout
            failed.append(name)
    if failed:
        raise TrainingError(
            f"these methods did not finish: {failed}; what went wrong is printed above. The others are kept in "
            f"{output}; the same command goes on where it stopped"
        )
    return [json.loads(result_path(recipe, name).read_text()) for name in names]


def result_path(recipe: Recipe, name: str) -> Path:
    """Where one method's result lies, once it has finished."""
    return Path(recipe.output) / recipe.run_id(name) / "result.json"


def rows_of(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: before and after for target and probes, then what it took."""
    bases = [r["scores"] for r in results if r["kind"] == "base"]
    probes = list(results[0]["scores"]["probes"])
    header = ["method", "target loss", "target acc", *[f"{name} ppl" for name in probes]]
    header += ["rows changed", "numbers changed", "trained params", "seconds", "peak MB"]
    rows = []
    for result in results:
        scores = result["scores"]
        base = bases[0] if bases and result["kind"] != "base" else None
        cells = [
            result["method"],
            _change(scores["target"]["loss"], base and base["target"]["loss"], "{:.3f}"),
            _change(scores["target"]["acc"], base and base["target"]["acc"], "{:.3f}"),
        ]
        for name in probes:
            before = base and base["probes"][name]["perplexity"]
            cells.append(_change(scores["probes"][name]["perplexity"], before, "{:.2f}"))
        seconds = result["seconds"] + result["heal_seconds"] if "seconds" in result else None
        took = [result.get(key) for key in ("rows_changed", "numbers_changed", "trained_parameters")]
        took += [seconds, result.get("peak_memory_mb")]
        cells += ["-" if number is None else f"{number:,.0f}" for number in took]
        rows.append(cells)
    return header, rows


def _change(after: float, before: float | None, form: str) -> str:
    text = form.format(after)
    if before is None:
        return text
    difference = form.replace("{:", "{:+").format(after - before)
    return f"{text} ({difference})"


def print_table(results: Sequence[dict[str, Any]], title: str) -> None:
    """The table, in the terminal."""
    header, rows = rows_of(results)
    changes = "in brackets: change against the base; " if any(r["kind"] == "base" for r in results) else ""
    table = Table(title=title, caption=f"{changes}loss in nats per token that the recipe's loss counts")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=max(console.width, 190)).print(table) if not console.is_terminal else console.print(table)


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """The table, as Markdown."""
    header, rows = rows_of(results)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows]) + "\n"


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results without their per-example records, which lie in each run's result.json."""
    short = []
    for result in results:
        scores = result["scores"]
        target = {k: v for k, v in scores["target"].items() if k != "records"}
        probes = {name: {k: v for k, v in p.items() if k != "records"} for name, p in scores["probes"].items()}
        short.append(result | {"scores": {"target": target, "probes": probes}})
    return short
