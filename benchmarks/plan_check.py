"""What `smf doctor --plan` predicts against what is measured: peak memory and seconds of a step, as ratios.

    python benchmarks/plan_check.py

Each method runs on each size in a process of its own, the sizes in turn. The smallest size is what `--plan` measures
where a recipe's base is not there; seconds on the others are predicted from it, by the FLOPs that are counted and the
speed of a plain matrix product of their width (measured in the same process, so that whatever else this machine does
weighs on both). Peak memory is predicted from counted bytes and from the process without its model. Weights and tokens
are random; 1 x 128 tokens a step, as `--plan` measures. Writes benchmarks/results/plan_check.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import Qwen2Config

from memory_growth import machine, versions
from smf.plan import BACKBONES, STAND_IN, Measured, _shape, measure_alone, short
from smf.recipe_file import load_recipe

SIZES = {"stand-in": STAND_IN, "0.1B": _shape(768, 2048, 12, 12, 4, 32768, True), "0.5B": BACKBONES["0.5B"]}
METHODS = ("smf", "lora", "full")
RESULT = Path(__file__).parent / "results" / "plan_check.json"


def measured(size: str, name: str) -> Measured:
    """Some steps of a method of `medmcqa.toml`, its memory at a quarter, the middle and three quarters of the depth."""
    recipe = short(load_recipe("medmcqa.toml"))
    method = replace(recipe.methods[name], memory=replace(recipe.memory, layers=None))
    return measure_alone(recipe, method, Qwen2Config(**SIZES[size]))


def ratios(found: Measured, like: Measured) -> dict[str, float]:
    """Predicted by measured."""
    work, before = (each.costs.numbers + 2 * each.costs.reads for each in (found, like))
    passes = found.costs.flops / (like.efficiency * found.product)
    step = like.step * work / before
    return {
        "memory": (found.before + found.costs.memory) / found.peak,
        "seconds": (passes + step) / (found.passes + found.step),
        "seconds of the passes": passes / found.passes,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    given = parser.parse_args()
    busy = os.getloadavg()[0]
    turns: dict[str, list[dict[str, Any]]] = {}
    for turn in range(given.turns):
        for name in METHODS:
            like = measured("stand-in", name)
            for size in given.sizes:
                found = like if size == "stand-in" else measured(size, name)
                compared = ratios(found, like)
                turns.setdefault(f"{size} {name}", []).append({"ratios": compared, "measured": asdict(found)})
                shown = ", ".join(f"{what} {ratio:.2f}" for what, ratio in compared.items())
                print(f"turn {turn + 1}, {size:>8} {name:>5}: predicted / measured: {shown}", flush=True)
    results = {
        side: {what: spread([each["ratios"][what] for each in found]) for what in found[0]["ratios"]}
        for side, found in turns.items()
    }
    report = {
        "command": f"python {' '.join(sys.argv)}",
        "machine": machine() | {"load average at the start": busy},
        "versions": versions(),
        "results, predicted / measured": results,
        "turns": turns,
    }
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
