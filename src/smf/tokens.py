"""What a memory must know of the batch, which an MLP does not see: which tokens are pads, and whose they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TrainingError


class TokenMask:
    """Which tokens of the current forward pass are not pads; an MLP does not see the attention mask by itself.

    Reads it off the call of the module that owns the decoder layers, through a forward pre-hook.
    """

    def __init__(self, decoder: nn.Module):
        self._position = list(inspect.signature(decoder.forward).parameters).index("attention_mask")
        self._masks: list[Any] = []
        self._recording = False  # the decoder runs with gradients enabled
        self._backward = -1  # the backward pass that the decoder runs in; -1: none
        self._reentrant = False  # a checkpointed layer ran without gradients, and will run again in the backward pass
        self._again = False  # it has
        self.handle = decoder.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._recording = torch.is_grad_enabled()
        if not self._recording:
            return  # nothing is counted, and an earlier pass may still wait for its backward pass
        mask = args[self._position] if len(args) > self._position else kwargs.get("attention_mask")
        waiting = self._reentrant and not self._again
        self._masks = [*self._masks, mask] if waiting else [mask]
        self._reentrant, self._again, self._backward = waiting, False, torch._C._current_graph_task_id()

    def flat(self, x: Tensor) -> Tensor | None:
        """The mask `[T]` (bool) of hidden states `[..., D]`; None where all tokens are real, or no read will count."""
        if not torch.is_grad_enabled():
            if not self._recording:
                return None
            self._reentrant = True
        elif torch._C._current_graph_task_id() != self._backward:  # a checkpointed layer runs again
            if not self._reentrant:
                return None  # use_reentrant=False: the first run's reads count, with its own mask
            self._again = True
            if any(not _equal(mask, self._masks[-1]) for mask in self._masks):
                raise TrainingError(
                    "two forward passes with different attention masks before one backward pass: with "
                    "use_reentrant=True their reads cannot be told apart; checkpoint with use_reentrant=False"
                )
        mask = self._masks[-1] if self._masks else None
        if mask is None:
            return None
        tokens = x.shape[:-1].numel()
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.numel() != tokens:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise TrainingError(
                f"training needs an attention_mask [B, S] with one entry for each of the {tokens} tokens, to tell pads "
                f"from tokens; got {got}. Pass the 2-D mask, or none if nothing is padded"
            )
        return (mask != 0).reshape(-1)


class ExampleIds:
    """Takes `example_ids` out of a model's call and gives them to its memories."""

    def __init__(self, model: nn.Module, memories: Iterable[Any]):
        self._memories = list(memories)
        self.handle = model.register_forward_pre_hook(self._look, with_kwargs=True)

    @classmethod
    def watch(cls, model: nn.Module, memories: Iterable[Any], *, wanted: bool) -> None:
        """Watch a model from now on, or no more."""
        for hook in list(model._forward_pre_hooks.values()):
            if isinstance(owner := getattr(hook, "__self__", None), cls):
                owner.handle.remove()
        for memory in (memories := list(memories)):
            memory.example_ids = None
        if wanted:
            cls(model, memories)

    def _look(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids = kwargs.pop("example_ids", None)
        if module.training and torch.is_grad_enabled():
            whole = isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() in (1, 2) and ids.numel()
            if not whole or int(ids.min()) < 0 or int(ids.max()) >= 2**32:
                got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
                raise TrainingError(
                    "provenance=True: every training batch must have example_ids, whole numbers from 0 to 2**32 - 1, "
                    f"[B] or [B, S]; got {got}. With Trainer: a column example_ids, and remove_unused_columns=False"
                )
            for memory in self._memories:
                memory.example_ids = ids
        return args, kwargs


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b
