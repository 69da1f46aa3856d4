"""Learning rates chosen on the validation set: for every method a grid of the same size around the recipe's rate."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .compare import result_path, run_missing
from .errors import ConfigError, TrainingError
from .files import read_text
from .recipe import UNTRAINED, Recipe
from .recipe_file import load_recipe, named, to_toml
from .runs import read_result
from .study import best_stage, lowest_reaching, numbers_of, signed


def tune(
    recipe: Recipe,
    only: Sequence[str] = (),
    points: int = 5,
    factor: float = 2.0,
    ray: str | None = None,
) -> dict[str, Any]:
    """Train every method at several learning rates and choose the best by the validation set's first target metric.

    Of a run that is scored on the way (`train.score_at`), its best moment counts, for every method alike. A grid whose
    best point lies at its end grows in that direction, a point at a time and to twice its size at most, until it is
    interior; then its method was tried more often than the others, which the result shows. Tuned again with the best
    rates in the recipe, all grids have one size. The runs are those of `compare`, in the same folder: they are kept, a
    killed tuning goes on, and comparing the tuned recipe does none of them again.

    The rate that learns most is seldom the one that keeps most. Where the recipe names methods to `match`, these are
    tuned as above; every other one takes the lowest rate at which it learns as much as the best of these, since what a
    method forgets grows with its rate. One that never learns as much takes its best.

    Args:
        recipe: its methods' learning rates are the middles of the grids.
        only: names of methods as `compare.named` takes them; none: all.
        points: of each grid, an odd number.
        factor: between neighbouring rates.
        ray: a cluster to run on, as `smf.ray_jobs.on_ray` takes it; None: this machine.

    Returns:
        `{"comparison", "metric", "points", "factor", "match", "base", "methods": {name: entry}}`. "base" is the base's
        score, None where the recipe has no base; an entry is `{"best", "interior", "grid": [{"lr", "score", ...}]}`,
        and of a method that reached the others' score "reached", that score.
    """
    if recipe.target.validation is None:
        raise ConfigError(
            "the recipe has no [target.validation] table, by which learning rates could be chosen. With a file of rows "
            "that are neither trained nor scored: --set target.validation.path=validation.jsonl. With a share of the "
            'training rows: docs/recipes.md, "Your data"'
        )
    if points < 3 or points % 2 == 0 or not factor > 1:
        raise ConfigError(f"points = {points}, factor = {factor}; expected an odd number from 3 and a factor above 1")
    only, match = named(only, recipe.methods), named(recipe.match, recipe.methods)
    untuned = [(recipe, name) for name, method in recipe.methods.items() if method.kind in UNTRAINED]
    for name in match:
        if recipe.methods[name].kind in UNTRAINED:
            raise ConfigError(f"{name!r} has no learning rate to tune, so nothing can be matched with its best")
    wanted = {*(only or recipe.methods), *match}
    names = [name for name, method in recipe.methods.items() if name in wanted and method.kind not in UNTRAINED]
    exponents = {name: list(range(-(points // 2), points // 2 + 1)) for name in names}
    known = _known_rates(recipe)
    tried: set[Path] = set()  # a run that failed is not done again for every point that a grid grows by
    while True:
        rates = {n: [_rate(recipe.methods[n].lr * factor**e, known[n]) for e in exponents[n]] for n in names}
        runs = [*untuned, *((at_rate(recipe, name, rate), name) for name in names for rate in rates[name])]
        run_missing(recipe, [run for run in runs if result_path(*run) not in tried], ray)  # says which failed
        tried |= {result_path(*run) for run in runs}
        tuned = {name: _grid(recipe, name, rates[name]) for name in names}
        if match:
            tuned = _matched(tuned, match, recipe.target.metrics[0])
        growing = [name for name in names if not tuned[name]["interior"] and len(exponents[name]) < 2 * points]
        if not growing:
            head = {"comparison": recipe.comparison_id(), "metric": recipe.target.metrics[0]}
            grids = {"points": points, "factor": factor, "match": match}
            return head | grids | {"base": _base_score(recipe), "methods": tuned}
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


def tuned_toml(recipe: Recipe, tuned: dict[str, Any], output: Path) -> str:
    """The tuned recipe as a file, whose first lines say how to go on and which rates nobody chose."""
    untuned = [n for n, m in recipe.methods.items() if n not in tuned["methods"] and m.kind not in UNTRAINED]
    match = tuned.get("match")
    lines = [
        f"# smf compare {output / 'tuned.toml'} --seeds 5",
        "",
        f"# Learning rates: the best of grids of {tuned['points']}, by the validation set's {tuned['metric']}; tune.md "
        "has every point.",
        *([f"# Of the methods beside {', '.join(match)}: the lowest that learn as much as these."] if match else []),
        *([f"# Not tuned, at the recipe's own rates: {', '.join(untuned)}."] if untuned else []),
    ]
    return "\n".join(lines) + "\n\n" + to_toml(tuned_recipe(recipe, tuned))


def with_earlier(recipe: Recipe, tuned: dict[str, Any], file: Path) -> dict[str, Any]:
    """What was tuned now and, of the recipe's other methods, what `file` has of earlier calls with equal grids.

    What differs is not kept, and said: a method that has other options now than when it was tuned was another one.
    """
    before = _read_tuned(file)
    grids = ("comparison", "metric", "points", "factor", "match")
    if before is not None and any(({"match": []} | before).get(key) != tuned[key] for key in grids):
        print(f"smf: {file} is of another comparison, metric, match or size of grids; it is replaced", file=sys.stderr)
        before = None
    entries = {} if before is None else before["methods"]
    kept: dict[str, Any] = {}
    for name in recipe.methods:
        if name in tuned["methods"]:
            kept[name] = tuned["methods"][name]
        elif name in entries and result_path(at_rate(recipe, name, entries[name]["best"]), name).is_file():
            kept[name] = entries[name]
        elif name in entries:
            print(f"smf: {file}: {name} is not kept: there is no run of it as the recipe has it", file=sys.stderr)
    return _strict(tuned | {"methods": kept})


def _read_tuned(file: Path) -> dict[str, Any] | None:
    """An earlier call's file; None where there is none, or it is broken, which is said."""
    try:
        before = json.loads(read_text(file))
        tuning_table(before)  # needs all that is read of it
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        print(f"smf: {file} cannot be read ({error!r}); it is replaced", file=sys.stderr)
        return None
    return before


def _strict(tuned: dict[str, Any]) -> dict[str, Any]:
    """With None for NaN and infinity, which training that diverged leaves and JSON does not have."""
    return json.loads(json.dumps(tuned), parse_constant=lambda _: None)


def _known_rates(recipe: Recipe) -> dict[str, set[float]]:
    """Of each method the rates that its runs in the output folder were begun at."""
    known: dict[str, set[float]] = {name: set() for name in recipe.methods}
    for file in Path(recipe.output).glob("*/recipe.toml"):
        name = file.parent.name.rpartition("-")[0]
        with contextlib.suppress(ConfigError, OSError, KeyError):  # a folder of something else, or of another version
            rate = load_recipe(file).methods[name].lr
            if result_path(at_rate(recipe, name, rate), name).parent == file.parent:
                known[name].add(rate)
    return known


def _rate(wanted: float, known: Collection[float]) -> float:
    """The rate with six digits; one that was run before and differs by such rounding alone, as it was then.

    Around 0.000333333, a third of 0.001, a grid would have 0.000999999 else.
    """
    near = [rate for rate in known if math.isclose(rate, wanted, rel_tol=2e-5)]
    return min(near, key=lambda rate: abs(rate - wanted)) if near else float(f"{wanted:.6g}")


def _grid(recipe: Recipe, name: str, rates: Sequence[float]) -> dict[str, Any]:
    """The best rate, whether it is interior, and an entry for each rate; one whose run failed has the score None."""
    grid: list[dict[str, Any]] = []
    for rate in rates:
        path = result_path(at_rate(recipe, name, rate), name)
        grid.append({"lr": rate, "score": None} | (_point(recipe, read_result(path)) if path.is_file() else {}))
    metric = recipe.target.metrics[0]
    scores = [-math.inf if point["score"] is None else signed(point["score"], metric) for point in grid]
    best = [place for place, score in enumerate(scores) if score == max(scores)]  # of equal ones, all
    if grid[best[0]]["score"] is None:
        raise TrainingError(f"{name}: no run finished, at none of the learning rates {list(rates)}; see above why")
    chosen = best[-1] if best[0] > 0 and best[-1] == len(grid) - 1 else best[0]  # at an end, where one of them is
    return {"best": rates[chosen], "interior": 0 < chosen < len(grid) - 1, "grid": grid}


def _matched(tuned: dict[str, Any], match: Collection[str], metric: str) -> dict[str, Any]:
    """The lowest rate that reaches the best score of `match`, for the other methods that have one.

    Such a grid is interior where a lower rate of it falls short.
    """

    def score(point: dict[str, Any]) -> float:
        return -math.inf if point["score"] is None else signed(point["score"], metric)

    goal = max((point for name in match for point in tuned[name]["grid"]), key=score)
    found = dict(tuned)
    for name, entry in tuned.items():
        lowest = lowest_reaching([(point["lr"], score(point)) for point in entry["grid"]], score(goal))
        if name not in match and lowest is not None:
            interior = entry["grid"][0]["lr"] < lowest
            found[name] = entry | {"best": lowest, "interior": interior, "reached": goal["score"]}
    return found


def _base_score(recipe: Recipe) -> float | None:
    """The base's validation score; None where the recipe has no base, or its run did not finish."""
    for name, method in recipe.methods.items():
        if method.kind == "base" and (path := result_path(recipe, name)).is_file():
            return best_stage(read_result(path), recipe.target.metrics[0]).validation(recipe.target.metrics[0])
    return None


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
    metric, before = tuned["metric"], tuned.get("base")
    lines = [f"| method | learning rate: validation {metric} |", "| --- | --- |"]
    for name, entry in tuned["methods"].items():
        cells = [f"{p['lr']:g}: " + ("failed" if p["score"] is None else f"{p['score']:.3f}") for p in entry["grid"]]
        shown = [f"**{c}**" if p["lr"] == entry["best"] else c for c, p in zip(cells, entry["grid"], strict=True)]
        note = "" if entry["interior"] else " (best point at the end of its grid)"
        note += f" (the lowest that reaches {entry['reached']:.3f})" if "reached" in entry else ""
        scores = [signed(point["score"], metric) for point in entry["grid"] if point["score"] is not None]
        if before is not None and max(scores) <= signed(before, metric):
            note += " (no better than the base)"
        lines.append(f"| {name} | {' · '.join(shown)}{note} |")
    return "\n".join(lines) + ("\n" if before is None else f"\n\nThe base: {before:.3f}.\n")
