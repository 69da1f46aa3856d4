"""An independent memory layer to compare with: plain autograd, every key scored, the value table a leaf like any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

import smf
from conftest import VOCABULARY, tiny_base, tiny_config

LENGTHS = (5, 12, 9, 3, 12, 7)
KINDS = ("values", "query_weight", "query_bias", "keys", "gate", "out", "scale")


def double_model(**config: object) -> PeftModel:
    return get_peft_model(tiny_base().double(), tiny_config(**config))


def padded(lengths: Sequence[int] = LENGTHS, seed: int = 0, left: bool = False, extra: int = 0) -> dict[str, Tensor]:
    """Random documents of these lengths, padded on one side by `extra` more than they need."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + extra
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        place = slice(width - length, width) if left else slice(0, length)
        ids[i, place] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def with_labels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


class DenseMemory(nn.Module):
    """`mlp(x) + scale * out(o * silu(gate(x)))`; keeps `o`, row ids and weights of the last forward pass."""

    def __init__(self, mlp: nn.Module, memory: smf.ProductKeyMemory):
        super().__init__()
        self.mlp, self.shape = mlp, memory.shape
        for kind in KINDS:
            setattr(self, kind, nn.Parameter(memory.tensor(kind).detach().clone()))

    def search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Row ids and weights `[..., H, K]`, by scoring all `n_keys ** 2` keys."""
        heads, half = self.shape.heads, self.shape.k_dim // 2
        query = (x @ self.query_weight.T + self.query_bias).reshape(*x.shape[:-1], heads, 2, half)
        first = torch.einsum("...hc,hnc->...hn", query[..., 0, :], self.keys[:, 0])
        second = torch.einsum("...hc,hnc->...hn", query[..., 1, :], self.keys[:, 1])
        every = (first.unsqueeze(-1) + second.unsqueeze(-2)).flatten(-2)  # score of row i * n_keys + j
        score, ids = every.topk(self.shape.knn, dim=-1)
        return ids, score.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        self.ids, self.weights = self.search(x)
        self.o = (self.values[self.ids] * self.weights.unsqueeze(-1)).sum((-3, -2))
        if self.o.requires_grad:
            self.o.retain_grad()
        gate = x @ self.gate.T
        return self.mlp(x) + self.scale * ((self.o * gate * gate.sigmoid()) @ self.out.T)

    def reads(self, mask: Tensor, kind: str = "hits") -> dict[int, float]:
        """Reads of each row in the last pass: hits, or weight times the norm of the gradient of `o`."""
        counts: Counter[int] = Counter()
        norms = self.o.grad.norm(dim=-1) if kind == "gradient" else None
        for b, s in mask.nonzero().tolist():
            ids, weights = self.ids[b, s].flatten().tolist(), self.weights[b, s].flatten().tolist()
            for row, weight in zip(ids, weights, strict=True):
                counts[row] += 1 if norms is None else weight * float(norms[b, s])
        return dict(counts)


def dense_twin(model: nn.Module, seed: int = 0) -> tuple[Qwen2ForCausalLM, dict[int, DenseMemory]]:
    """The same tiny base with a DenseMemory for each memory of `model`, at their present values."""
    like = next(model.parameters())
    twin = tiny_base(seed).to(like.dtype)
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    dense = {}
    for layer, memory in smf.memory_layers(model).items():
        block = twin.model.layers[layer]
        block.mlp = dense[layer] = DenseMemory(block.mlp, memory)
    return twin, dense


def gradients(
    twin: nn.Module, dense: dict[int, DenseMemory], batch: dict[str, Tensor], kind: str = "values"
) -> dict[int, Tensor]:
    """Dense autograd's gradient of one kind of parameter for one batch, by layer."""
    twin.zero_grad()
    twin(**batch).loss.backward()
    return {layer: getattr(memory, kind).grad.clone() for layer, memory in dense.items()}
