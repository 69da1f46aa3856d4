"""What counting reads costs: `read_background` over 2,000 documents / the same plain forward passes.

    python benchmarks/background.py

The embedded world's base with the memory of its study, documents of 64 random tokens in batches of eight. `forward`
runs the same model over the same batches and counts nothing; `base` is the model without memory. None of them makes
logits but for the last token. Writes benchmarks/results/background.json.
"""

from __future__ import annotations

import torch
from peft import get_peft_model

import smf
from smf.base import load_base
from smf.methods import memory_config
from smf.recipe_file import load_recipe
from turns import Result, compared, parser, spreads, take_turns

METHOD = "smf-kl-gradient-t=512"
TOKENS, BATCH = 64, 8


@torch.no_grad()
def main() -> None:
    made = parser(__doc__, turns=5)
    made.add_argument("--documents", type=int, default=2000)
    options = made.parse_args()
    result = Result(__file__, options)
    recipe = load_recipe("world_study.toml")
    base = load_base(recipe).eval()
    model = get_peft_model(base, memory_config(recipe, recipe.methods[METHOD])).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (options.documents, TOKENS), generator=generator)
    batches = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids.split(BATCH)]

    def forward() -> None:
        for each in batches:
            model(**each, use_cache=False, logits_to_keep=1)

    def plain() -> None:
        with model.disable_adapter():
            forward()

    sides = {"background": lambda: smf.read_background(model, batches), "forward": forward, "base": plain}
    took = take_turns(sides, options.turns, warm_up=0)
    figures = {f"times {other}": compared(took, "background", other) for other in ("forward", "base")}
    result.write(figures=figures | {"documents": options.documents}, seconds=spreads(took))


if __name__ == "__main__":
    main()
