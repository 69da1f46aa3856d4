"""What a memory must know of the batch, which an MLP does not see: which tokens are pads, and whose they are."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection
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
        self.handles = [decoder.register_forward_pre_hook(self._look, with_kwargs=True)]

    def close(self) -> None:
        """Leave the model alone."""
        for handle in self.handles:
            handle.remove()

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
            warnings.warn(
                "the model is checkpointed with use_reentrant=True, so every layer below the lowest memory keeps its "
                "input and runs again in the backward pass, for nothing; checkpoint with use_reentrant=False, as "
                'TrainingArguments(gradient_checkpointing_kwargs={"use_reentrant": False})',
                stacklevel=2,
            )
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
    """Takes `example_ids` out of a model's calls and gives them to its memories while the call lasts."""

    def __init__(self, model: nn.Module):
        self._memories: list[Any] = []
        self._handles = [
            model.register_forward_pre_hook(self._look, with_kwargs=True),
            model.register_forward_hook(self._forget, always_call=True),
        ]

    @classmethod
    def watch(cls, model: nn.Module, memories: Collection[Any], *, wanted: bool) -> None:
        """Give some memories of a model the ids of its calls from now on, or no more."""
        owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
        own = next((owner for owner in owners if isinstance(owner, cls)), None)
        if own is None and not wanted:
            return
        own = own or cls(model)
        own._memories = [m for m in own._memories if all(m is not memory for memory in memories)]
        own._memories += memories if wanted else []
        if not own._memories:
            for handle in own._handles:
                handle.remove()

    def _look(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids = kwargs.pop("example_ids", None)
        learning = module.training and torch.is_grad_enabled()
        if learning and any(memory.trainable and memory.attached for memory in self._memories):
            ids = _checked(ids, args, kwargs)
            for memory in self._memories:
                memory.example_ids = ids
        return args, kwargs

    def _forget(self, *_: Any) -> None:
        for memory in self._memories:
            memory.example_ids = None


def _checked(ids: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Ids of examples that fit the batch; those of pads are 0."""
    given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    shape = next((tuple(tokens.shape[:2]) for tokens in given if isinstance(tokens, Tensor)), ())
    whole = isinstance(ids, Tensor) and not ids.is_floating_point() and not ids.is_complex() and ids.dtype != torch.bool
    fits = whole and tuple(ids.shape) in (shape, shape[:1])
    mask = kwargs.get("attention_mask")
    if fits and isinstance(mask, Tensor) and mask.shape == ids.shape:
        ids = ids.masked_fill(mask.to(ids.device) == 0, 0)
    if not fits or not ids.numel() or int(ids.min()) < 0 or int(ids.max()) >= 2**32:
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        got += f" from {int(ids.min())} to {int(ids.max())}" if fits and ids.numel() else ""
        raise TrainingError(
            "provenance=True: every training batch must have example_ids, whole numbers from 0 to 2**32 - 1, one for "
            f"each of its sequences or tokens {shape}; got {got}. With Trainer: a column example_ids, "
            "remove_unused_columns=False, and a collator that keeps it (TRL's drops it)"
        )
    return ids


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b
