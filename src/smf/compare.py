"""The comparison: every method of a recipe, for every seed, each in a process of its own."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import ConfigError, TrainingError
from .files import write_atomically
from .jobs import Job, run_jobs, start_server
from .prepare import Loaded, load
from .recipe import Recipe, to_toml

PRELOADED = ["smf.train", "datasets", "lm_eval.models.huggingface"]  # seconds to import


def compare(recipe: Recipe, only: Sequence[str] = (), seeds: int = 1) -> list[dict[str, Any]]:
    """Run what is not finished yet, then return all results, method by method in the recipe's order.

    Each run has a process of its own, so that its peak memory is its own and a crash takes nothing else along. A
    script that calls this needs the usual `if __name__ == "__main__":` of Python's multiprocessing.

    Args:
        recipe: what to compare.
        only: names of methods, beside which the base is always shown; none: all.
        seeds: how many seeds, from the recipe's upwards; the base has one result.

    Raises:
        ConfigError: for a method that the recipe does not have.
        TrainingError: where a run did not finish; the others are kept.
    """
    unknown = [name for name in only if name not in recipe.methods]
    if unknown:
        raise ConfigError(
            f"the recipe has no [methods.{unknown[0]}]; its methods: {sorted(recipe.methods)}; separate names by blanks"
        )
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1; got {seeds}")
    runs = [
        (replace(recipe, seed=recipe.seed + i), name)
        for name, method in recipe.methods.items()
        if not only or name in only or method.kind == "base"
        for i in range(1 if method.kind == "base" else seeds)
    ]
    unfinished: list[tuple[str, tuple[Recipe, str]]] = []
    for number, run in enumerate(runs, 1):
        title = f"{_title(*run)} ({number} of {len(runs)})"
        if result_path(*run).is_file():
            print(f"smf: {title}: finished, kept", file=sys.stderr)
        else:
            unfinished.append((title, run))
    if unfinished:
        start_server(PRELOADED)
        loaded = load(recipe)  # refuses what can't work before the first method spends time
        write_atomically(Path(recipe.output) / "recipe.toml", to_toml(recipe))
        jobs = [Job(title, _run, (*run, loaded), result_path(*run).with_name("log.txt")) for title, run in unfinished]
        run_jobs(jobs, recipe.jobs)
    failed = [run for run in runs if not result_path(*run).is_file()]
    if failed:
        raise TrainingError(
            f"these methods did not finish: {[_title(*run) for run in failed]}; what went wrong is printed above. The "
            f"others are kept in {recipe.output}; the same command goes on where it stopped"
        )
    return [read_result(result_path(*run)) for run in runs]


def result_path(recipe: Recipe, name: str) -> Path:
    """Where one method's result lies, once it has finished."""
    return Path(recipe.output) / recipe.run_id(name) / "result.json"


def read_result(path: Path) -> dict[str, Any]:
    """One run's result, with the folder that it lies in."""
    return json.loads(path.read_text()) | {"folder": str(path.parent)}


def _title(recipe: Recipe, name: str) -> str:
    return f"{name}, seed {recipe.seed}"


def _run(recipe: Recipe, name: str, loaded: Loaded) -> None:
    """In a process of its own: one run."""
    from .train import run_method

    quiet_known_warnings()
    run_method(recipe, name, loaded)


def quiet_known_warnings() -> None:
    """Hide what transformers says about PEFT's own calls: no user of ours can act on it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results without their per-example records, which lie in each run's result.json."""
    short = []
    for result in results:
        scores = {name: {k: v for k, v in s.items() if k != "records"} for name, s in result["scores"].items()}
        short.append(result | {"scores": scores})
    return short
