"""What the ranks of a distributed step exchange: reads, chosen rows and their gradient."""

from __future__ import annotations

import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .rows import find
from .selection import Reads


def world_size() -> int:
    """Ranks that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes (torchrun starts several)."""
    return os.environ.get("RANK", "0") == "0"


def join_again(timeout: timedelta) -> None:
    """Join the other ranks of a job that torchrun has started anew.

    All starts of a job on one machine share torchrun's store, in which a rank that is early finds the addresses of the
    start before: it is refused there, and the restart fails (pytorch issue 135712). Under a prefix of its own a start
    finds only itself. On several machines each counts its restarts alone, so that only torchrun can tell them apart
    (`TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`).
    """
    start, local = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("LOCAL_WORLD_SIZE")
    if start == "0" or local != os.environ.get("WORLD_SIZE") or dist.is_initialized():
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = dist.PrefixStore(f"start {start}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def sum_reads(reads: Reads) -> Reads:
    """The reads of all ranks together, equal to the last bit on each of them."""
    rows, c, hits = sum_by_id(reads.rows_R, reads.c_R, reads.hits_R)
    return Reads(rows, c, hits)


def sum_by_id(ids_R: Tensor, *columns_R: Tensor) -> list[Tensor]:
    """The ids of all ranks, ascending, and of each column the sums by id, equal to the last bit on each rank.

    Args:
        ids_R: of this rank, each once.
        columns_R: a number for each id.
    """
    world = world_size()
    if world == 1:
        return [ids_R, *columns_R]
    device = ids_R.device
    size = torch.tensor([len(ids_R)], device=device)
    sizes = [torch.zeros_like(size) for _ in range(world)]
    dist.all_gather(sizes, size)
    lengths = torch.cat(sizes).tolist()
    longest = max(lengths)

    def gather(mine: Tensor) -> list[Tensor]:
        padded = mine.new_zeros(longest)
        padded[: len(mine)] = mine
        all_ranks = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(all_ranks, padded)
        return [column[:length] for column, length in zip(all_ranks, lengths, strict=True)]

    ids = gather(ids_R)
    every = torch.unique(torch.cat(ids))
    sums = []
    for column in columns_R:
        total = column.new_zeros(len(every))
        for rank_ids, part in zip(ids, gather(column), strict=True):  # in rank order: no rounding differs between ranks
            total[find(every, rank_ids)[0]] += part
        sums.append(total)
    return [every, *sums]


def mean_(tensor: Tensor) -> None:
    """Replace a tensor by its mean over the ranks, in place."""
    world = world_size()
    if world > 1:
        dist.all_reduce(tensor)
        tensor /= world


def mean_gradients_(parameters: list[nn.Parameter]) -> None:
    """Replace the gradients of parameters by their means over the ranks; where a rank has none, it counts as zero."""
    if not parameters:
        return
    used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32, device=_device())
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    for parameter, anywhere in zip(parameters, used.tolist(), strict=True):
        if anywhere:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            mean_(parameter.grad)


def same_everywhere(value: float) -> bool:
    """Whether all ranks hold the same number; NaN is the same as infinity."""
    if world_size() == 1:
        return True
    value = math.inf if math.isnan(value) else value
    mine = torch.tensor([value, -value], dtype=torch.float64, device=_device())
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return bool(mine[0] == -mine[1])


def true_everywhere(*flags: bool) -> list[bool]:
    """Of each flag whether all ranks hold it."""
    if world_size() == 1:
        return list(flags)
    held = torch.tensor(flags, dtype=torch.int32, device=_device())
    dist.all_reduce(held, op=dist.ReduceOp.MIN)
    return [bool(flag) for flag in held.tolist()]


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
