"""What a set of runs shows: its points, the one chosen of each method, what they gained and lost.

A point is one method with one set of options after some share of its steps, under one or more seeds. Shape letters:
P points, K parts of a measure.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .fingerprint import json_hash
from .recipe import VALIDATION
from .stats import DRAWS, RATIOS, Changes, Estimate, changes_of, function_of
from .tasks import find_task

# -- points -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One run after a share of its steps.

    Args:
        step: optimizer steps done.
        share: of all steps.
        scores: as in result.json.
    """

    step: int
    share: float
    scores: dict[str, Any]

    def validation(self, metric: str) -> float | None:
        """The score that points are chosen by; None where the run has no validation set."""
        return self.scores[VALIDATION]["metrics"][metric] if VALIDATION in self.scores else None


def stages(result: dict[str, Any]) -> list[Stage]:
    """Every moment at which a run was scored, the end last."""
    return [Stage(**stage) for stage in result.get("on_the_way", [])] + [
        Stage(result.get("steps", 0), 1.0, result["scores"])
    ]


def signed(score: float, metric: str) -> float:
    """The score, or of a loss its negative: the larger, the better; what is not finite is the worst."""
    if not math.isfinite(score):
        return -math.inf
    return -score if metric in RATIOS else score


def best_stage(result: dict[str, Any], metric: str) -> Stage:
    """The moment with the best validation score, the earliest of equal ones; without a validation set, the end."""
    moments = stages(result)
    scores = [stage.validation(metric) for stage in moments]
    known = [signed(score, metric) for score in scores if score is not None]
    return moments[known.index(max(known))] if len(known) == len(moments) else moments[-1]


def numbers_of(scores: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics of every set, without records."""
    return {name: score["metrics"] for name, score in scores.items()}


def seed_of(run: dict[str, Any]) -> int:
    """0 for what is scored without a run."""
    return run.get("seed", 0)


@dataclass(frozen=True, eq=False)
class Point:
    """One method with one set of options after a share of its steps.

    Args:
        method: its name.
        share: of the steps.
        runs: the results of its seeds, ascending, each with the steps and scores of that moment.
        known: changes of its scores that were worked out before; `change_of` fills it.
    """

    method: str
    share: float
    runs: list[dict[str, Any]]
    known: dict[Any, Changes] = field(default_factory=dict, repr=False)

    @property
    def lr(self) -> float:
        """Learning rate; 0 for the base."""
        return self.runs[0].get("options", {}).get("lr", 0.0)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds that were run."""
        return tuple(map(seed_of, self.runs))

    def mean(self, name: str, metric: str, seeds: Sequence[int] | None = None) -> float:
        """A score, averaged over seeds: all, or some that were run."""
        values = [r["scores"][name]["metrics"][metric] for r in self.runs if seeds is None or seed_of(r) in seeds]
        return sum(values) / len(values)


def points_of(results: Sequence[dict[str, Any]]) -> list[Point]:
    """Every point, method by method in the order of the results; runs that differ in nothing but the seed are one.

    Methods with one name, but other options beside the learning rate, are told apart: "smf (rows_per_step=512)"; so are
    runs of a function of one's own whose code changed.
    """
    variants: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result, name in zip(results, _names(results), strict=True):
        options = result.get("options", {}) | {"code": result.get("code")}
        variants.setdefault((name, json_hash(options)), []).append(result)
    points = []
    for (name, _), runs in variants.items():
        by_share: dict[float, list[dict[str, Any]]] = {}
        for run in sorted(runs, key=seed_of):
            for stage in stages(run):
                by_share.setdefault(stage.share, []).append(run | {"steps": stage.step, "scores": stage.scores})
        points += [Point(name, share, at) for share, at in by_share.items() if len(at) == len(runs)]
    return [point for own in by_method(points).values() for point in own]


def _names(results: Sequence[dict[str, Any]]) -> list[str]:
    """For each result the method's name, and the options in which methods of that name differ."""
    flat = [_flat({k: v for k, v in r.get("options", {}).items() if k != "lr"}) | _code(r) for r in results]
    alike: dict[str, list[dict[str, str]]] = {}
    for result, options in zip(results, flat, strict=True):
        alike.setdefault(result["method"], []).append(options)
    keys = {
        name: [key for key in dict.fromkeys(key for one in own for key in one) if len({o.get(key) for o in own}) > 1]
        for name, own in alike.items()
    }
    names = []
    for result, options in zip(results, flat, strict=True):
        apart = ", ".join(f"{key}={options.get(key, '-')}" for key in keys[result["method"]])
        names.append(f"{result['method']} ({apart})" if apart else result["method"])
    return names


def _code(result: dict[str, Any]) -> dict[str, str]:
    return {"code": result["code"][:6]} if result.get("code") else {}


def _flat(options: dict[str, Any], above: str = "") -> dict[str, str]:
    """Every option as JSON, those of inner tables as "memory.n_keys"."""
    flat = {}
    for key, value in options.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: json.dumps(value)}
    return flat


def by_method(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each method, in the order of the first of each."""
    own: dict[str, list[Point]] = {}
    for point in points:
        own.setdefault(point.method, []).append(point)
    return own


def chosen(points: Sequence[Point], metric: str, match: Sequence[str] = ()) -> list[Point]:
    """One point of each method: that with the best validation score, at seeds that all of its points have.

    Of equal ones, the smallest learning rate and the earliest moment. A method without a validation set is not chosen
    from: the ends of all its variants are returned.

    Args:
        points: of all methods.
        metric: of the validation set.
        match: names of methods; of every other one that learns as much as the best of these at some learning rate, its
            best moment at the lowest such rate is chosen.
    """
    goal = goal_of(points, metric, match)
    rows = []
    for own in by_method(points).values():
        if not all(map(validated, own)):
            rows += [point for point in own if point.share == 1]
            continue
        seeds = common_seeds(own)
        known = at_seeds(own, seeds)
        scored = [(point.lr, validation_of(point, metric, seeds)) for point in known]
        lowest = None if own[0].method in match else lowest_reaching(scored, goal)
        known = known if lowest is None else [point for point in known if point.lr == lowest]
        rows.append(min(known, key=lambda p: (-validation_of(p, metric, seeds), p.lr, p.share)))
    return rows


def goal_of(points: Sequence[Point], metric: str, match: Sequence[str]) -> float:
    """What the best of the methods of `match` learned, by validation, at the seeds that it is chosen at."""
    own = by_method([point for point in points if point.method in match])
    best = [point for points in own.values() for point in chosen(points, metric) if validated(point)]
    scores = [validation_of(point, metric, common_seeds(own[point.method])) for point in best]
    return max(scores, default=math.inf)


def lowest_reaching(scored: Iterable[tuple[float, float]], goal: float) -> float | None:
    """The lowest learning rate at which a method learned enough, of rates and their scores; None where none did."""
    return min((rate for rate, score in scored if score >= goal), default=None)


def validated(point: Point) -> bool:
    """Whether all of its runs were scored on the validation set."""
    return all(VALIDATION in run["scores"] for run in point.runs)


def validation_of(point: Point, metric: str, seeds: Sequence[int] | None = None) -> float:
    """The score that points are chosen by, the larger, the better."""
    return signed(point.mean(VALIDATION, metric, seeds), metric)


def common_seeds(points: Sequence[Point]) -> tuple[int, ...]:
    """Seeds that all points have; where there are none, the one that most have, the smallest of equal ones."""
    counts = Counter(seed for point in points for seed in set(point.seeds))
    common = sorted(seed for seed, count in counts.items() if count == len(points))
    return tuple(common) or (min(counts, key=lambda seed: (-counts[seed], seed)),)


def at_seeds(points: Sequence[Point], seeds: Sequence[int]) -> list[Point]:
    """The points that have all of these seeds."""
    return [point for point in points if set(seeds) <= set(point.seeds)]


# -- measures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A number that methods are compared by: a weighted sum of changes of scores against the base.

    Args:
        name: for tables.
        unit: "points", "nats per token" or "%".
        scale: from the sum to the unit.
        parts: sets, metrics and weights; positive sums are gains of a target, losses of a probe.
        role: "gain" or "forgetting".
    """

    name: str
    unit: str
    scale: float
    parts: tuple[tuple[str, str, float], ...]
    role: str


def measures(base: dict[str, Any], target_metrics: Sequence[str]) -> list[Measure]:
    """What there is to compare: gains on the target sets, forgetting of each probe and, of several, overall.

    Overall is the mean over probes of what was lost in per cent of the base's score; of a text, the rise of the nats
    per token in per cent (for small rises, that of the perplexity).
    """
    gains, losses, shares = [], [], []
    for name, score in base["scores"].items():
        if score["role"] == "target":
            gains += [_measure(name, metric, "gain") for metric in target_shown(score, target_metrics)]
        if score["role"] == "probe":
            metric = find_task(score["task"]).METRICS[0]
            losses.append(_measure(name, metric, "forgetting"))
            before = score["metrics"][metric]
            if metric in RATIOS or abs(before) > 0:  # a score that is better when lower stands there as its negative
                shares.append((name, metric, 1.0 if metric in RATIOS else -1 / abs(before)))
    overall = []
    if len(shares) > 1:
        parts = tuple((name, metric, weight / len(shares)) for name, metric, weight in shares)
        overall = [Measure("overall", "%", 100.0, parts, "forgetting")]
    return [*gains, *losses, *overall]


def target_shown(score: dict[str, Any], metrics: Sequence[str]) -> list[str]:
    """The metrics of a target set that are shown: those asked for; of a set with another task, that task's first."""
    return [metric for metric in metrics if metric in score["metrics"]] or list(find_task(score["task"]).METRICS[:1])


def _measure(name: str, metric: str, role: str) -> Measure:
    better_when_lower = metric in RATIOS
    weight = 1.0 if better_when_lower == (role == "forgetting") else -1.0
    unit, scale = ("nats per token", 1.0) if better_when_lower else ("points", 100.0)
    title = name if metric in ("acc", "nats", "exact_match", "score") else f"{name} {metric}"
    return Measure(title, unit, scale, ((name, metric, weight),), role)


def change_of(point: Point, base: Point, name: str, metric: str, seeds: Sequence[int] | None = None) -> Changes:
    """By how much a score changed from the base, under some of the point's seeds or all; worked out once."""
    seeds = point.seeds if seeds is None else tuple(seeds)
    key = (base, name, metric, seeds)
    if key not in point.known:
        after = [run["scores"][name]["records"] for run in point.runs if seed_of(run) in seeds]
        point.known[key] = changes_of(after, base.runs[0]["scores"][name]["records"], metric, seeds)
    return point.known[key]


def changes_at(point: Point, base: Point, measure: Measure, seeds: Sequence[int]) -> list[Changes]:
    """The changes that a measure is made of, under some seeds."""
    return [change_of(point, base, name, metric, seeds) for name, metric, _ in measure.parts]


def weights_of(measure: Measure) -> np.ndarray:
    """Of the parts `[K]`, with the unit's scale."""
    return measure.scale * np.array([weight for *_, weight in measure.parts])


def limits(base: Point, measure: Measure) -> tuple[float, float]:
    """The least and the largest value that a measure can have: shares lie between 0 and 1, nats are not negative."""
    least = most = 0.0
    for name, metric, weight in measure.parts:
        before = base.mean(name, metric)
        down, up = -before, math.inf if metric in RATIOS else 1 - before
        if metric == "score":  # of lm-evaluation-harness: any number
            down, up = -math.inf, math.inf
        ends = sorted((measure.scale * weight * down, measure.scale * weight * up))
        least, most = least + ends[0], most + ends[1]
    return least, most


def measured(point: Point, base: Point, measure: Measure) -> Estimate:
    """A measure of one point, over its seeds and the examples."""
    found = weighted(weights_of(measure), changes_at(point, base, measure, point.seeds))
    return found.within(*limits(base, measure))


def weighted(weights_K: np.ndarray, changes: Sequence[Changes], count: int = DRAWS) -> Estimate:
    """The weighted sum of changes, from so many draws; without an interval where a run diverged."""
    with np.errstate(invalid="ignore"):
        return function_of(lambda v: np.tensordot(weights_K, v, 1), changes, count=count)


def pareto(gains_P: np.ndarray, losses_P: np.ndarray) -> np.ndarray:
    """Places of the points that no other one beats (a gain as large, with a smaller loss), ascending by gain.

    Of equal points the last one is listed. All must be finite.
    """
    order_P, front_P = unbeaten(gains_P, losses_P)
    return order_P[front_P]


def unbeaten(gains_PX: np.ndarray, losses_PX: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order `[P, X]` of points by gain, and which of them, in that order, no other one beats; each X by itself."""
    order_PX = np.lexsort((-losses_PX, gains_PX), axis=0)
    sorted_PX = np.take_along_axis(losses_PX, order_PX, 0)
    least_PX = np.minimum.accumulate(sorted_PX[::-1])[::-1]  # of this point and those that gain more
    front_PX = np.ones(sorted_PX.shape, bool)
    front_PX[:-1] = sorted_PX[:-1] < least_PX[1:]
    return order_PX, front_PX
