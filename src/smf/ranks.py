"""What the ranks of a distributed step exchange: reads, chosen rows and their gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .rows import find
from .selection import Reads


def world_size() -> int:
    """Ranks that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_reads(reads: Reads) -> Reads:
    """The reads of all ranks together, equal to the last bit on each of them."""
    world = world_size()
    if world == 1:
        return reads
    device = reads.rows_R.device
    size = torch.tensor([len(reads.rows_R)], device=device)
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

    rows, counts, hits = gather(reads.rows_R), gather(reads.c_R), gather(reads.hits_R)
    all_rows = torch.unique(torch.cat(rows))
    total_c, total_hits = counts[0].new_zeros(len(all_rows)), hits[0].new_zeros(len(all_rows))
    for rank_rows, c, h in zip(rows, counts, hits, strict=True):  # in rank order: no rounding differs between ranks
        place = find(all_rows, rank_rows)[0]
        total_c[place] += c
        total_hits[place] += h
    return Reads(all_rows, total_c, total_hits)


def mean_(tensor: Tensor) -> None:
    """Replace a tensor by its mean over the ranks, in place."""
    world = world_size()
    if world > 1:
        dist.all_reduce(tensor)
        tensor /= world


def same_everywhere(value: int) -> bool:
    """Whether all ranks hold the same number."""
    world = world_size()
    if world == 1:
        return True
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = torch.tensor([value, -value], device=device)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return bool(mine[0] == -mine[1])
