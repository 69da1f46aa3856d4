"""Forgetting at equal gain, read off each method's points.

A method can forget less by learning less, so methods are compared where they gain equally. Shape letters: P points,
D draws of the bootstrap, X any shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm.auto import tqdm

from .stats import DRAWS, Estimate, draws, estimate, halves
from .study import (
    Measure,
    Point,
    at_seeds,
    by_method,
    change_of,
    changes_at,
    common_seeds,
    limits,
    unbeaten,
    weights_of,
)

IN_RANGE = 0.95  # share of the draws in which a method's points must reach a gain for the interval to be one
Levels = dict[str, float | Point]  # by label: a gain in its unit, or the point that has it


@dataclass(frozen=True)
class Matched:
    """Forgetting at equal gain.

    Args:
        gain: of the target, in its unit.
        label: where the gain comes from.
        measure: what is forgotten.
        losses: by method, in the measure's unit; None beyond the method's points.
        ratios: by method, as a share of the reference's loss; None where one of both has none, or the reference forgets
            nothing.
        seeds: of the points that were read, all alike; of one, intervals are over examples only.
        ranges: by method, the least and the largest gain of its Pareto points, between which there is a value.
    """

    gain: float
    label: str
    measure: Measure
    losses: dict[str, Estimate | None]
    ratios: dict[str, Estimate | None]
    seeds: tuple[int, ...] = (0,)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    def beyond(self, name: str) -> str:
        """Where a method's points lie that has no value here; "" where it has one, or no points."""
        if self.losses.get(name) is not None or name not in self.ranges:
            return ""
        least, most = self.ranges[name]
        return f"gains {least:.3g} and more" if least > self.gain else f"gains {most:.3g} at most"


def front(gains_PX: np.ndarray, losses_PX: np.ndarray) -> np.ndarray:
    """Which points `[P, X]` are Pareto points: no other one gains as much with a smaller loss."""
    order_PX, unbeaten_PX = unbeaten(gains_PX, losses_PX)
    kept_PX = np.zeros(order_PX.shape, bool)
    np.put_along_axis(kept_PX, order_PX, unbeaten_PX, 0)
    return kept_PX


def read_off(
    gains_PX: np.ndarray, losses_PX: np.ndarray, kept_PX: np.ndarray, gain_X: np.ndarray | float
) -> np.ndarray:
    """The loss `[X]` at a gain, linear between neighbours among the points that are kept; NaN beyond them.

    Args:
        gains_PX, losses_PX: of the points, all finite; X may be empty (plain numbers) or draws, each read by itself.
        kept_PX: which of them the line joins.
        gain_X: where to read.
    """
    places_PX = np.argsort(np.where(kept_PX, gains_PX, np.inf), axis=0, kind="stable")
    gains_PX, losses_PX, kept_PX = (np.take_along_axis(a, places_PX, 0) for a in (gains_PX, losses_PX, kept_PX))
    rounding = 1e-9 * np.abs(gains_PX).max(0)  # a point's own gain must not fall out of the range
    below_PX, above_PX = kept_PX & (gains_PX <= gain_X + rounding), kept_PX & (gains_PX >= gain_X - rounding)
    ends = (len(gains_PX) - 1 - below_PX[::-1].argmax(0), above_PX.argmax(0))
    (gain0, gain1), (loss0, loss1) = (
        [np.take_along_axis(each, place[None], 0)[0] for place in ends] for each in (gains_PX, losses_PX)
    )
    way = (np.clip(gain_X, gain0, gain1) - gain0) / np.where(gain1 > gain0, gain1 - gain0, np.inf)
    return np.where(below_PX.any(0) & above_PX.any(0), loss0 + way * (loss1 - loss0), np.nan)


def read_crosswise(
    gains_HPX: np.ndarray, losses_HPX: np.ndarray, kept_HP: np.ndarray, gain_HX: np.ndarray
) -> np.ndarray:
    """The loss `[X]` at a gain, the mean of two halves H of the examples; NaN where one does not reach the gain.

    Args:
        gains_HPX, losses_HPX: of the points, on each half.
        kept_HP: the Pareto points of each half, which the other's line joins. Points that are chosen because they lost
            little look better on the examples they were chosen by than they are: of twenty equal ones by two points of
            a hundred in simulations, and an interval around that misses the truth.
        gain_HX: where to read each half.
    """
    found = []
    for half in (0, 1):
        kept_PX = np.broadcast_to(kept_HP[1 - half].reshape(-1, *[1] * (gain_HX.ndim - 1)), gains_HPX[half].shape)
        found.append(read_off(gains_HPX[half], losses_HPX[half], kept_PX, gain_HX[half]))
    return (found[0] + found[1]) / 2


def mean_of(point: Point, base: Point, measure: Measure, seeds: Sequence[int]) -> float:
    """A measure of one point, over some of its seeds."""
    means_K = np.array([change.by_seed.mean() for change in changes_at(point, base, measure, seeds)])
    return float(weights_of(measure) @ means_K)


class Drawn:
    """Measures of points on two halves of the examples, as they are and as joint draws over examples and seeds.

    Args:
        points: all with these seeds, and with finite scores.
        base: the untouched model.
        wanted: measures.
        seeds: that the measures are over.
        count: number of draws.
    """

    def __init__(
        self, points: Sequence[Point], base: Point, wanted: Sequence[Measure], seeds: Sequence[int], count: int = DRAWS
    ):
        parts = list(dict.fromkeys((name, metric) for measure in wanted for name, metric, _ in measure.parts))
        halved = [halves(change_of(point, base, *part, seeds)) for part in parts for point in points]
        changes = [pair[half] for half in (0, 1) for pair in halved]
        shape = (2, len(parts), len(points))
        values_HKP = np.array([change.by_seed.mean() for change in changes]).reshape(shape)
        drawn_HKPD = (draws(changes, count) if changes else np.empty((0, count))).reshape(*shape, count)
        self.places = {point: place for place, point in enumerate(points)}
        self.values_HP: dict[Measure, np.ndarray] = {}
        self.drawn_HPD: dict[Measure, np.ndarray] = {}
        self.whole_P: dict[Measure, np.ndarray] = {}
        for measure in wanted:
            self.whole_P[measure] = np.array([mean_of(point, base, measure, seeds) for point in points])
            own = [parts.index((name, metric)) for name, metric, _ in measure.parts]
            self.values_HP[measure] = np.einsum("k,hkp->hp", weights_of(measure), values_HKP[:, own])
            self.drawn_HPD[measure] = np.einsum("k,hkpd->hpd", weights_of(measure), drawn_HKPD[:, own])

    def range_of(self, points: Sequence[Point], gain: Measure, loss: Measure) -> tuple[float, float]:
        """The least and the largest gain of the Pareto points, on all examples."""
        own = [self.places[point] for point in points]
        gains_P = self.whole_P[gain][own]
        kept_P = gains_P[front(gains_P, self.whole_P[loss][own])]
        return float(kept_P.min()), float(kept_P.max())

    def read(
        self, points: Sequence[Point], gain: Measure, loss: Measure, at: float | Point
    ) -> tuple[float, np.ndarray]:
        """The loss where `points` gain as much as `at`, and its draws `[D]`; the gain of a point is drawn too.

        NaN beyond the points' range on all examples; read off all examples where a half does not reach the gain.
        """
        own = [self.places[point] for point in points]
        mine_P, lost_P = self.whole_P[gain][own], self.whole_P[loss][own]
        level = self.whole_P[gain][self.places[at]] if isinstance(at, Point) else at
        whole = read_off(mine_P, lost_P, front(mine_P, lost_P), level)
        kept_HP = np.stack([front(self.values_HP[gain][half, own], self.values_HP[loss][half, own]) for half in (0, 1)])
        read = []
        for values in (self.values_HP, self.drawn_HPD):
            gains, losses = values[gain], values[loss]
            level = gains[:, self.places[at]] if isinstance(at, Point) else np.full_like(gains[:, 0], at)
            read.append(read_crosswise(gains[:, own], losses[:, own], kept_HP, level))
        return float(whole if np.isnan(whole) or np.isnan(read[0]) else read[0]), read[1]


def matched(drawn: Drawn, points: Sequence[Point], gain: Measure, loss: Measure, at: float | Point) -> Estimate | None:
    """What a method forgets where it gains as much as `at`; None beyond its points' range.

    Args:
        drawn: holds the points.
        points: of the method.
        gain, loss: measures.
        at: a gain in its unit, or a point of `drawn` that has the gain; the interval then knows that its gain, too, was
            measured on the same examples.

    Returns:
        the interval draws examples and seeds anew and reads the loss off the drawn points; it is (NaN, NaN) where these
        do not reach the gain often enough.
    """
    if not points:
        return None
    value, draws_D = drawn.read(points, gain, loss, at)
    return None if math.isnan(value) else _interval(value, draws_D)


def matched_ratio(
    drawn: Drawn, points: Sequence[Point], others: Sequence[Point], gain: Measure, loss: Measure, at: float | Point
) -> Estimate | None:
    """Forgetting of a method as a share of another's, where both gain as much as `at`.

    None beyond either's range, and where the other forgets nothing; without an interval (NaN) where the other may
    forget nothing. The p-value is that of a ratio of 1.
    """
    if not points or not others:
        return None
    (mine, mine_D), (theirs, theirs_D) = (drawn.read(each, gain, loss, at) for each in (points, others))
    if math.isnan(mine) or not theirs > 0:
        return None
    if np.isnan(theirs_D).all() or np.nanquantile(theirs_D, 0.025) <= 0:
        return Estimate(mine / theirs, math.nan, math.nan)
    # the few draws in which the other forgets nothing count as further out than any ratio
    return _interval(mine / theirs, mine_D / np.maximum(theirs_D, 1e-9 * theirs), null=1.0)


def _interval(value: float, draws_D: np.ndarray, null: float = 0.0) -> Estimate:
    there = np.isfinite(draws_D)
    if there.mean() < IN_RANGE:
        return Estimate(value, math.nan, math.nan)
    return estimate(value, draws_D[there], null)


# -- of all methods ---------------------------------------------------------------------------------------------------


def at_equal_gain(
    rows: Sequence[Point],
    points: Sequence[Point],
    base: Point,
    wanted: Sequence[Measure],
    reference: Point | None,
    gains: Sequence[float],
) -> list[Matched]:
    """Forgetting of every method at the gains given, or at those of the reference and of full finetuning.

    Read off all points, at the seeds that all have; where the reference was run under more seeds, once more, off the
    points that have all of its seeds. Points with scores that are not finite are left out.
    """
    gain = next((measure for measure in wanted if measure.role == "gain"), None)
    losses = [measure for measure in wanted if measure.role == "forgetting"]
    points = finite(points, base, wanted)
    if gain is None or not losses or not points:
        return []
    levels: Levels = {f"gain {gain:g}": float(gain) for gain in gains}
    if not gains:
        full = next((row for row in rows if row.runs[0]["kind"] == "full" and not _replays(row)), None)
        levels = {f"gain of {mark.method}": mark for mark in (reference, full) if mark in points and mark is not None}
    names = list(by_method(rows))
    found = []
    for title, seeds in _seed_sets(rows, points, reference).items():
        own = by_method(at_seeds(points, seeds))
        known: Levels = {
            label + title: at for label, at in levels.items() if not isinstance(at, Point) or at_seeds([at], seeds)
        }
        if any(len(each) > 1 for each in own.values()):
            found += _read_all(names, own, base, gain, losses, known, reference, seeds)
    return found


def _replays(point: Point) -> bool:
    return bool(point.runs[0].get("options", {}).get("replay"))


def finite(points: Sequence[Point], base: Point, wanted: Sequence[Measure]) -> list[Point]:
    """The points whose measures are made of nothing but finite numbers: their training did not diverge."""
    parts = dict.fromkeys((name, metric) for measure in wanted for name, metric, _ in measure.parts)
    return [p for p in points if all(np.isfinite(change_of(p, base, *part).differences_SE).all() for part in parts)]


def _seed_sets(rows: Sequence[Point], points: Sequence[Point], reference: Point | None) -> dict[str, tuple[int, ...]]:
    """The seeds to read points at, by what a label says of them."""
    everywhere = common_seeds(points)
    most = max((row.seeds for row in rows), key=len) if reference is None else reference.seeds
    if set(most) <= set(everywhere):
        return {"": everywhere}
    count = "one seed" if len(everywhere) == 1 else f"{len(everywhere)} seeds"
    return {f", {count} of all points": everywhere, f", the points with {len(most)} seeds": most}


def _read_all(
    names: Sequence[str],
    own: dict[str, list[Point]],
    base: Point,
    gain: Measure,
    losses: Sequence[Measure],
    levels: Levels,
    reference: Point | None,
    seeds: tuple[int, ...],
) -> list[Matched]:
    """For every level and loss, each method beside the reference, with draws of these points alone."""
    tables: dict[tuple[str, Measure], Matched] = {}
    theirs = [] if reference is None else own.get(reference.method, [])
    marks = [at for at in levels.values() if isinstance(at, Point)]
    for name in tqdm(names, desc="forgetting at equal gain", leave=False, disable=None):
        mine = own.get(name, [])
        drawn = Drawn(list(dict.fromkeys([*mine, *theirs, *marks])), base, [gain, *losses], seeds)
        for label, at in levels.items():
            value = mean_of(at, base, gain, seeds) if isinstance(at, Point) else at
            for loss in losses:
                table = tables.setdefault((label, loss), Matched(value, label, loss, {}, {}, seeds))
                lost = matched(drawn, mine, gain, loss, at)
                table.losses[name] = lost and lost.within(*limits(base, loss))
                if mine:
                    table.ranges[name] = drawn.range_of(mine, gain, loss)
                if reference is not None and name != reference.method:
                    table.ratios[name] = matched_ratio(drawn, mine, theirs, gain, loss, at)
    return list(tables.values())
