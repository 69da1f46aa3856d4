"""The comparison: every method of a recipe, for every seed, each in a process of its own, here or on a Ray cluster."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from .base import base_config
from .data import Loaded
from .doubts import doubts, warmup_doubts
from .errors import ConfigError, TrainingError
from .files import write_atomically, write_json
from .jobs import Job, run_jobs, start_server
from .locks import LOCK
from .loop import training_steps
from .prepare import load
from .ray_jobs import on_ray
from .recipe import Recipe
from .recipe_file import named, to_toml
from .runs import FAILED, is_finished, read_result

Run = tuple[Recipe, str]  # a recipe, and the name of one of its methods
PRELOADED = ["smf.train", "datasets", "lm_eval.models.huggingface"]  # seconds to import


def compare(recipe: Recipe, only: Sequence[str] = (), seeds: int = 1, ray: str | None = None) -> list[dict[str, Any]]:
    """Run what is not finished yet, then return all results, method by method in the recipe's order.

    Each run has a process of its own, so that its peak memory is its own and a crash takes nothing else along; several
    calls, in as many processes, may share an output folder. A script that calls this needs the usual
    `if __name__ == "__main__":` of Python's multiprocessing.

    Args:
        recipe: what to compare.
        only: names of methods as `named` takes them, beside which the base is always shown; none: all.
        seeds: how many seeds, from the recipe's upwards; the base has one result.
        ray: a cluster to run on, as `smf.ray_jobs.on_ray` takes it; None: this machine.

    Raises:
        ConfigError: for a method that the recipe does not have, or a cluster that cannot be used.
        TrainingError: where a run did not finish; the others are kept.
    """
    only = named(only, recipe.methods)
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1; got {seeds}")
    runs = [
        (replace(recipe, seed=recipe.seed + i), name)
        for name, method in recipe.methods.items()
        if not only or name in only or method.kind == "base"
        for i in range(1 if method.kind == "base" else seeds)
    ]
    failed = run_missing(recipe, runs, ray)
    if failed:
        kept = f"The others are kept, `smf report {recipe.output}` shows them; t" if len(failed) < len(runs) else "T"
        raise TrainingError(
            f"these methods did not finish: {[_title(*run) for run in failed]}; what went wrong is printed above. "
            f"{kept}he same command goes on where it stopped"
        )
    return [read_result(result_path(*run)) for run in runs]


def check_reference(recipe: Recipe, name: str) -> None:
    """Refuse what the methods cannot be compared with."""
    names = [each for each, method in recipe.methods.items() if method.kind != "base"]
    if name not in names:
        raise ConfigError(f"there is no method {name!r} to compare with; there are {sorted(names)}")


def run_missing(recipe: Recipe, runs: Sequence[Run], ray: str | None = None) -> list[Run]:
    """Do those runs that are not finished, `recipe.jobs` at a time, the base first; returns those that failed.

    Args:
        recipe: what all of them share, and all of their methods.
        runs: the recipe with a run's own seed and rates, and the method's name.
        ray: a cluster to run on; None: this machine.
    """
    unfinished: list[tuple[str, Run]] = []
    for number, run in enumerate(runs, 1):
        title = f"{_title(*run)} ({number} of {len(runs)})"
        if is_finished(result_path(*run)):
            print(f"smf: {title}: finished, kept", file=sys.stderr)
        else:
            unfinished.append((title, run))
    if unfinished:
        with _running_on(ray, recipe) as run:
            _run_all(recipe, runs, unfinished, run)
    return [run for run in runs if not result_path(*run).is_file()]


@contextlib.contextmanager
def _running_on(ray: str | None, recipe: Recipe) -> Iterator[Callable[..., None]]:
    """`run_jobs`, on this machine or a cluster."""
    if ray is None:
        start_server(PRELOADED)
        yield run_jobs
    else:
        with on_ray(ray, Path(recipe.output), recipe.jobs) as workers:
            yield partial(run_jobs, workers=workers)


def _run_all(
    recipe: Recipe, runs: Sequence[Run], unfinished: Sequence[tuple[str, Run]], run_jobs: Callable[..., None]
) -> None:
    """The base, and the others once it is scored: what cannot score the base can score no method after its training."""
    loaded = load(recipe)  # refuses what can't work before the first method spends time
    for doubt in warmup_doubts(recipe.train.warmup_steps, training_steps(recipe.train, len(loaded.train))):
        print(f"smf: warning: {doubt}", file=sys.stderr)
    write_atomically(Path(recipe.output) / "recipe.toml", to_toml(recipe))
    bases = [(title, run) for title, run in unfinished if run[0].methods[run[1]].kind == "base"]
    run_jobs([_job(title, run, loaded) for title, run in bases], recipe.jobs)
    if all(result_path(*run).is_file() for _, run in bases):
        _warn(runs)  # within the first minute, not after hours
        run_jobs([_job(title, run, loaded) for title, run in unfinished if (title, run) not in bases], recipe.jobs)


def _warn(runs: Sequence[Run]) -> None:
    """Say what the base's scores say against the comparison."""
    for run in runs:
        if run[0].methods[run[1]].kind == "base" and result_path(*run).is_file():
            words = getattr(base_config(run[0]), "vocab_size", None) or 32_000
            for doubt in doubts(read_result(result_path(*run))["scores"], words):
                print(f"smf: warning: {doubt}", file=sys.stderr)


def _job(title: str, run: Run, loaded: Loaded) -> Job:
    folder = result_path(*run).parent
    return Job(title, _run, (*run, loaded), folder / "log.txt", folder / LOCK)


def result_path(recipe: Recipe, name: str) -> Path:
    """Where one method's result lies, once it has finished."""
    return Path(recipe.output) / recipe.run_id(name) / "result.json"


def _title(recipe: Recipe, name: str) -> str:
    rate = recipe.methods[name].lr
    return f"{name}, {f'lr {rate:g}, ' if rate else ''}seed {recipe.seed}"


def _run(recipe: Recipe, name: str, loaded: Loaded) -> None:
    """In a process of its own: one run; one whose training fails leaves the reason, which reports show."""
    from .train import run_method

    quiet_known_warnings()
    failed = result_path(recipe, name).with_name(FAILED)
    try:
        run_method(recipe, name, loaded, wait=True)  # for another comparison that is at it
    except TrainingError as error:
        method = recipe.methods[name]
        run = {"method": name, "options": asdict(method), "seed": recipe.seed, "code": method.code()}
        with contextlib.suppress(OSError):  # the error itself counts
            write_json(failed, run | {"comparison": recipe.comparison_id(), "reason": str(error)})
        raise
    failed.unlink(missing_ok=True)


def quiet_known_warnings() -> None:
    """Hide what transformers says about PEFT's own calls: no user of ours can act on it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
