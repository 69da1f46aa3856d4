"""Why the last layer: how many reads two questions share, in each decoder layer, where the answer is about to be said.

    python examples/read_overlap.py                   # seconds; writes docs/results/late_rows/overlap.json and .png

Two questions overlap by the sum over rows of the smaller of their weights, as a share of all weights: 1 where they read
the same rows alike, 0 where they share none. A row can carry a fact from one form of its question to another where the
two forms overlap; it harms what the model knows where a new disease's question overlaps with a known one's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import smf
from smf import world
from smf.background import pad_right
from smf.files import write_json
from smf.memory import MemoryHost

Question = tuple[str, str, str]  # disease, attribute, form


def questions(name: str) -> dict[Question, str]:
    """Prompts of one set, by disease, attribute and form."""
    return {tuple(row["id"].split(".")): row["prompt"] for row in world.rows(name)}  # type: ignore[misc]


@torch.no_grad()
def reads(model: Any, tokenizer: Any, prompts: list[str], n_rows: int) -> dict[int, Tensor]:
    """Of each layer the weights of all rows at the prompts' last tokens, `[P, N]`, as shares of 1."""
    hosts = [module for module in model.modules() if isinstance(module, MemoryHost)]
    found: dict[int, list[Tensor]] = {host.layer: [] for host in hosts}
    last_P = torch.zeros(0, dtype=torch.int64)

    def look(host: MemoryHost, args: tuple[Tensor, ...]) -> None:
        x_PD = args[0][torch.arange(len(last_P)), last_P]
        idx_PR, w_PR = host.memories["default"].search(x_PD)
        weights_PN = torch.zeros(len(x_PD), n_rows).scatter_add_(1, idx_PR.long(), w_PR)
        found[host.layer].append(weights_PN / weights_PN.sum(1, keepdim=True))

    handles = [host.register_forward_pre_hook(look) for host in hosts]
    for start in range(0, len(prompts), 100):
        batch = pad_right([tokenizer(prompt)["input_ids"] for prompt in prompts[start : start + 100]], 0)
        last_P = batch["attention_mask"].sum(1) - 1
        model(**batch)
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def overlap(a_PN: Tensor, b_PN: Tensor) -> float:
    """Mean over the pairs of what they share."""
    return torch.minimum(a_PN, b_PN).sum(1).mean().item()


def main(pairs: int = 300, seed: int = 0, output: Path = Path("docs/results/late_rows")) -> None:
    """Measure the overlap of pairs of questions in every layer, draw it and write it down.

    Args:
        pairs: of each kind.
        seed: of the memories' keys, and of which questions are drawn.
        output: folder.
    """
    tokenizer = AutoTokenizer.from_pretrained(world.BASE)
    base = AutoModelForCausalLM.from_pretrained(world.BASE, dtype=torch.float32)
    layers = list(range(base.config.num_hidden_layers))
    model = get_peft_model(base, smf.SparseMemoryConfig(layers=layers, knn=8, k_dim=128, seed=seed)).eval()
    new, known = questions("exam_heldout_test") | questions("exam_seen_test"), questions("near_domain")
    generator = torch.Generator().manual_seed(seed)
    asked = [list(new)[i] for i in torch.randperm(len(new), generator=generator).tolist() if list(new)[i][2] == "0"]
    asked = asked[:pairs]
    diseases = sorted({disease for disease, _, _ in known})
    attributes = sorted({attribute for _, attribute, _ in known})
    picks = torch.randint(len(diseases), (len(asked),), generator=generator).tolist()
    others = {
        "the same fact, asked otherwise": [new[d, a, "2"] for d, a, _ in asked],
        "another fact of the disease": [
            new[d, attributes[(attributes.index(a) + 1) % len(attributes)], "0"] for d, a, _ in asked
        ],
        "a known disease, asked alike": [known[diseases[i], a, "0"] for i, (_, a, _) in zip(picks, asked, strict=True)],
        "a question on something else": [row["prompt"] for row in world.rows("closed_book")[: len(asked)]],
    }
    n_rows = 128**2
    own = reads(model, tokenizer, [new[question] for question in asked], n_rows)
    measured = {
        kind: {layer: overlap(own[layer], read) for layer, read in reads(model, tokenizer, prompts, n_rows).items()}
        for kind, prompts in others.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "overlap.json", {"pairs": len(asked), "seed": seed, "overlap": measured})
    draw(measured, output / "overlap.png")
    print(json.dumps(measured, indent=1))


def draw(measured: dict[str, dict[int, float]], file: Path) -> None:
    """A line for each kind of pair, over the layers."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for (kind, by_layer), marker in zip(measured.items(), "osx^", strict=True):
        axes.plot(list(by_layer), list(by_layer.values()), marker=marker, label=f"a new disease, and {kind}")
    axes.set(xlabel="decoder layer", ylabel="share of reads in common", ylim=(0, 1))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    tyro.cli(main)
