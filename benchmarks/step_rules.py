"""What a step of each method of `late_rows.toml` costs on the embedded world: time, and memory that it adds.

    python benchmarks/step_rules.py

One batch of 32 lessons, forward, backward and update, the methods in turn. Seconds are compared with those of the
papers' rule at the same place (hits, kl), of LoRA and of full finetuning. Writes benchmarks/results/step_rules.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smf.base import load_base
from smf.data import Collator, pad_id
from smf.methods import Prepared, attach, find_method
from smf.prepare import load
from smf.recipe import Recipe
from smf.recipe_file import load_recipe
from turns import Result, compared, parser, peak_growth, spreads, take_turns

SIDES = ("late-rows", "hits-kl", "random-rows", "all-rows", "middle-rows", "lora", "full")
OTHERS = ("hits-kl", "lora", "full")


def stepping(recipe: Recipe, loaded: Any, name: str, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A step of one method on the batch, its model and optimizer made."""
    method = recipe.methods[name]
    model = load_base(recipe)
    model = attach(model, method, recipe) if method.kind == "smf" else model
    prepared: Prepared = find_method(method.kind)(model, method, recipe, loaded)
    assert prepared.optimizer is not None
    prepared.model.train()
    optimizer, clipped = prepared.optimizer, [p for p in prepared.model.parameters() if p.requires_grad]

    def step() -> None:
        prepared.model(**batch).loss.backward()
        if prepared.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(clipped, prepared.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    options = parser(__doc__, turns=15).parse_args()
    result = Result(__file__, options)
    recipe = load_recipe("late_rows.toml")
    loaded = load(recipe)
    batch = Collator(pad_id(loaded.tokenizer), recipe.train.loss)(loaded.train[: recipe.train.batch_size])
    sides = {name: stepping(recipe, loaded, name, batch) for name in SIDES}
    took = take_turns(sides, options.turns)
    figures = {f"{name} / {other}": compared(took, name, other) for name in SIDES for other in OTHERS if name != other}
    memory = {name: peak_growth(step) / 2**20 for name, step in sides.items()}
    result.write(figures=figures, seconds=spreads(took), **{"MiB that a step adds": memory})


if __name__ == "__main__":
    main()
