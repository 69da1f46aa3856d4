"""A summary as numbers: CSV, and JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from typing import Any

from .stats import RATIOS, Estimate
from .study import Measure, Point, numbers_of, seed_of
from .summary import Summary, verdict
from .table import COSTS, mean_cost, numbered, one_line

CSV = ["what", "method", "lr", "share", "seeds", "against", "set", "role", "metric", "unit"]  # and the numbers


def as_csv(summary: Summary) -> str:
    """Every number of the tables on a line of its own, unrounded.

    `what` is "score" (with its change against the base, as a share or in nats per token), "overall" (forgetting),
    "cost", "learned" and "forgotten" (questions that changed sides, on average over the seeds), "difference" (from the
    method `against`; p by Holm), "equal gain" (forgotten where `against` says) or "equal gain, ratio" (to that of the
    reference).
    """
    buffer = io.StringIO()
    columns = [*CSV, "score", "change", "low", "high", "p", "verdict"]
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows([*_csv_scores(summary), *_csv_differences(summary), *_csv_equal_gains(summary)])
    return buffer.getvalue()


def _csv_scores(summary: Summary) -> Iterator[dict[str, Any]]:
    for number, point in numbered(summary):
        run = {"method": one_line(point.method), "lr": point.lr, "share": point.share, "seeds": len(point.runs)}
        for column in summary.columns:
            where = {"set": one_line(column.scored), "role": column.role, "metric": column.metric}
            unit = "nats per token" if column.metric in RATIOS else "share"
            score = {"unit": unit, "score": point.mean(column.scored, column.metric)}
            found = _csv_estimate(summary.changes.get((number, column)))
            yield {"what": "score"} | run | where | score | found
        if number >= 0 and summary.overall:
            found = _csv_estimate(summary.overall[number])
            yield {"what": "overall"} | run | {"role": "forgetting", "unit": "%"} | found
        for title in COSTS:
            if (cost := mean_cost(point.runs, title)) is not None:
                yield {"what": "cost"} | run | {"metric": title, "score": cost}
        for scored, counts in summary.flips[number].items() if number >= 0 and summary.flips else ():
            for what, count in zip(("learned", "forgotten"), counts, strict=True):
                yield {"what": what} | run | {"set": one_line(scored), "unit": "questions", "score": count}


def _csv_differences(summary: Summary) -> Iterator[dict[str, Any]]:
    for row, comparisons in summary.compared():
        run = {"method": one_line(row.method), "lr": row.lr, "share": row.share}
        run["against"] = one_line(summary.reference.method if summary.reference else "")
        for each in comparisons:
            found = _csv_estimate(each.estimate) | {"p": each.adjusted, "seeds": each.seeds, "verdict": verdict(each)}
            yield {"what": "difference"} | run | _csv_measure(each.measure) | found


def _csv_equal_gains(summary: Summary) -> Iterator[dict[str, Any]]:
    for table in summary.matched:
        for name, lost in table.losses.items():
            run = {"method": one_line(name), "seeds": len(table.seeds), "against": one_line(table.label)}
            for what, found in (("equal gain", lost), ("equal gain, ratio", table.ratios.get(name))):
                if found is not None:
                    yield {"what": what} | run | _csv_measure(table.measure) | _csv_estimate(found) | {"p": ""}


def _csv_measure(measure: Measure) -> dict[str, Any]:
    return {"set": one_line(measure.name), "role": measure.role, "unit": measure.unit}


def _csv_estimate(found: Estimate | None) -> dict[str, Any]:
    return {} if found is None else {"change": found.value, "low": found.low, "high": found.high, "p": found.p}


def as_json(summary: Summary) -> dict[str, Any]:
    """Everything, without the per-example records: the rows of the tables, and every point of every method.

    What is no finite number is None, as JSON has no other word for it.
    """
    methods = []
    for number, point in enumerate(summary.rows):
        changes = {f"{c.scored} {c.metric}": vars(e) for (place, c), e in summary.changes.items() if place == number}
        row: dict[str, Any] = {"changes": changes, "interior": summary.interior[number], "rates": summary.rates[number]}
        row["overall"] = vars(summary.overall[number]) if summary.overall else None
        row["flips"] = summary.flips[number] if summary.flips else {}
        methods.append(_point_json(point) | row | {"runs": [_run_json(run) for run in point.runs]})
    return _strict(
        {
            "base": None if summary.base is None else _point_json(summary.base),
            "methods": methods,
            "points": [_point_json(point) for point in summary.points],
            "matched": [vars(m) | {"measure": m.measure.name, "unit": m.measure.unit} for m in summary.matched],
            "failed": list(summary.failed),
            "match": list(summary.match),
            "reference": summary.reference and summary.reference.method,
            "comparisons": [
                vars(c) | {"lr": row.lr, "measure": c.measure.name, "unit": c.measure.unit}
                for row, found in summary.compared()
                for c in found
            ],
        }
    )


def _strict(value: Any) -> Any:
    """Plain JSON, without NaN and infinity."""
    if isinstance(value, Estimate):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _point_json(point: Point) -> dict[str, Any]:
    first = point.runs[0]
    keys = {"method": point.method, "kind": first["kind"], "lr": point.lr, "share": point.share}
    keys |= {"steps": first.get("steps"), "options": first.get("options", {})}
    return keys | {"scores_by_seed": {str(seed_of(run)): numbers_of(run["scores"]) for run in point.runs}}


def _run_json(run: dict[str, Any]) -> dict[str, Any]:
    left_out = ("scores", "on_the_way", "folder", "options")
    return {key: value for key, value in run.items() if key not in left_out}
