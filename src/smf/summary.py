"""Everything that tables, files and the report show of a set of runs, worked out once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .comparisons import Comparison, against
from .errors import ConfigError, DataError
from .matched import Matched, at_equal_gain
from .recipe import VALIDATION
from .stats import RATIOS, Estimate, flips, non_inferior
from .study import (
    Measure,
    Point,
    by_method,
    chosen,
    common_seeds,
    goal_of,
    measured,
    measures,
    points_of,
    stages,
    target_shown,
    validated,
    validation_of,
)
from .tasks import find_task

ENOUGH = 5  # things asked about that differ, for an interval to be trusted
MARGIN = 0.5  # points of the target's gain: a method is not inferior where it is sure to lose less


@dataclass(frozen=True)
class Column:
    """One metric of one scored set.

    Args:
        scored: name of the set.
        role: "target", "probe" or "divergence".
        metric: its name.
        unit: of a change: "points" or "nats per token".
        digits: behind the point.
        scale: from the score to the unit.
    """

    scored: str
    role: str
    metric: str
    unit: str
    digits: int
    scale: int


@dataclass(frozen=True)
class Summary:
    """What a set of runs shows.

    Args:
        base: the untouched model; None where it was not run, and then nothing is compared.
        rows: the chosen point of each method, in the order of the results.
        points: all points of all methods.
        columns: of the table: targets, probes, divergences.
        changes: of each row (by its place) and column against the base.
        interior: whether a chosen learning rate has neighbours on both sides; None for one rate alone, or no choice.
        overall: of each row, the forgetting over all probes; empty with fewer than two.
        flips: of each row and set of questions, how many went from wrong to right and from right to wrong, a run.
        matched: forgetting at equal gain; empty where no method has more points than one.
        reference: the method that the others are compared with, and the comparisons.
        rates: number of learning rates that the method of each row was tried at.
        failed: runs whose training failed: method, options, seed and reason of each.
        match: methods whose best point the others are chosen to learn as much as.
    """

    base: Point | None
    rows: list[Point]
    points: list[Point]
    columns: list[Column]
    changes: dict[tuple[int, Column], Estimate] = field(default_factory=dict)
    interior: list[bool | None] = field(default_factory=list)
    overall: list[Estimate] = field(default_factory=list)
    flips: list[dict[str, tuple[float, float]]] = field(default_factory=list)
    matched: list[Matched] = field(default_factory=list)
    reference: Point | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    rates: list[int] = field(default_factory=list)
    failed: Sequence[dict[str, Any]] = ()
    match: Sequence[str] = ()

    def compared(self) -> list[tuple[Point, list[Comparison]]]:
        """The comparisons of each row that has some, one for each measure."""
        if self.reference is None:
            return []
        seeds = set(self.reference.seeds)
        found = [row for row in self.rows if row is not self.reference and seeds & set(row.seeds)]
        size = len(self.comparisons) // max(1, len(found))
        return [(row, self.comparisons[place * size : (place + 1) * size]) for place, row in enumerate(found)]


def summarise(
    results: Sequence[dict[str, Any]],
    target_metrics: Sequence[str],
    reference: str | None = None,
    gains: Sequence[float] = (),
    failed: Sequence[dict[str, Any]] = (),
    match: Sequence[str] = (),
) -> Summary:
    """Choose, compare and read off.

    Args:
        results: of one comparison.
        target_metrics: shown of each target set; points are chosen by the first.
        reference: method to compare the others with; None: the first LoRA, else full finetuning, else none.
        gains: at which to read off forgetting, in the unit of the first target's metric; none: those that the
            reference and full finetuning have.
        failed: runs whose training failed, as `read_runs` finds them.
        match: names of methods; each of the others stands at the lowest learning rate that learns as much as the best
            of these.

    Raises:
        DataError: where results were not scored on the same sets.
        ConfigError: for a reference, a metric or a gain that they do not have.
    """
    _check(results, target_metrics)
    if not all(map(math.isfinite, gains)):
        raise ConfigError(f"forgetting is read off at gains that are numbers, not {list(gains)}")
    points = points_of(results)
    base = next((point for point in points if point.runs[0]["kind"] == "base"), None)
    points = [point for point in points if point.runs[0]["kind"] != "base"]
    match = [name for name in match if any(point.method == name for point in points)]
    rows = chosen(points, target_metrics[0], match)
    columns = columns_of(results[0]["scores"], target_metrics)
    own = by_method(points)
    if reference is not None and reference not in own:
        raise ConfigError(f"there is no method {reference!r} to compare with; there are {list(own)}")
    tried = [_tried(own[row.method], failed) for row in rows]
    rates = [len(each) for each in tried]
    goal = goal_of(points, target_metrics[0], match)
    lowest = [row.method not in match and _reaches(row, own[row.method], target_metrics[0], goal) for row in rows]
    interior = [_interior(*each) for each in zip(rows, tried, lowest, strict=True)]
    if base is None:
        return Summary(base, rows, points, columns, interior=interior, rates=rates, failed=failed, match=match)
    wanted = measures(base.runs[0], target_metrics)
    with_which = _reference(rows, reference)
    overall = [measure for measure in wanted if len(measure.parts) > 1]
    matched = at_equal_gain(rows, points, base, wanted, with_which, gains)
    if gains and not matched:
        raise ConfigError(
            "what is forgotten at a gain is read off between points of a method, but none has two: score on the way "
            "(train.score_at), or run it at several learning rates (smf tune)"
        )
    return Summary(
        base,
        rows,
        points,
        columns,
        changes={(i, column): _change(row, base, column) for i, row in enumerate(rows) for column in columns},
        interior=interior,
        overall=[measured(row, base, measure) for measure in overall for row in rows],
        flips=[_flips(row, base) for row in rows],
        matched=matched,
        reference=with_which,
        comparisons=[] if with_which is None else against(rows, with_which, base, wanted),
        rates=rates,
        failed=failed,
        match=match,
    )


def _check(results: Sequence[dict[str, Any]], target_metrics: Sequence[str]) -> None:
    if not results:
        raise DataError("there are no results to report; run `smf compare` first")
    if not target_metrics:
        raise ConfigError("there is no metric of the target to show; give at least one")
    first = results[0]
    for result in results:
        for stage in stages(result):
            if set(stage.scores) != set(first["scores"]):
                raise DataError(
                    f"{first['method']!r} was scored on {list(first['scores'])}, {result['method']!r} on "
                    f"{list(stage.scores)}; they cannot be in one table"
                )
    main = next((score["task"] for score in first["scores"].values() if score["role"] == "target"), "")
    for name, score in first["scores"].items():
        unknown = [metric for metric in target_metrics if metric not in score["metrics"]]
        if score["role"] in ("target", "validation") and score["task"] == main and unknown:
            raise ConfigError(f"{name} has no score {unknown[0]!r}; it has {list(score['metrics'])}")


def columns_of(scores: dict[str, Any], target_metrics: Sequence[str]) -> list[Column]:
    """What a table shows: of targets the metrics asked for, of other sets the first of their task."""
    columns = []
    for role in ("target", "probe", "divergence"):
        for name, score in scores.items():
            if score["role"] == role:
                metrics = ["nats"] if role == "divergence" else find_task(score["task"]).METRICS[:1]
                shown = target_shown(score, target_metrics) if role == "target" else metrics
                columns += [_column(name, role, metric) for metric in shown]
    return columns


def _column(name: str, role: str, metric: str) -> Column:
    return Column(name, role, metric, *(("nats per token", 3, 1) if metric in RATIOS else ("points", 1, 100)))


def _change(point: Point, base: Point, column: Column) -> Estimate:
    changed = Measure(column.scored, column.unit, 1.0, ((column.scored, column.metric, 1.0),), "gain")
    return measured(point, base, changed)


def _tried(own: Sequence[Point], failed: Sequence[dict[str, Any]]) -> list[float]:
    """The learning rates of a method, those at which training failed too, ascending."""
    name = own[0].runs[0]["method"]
    return sorted({point.lr for point in own} | {run["options"]["lr"] for run in failed if run["method"] == name})


def _reaches(row: Point, own: Sequence[Point], metric: str, goal: float) -> bool:
    """Whether a method learned as much as it had to, so that its row stands at its lowest rate that does."""
    return validated(row) and validation_of(row, metric, common_seeds(own)) >= goal


def _interior(point: Point, rates: Sequence[float], lowest: bool) -> bool | None:
    """Whether rates on both sides were tried; of the lowest that learns enough, whether a lower one was."""
    if len(rates) < 2 or VALIDATION not in point.runs[0]["scores"]:
        return None
    return rates[0] < point.lr and (lowest or point.lr < rates[-1])


def _flips(point: Point, base: Point) -> dict[str, tuple[float, float]]:
    counts = {}
    for name, score in base.runs[0]["scores"].items():
        metric = "nats" if score["role"] in ("divergence", "validation") else find_task(score["task"]).METRICS[0]
        if metric not in RATIOS:
            sides = [flips(run["scores"][name]["records"], score["records"], metric) for run in point.runs]
            learned, forgotten = (sum(len(side[i]) for side in sides) / len(sides) for i in (0, 1))
            counts[name] = (learned, forgotten)
    return counts


def _reference(rows: Sequence[Point], name: str | None) -> Point | None:
    if name is not None:
        return next(point for point in rows if point.method == name)
    for kind in ("lora", "full"):
        for point in rows:
            if point.runs[0]["kind"] == kind and len(rows) > 1:
                return point
    return None


def verdict(comparison: Comparison) -> str:
    """Whether the method gains at most half a point less than the reference; "" where that is not asked.

    Where hardly any example differs the interval is too short to say (of n things asked about, 3 / n may still differ
    when none was seen to), unless there are so many that this is below the margin.
    """
    low, high = comparison.estimate.low, comparison.estimate.high
    if comparison.measure.role != "gain" or comparison.measure.unit != "points" or math.isnan(low):
        return ""
    if comparison.differing < ENOUGH and 100 * 3 / comparison.clusters >= MARGIN:
        return "too few changed to say"
    if non_inferior(comparison.estimate, MARGIN):
        return "non-inferior"
    return "inferior" if high < -MARGIN else "may be inferior"
