"""What the benchmarks of a GPU share: milliseconds by CUDA events of sides that take turns, bandwidth, memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def race(sides: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each side, which take turns; each is given the number of the repeat."""
    for side in sides.values():
        for i in range(2):
            side(i)
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in sides}
    for i in range(repeats):
        for name, side in sides.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            side(i)
            end.record()
            marks[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) for begin, end in pairs] for name, pairs in marks.items()}


def spread(milliseconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(milliseconds), "least": min(milliseconds), "most": max(milliseconds)}


def error(got: Tensor, expected: Tensor) -> float:
    """Of float32 against float64, by norm."""
    return float((got.double() - expected).norm() / expected.norm())


def copy_bandwidth(repeats: int) -> float:
    """GB/s of a copy on the device, bytes read plus bytes written."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    taken = race({"copy": lambda i: target.copy_(source)}, repeats)["copy"]
    return 2 * source.numel() * 4 / statistics.median(taken) / 1e6


def extra_peak(work: Callable[[], Any]) -> float:
    """MiB that work takes beyond what is there before it, its result included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = work()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20
