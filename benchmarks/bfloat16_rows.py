"""What it costs to store a patch's rows in bfloat16: both scored by a recipe, and how many answers differ.

python benchmarks/bfloat16_rows.py world_study.toml RUN/patch.smf > benchmarks/results/bfloat16_rows.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import smf
from smf.recipe_file import load_recipe
from smf.study import numbers_of
from smf.train import evaluate_saved, provenance


def main(recipe_path: str, patch_path: str) -> dict[str, Any]:
    """Score base, patch and rounded patch."""
    recipe = replace(load_recipe(Path(recipe_path)), divergence=0)
    with tempfile.TemporaryDirectory() as folder:
        rounded = Path(folder) / "rounded.smf"
        smf.save_patch(smf.load_patch(patch_path), rounded, stored="bfloat16")
        sizes = {"float32": Path(patch_path).stat().st_size, "bfloat16": rounded.stat().st_size}
        base, whole = (each["scores"] for each in evaluate_saved(recipe, adapter=None, patch=patch_path))
        half = evaluate_saved(recipe, adapter=None, patch=str(rounded))[1]["scores"]
    differ = {
        name: sum(a.get("said") != b.get("said") for a, b in zip(each["records"], half[name]["records"], strict=True))
        for name, each in whole.items()
    }
    scores = {"base": numbers_of(base), "float32": numbers_of(whole), "bfloat16": numbers_of(half)}
    return {"patch": patch_path, "bytes": sizes, "scores": scores, "answers_that_differ": differ} | provenance(recipe)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:]), indent=2))
