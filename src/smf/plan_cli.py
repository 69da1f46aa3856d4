"""What `smf doctor --plan` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .table import print_plain

if TYPE_CHECKING:
    from .plan import Measured, Plan, Prediction

GIB, MIB = 2**30, 2**20
HEADER = ["model", "method", "rows", "GFLOP a token", "TFLOP a step", "weights", "of it table", "passes", "factors"]
HEADER += ["states", "memory, GiB", "checkpoint", "result", "patch, MiB", "exchanged, MiB", "s a step"]


def print_plan(recipe: Any, as_json: bool, larger: bool = False) -> None:
    """Print what a recipe would take, or as JSON."""
    from .plan import plan

    found = plan(recipe, larger)
    if as_json:
        print(json.dumps(as_table(found), indent=2))
        return
    measured = [_measured_row(kind, each) for kind, each in found.measured.items()]
    header = ["kind", "s passes", "s optimizer", "GFLOP/s", "of a product's", "peak, MiB", "predicted, MiB"]
    print_plain("Measured here", header, measured)
    for title, predictions in (("This recipe", found.recipe), ("Larger models and tables", found.larger)):
        if predictions:
            print_plain(title, HEADER, _rows(predictions))
    print("All sizes in GiB, but for MiB where it says so; of a step on one rank, with all micro-batches.")
    print(*(f"- {line}" for line in found.about), sep="\n")


def as_table(found: Plan) -> dict[str, Any]:
    """As JSON: bytes, FLOPs, seconds."""
    predictions = {"recipe": found.recipe, "larger": found.larger}
    measured = {kind: asdict(each) | {"efficiency": each.efficiency} for kind, each in found.measured.items()}
    return {"about": found.about, "measured": measured} | {
        name: [asdict(each) for each in some] for name, some in predictions.items()
    }


def _measured_row(kind: str, each: Measured) -> list[str]:
    speed, predicted = each.costs.flops / each.passes, each.before + each.costs.memory
    return [
        kind,
        f"{each.passes:.3f}",
        f"{each.step:.3f}",
        f"{speed / 1e9:,.0f}",
        f"{each.efficiency:.0%}",
        f"{each.peak / MIB:,.0f}",
        f"{predicted / MIB:,.0f}",
    ]


def _rows(predictions: Sequence[Prediction]) -> list[list[str]]:
    rows = []
    for each in predictions:
        costs = each.costs
        sizes = [costs.weights, costs.table, costs.passes, costs.factors, costs.states]
        rows.append(
            [
                each.model,
                each.method,
                f"{each.rows:,}" if each.rows else "",
                f"{costs.flops / costs.tokens / 1e9:,.2f}",
                f"{costs.flops / 1e12:,.2f}",
                *(f"{size / GIB:,.2f}" for size in sizes),
                f"{each.memory / GIB:,.2f}",
                f"{costs.checkpoint / GIB:,.2f}",
                f"{costs.result / GIB:,.2f}",
                f"{costs.patch / MIB:,.1f}",
                f"{costs.exchanged / MIB:,.1f}",
                "" if each.seconds is None else f"{each.seconds:,.2f}",
            ]
        )
    return rows
