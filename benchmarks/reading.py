"""What reading with a memory costs: prefill of 512 tokens, and decoding at batch 1 and 8, with memory / without.

    python benchmarks/reading.py

A model of Qwen2.5-0.5B's shape with random weights in float32, three memory layers of 16,384 rows in the middle. Both
sides share the base's weights; the one without is the base as Transformers makes it. A turn of decoding reads four
tokens, one at a time, behind 512 others. Writes benchmarks/results/reading.json.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

import smf
from qwen_shape import Setup, make_base
from turns import Result, compared, parser, spreads, take_turns

PROMPT, DECODED, LAYERS = 512, 4, [10, 12, 14]


def sharing(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters are those of the original."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def prefill(model: nn.Module, ids_BS: torch.Tensor) -> Callable[[], Any]:
    return lambda: model(input_ids=ids_BS, logits_to_keep=1, use_cache=True)


def decoding(model: nn.Module, ids_BS: torch.Tensor) -> Callable[[], Any]:
    past = model(input_ids=ids_BS, logits_to_keep=1, use_cache=True).past_key_values

    def work() -> None:
        for _ in range(DECODED):
            model(input_ids=ids_BS[:, :1], past_key_values=past, use_cache=True)
        past.crop(-DECODED)

    return work


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__, turns=15).parse_args()
    result = Result(__file__, options)
    base = make_base(Setup())
    memory = smf.SparseMemoryConfig(layers=LAYERS, init="paper")
    models = {"with": get_peft_model(sharing(base), memory).eval(), "without": base}
    ids = torch.randint(1000, (8, PROMPT), generator=torch.Generator().manual_seed(0))
    figures, seconds = {}, {}
    for name, make, rows in (
        ("prefill 512", prefill, 1),
        ("decode, batch 1", decoding, 1),
        ("decode, batch 8", decoding, 8),
    ):
        took = take_turns({side: make(model, ids[:rows]) for side, model in models.items()}, options.turns)
        figures[name], seconds[name] = compared(took, "with", "without"), spreads(took)
    result.write(figures={"times without memory": figures}, seconds=seconds)


if __name__ == "__main__":
    main()
