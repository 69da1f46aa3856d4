"""Sparse memory finetuning: train, evaluate and compare methods from a recipe."""

from __future__ import annotations

import json
import sys
import warnings
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
    """Keys of the recipe to replace."""

    base: str | None = None
    """Model folder or hub name."""
    data: str | None = None
    """Folder with the data sets, or "hub"."""
    output: str | None = None
    """Folder of the runs."""
    seed: int | None = None
    """Of data order and initial values."""
    max_steps: int | None = None
    """Stop every training after so many steps (to try a recipe)."""

    def load(self, path: Path) -> Any:
        """The recipe at `path` with these keys in place of its own."""
        from .recipe import load_recipe

        recipe = load_recipe(path, base=self.base, data=self.data, output=self.output, seed=self.seed)
        if self.max_steps is None:
            return recipe
        if self.max_steps < 1:
            raise ConfigError(f"--max-steps must be at least 1; got {self.max_steps}")
        heal = recipe.heal and replace(recipe.heal, steps=self.max_steps)
        warmup = min(recipe.train.warmup_steps, self.max_steps // 2)
        return replace(recipe, train=replace(recipe.train, steps=self.max_steps, warmup_steps=warmup), heal=heal)


Options = OmitArgPrefixes[Overrides]


def train(recipe: RecipePath, /, method: str, overrides: Options = Overrides()) -> None:
    """Train and score one method of a recipe; a killed run goes on where it stopped.

    Args:
        method: name of a [methods.NAME] table.
    """
    from .compare import print_table, result_path
    from .train import run_method

    loaded = overrides.load(recipe)
    result = run_method(loaded, method)
    if "scores" in result:  # torchrun: the first rank's alone
        bases = [result_path(loaded, name) for name, m in loaded.methods.items() if m.kind == "base" and name != method]
        before = [json.loads(path.read_text()) for path in bases if path.is_file()]
        print_table([*before, result], f"{method} -> {result_path(loaded, method).parent}")


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
    from .compare import print_table
    from .train import evaluate_saved

    loaded = overrides.load(recipe)
    print_table(evaluate_saved(loaded, adapter=adapter, patch=patch), f"{recipe.name} on {loaded.base}")


def compare(
    recipe: RecipePath,
    /,
    methods: tuple[str, ...] = (),
    overrides: Options = Overrides(),
) -> None:
    """Train and score every method of a recipe, and print one table; finished methods are not run again.

    Args:
        methods: names of [methods.NAME] tables, beside which the base is always shown; none: all.
    """
    from .compare import compare as run_all
    from .compare import markdown_table, print_table, summary
    from .files import write_atomically, write_json

    loaded = overrides.load(recipe)
    results = run_all(loaded, methods)
    print_table(results, f"{recipe.name} on {loaded.base}, seed {loaded.seed}")
    write_atomically(Path(loaded.output) / "table.md", markdown_table(results))
    write_json(Path(loaded.output) / "summary.json", summary(results))


def main() -> None:
    """Entry point: errors of ours are one message and exit code 2, without a traceback."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about PEFT's own calls
    commands: dict[str, Callable[..., Any]] = {"train": train, "eval": evaluate, "compare": compare}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="smf", description=__doc__)
    except SmfError as error:
        print(f"smf: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("smf: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
