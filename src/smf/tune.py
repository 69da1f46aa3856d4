"""Learning rates chosen on the validation set: for every method a grid of the same size around the recipe's rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .compare import compare, read_result, result_path
from .errors import ConfigError, DataError, TrainingError
from .prepare import load_scored
from .recipe import Recipe, Source
from .stats import RATIOS

VALIDATION = "validation"  # name of the scored set


def tune(recipe: Recipe, only: Sequence[str] = (), points: int = 5, factor: float = 2.0) -> dict[str, Any]:
    """Train every method at several learning rates and choose the best by the validation set's first target metric.

    A grid whose best point lies at its end grows in that direction, a point at a time and to twice its size at most,
    until it is interior; then its method was tried more often than the others, which the result shows. Tuned again
    with the best rates in the recipe, all grids have one size. Runs are kept: a killed tuning goes on.

    Args:
        recipe: its methods' learning rates are the middles of the grids.
        only: names of methods; none: all.
        points: of each grid, an odd number.
        factor: between neighbouring rates.

    Returns:
        `{"metric", "points", "factor", "methods": {name: {"best", "interior", "grid": [{"lr", "score", ...}]}}}`.
    """
    if recipe.target.validation is None:
        raise ConfigError("the recipe has no [target.validation] table, by which learning rates could be chosen")
    if points < 3 or points % 2 == 0 or not factor > 1:
        raise ConfigError(f"points = {points}, factor = {factor}; expected an odd number from 3 and a factor above 1")
    if VALIDATION in recipe.probes:
        raise ConfigError(f"tuning scores a set of the name {VALIDATION!r}; give the probe of that name another one")
    unknown = [name for name in only if name not in recipe.methods]
    if unknown:
        raise ConfigError(f"the recipe has no [methods.{unknown[0]}]; its methods: {sorted(recipe.methods)}")
    _check_apart(recipe, recipe.target.validation)
    recipe = replace(recipe, target=replace(recipe.target, eval={VALIDATION: recipe.target.validation}))
    names = [name for name, m in recipe.methods.items() if m.kind != "base" and (not only or name in only)]
    tuned = {name: _tune_method(recipe, name, points, factor) for name in names}
    return {"metric": recipe.target.metrics[0], "points": points, "factor": factor, "methods": tuned}


def _check_apart(recipe: Recipe, validation: Source) -> None:
    """Refuse validation rows that are scored as well."""
    both = replace(recipe, target=replace(recipe.target, eval=recipe.target.eval | {VALIDATION: validation}), probes={})
    sets = load_scored(both)[1]
    ids = {item["id"] for item in sets.pop(VALIDATION).items}
    shared = ids & {item["id"] for scored in sets.values() for item in scored.items}
    if shared:
        raise DataError(f"{len(shared)} validation rows are in target.eval too, such as id {min(shared)!r}")


def _tune_method(recipe: Recipe, name: str, points: int, factor: float) -> dict[str, Any]:
    middle = points // 2
    exponents = list(range(-middle, middle + 1))
    while True:
        grid = _run_grid(recipe, name, exponents, factor)
        best = _best(grid, recipe.target.metrics[0])
        interior = 0 < best < len(grid) - 1
        if interior or len(exponents) >= 2 * points:
            return {"best": grid[best]["lr"], "interior": interior, "grid": grid}
        exponents = [exponents[0] - 1, *exponents] if best == 0 else [*exponents, exponents[-1] + 1]


def _run_grid(recipe: Recipe, name: str, exponents: Sequence[int], factor: float) -> list[dict[str, Any]]:
    """One entry a learning rate, ascending: the rate, the validation score, and all scores without their records.

    A rate whose run failed has the score None.
    """
    rates = [float(f"{recipe.methods[name].lr * factor**exponent:.6g}") for exponent in exponents]
    base = {other: method for other, method in recipe.methods.items() if method.kind == "base"}
    grid = {f"{name} at {rate:g}": replace(recipe.methods[name], lr=rate) for rate in rates}
    recipe = replace(recipe, methods=base | grid)
    try:
        compare(recipe)
    except TrainingError:  # printed; a rate so large that training diverges is a bad one, not the end of tuning
        if not any(result_path(recipe, title).is_file() for title in grid):
            raise
    entries: list[dict[str, Any]] = []
    for rate, title in zip(rates, grid, strict=True):
        path = result_path(recipe, title)
        entries.append({"lr": rate, "score": None} | (_point(recipe, read_result(path)) if path.is_file() else {}))
    return entries


def _point(recipe: Recipe, result: dict[str, Any]) -> dict[str, Any]:
    return {
        "score": result["scores"][VALIDATION]["metrics"][recipe.target.metrics[0]],
        "scores": {name: score["metrics"] for name, score in result["scores"].items()},
        "rows_changed": result["rows_changed"],
        "seconds": result["seconds"],
    }


def _best(grid: Sequence[dict[str, Any]], metric: str) -> int:
    """Index of the best score (of losses the smallest); of equal ones, the smallest rate."""
    sign = -1 if metric in RATIOS else 1
    scores = [-math.inf if entry["score"] is None else sign * entry["score"] for entry in grid]
    return scores.index(max(scores))


def tuning_table(tuned: dict[str, Any]) -> str:
    """Every point of every grid, as Markdown; the chosen one in bold."""
    metric = tuned["metric"]
    lines = [f"| method | learning rate: validation {metric} |", "| --- | --- |"]
    for name, entry in tuned["methods"].items():
        cells = [f"{p['lr']:g}: " + ("failed" if p["score"] is None else f"{p['score']:.3f}") for p in entry["grid"]]
        shown = [f"**{c}**" if p["lr"] == entry["best"] else c for c, p in zip(cells, entry["grid"], strict=True)]
        note = "" if entry["interior"] else " (best point at the end of its grid)"
        lines.append(f"| {name} | {' · '.join(shown)}{note} |")
    return "\n".join(lines) + "\n"
