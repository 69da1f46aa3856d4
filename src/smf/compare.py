"""The comparison: every method of a recipe, for every seed, each in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from .errors import ConfigError, SmfError, TrainingError
from .files import write_atomically
from .prepare import load
from .recipe import Recipe, to_toml

PRELOADED = ["smf.train", "datasets", "lm_eval.models.huggingface"]  # seconds to import, once for all runs


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
    if not all(result_path(*run).is_file() for run in runs):
        load(recipe)  # refuses what can't work before the first method spends time
        write_atomically(Path(recipe.output) / "recipe.toml", to_toml(recipe))
    failed = [run for number, run in enumerate(runs, 1) if not _finish(*run, f"{number} of {len(runs)}")]
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


def _finish(recipe: Recipe, name: str, number: str) -> bool:
    """Whether a run's result is there, after running it where it was not."""
    title = f"smf: {_title(recipe, name)} ({number})"
    if result_path(recipe, name).is_file():
        print(f"{title}: finished, kept", file=sys.stderr)
        return True
    print(title, file=sys.stderr)
    # a server that has imported everything forks each run; not on macOS, whose libraries do not bear forking, nor
    # beside CUDA, which a fork must not have touched: there each run imports for itself
    forks = sys.platform == "linux" and not torch.cuda.is_available()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(recipe, name), name=title)
    process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    finished = process.exitcode == 0 and result_path(recipe, name).is_file()
    if not finished:
        print(f"{title}: ended with exit code {process.exitcode} and no result", file=sys.stderr)
    return finished


def _run(recipe: Recipe, name: str) -> None:
    """In a process of its own: one run, with all that it prints on stderr (the one table is all of stdout)."""
    from .train import run_method

    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    quiet_known_warnings()
    try:
        with redirect_stdout(sys.stderr):
            run_method(recipe, name)
    except SmfError as error:
        print(f"smf: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def quiet_known_warnings() -> None:
    """Hide what transformers says about PEFT's own calls: no user of ours can act on it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _end_with(sentinel: int) -> None:
    """End this process when its parent has gone, so that a restart never meets a run that still goes on."""
    wait([sentinel])
    os._exit(1)


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results without their per-example records, which lie in each run's result.json."""
    short = []
    for result in results:
        scores = {name: {k: v for k, v in s.items() if k != "records"} for name, s in result["scores"].items()}
        short.append(result | {"scores": scores})
    return short
