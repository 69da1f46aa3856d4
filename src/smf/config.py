"""The config of sparse memory as a PEFT method: which memory layers to attach, how they start and what trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from peft import PeftConfig, PeftType, TaskType

from .errors import ConfigError
from .shape import MemoryShape

TRAINED: dict[str, tuple[str, ...]] = {  # kinds that autograd trains; the table is trained through the anchor
    "rows": ("anchor",),
    "rows+scale": ("anchor", "scale"),
    "memory": ("anchor", "scale", "query_weight", "query_bias", "keys", "gate", "out"),
}
MOST_LAYERS = 1000  # no decoder is so deep; a file that says more is not worth looking at layer by layer


def _register_type(name: str) -> PeftType:
    """Add a member to PEFT's closed enum of methods; `register_peft_method` refuses names that are not in it."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member.__objclass__ = PeftType  # type: ignore[attr-defined]
        member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


SPARSE_MEMORY = _register_type("SPARSE_MEMORY")


@dataclass
class SparseMemoryConfig(PeftConfig):
    """Which memory layers to attach, and how they start.

    Args:
        layers: decoder layers that get a memory, the first is 0, the last -1; None: at one quarter, the middle and
            three quarters of the depth.
        n_keys: sub-keys of each half; the table has `n_keys ** 2` rows.
        heads: query heads.
        knn: rows that each head reads for a token.
        k_dim: width of a head's query; even, both halves take half of it.
        mode: "additive", `mlp(x) + scale * memory(x)`, or "replacement", `memory(x)` in place of the MLP.
        init: "zero", value rows zero and scale 1, so that attaching changes no logit; or "paper", random values and
            scale 0.01 (arXiv 2605.03229), which expects healing.
        seed: of all initial values.
        table_dtype: "float32" or "bfloat16" (updates are computed in float32 and rounded stochastically). On a
            float64 base, a "float32" table is float64.
        train: what trains: "rows" of the table, "rows+scale", or the whole "memory" (healing). `set_train` changes it.
        base_hash: hash of the base's weights, filled in when the memory is attached and checked when it is loaded.
        target_modules: filled in: the wrapped modules, found from `layers`.
    """

    layers: list[int] | None = None
    n_keys: int = 128
    heads: int = 4
    knn: int = 16
    k_dim: int = 256
    mode: Literal["additive", "replacement"] = "additive"
    init: Literal["zero", "paper"] = "zero"
    seed: int = 0
    table_dtype: Literal["float32", "bfloat16"] = "float32"
    train: Literal["rows", "rows+scale", "memory"] = "rows"
    base_hash: str | None = field(default=None, repr=False)
    target_modules: list[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPARSE_MEMORY
        self.task_type = self.task_type or TaskType.CAUSAL_LM
        for name in ("n_keys", "heads", "knn", "k_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise ConfigError(f"{name} must be a whole number from 1 to 2147483647; got {value!r:.60}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be a whole number; got {self.seed!r:.60}")
        if self.k_dim % 2:
            raise ConfigError(f"k_dim must be even, since both halves of a query take k_dim / 2; got {self.k_dim}")
        if self.knn > self.n_keys:
            raise ConfigError(f"knn={self.knn} rows cannot be picked from n_keys={self.n_keys} sub-keys; lower knn")
        if self.n_keys**2 >= 2**31:
            raise ConfigError(f"n_keys={self.n_keys}: row ids are 32-bit, so n_keys can be 46340 at most")
        for name, allowed in (
            ("mode", ("additive", "replacement")),
            ("init", ("zero", "paper")),
            ("table_dtype", ("float32", "bfloat16")),
            ("train", tuple(TRAINED)),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not known; use one of {list(allowed)}")
        if self.mode == "replacement" and self.init == "zero":
            raise ConfigError('mode="replacement" with init="zero" would erase the MLP; use init="paper" and heal')
        self.check_train(self.train)
        if self.layers is not None:
            self.layers = _checked_layers(self.layers)

    def check_train(self, train: str) -> None:
        """Refuse a train mode that does not exist or does not fit the mode."""
        if train not in TRAINED:
            raise ConfigError(f"train={train!r} is not known; use one of {list(TRAINED)}")
        if train == "rows+scale" and self.mode == "replacement":
            raise ConfigError('train="rows+scale" needs mode="additive": a replacement has no scale')

    def shape(self, layer: int, d: int, dtype: torch.dtype) -> MemoryShape:
        """Sizes and start of the memory at `layer` of a base of width `d`, whose parameters have `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        table = torch.bfloat16 if self.table_dtype == "bfloat16" else wide
        sizes = (d, self.n_keys, self.heads, self.knn, self.k_dim)
        return MemoryShape(layer, *sizes, self.mode, self.init, self.seed, table, wide)


def _checked_layers(layers: Sequence[int]) -> list[int]:
    listed = isinstance(layers, Sequence) and not isinstance(layers, str)
    if not listed or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
        raise ConfigError(f"layers must be a list of decoder layer indices like [10, 12, 14] or [-1]; got {layers!r}")
    if len(layers) > MOST_LAYERS:
        raise ConfigError(f"layers names {len(layers):,} layers; expected {MOST_LAYERS:,} at most")
    if not layers or len(set(layers)) != len(layers):
        raise ConfigError(f"layers must name at least one layer, each once; got {layers!r}")
    return sorted(layers)
