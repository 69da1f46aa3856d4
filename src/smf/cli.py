"""The command `smf`: train, evaluate and compare from a recipe."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from .errors import ConfigError, SmfError

try:
    import tyro
    from tyro.conf import Positional
except ImportError:  # the command needs the extra [run]; the library does not
    sys.exit("the command smf needs more packages: pip install 'sparse-memory-finetuning[run]'")

RecipePath = Annotated[Positional[Path], tyro.conf.arg(help="a recipe file, or the name of a shipped one")]
Base = Annotated[str | None, tyro.conf.arg(help="model folder or hub name, in place of the recipe's")]
Data = Annotated[str | None, tyro.conf.arg(help='folder with the data sets, or "hub"')]
Output = Annotated[str | None, tyro.conf.arg(help="folder of the runs")]
Seed = Annotated[int | None, tyro.conf.arg(help="of data order and initial values")]
MaxSteps = Annotated[int | None, tyro.conf.arg(help="stop every training after so many steps (to try a recipe)")]


def load_with(recipe: Path, base: Any, data: Any, output: Any, seed: Any, max_steps: int | None) -> Any:
    """A recipe with what the command line overrides."""
    from .recipe import load_recipe

    loaded = load_recipe(recipe, base=base, data=data, output=output, seed=seed)
    if max_steps is not None:
        if max_steps < 1:
            raise ConfigError(f"--max-steps must be at least 1; got {max_steps}")
        loaded = replace(loaded, train=replace(loaded.train, steps=max_steps))
        if loaded.heal is not None:
            loaded = replace(loaded, heal=replace(loaded.heal, steps=max_steps))
    return loaded


def train(
    recipe: RecipePath,
    /,
    method: str,
    base: Base = None,
    data: Data = None,
    output: Output = None,
    seed: Seed = None,
    max_steps: MaxSteps = None,
) -> None:
    """Train and score one method of a recipe; a killed run goes on where it stopped.

    Args:
        method: name of a [methods.NAME] table.
    """
    from .compare import print_table
    from .train import run_method

    loaded = load_with(recipe, base, data, output, seed, max_steps)
    result = run_method(loaded, method)
    if "scores" in result:  # torchrun: the first rank's alone
        print_table([result], f"{method} -> {Path(loaded.output) / loaded.run_id(method)}")


def evaluate(
    recipe: RecipePath,
    /,
    adapter: str | None = None,
    patch: str | None = None,
    base: Base = None,
    data: Data = None,
) -> None:
    """Score the base of a recipe, or an adapter or patch of it, on the recipe's target and probes.

    Args:
        adapter: folder of a saved PEFT adapter (of any method).
        patch: file written by smf.save_patch.
    """
    from .compare import print_table
    from .train import evaluate_saved

    loaded = load_with(recipe, base, data, None, None, None)
    results = evaluate_saved(loaded, adapter=adapter, patch=patch)
    print_table(results, f"{recipe.name} on {loaded.base}")


def compare(
    recipe: RecipePath,
    /,
    methods: tuple[str, ...] = (),
    base: Base = None,
    data: Data = None,
    output: Output = None,
    seed: Seed = None,
    max_steps: MaxSteps = None,
) -> None:
    """Train and score every method of a recipe, and print one table; finished methods are not run again.

    Args:
        methods: only these.
    """
    from .compare import compare as run_all
    from .compare import markdown_table, print_table
    from .files import write_atomically

    loaded = load_with(recipe, base, data, output, seed, max_steps)
    results = run_all(loaded, methods)
    print_table(results, f"{recipe.name} on {loaded.base}, seed {loaded.seed}")
    write_atomically(Path(loaded.output) / "table.md", markdown_table(results))


def main() -> None:
    """Entry point: errors of ours are one message and exit code 2, without a traceback."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about PEFT's own calls
    commands: dict[str, Callable[..., Any]] = {"train": train, "eval": evaluate, "compare": compare}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="smf", description=__doc__)
    except SmfError as error:
        sys.exit(_report(error))


def _report(error: SmfError) -> int:
    print(f"smf: error: {error}", file=sys.stderr)
    return 2
