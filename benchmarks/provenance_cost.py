"""What keeping provenance costs: time of a training step, bytes of the patch and of the optimizer's state.

    python benchmarks/provenance_cost.py

The world's base with the memory of its study, batches of 32 lessons, rows by kl with gradient reads, 512 a step and
layer. Two models train on the same batches in turn, one with provenance; ratios are of medians within the run. Writes
benchmarks/results/provenance_cost.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import smf
from smf.base import load_base
from smf.data import Collator, in_order, pad_id
from smf.methods import attach
from smf.prepare import load
from smf.recipe_file import load_recipe

RESULT = Path(__file__).parent / "results" / "provenance_cost.json"
METHOD = "smf-kl-gradient-t=512"


def trainer(recipe: Any, loaded: Any, provenance: bool) -> tuple[Any, smf.SparseMemoryOptimizer]:
    """A model and its optimizer."""
    model = attach(load_base(recipe), recipe.methods[METHOD], recipe)
    background = smf.read_background(model, loaded.background[:100], tokenizer=loaded.tokenizer, max_length=128)
    optimizer = smf.SparseMemoryOptimizer(
        model, background, lr=0.4, rule="kl", reads="gradient", rows_per_step=512, provenance=provenance
    )
    return model.train(), optimizer


def main() -> None:
    """Train both in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    recipe = load_recipe("world_study.toml")
    loaded = load(recipe)
    collate = Collator(pad_id(loaded.tokenizer), "answer", loaded.places)
    examples = in_order(loaded.train, options.steps * 32, seed=0)
    sides = {"without": trainer(recipe, loaded, False), "with": trainer(recipe, loaded, True)}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    steps: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.steps):
        batch = collate(examples[32 * number : 32 * number + 32])
        for side, (model, optimizer) in sides.items():
            inputs = batch if side == "with" else {k: v for k, v in batch.items() if k != "example_ids"}
            started = time.perf_counter()
            model(**inputs).loss.backward()
            half = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            if number >= 3:
                seconds[side].append(time.perf_counter() - started)
                steps[side].append(time.perf_counter() - half)
    with tempfile.TemporaryDirectory() as name:
        files = {side: Path(name) / f"{side}.smf" for side in sides}
        patches = {side: smf.save_patch(model, files[side]) for side, (model, _) in sides.items()}
        sizes = {side: file.stat().st_size for side, file in files.items()}
    known = patches["with"].provenance
    assert known is not None
    result = {
        "ratio_of_a_whole_step": statistics.median(seconds["with"]) / statistics.median(seconds["without"]),
        "ratio_of_optimizer_step": statistics.median(steps["with"]) / statistics.median(steps["without"]),
        "patch_bytes": sizes,
        "pairs": sum(map(len, known.examples.values())),
        "rows": sum(map(len, patches["with"].rows.values())),
        "rows_with_more_writers": sum(int((rest > 0).sum()) for rest in known.rest.values()),
        "steps": options.steps,
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
