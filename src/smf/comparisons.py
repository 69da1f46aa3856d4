"""One method against another: the difference of a measure, its interval, and p over all comparisons of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .stats import DRAWS, Estimate, holm, mcnemar
from .study import Measure, Point, changes_at, limits, seed_of, weighted, weights_of


@dataclass(frozen=True)
class Comparison:
    """A method's measure minus the reference's.

    Args:
        method: its name.
        measure: what is compared.
        estimate: of the difference.
        seeds: how many both have.
        test: "bootstrap", or "McNemar" for two single runs of questions that are independent.
        p: of no difference.
        adjusted: p by Holm over all comparisons of the table.
        clusters: things that were asked about.
        differing: of these, those on which the two differ under some seed.
        least: the smallest p that the test could give, before the adjustment.
    """

    method: str
    measure: Measure
    estimate: Estimate
    seeds: int
    test: str
    p: float
    adjusted: float
    clusters: int
    differing: int
    least: float


def against(rows: Sequence[Point], reference: Point, base: Point, wanted: Sequence[Measure]) -> list[Comparison]:
    """Every method compared with the reference, in every measure; p-values adjusted over all of them together.

    Row by row, measure by measure; rows that share no seed with the reference are left out. The number of draws grows
    with that of the comparisons, so that an adjusted p can be as small as 0.01.
    """
    pairs = [
        (point, measure)
        for point in rows
        if point is not reference and point is not base and set(point.seeds) & set(reference.seeds)
        for measure in wanted
    ]
    count = max(DRAWS, 200 * len(pairs) - 1)
    raw = [_compare(point, reference, base, measure, count) for point, measure in pairs]
    adjusted = holm([comparison.p for comparison in raw])
    return [replace(comparison, adjusted=p) for comparison, p in zip(raw, adjusted, strict=True)]


def _compare(point: Point, reference: Point, base: Point, measure: Measure, count: int) -> Comparison:
    seeds = tuple(sorted(set(point.seeds) & set(reference.seeds)))
    both = [*changes_at(point, base, measure, seeds), *changes_at(reference, base, measure, seeds)]
    weights_K = np.concatenate([weights_of(measure), -weights_of(measure)])
    least, most = limits(base, measure)
    difference = weighted(weights_K, both, count).within(least - most, most - least)
    test, p, least = "bootstrap", difference.p, 2 / (count + 1)
    if len(seeds) == 1 and len(measure.parts) == 1:
        name, metric, _ = measure.parts[0]
        mine, theirs = (_records(side, seeds[0], name) for side in (point, reference))
        if all(record.get(metric) in (0, 1) and "cluster" not in record for record in (*mine, *theirs)):
            test, p, least = "McNemar", mcnemar(mine, theirs, metric), 0.0
    half = len(both) // 2
    clusters, differing = 0, 0
    for mine, theirs in zip(both[:half], both[half:], strict=True):
        differs_E = (mine.differences_SE != theirs.differences_SE).any(0)
        clusters += int(mine.cluster_E.max()) + 1
        differing += len(np.unique(mine.cluster_E[differs_E]))
    return Comparison(point.method, measure, difference, len(seeds), test, p, p, clusters, differing, least)


def _records(point: Point, seed: int, name: str) -> list[dict[str, Any]]:
    return next(run for run in point.runs if seed_of(run) == seed)["scores"][name]["records"]
