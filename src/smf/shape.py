"""Sizes and start of a memory layer; what this machine has no room for is refused before anything is allocated."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from .errors import ConfigError

Layout = tuple[torch.dtype, tuple[int, ...]]


def seeded(*parts: Any) -> torch.Generator:
    """A CPU generator that depends on nothing but `parts`, and on all of them."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def available_memory() -> int:
    """Bytes that can be allocated without swapping; not more than a container may have."""
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no container, or "max": one without a limit
        return psutil.virtual_memory().available
    return min(limit, psutil.virtual_memory().available)


@dataclass(frozen=True)
class MemoryShape:
    """Sizes and start of one memory layer; two layers of equal shape start from equal tensors on every machine."""

    layer: int
    d: int
    n_keys: int
    heads: int
    knn: int
    k_dim: int
    mode: str
    init: str
    seed: int
    table_dtype: torch.dtype
    dtype: torch.dtype = torch.float32  # of everything but the table

    @property
    def n_rows(self) -> int:
        """N, the rows of the value table."""
        return self.n_keys**2

    def layouts(self) -> dict[str, Layout]:
        """Dtype and size of each tensor, by kind; the table comes last."""
        d, query = self.d, self.heads * self.k_dim
        sizes: dict[str, tuple[int, ...]] = {
            "query_weight": (query, d),
            "query_bias": (query,),
            "keys": (self.heads, 2, self.n_keys, self.k_dim // 2),
            "gate": (d, d),
            "out": (d, d),
            "anchor": (1,),
        }
        sizes |= {"scale": (1,)} if self.mode == "additive" else {}
        return {kind: (self.dtype, size) for kind, size in sizes.items()} | {
            "values": (self.table_dtype, (self.n_rows, d))
        }

    def check_room(self, layers: int = 1) -> None:
        """Refuse starts of so many layers that take more memory than this machine has left.

        Where a file says the sizes, nothing but this machine bounds them: a file of a few rows may belong to a table of
        gigabytes, which is drawn anew and not read. What is drawn is drawn in float32 and then cast.
        """
        if detect_fake_mode() is not None:  # tensors without numbers, to count with, take none
            return
        needed = 0
        for kind, (dtype, size) in self.layouts().items():
            zeros = kind == "values" and self.init == "zero"
            cast = 0 if zeros or dtype == torch.float32 else 4
            needed += math.prod(size) * (dtype.itemsize + cast)
        needed, room = layers * needed, available_memory()
        if needed > room:
            raise ConfigError(
                f"a memory of n_keys={self.n_keys}, heads={self.heads}, k_dim={self.k_dim} at width {self.d} takes "
                f"{needed / 2**30:,.1f} GiB to make at {layers} layer(s), and this machine has {room / 2**30:,.1f} GiB "
                "left; make it smaller, or use a machine with more memory"
            )

    def start(self) -> dict[str, Tensor]:
        """The tensors that a fresh layer starts from, by kind, on the CPU.

        Variances as in arXiv 2605.03229 (facts: values 1/d, keys 1/(3 k_dim), query Xavier, gate and out 1/d), drawn
        with `uniform_`, whose bits do not depend on the machine; the table is drawn last, so that it alone can be left
        out or checked.

        Raises:
            ConfigError: where it takes more memory than there is.
        """
        self.check_room()
        d, query = self.d, self.heads * self.k_dim
        generator = seeded("memory", self.seed, self.layer)
        bounds = {"query_weight": math.sqrt(6 / (d + query)), "query_bias": 1 / math.sqrt(d)}
        bounds |= {"keys": 1 / math.sqrt(self.k_dim)} | dict.fromkeys(("gate", "out", "values"), math.sqrt(3 / d))
        zeros = {"anchor", "values"} if self.init == "zero" else {"anchor"}
        scale = torch.full((1,), 1.0 if self.init == "zero" else 0.01, device="cpu")
        tensors = {}
        for kind, (dtype, size) in self.layouts().items():
            if kind in zeros:
                tensors[kind] = torch.zeros(size, dtype=dtype, device="cpu")
            elif kind == "scale":
                tensors[kind] = scale.to(dtype)
            else:
                drawn = torch.empty(size, device="cpu").uniform_(-bounds[kind], bounds[kind], generator=generator)
                tensors[kind] = drawn.to(dtype)
        return tensors
