"""Below the lowest memory layer nothing trains, so nothing is kept there for a backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .decoder import DecoderLayers


class FrozenBelow:
    """Takes the gradient off what enters the first decoder layer, where nothing before it trains.

    Transformers' activation checkpointing makes the embeddings' output require one, which `use_reentrant=True` needs:
    otherwise its layers would return nothing that a loss can reach. With `use_reentrant=False` it only makes every
    frozen layer below the first that trains keep its input, and run again in the backward pass.
    """

    def __init__(self, decoder: DecoderLayers):
        self._blocks = decoder.name.rpartition(".")[2]
        self._cuts = False
        self.handles: list[RemovableHandle] = [
            decoder.owner.register_forward_pre_hook(self._look, with_kwargs=True),
            decoder.blocks[0].register_forward_pre_hook(self._cut, with_kwargs=True),
        ]

    def _look(self, owner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        asked = kwargs.get("inputs_embeds") is not None  # whoever gives hidden states may want their gradient
        self._cuts = owner.training and torch.is_grad_enabled() and not asked and not self._trains_before(owner)
        self._cuts = self._cuts and not any(map(_reentrant, (owner, *getattr(owner, self._blocks))))

    def _trains_before(self, owner: nn.Module) -> bool:
        """Whether anything outside of the decoder layers trains, such as the embeddings."""
        outside = (p for name, p in owner.named_parameters() if not name.startswith(f"{self._blocks}."))
        return any(p.requires_grad for p in outside)

    def _cut(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if not self._cuts:
            return args, kwargs
        if args and isinstance(args[0], Tensor):
            return (args[0].detach(), *args[1:]), kwargs
        hidden = kwargs.get("hidden_states")
        return args, kwargs | ({} if hidden is None else {"hidden_states": hidden.detach()})


def _reentrant(module: nn.Module) -> bool:
    """Whether a module is checkpointed, and not known to be so with use_reentrant=False."""
    function: Any = getattr(module, "_gradient_checkpointing_func", None)
    keywords = getattr(function, "keywords", {})
    return bool(getattr(module, "gradient_checkpointing", False)) and keywords.get("use_reentrant", True) is not False
