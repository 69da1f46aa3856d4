"""Learning rates chosen on the validation set: for every method a grid of the same size around the recipe's rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .compare import check_names, result_path, run_missing
from .errors import ConfigError, TrainingError
from .recipe import Recipe
from .runs import read_result
from .study import best_stage, numbers_of, signed

UNTUNED = ("base", "healed")  # kinds without a learning rate of their own


def tune(recipe: Recipe, only: Sequence[str] = (), points: int = 5, factor: float = 2.0) -> dict[str, Any]:
    """Train every method at several learning rates and choose the best by the validation set's first target metric.

    Of a run that is scored on the way (`train.score_at`), its best moment counts, for every method alike. A grid whose
    best point lies at its end grows in that direction, a point at a time and to twice its size at most, until it is
    interior; then its method was tried more often than the others, which the result shows. Tuned again with the best
    rates in the recipe, all grids have one size. The runs are those of `compare`, in the same folder: they are kept, a
    killed tuning goes on, and comparing the tuned recipe does none of them again.

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
    check_names(recipe, only)
    untuned = [(recipe, name) for name, method in recipe.methods.items() if method.kind in UNTUNED]
    names = [name for name, m in recipe.methods.items() if m.kind not in UNTUNED and (not only or name in only)]
    exponents = {name: list(range(-(points // 2), points // 2 + 1)) for name in names}
    while True:
        rates = {name: [_rate(recipe, name, factor**e) for e in grid] for name, grid in exponents.items()}
        runs = [(at_rate(recipe, name, rate), name) for name in names for rate in rates[name]]
        run_missing(recipe, [*untuned, *runs])  # says which failed; a rate at which training diverges is a bad one
        tuned = {name: _grid(recipe, name, rates[name]) for name in names}
        growing = [name for name in names if not tuned[name]["interior"] and len(exponents[name]) < 2 * points]
        if not growing:
            return {"metric": recipe.target.metrics[0], "points": points, "factor": factor, "methods": tuned}
        for name in growing:
            grid, low = exponents[name], tuned[name]["best"] == rates[name][0]
            exponents[name] = [grid[0] - 1, *grid] if low else [*grid, grid[-1] + 1]


def at_rate(recipe: Recipe, name: str, rate: float) -> Recipe:
    """The recipe with another learning rate of one method."""
    return replace(recipe, methods=recipe.methods | {name: replace(recipe.methods[name], lr=rate)})


def tuned_recipe(recipe: Recipe, tuned: dict[str, Any]) -> Recipe:
    """The recipe with the learning rates that `tune` chose."""
    for name, entry in tuned["methods"].items():
        recipe = at_rate(recipe, name, entry["best"])
    return recipe


def _rate(recipe: Recipe, name: str, factor: float) -> float:
    return float(f"{recipe.methods[name].lr * factor:.6g}")


def _grid(recipe: Recipe, name: str, rates: Sequence[float]) -> dict[str, Any]:
    """The best rate, whether it is interior, and an entry for each rate; one whose run failed has the score None."""
    grid: list[dict[str, Any]] = []
    for rate in rates:
        path = result_path(at_rate(recipe, name, rate), name)
        grid.append({"lr": rate, "score": None} | (_point(recipe, read_result(path)) if path.is_file() else {}))
    metric = recipe.target.metrics[0]
    scores = [-math.inf if point["score"] is None else signed(point["score"], metric) for point in grid]
    best = scores.index(max(scores))
    if grid[best]["score"] is None:
        raise TrainingError(f"{name}: no run finished, at none of the learning rates {list(rates)}; see above why")
    return {"best": rates[best], "interior": 0 < best < len(grid) - 1, "grid": grid}


def _point(recipe: Recipe, result: dict[str, Any]) -> dict[str, Any]:
    metric = recipe.target.metrics[0]
    stage = best_stage(result, metric)
    return {
        "score": stage.validation(metric),
        "share": stage.share,
        "scores": numbers_of(stage.scores),
        "rows_changed": result["rows_changed"],
        "seconds": result["seconds"],
    }


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
