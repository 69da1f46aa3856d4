"""Sparse memory finetuning: train, evaluate and compare methods from a recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from .errors import ConfigError, SmfError

try:
    import tyro
    from tyro.conf import OmitArgPrefixes, Positional
except ImportError:  # the command needs the extra [run]; the library does not
    sys.exit("the command smf needs more packages: pip install 'sparse-memory-finetuning[run]'")

RecipePath = Annotated[Positional[Path], tyro.conf.arg(help="a recipe file, or the name of a shipped one")]


@dataclass(frozen=True)
class Overrides:
    """Keys of the recipe to replace; where none is given, the recipe's own count."""

    base: str | None = None
    """Model folder, hub name, or "world": the embedded one."""
    data: str | None = None
    """Folder with the data sets, "hub", or "world": the embedded sets."""
    output: str | None = None
    """Folder of the runs."""
    seed: int | None = None
    """Of data order and initial values."""
    jobs: int | None = None
    """Methods that run at a time, with an equal share of the processor's cores each."""
    max_steps: int | None = None
    """Stop every training after so many steps (to try a recipe)."""
    limit: int | None = None
    """Score the first so many rows of every set, in place of the recipe's limits; 0: all rows."""

    def load(self, path: Path) -> Any:
        """The recipe at `path` with these keys in place of its own."""
        from .recipe import limited, load_recipe, shortened

        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"--max-steps must be at least 1; got {self.max_steps}")
        if self.limit is not None and self.limit < 0:
            raise ConfigError(f"--limit must be at least 0; got {self.limit}")
        keys = {key: getattr(self, key) for key in ("base", "data", "output", "seed", "jobs")}
        recipe = load_recipe(path, **keys)
        recipe = recipe if self.max_steps is None else shortened(recipe, self.max_steps)
        return recipe if self.limit is None else limited(recipe, self.limit)


Options = OmitArgPrefixes[Overrides]


def train(recipe: RecipePath, /, method: str, overrides: Options = Overrides()) -> None:
    """Train and score one method of a recipe; a killed run goes on where it stopped.

    Args:
        method: name of a [methods.NAME] table.
    """
    from .compare import result_path
    from .table import print_table
    from .train import run_method

    loaded = overrides.load(recipe)
    result = run_method(loaded, method)
    if "scores" in result:  # torchrun: the first rank's alone
        bases = [result_path(loaded, name) for name, m in loaded.methods.items() if m.kind == "base" and name != method]
        before = [json.loads(path.read_text()) for path in bases if path.is_file()]
        title = f"{method} -> {result_path(loaded, method).parent}"
        print_table([*before, result], title, loaded.target.metrics)


def evaluate(
    recipe: RecipePath,
    /,
    adapter: str | None = None,
    patch: str | None = None,
    overrides: Options = Overrides(),
) -> None:
    """Score the base of a recipe, and an adapter or patch of it, on the recipe's target and probes.

    Args:
        adapter: folder of a saved PEFT adapter (of any method).
        patch: file written by smf.save_patch.
    """
    from .table import print_table
    from .train import evaluate_saved

    loaded = overrides.load(recipe)
    results = evaluate_saved(loaded, adapter=adapter, patch=patch)
    print_table(results, f"{recipe.stem} on {loaded.base}", loaded.target.metrics)


def compare(
    recipe: RecipePath,
    /,
    methods: tuple[str, ...] = (),
    seeds: int = 1,
    overrides: Options = Overrides(),
) -> None:
    """Train and score every method of a recipe; print one table and write report.html.

    Finished methods are not run again, and a killed run goes on where it stopped.

    Args:
        methods: names of [methods.NAME] tables, beside which the base is always shown; none: all.
        seeds: how many seeds to run, from the recipe's upwards.
    """
    from .compare import compare as run_all
    from .compare import summary
    from .files import write_atomically, write_json
    from .report import write_report
    from .table import markdown_table, print_table

    loaded = overrides.load(recipe)
    results = run_all(loaded, methods, seeds)
    title, metrics, output = f"{recipe.stem} on {loaded.base}", loaded.target.metrics, Path(loaded.output)
    print_table(results, title, metrics)
    write_atomically(output / "table.md", markdown_table(results, metrics))
    write_json(output / "summary.json", summary(results))
    write_report(results, output / "report.html", title, _notes(loaded, results), metrics)
    print(f"report: {output / 'report.html'}")


def _notes(recipe: Any, results: list[dict[str, Any]]) -> list[str]:
    """What a report says above its table."""
    from .table import methods_at_a_time

    shown = {result["method"]: recipe.methods[result["method"]] for result in results if result["kind"] != "base"}
    rates = ", ".join(f"{name} {method.lr:g}" for name, method in shown.items())
    per_step = f"{recipe.train.steps or recipe.train.epochs} {'steps' if recipe.train.steps else 'epochs'}"
    return [
        *recipe.about,
        f"Every method: {per_step} with {recipe.train.batch_size} examples a step. Learning rates: {rates}.",
        f"Made by: smf {' '.join(sys.argv[1:])}, with {methods_at_a_time(results)} of the methods running at a time",
    ]


def demo(methods: tuple[str, ...] = (), seeds: int = 1, overrides: Options = Overrides()) -> None:
    """The whole comparison on the embedded world, in minutes on two CPU cores: `smf compare demo.toml`.

    Args:
        methods: names of methods, beside which the base is always shown; none: all.
        seeds: how many seeds to run.
    """
    from .recipe import SHIPPED

    compare(SHIPPED / "demo.toml", methods, seeds, overrides)


def tune(
    recipe: RecipePath,
    /,
    methods: tuple[str, ...] = (),
    points: int = 5,
    factor: float = 2.0,
    overrides: Options = Overrides(),
) -> None:
    """Choose each method's learning rate on the recipe's validation set, from grids of equal size.

    Args:
        methods: names of [methods.NAME] tables; none: all.
        points: of each grid, whose middle is the recipe's rate; a best point at an end extends the grid.
        factor: between neighbouring rates.
    """
    from .files import write_atomically, write_json
    from .tune import tune as run_all
    from .tune import tuning_table

    loaded = overrides.load(recipe)
    output = Path(loaded.output) / "tuning"  # apart from the comparison's own runs
    tuned = run_all(replace(loaded, output=str(output)), methods, points, factor)
    table = tuning_table(tuned)
    write_json(output / "tune.json", tuned)
    write_atomically(output / "tune.md", table)
    print(table)


def main() -> None:
    """Entry point: errors of ours are one message and exit code 2, without a traceback."""
    from .compare import quiet_known_warnings

    quiet_known_warnings()
    commands: dict[str, Callable[..., Any]] = {
        "demo": demo,
        "compare": compare,
        "tune": tune,
        "train": train,
        "eval": evaluate,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="smf", description=__doc__)
    except SmfError as error:
        print(f"smf: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("smf: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
