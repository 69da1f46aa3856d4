"""What the epoch cache saves: an epoch that reads hidden states from disk / the first, which computes and stores them.

    python benchmarks/epochs.py

Qwen2.5-0.5B's shape with random weights in float32, three memory layers or, as late rows have it, one; an epoch is two
steps of 1 x 128 tokens, all of them learned. `floor` counts multiplications: what is left of an epoch's where the
layers below the first memory have nothing to do. Writes benchmarks/results/epochs.json.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

import smf
from qwen_shape import QWEN
from smf.epoch_cache import EpochCache
from smf.loss import MeanTokenLoss
from turns import Result, compared, parser, spreads, take_turns

STEPS, BATCH, LENGTH = 2, 1, 128
CASES = {  # layers of the memory, and size of the vocabulary
    "layers 10, 12, 14, vocabulary of Qwen2.5": ([10, 12, 14], QWEN["vocab_size"]),
    "layers 16, 18, 20, vocabulary of Qwen2.5": ([16, 18, 20], QWEN["vocab_size"]),
    "the last layer, vocabulary of Qwen2.5": ([23], QWEN["vocab_size"]),
    "layers 10, 12, 14, vocabulary of 8,192": ([10, 12, 14], 8192),
}


def floor(layers: list[int], base: Any) -> float:
    """Multiplications of a later epoch / of the first: forward, and back to the end of the first memory's layer."""
    depth = len(base.model.layers)
    block = sum(p.numel() for p in base.model.layers[0].parameters())
    head = base.lm_head.weight.numel()
    forward, back = (depth - layers[0]) * block + head, (depth - layers[0] - 1) * block + head
    return (forward + back) / (depth * block + head + back)


def measure(layers: list[int], vocabulary: int, turns: int) -> tuple[dict[str, Any], Any]:
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_config(Qwen2Config(**(QWEN | {"vocab_size": vocabulary})))
    least = floor(layers, base)
    model = get_peft_model(base, smf.SparseMemoryConfig(layers=layers)).train()
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf")
    ids = torch.randint(1, vocabulary, (STEPS, BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    def epoch() -> None:
        for ids_BS in ids:
            mask_BS = torch.ones_like(ids_BS)
            outputs = model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False)
            loss_of(outputs, ids_BS).backward()
            optimizer.step()
            optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder, MeanTokenLoss(model) as loss_of:
        caches: list[EpochCache] = []

        def first() -> None:
            caches.append(EpochCache(model, ids.flatten(0, 1).tolist() * 2, Path(folder) / str(len(caches))))
            epoch()

        def later() -> None:
            epoch()
            caches[-1].close()

        sides: dict[str, Callable[[], None]] = {"first epoch": first, "later epoch": later}
        seconds = take_turns(sides, turns)
    return compared(seconds, "later epoch", "first epoch") | {"floor": least}, spreads(seconds)


def main() -> None:
    options = parser(__doc__, turns=5).parse_args()
    result = Result(__file__, options)
    found = {name: measure(*case, options.turns) for name, case in CASES.items()}
    result.write(
        figures={"later epoch, times the first": {name: figures for name, (figures, _) in found.items()}},
        seconds={name: seconds for name, (_, seconds) in found.items()},
    )


if __name__ == "__main__":
    main()
