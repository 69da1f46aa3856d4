"""Options that several commands share: which recipe, and which of its keys to replace."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from .errors import ConfigError

RecipePath = Annotated[Positional[Path], tyro.conf.arg(help="a recipe file, or the name of a shipped one")]


@dataclass(frozen=True)
class Overrides:
    """Keys of the recipe to replace; where none is given, the recipe's own count."""

    base: str | None = None
    """Model folder, hub name, or "world": the embedded one."""
    data: str | None = None
    """Folder with the data sets, "hub", or "world": the embedded sets."""
    output: str | None = None
    """Folder of the runs; of a trial (--max-steps, --limit) the recipe's with "-trial" behind it."""
    seed: int | None = None
    """Of data order and initial values."""
    jobs: int | None = None
    """Methods that run at a time, with an equal share of the processor's cores each."""
    max_steps: int | None = None
    """Stop every training after so many steps (to try a recipe)."""
    limit: int | None = None
    """Score at most so many rows of every set, the first ones; 0: all rows, whatever the recipe's limits."""
    set: tuple[str, ...] = ()
    """Any other keys, as in the recipe: train.max_length=256 'memory.layers=[0, 1]' target.train.path=mine.jsonl."""

    def load(self, path: Path) -> Any:
        """The recipe at `path` with these keys in place of its own."""
        from .recipe import limited, shortened
        from .recipe_file import load_recipe

        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"--max-steps must be at least 1; got {self.max_steps}")
        if self.limit is not None and self.limit < 0:
            raise ConfigError(f"--limit must be at least 0; got {self.limit}")
        keys = {key: getattr(self, key) for key in ("base", "data", "output", "seed", "jobs")}
        recipe = load_recipe(path, self.set, **keys)
        if self.output is None and (self.max_steps or self.limit):
            recipe = replace(recipe, output=f"{recipe.output}-trial")  # whose report is not that of the real runs
        warmup = recipe.train.warmup_steps
        recipe = recipe if self.max_steps is None else shortened(recipe, self.max_steps)
        if recipe.train.warmup_steps < warmup:
            fewer = f"{recipe.train.warmup_steps:,} in place of {warmup:,}"
            print(f"smf: a trial of {recipe.train.steps:,} steps: its warm-up has {fewer}", file=sys.stderr)
        return recipe if self.limit is None else limited(recipe, self.limit)

    def trial(self) -> str:
        """What the title of a trial ends with; nothing where this is none."""
        steps = f"{self.max_steps:,} step{'s' * (self.max_steps != 1)}" if self.max_steps else ""
        rows = f"first {self.limit:,} rows of each set" if self.limit else ""
        return f" (trial: {', '.join(filter(None, (steps, rows)))})" if steps or rows else ""


Options = OmitArgPrefixes[Overrides]

Format = Literal["table", "md", "csv", "json"]
Formatted = Annotated[Format, tyro.conf.arg(help="what to print: tables, Markdown, CSV or JSON")]
Ray = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="local|ADDRESS",
        help='run the methods on a Ray cluster: "local" starts one on this machine, ADDRESS is the HOST:PORT of one '
        'that this machine is part of ("auto": find it). All machines must share the output folder, at the same path; '
        "--jobs says how many methods run at a time over all of them. What a lost process or machine was at goes on "
        "from its last checkpoint. Needs the extra [ray]. None: this machine, without Ray",
    ),
]
