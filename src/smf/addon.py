"""The dense add-on: a gated MLP in the place of a memory layer, the control that has no rows to choose.

Shape letters: D model width, H hidden width of the add-on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SparseMemoryConfig
from .decoder import find_decoder
from .errors import ConfigError
from .files import read_tensors, write_tensors
from .shape import seeded

FORMAT = 1


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` (arXiv 2002.05202), zero at its start.

    Args:
        d: width of the hidden states (D).
        hidden: H.
        dtype: of the weights.
        generator: of the initial values of `gate` and `up`; `down` is zero.
    """

    def __init__(self, d: int, hidden: int, dtype: torch.dtype, generator: torch.Generator):
        super().__init__()
        bound = (3 / d) ** 0.5  # variance 1 / D
        self.gate_HD = nn.Parameter(torch.empty(hidden, d, dtype=dtype).uniform_(-bound, bound, generator=generator))
        self.up_HD = nn.Parameter(torch.empty(hidden, d, dtype=dtype).uniform_(-bound, bound, generator=generator))
        self.down_DH = nn.Parameter(torch.zeros(d, hidden, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`, in the weights' dtype, cast to the input's."""
        wide = x.to(self.gate_HD.dtype)
        return F.linear(F.silu(F.linear(wide, self.gate_HD)) * F.linear(wide, self.up_HD), self.down_DH).to(x.dtype)


class Beside(nn.Module):
    """A module and an add-on whose outputs are added up."""

    def __init__(self, base: nn.Module, addon: GatedMLP):
        super().__init__()
        self.base, self.addon = base, addon

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base's output plus the add-on's; of a tuple, its first entry."""
        out = self.base(x, *args, **kwargs)
        added = self.addon(x)
        return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added


def equal_width(config: SparseMemoryConfig, d: int) -> int:
    """H at which the add-on multiplies as often for a token as the memory does: 3 D H of its three matrices.

    The memory: queries (D x heads x k_dim), scores against both halves' sub-keys (heads x n_keys x k_dim), the sum of
    the rows read (heads x knn x D), gate and output (2 D^2). Picking the best is not counted, on either side.
    """
    query, keys = d * config.heads * config.k_dim, config.heads * config.n_keys * config.k_dim
    memory = query + keys + config.heads * config.knn * d + 2 * d * d
    return max(1, round(memory / (3 * d)))


def add_dense(model: nn.Module, config: SparseMemoryConfig) -> nn.Module:
    """Put an add-on beside the MLPs that `config` would put a memory beside; changes the model and returns it.

    No logit changes until it is trained. Only the add-ons' own parameters are made to require gradients.

    Raises:
        ConfigError: for a config that is not additive.
    """
    if config.mode != "additive":
        raise ConfigError(f"the dense add-on stands beside the MLP; it cannot be made for mode={config.mode!r}")
    decoder = find_decoder(model)
    like = next(model.parameters())
    dtype = torch.promote_types(like.dtype, torch.float32)
    layers = decoder.chosen(config.layers)
    for layer, name in zip(layers, decoder.mlp_names(layers, replace=False), strict=True):
        addon = GatedMLP(decoder.width, equal_width(config, decoder.width), dtype, seeded("addon", config.seed, layer))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Beside(model.get_submodule(name), addon.to(like.device)))
    return model


def save_dense(model: nn.Module, path: Path) -> None:
    """Write the add-ons' weights into one safetensors file."""
    addons = {name: module for name, module in model.named_modules() if isinstance(module, GatedMLP)}
    tensors = {
        f"{name}.{key}": tensor for name, module in addons.items() for key, tensor in module.state_dict().items()
    }
    write_tensors(path, tensors, "addon", {"format": FORMAT})


def load_dense(model: nn.Module, config: SparseMemoryConfig, path: Path) -> nn.Module:
    """Add the add-ons of `config`, with the weights that `save_dense` wrote.

    Raises:
        ConfigError: for a file that is not one of add-ons, or not of this model and config.
    """
    _, tensors = read_tensors(path, "addon", FORMAT, ConfigError)
    add_dense(model, config)
    own = {name: tensor for name, tensor in model.state_dict().items() if ".addon." in name}
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
        raise ConfigError(
            f"{path} holds {sorted(tensors)[:1]} and others; this model and config have {sorted(own)[:1]}"
        )
    model.load_state_dict(tensors, strict=False)
    return model
