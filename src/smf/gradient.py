"""The gradient of chosen rows, from the factors that backward passes left.

Shape letters: T tokens, R reads a token, t rows chosen in a layer, P pairs of a row and an example, D model width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import TrainingError
from .memory import GATHER_ELEMENTS, Factors
from .provenance import pair
from .rows import find

CACHE_ELEMENTS = 2**19  # g is read in slices of so many numbers at most (2 MiB in float32), which a cache holds


def row_gradient(factors: list[Factors], rows_t: Tensor, like: Tensor) -> Tensor:
    """Gradient `[t, D]` of the rows `rows_t` (ascending) from the factors of some backward passes.

    Each chosen row is the weighted sum of the gradients of the tokens that read it: an embedding bag over tokens, so
    that neither time nor memory depends on the size of the table. Many rows read the same token, so on a CPU columns
    are summed slice by slice: all of a slice's tokens stay in the cache (docs/speed.md).
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    grad_tD = torch.zeros(len(rows_t), like.shape[1], dtype=dtype, device=like.device)
    for f in factors:
        ids, places = f.by_row
        wanted_t = rows_t.to(ids.dtype)
        starts_t = torch.searchsorted(ids, wanted_t, out_int32=True)
        reads_t = torch.searchsorted(ids, wanted_t, out_int32=True, right=True) - starts_t
        if f.kernels:
            from .kernels import rows  # needs triton

            rows.add_row_gradient(grad_tD, places, starts_t, reads_t, f.w_TR, f.g_TD)
            continue
        offsets_t = reads_t.cumsum(0, dtype=torch.int32) - reads_t  # where each row's reads begin among all chosen
        read = torch.arange(int(reads_t.sum()), dtype=torch.int32, device=ids.device)
        read = places[read.add_((starts_t - offsets_t).repeat_interleave(reads_t))]
        token, weight = read // f.idx_TR.shape[1], f.w_TR.flatten()[read]
        columns = max(1, CACHE_ELEMENTS // max(1, len(f.g_TD))) if like.device.type == "cpu" else like.shape[1]
        for grad, g in zip(grad_tD.split(columns, dim=1), f.g_TD.split(columns, dim=1), strict=True):
            grad += F.embedding_bag(token, g.contiguous(), offsets_t, per_sample_weights=weight, mode="sum")
    return grad_tD


def parts_by_example(factors: list[Factors], rows_t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of what each example adds to the gradient of each of the rows `rows_t`, where it adds anything.

    Args:
        factors: with `examples_T`.
        rows_t: ascending.
        like: the table, for width and device.

    Returns:
        `pair_P`, a row and an example in one number (`provenance.pair`), and `norm_P` in float64; an example that is
        in several of the factors has several entries.
    """
    pairs = [torch.empty(0, dtype=torch.int64, device=like.device)]
    norms = [pairs[0].double()]
    for f in factors:
        if f.examples_T is None:
            raise TrainingError(
                "provenance=True, but a backward pass does not know whose tokens its layers read: call the model that "
                "the optimizer was made for, with example_ids, and checkpoint activations with use_reentrant=False"
            )
        examples_E, local_T = torch.unique(f.examples_T, return_inverse=True)
        split = replace(f, idx_TR=f.idx_TR.long() * len(examples_E) + local_T.unsqueeze(1))  # a row for each example
        read_TR = find(rows_t, f.idx_TR.flatten().long())[1].view(f.idx_TR.shape)
        both_P = torch.unique(split.idx_TR[read_TR])
        for some in both_P.split(max(1, GATHER_ELEMENTS // like.shape[1])):
            norm = row_gradient([split], some, like).norm(dim=-1).double()
            some, norm = some[norm > 0], norm[norm > 0]
            pairs.append(pair(some // len(examples_E), examples_E[some % len(examples_E)]))
            norms.append(norm)
    return torch.cat(pairs), torch.cat(norms)
