"""How large are the hidden states that each MLP of a base reads, and what it writes?

`python benchmarks/mlp_scale.py BASE...`. Standard deviations over the tokens of one story; docs/log.md uses them to
explain learning rates.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smf.decoder import find_decoder

TEXT = "One day, a little girl named Lily found a needle in her room. She wanted to share it with her mom."


@torch.no_grad()
def scales(base: str) -> dict[str, list[float]]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    decoder = find_decoder(model)
    names = decoder.mlp_names(range(len(decoder.blocks)), replace=False)
    seen: dict[str, list[float]] = {"reads": [], "writes": []}

    def look(module: torch.nn.Module, args: tuple, out: torch.Tensor) -> None:
        seen["reads"].append(round(args[0].std().item(), 3))
        seen["writes"].append(round(out.std().item(), 3))

    for name in names:
        model.get_submodule(name).register_forward_hook(look)
    model(torch.tensor([AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]]))
    return seen


if __name__ == "__main__":
    results = {Path(base).name: scales(base) for base in sys.argv[1:]}
    print(json.dumps(results, indent=2))
    file = Path(__file__).parent / "results" / "mlp_scale.json"
    file.write_text(json.dumps({"command": f"python {' '.join(sys.argv)}", "std": results}, indent=2) + "\n")
