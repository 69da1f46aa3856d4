"""The product-key memory layer, and the backward pass that keeps the factors of its row gradient.

Formulas: Lample et al. 2019 (arXiv 1907.05242) for product keys, Berges et al. 2024 (arXiv 2412.09764) for the gated
output. Shape letters: T tokens, D model width, H heads, K `knn`, R = H * K reads a token, N = n_keys ** 2 rows.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError, TrainingError
from .kernels import check_table, check_triton
from .provenance import Writers
from .rows import RowStore
from .shape import MemoryShape

GATHER_ELEMENTS = 2**24  # rows are gathered in pieces of at most this many numbers (64 MiB in float32)
KINDS = ("values", "keys", "query_weight", "query_bias", "gate", "out", "scale", "anchor")


@dataclass
class Factors:
    """What one backward pass leaves of the table's gradient: `grad[row] = sum over (t, r) with idx = row of w * g`."""

    idx_TR: Tensor  # int32, row ids
    w_TR: Tensor  # softmax weights
    g_TD: Tensor  # gradient of o, the weighted row sum
    mask_T: Tensor | None  # bool, tokens that are not pads; None: all are
    examples_T: Tensor | None = None  # int64, which example each token is of, where provenance is asked for
    kernels: bool = False  # whether Triton kernels made them, and go on

    @functools.cached_property
    def by_row(self) -> tuple[Tensor, Tensor]:
        """The row ids of all reads, ascending, and the place of each in the flattened `[T, R]` (int32), in order."""
        ids, places = torch.sort(self.idx_TR.flatten(), stable=True)
        return ids, places.to(torch.int32)


@dataclass
class Journal:
    """What a training may change, as it was when its optimizer was made."""

    rows: RowStore  # column "old": each row ever chosen, before its first update
    others: dict[str, Tensor]  # other parameters of the layer, whole
    table: Tensor | None = None  # the whole table, where an update moves all of it (masked-adam)
    writers: Writers | None = None  # of all layers, where provenance is asked for


def weighted_row_sum(values_ND: Tensor, idx_TR: Tensor, w_TR: Tensor, kernels: bool = False) -> Tensor:
    """`o[t] = sum over r of w[t, r] * values[idx[t, r]]`, `[T, D]`, in the dtype of the weights."""
    if kernels:
        from .kernels import rows  # needs triton

        return rows.weighted_row_sum(values_ND, idx_TR, w_TR)
    if values_ND.dtype == w_TR.dtype:
        return F.embedding_bag(idx_TR, values_ND, per_sample_weights=w_TR, mode="sum")
    pieces = [
        torch.bmm(w.unsqueeze(1), values_ND[idx].to(w.dtype)).squeeze(1) for idx, w in _pieces(values_ND, idx_TR, w_TR)
    ]
    return torch.cat(pieces)


def row_dot(values_ND: Tensor, idx_TR: Tensor, g_TD: Tensor, kernels: bool = False) -> Tensor:
    """`values[idx[t, r]] . g[t]`, `[T, R]`: the gradient of the weights."""
    if kernels:
        from .kernels import rows

        return rows.row_dot(values_ND, idx_TR, g_TD)
    pieces = [
        torch.bmm(values_ND[idx].to(g.dtype), g.unsqueeze(-1)).squeeze(-1)
        for idx, g in _pieces(values_ND, idx_TR, g_TD)
    ]
    return torch.cat(pieces)


def _pieces(values_ND: Tensor, idx_TR: Tensor, other_TX: Tensor) -> zip[tuple[Tensor, Tensor]]:
    tokens = max(1, GATHER_ELEMENTS // (idx_TR.shape[1] * values_ND.shape[1]))
    return zip(idx_TR.split(tokens), other_TX.split(tokens), strict=True)


class _RowSum(torch.autograd.Function):
    """`weighted_row_sum` whose backward hands the factors of the table's gradient to `keep`, not to autograd.

    The anchor is a one-element parameter: it makes the backward pass reach this function where nothing below needs a
    gradient, and gives DDP something to reduce. `keep` is an attribute of the context, not a saved tensor: under
    activation checkpointing the context of the first forward is the one that runs backward, once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        w_TR: Tensor,
        anchor: Tensor,
        values_ND: Tensor,
        idx_TR: Tensor,
        keep: Callable | None,
        kernels: bool,
    ):
        ctx.keep, ctx.kernels = keep, kernels
        ctx.anchor_like = anchor
        ctx.save_for_backward(w_TR, values_ND, idx_TR)
        return weighted_row_sum(values_ND, idx_TR, w_TR, kernels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # type: ignore[override]
        (g_TD,) = grads
        w_TR, values_ND, idx_TR = ctx.saved_tensors
        if ctx.keep is not None:
            ctx.keep(idx_TR, w_TR, g_TD)
        grad_w_TR = row_dot(values_ND, idx_TR, g_TD, ctx.kernels) if ctx.needs_input_grad[0] else None
        return grad_w_TR, torch.zeros_like(ctx.anchor_like), None, None, None, None


def _refuse_float16(dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        raise TrainingError(
            "training under float16 autocast: its loss scaling cannot reach the rows' gradient; train in bfloat16 "
            "instead: TrainingArguments(bf16=True) or torch.autocast(..., dtype=torch.bfloat16)"
        )


class ProductKeyMemory:
    """One adapter's memory at one decoder layer: a view of its parameters, and what its training keeps.

    Args:
        shape: sizes and start.
        parameters: for each kind in `KINDS` a mapping from adapter name to tensor. Looked up at every use, since PEFT
            and transformers replace parameters when they load.
        adapter: the adapter's name.
        base_hash: hash of the base model's weights, where known.
    """

    def __init__(
        self,
        shape: MemoryShape,
        parameters: Mapping[str, Mapping[str, Tensor]],
        adapter: str,
        base_hash: str | None = None,
    ):
        self._shape = shape
        self.adapter = adapter
        self.base_hash = base_hash
        self._parameters = parameters
        self.kernels = False  # whether Triton kernels read the rows: `use_kernels`
        self.observer: Callable[[Tensor], None] | None = None  # sees idx_TR of every forward (the background)
        self.example_ids: Tensor | None = None  # [B] or [B, S] of this forward pass, where provenance is asked for
        self.journal: Journal | None = None  # since the last optimizer was made
        self._pending: list[Factors] = []
        self._consumer: weakref.ref | None = None  # the optimizer that takes the factors

    def __getstate__(self) -> dict[str, Any]:
        # a copy starts without an optimizer: the factors and the promise to consume them stay with the original
        return self.__dict__ | {"_pending": [], "_consumer": None, "observer": None, "example_ids": None}

    @property
    def shape(self) -> MemoryShape:
        """Sizes and start, in the dtypes that the parameters have now (a model may be cast after attaching)."""
        return replace(self._shape, table_dtype=self.values.dtype, dtype=self.tensor("keys").dtype)

    def tensor(self, kind: str) -> Tensor:
        """The parameter of this kind."""
        return self._parameters[kind][self.adapter]

    @property
    def kinds(self) -> list[str]:
        """The kinds of parameter that this memory has (a replacement has no scale)."""
        return [kind for kind in KINDS if self.adapter in self._parameters[kind]]

    @property
    def trained_kinds(self) -> list[str]:
        """The kinds that require gradients; the anchor stands for the table."""
        return [kind for kind in self.kinds if self.tensor(kind).requires_grad]

    @property
    def attached_dtype(self) -> torch.dtype:
        """The table's dtype when it was attached."""
        return self._shape.table_dtype

    @property
    def values(self) -> Tensor:
        """The value table `[N, D]`."""
        return self.tensor("values")

    @property
    def trainable(self) -> bool:
        """Whether training updates rows of this memory."""
        return self.tensor("anchor").requires_grad

    def others(self) -> dict[str, Tensor]:
        """Every parameter but the table and the anchor, by kind."""
        return {kind: self.tensor(kind) for kind in self.kinds if kind not in ("values", "anchor")}

    # -- forward ------------------------------------------------------------------------------------------------------

    def search(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that each token reads and their weights: `idx_TR` (int32), `w_TR` (softmax over the K of a head).

        Two halves of a head's query score `n_keys` sub-keys each; the K best sums of the K best of both halves are
        the K best of all N pairs (arXiv 1907.05242, section 3.2).
        """
        shape, dtype = self._shape, x_TD.dtype
        T, H, K, n = len(x_TD), shape.heads, shape.knn, shape.n_keys
        query = F.linear(x_TD, self.tensor("query_weight").to(dtype), self.tensor("query_bias").to(dtype))
        query_THPC = query.view(T, H, 2, shape.k_dim // 2)
        scores_THPn = torch.einsum("thpc,hpnc->thpn", query_THPC, self.tensor("keys").to(dtype))
        best_THPK, id_THPK = scores_THPn.topk(K, dim=-1)
        sums_THKK = best_THPK[:, :, 0, :, None] + best_THPK[:, :, 1, None, :]
        score_THK, pair_THK = sums_THKK.flatten(2).topk(K, dim=-1)
        first_THK = id_THPK[:, :, 0].gather(-1, pair_THK // K)
        second_THK = id_THPK[:, :, 1].gather(-1, pair_THK % K)
        idx_TR = (first_THK * n + second_THK).to(torch.int32).flatten(1)
        return idx_TR, score_THK.softmax(-1).flatten(1)

    def forward(self, x: Tensor, mask_T: Tensor | None, *, training: bool) -> Tensor:
        """`scale * out(o * silu(gate(x)))` for hidden states `[..., D]`, in their dtype.

        Everything is computed outside autocast and in at least float32.

        Args:
            x: hidden states.
            mask_T: which tokens are not pads, or None for all.
            training: whether reads count and the table learns in the backward pass.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        learns = training and self.trainable and torch.is_grad_enabled()
        keep = self._keeper(mask_T, self._examples(x)) if learns else None
        if keep is not None and torch.is_autocast_enabled(x.device.type):
            _refuse_float16(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            x_TD = x.reshape(-1, x.shape[-1]).to(dtype)
            idx_TR, w_TR = self.search(x_TD)
            if self.observer is not None:
                self.observer(idx_TR)
            o_TD = _RowSum.apply(w_TR, self.tensor("anchor"), self.values, idx_TR, keep, self.kernels)
            gated_TD = o_TD * F.silu(F.linear(x_TD, self.tensor("gate").to(dtype)))
            y_TD = F.linear(gated_TD, self.tensor("out").to(dtype))
            if self._shape.mode == "additive":
                y_TD = y_TD * self.tensor("scale").to(dtype)
        return y_TD.to(x.dtype).view(x.shape)

    # -- what training takes ------------------------------------------------------------------------------------------

    def _examples(self, x: Tensor) -> Tensor | None:
        """Which example each token of `x` is of, `[T]`."""
        if self.example_ids is None or torch._C._current_graph_task_id() != -1:  # a checkpointed layer runs again
            return None
        tokens = x.shape[:-1].numel()
        if tokens % self.example_ids.numel():
            raise TrainingError(
                f"example_ids {tuple(self.example_ids.shape)} do not fit {tokens} tokens; give one id for each "
                "sequence [B], or for each token [B, S]"
            )
        return self.example_ids.reshape(-1).repeat_interleave(tokens // self.example_ids.numel()).to(x.device)

    def _keeper(self, mask_T: Tensor | None, examples_T: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], None]:
        kernels = self.kernels

        def keep(idx_TR: Tensor, w_TR: Tensor, g_TD: Tensor) -> None:
            if not self.attached:
                raise TrainingError(
                    f"the memory at layer {self._shape.layer} is trainable, but no SparseMemoryOptimizer takes its "
                    "gradient, so training would change nothing. Make one and give it to the loop: "
                    "Trainer(..., optimizers=(smf.SparseMemoryOptimizer(model, background, lr=...), None)); "
                    "to train something else beside a frozen memory, load it with is_trainable=False."
                )
            self._pending.append(Factors(idx_TR, w_TR.detach(), g_TD, mask_T, examples_T, kernels))

        return keep

    @property
    def rows_per_step(self) -> int | None:
        """Rows that a step of the attached optimizer updates (all rows: N); None without an optimizer."""
        consumer = None if self._consumer is None else self._consumer()
        return None if consumer is None else min(consumer.rows_per_step, self._shape.n_rows)

    @property
    def attached(self) -> bool:
        """Whether a living optimizer takes this memory's factors."""
        return self._consumer is not None and self._consumer() is not None

    def attach(self, consumer: Any, journal: Journal) -> None:
        """Let `consumer` (held weakly) take the factors from now on; the journal starts anew."""
        self._consumer, self.journal, self._pending = weakref.ref(consumer), journal, []

    def note_old_rows(self, rows_t: Tensor) -> None:
        """Keep what rows are now, where a training keeps what it changes and does not know them yet."""
        if self.journal is not None and self.journal.table is None:
            self.journal.rows.to(self.values.device)
            new = self.journal.rows.missing(rows_t.to(self.values.device))
            self.journal.rows.add(new, old=self.values.detach()[new])

    def belongs_to(self, consumer: Any) -> bool:
        """Whether `consumer` is the last one that was attached."""
        return self._consumer is not None and self._consumer() is consumer

    @property
    def pending(self) -> Sequence[Factors]:
        """What `take` would return, which stays."""
        return self._pending

    def take(self) -> list[Factors]:
        """The factors since the last `take` or `drop`, one entry a backward pass."""
        pending, self._pending = self._pending, []
        return pending

    def drop(self) -> None:
        """Forget the pending factors."""
        self._pending = []


class MemoryHost(nn.Module):
    """A module that holds the memories of one decoder layer, by adapter; the base class of the PEFT layer."""

    layer: int
    memories: dict[str, ProductKeyMemory]
    active_adapters: Any  # list[str]; PEFT's property


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; after it every module is in the mode that it had (a model may be in a mixed one)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP's and torch.compile's wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def memory_layers(model: nn.Module, adapter: str | None = None) -> dict[int, ProductKeyMemory]:
    """The memory of each decoder layer that has one: layer index -> memory; `.values` is its table `[N, D]`.

    Args:
        model: any model with memory layers, however wrapped.
        adapter: the adapter's name; None for the active one, of which there must be one at most.
    """
    hosts = [module for module in model.modules() if isinstance(module, MemoryHost)]
    if adapter is None:
        active = sorted({name for host in hosts for name in host.active_adapters if name in host.memories})
        if len(active) > 1:
            raise ConfigError(f"adapters {active} are active; name one with adapter=...")
        adapter = active[0] if active else None
    names = sorted({name for host in hosts for name in host.memories})
    if adapter is not None and adapter not in names:
        raise ConfigError(f"adapter {adapter!r} has no memory layers; adapters with some: {names}")
    return {host.layer: host.memories[adapter] for host in hosts if adapter in host.memories}


def use_kernels(model: nn.Module, on: bool = True) -> None:
    """Let Triton kernels, not PyTorch's operators, read and add up the rows of every memory of the model; off at first.

    They compute the same in float32, in another order, and need triton and the model on a CUDA device. How much
    faster they are: docs/kernels.md.

    Args:
        model: any model with memory layers, however wrapped. Memories that are attached later are not affected.
        on: False turns them off.

    Raises:
        ConfigError: without memory layers; without triton; or where a table is neither on a CUDA device nor in
            float32 or bfloat16. Nothing is changed then.
    """
    memories = [memory for m in model.modules() if isinstance(m, MemoryHost) for memory in m.memories.values()]
    if not memories:
        raise ConfigError(
            "the model has no memory layers; attach them first: get_peft_model(model, SparseMemoryConfig())"
        )
    if on:
        check_triton()
        for memory in memories:
            check_table(memory.values)
    for memory in memories:
        memory.kernels = on
