"""What SparseMemoryOptimizer refuses when it is made: before the first step, naming what was given and what to do."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
from torch import nn

from .background import Background, background_identity
from .errors import BackgroundError, ConfigError
from .memory import ProductKeyMemory
from .selection import NEED_BACKGROUND, Rule


def check_model(model: Any) -> None:
    """Refuse what is not a model, such as its parameters."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"SparseMemoryOptimizer takes the model itself, not its parameters; got {type(model).__name__}"
        )


def check_memories(memories: dict[int, ProductKeyMemory]) -> None:
    """Refuse a model without memory, with a frozen one, or with one that lost precision by a cast."""
    if not memories:
        raise ConfigError(
            "the model has no memory layers; attach them first: get_peft_model(model, SparseMemoryConfig())"
        )
    for layer, memory in memories.items():
        if not memory.trainable:
            raise ConfigError(
                f"the memory of adapter {memory.adapter!r} is frozen; load it with "
                "PeftModel.from_pretrained(..., is_trainable=True), or make it the active adapter with set_adapter"
            )
        if memory.values.dtype not in (memory.attached_dtype, torch.float64):
            raise ConfigError(
                f"the memory at layer {layer} was attached in {memory.attached_dtype} and cast to "
                f"{memory.values.dtype} since; cast the base before attaching (the memory stays float32), or set "
                'table_dtype="bfloat16"'
            )


def check_numbers(rows_per_step: Any, betas: Any, **numbers: Any) -> None:
    """Refuse numbers that no training can use."""
    if isinstance(rows_per_step, bool) or not isinstance(rows_per_step, Integral) or rows_per_step < 1:
        raise ConfigError(f"rows_per_step must be a whole number of at least 1; got {rows_per_step!r}")
    for name, number in numbers.items():
        if number is not None and not (isinstance(number, (int, float)) and 0 <= number < math.inf):
            raise ConfigError(f"{name} must be a finite number of at least 0; got {number!r}")
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not pair or not all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas):
        raise ConfigError(f"betas must be two numbers in [0, 1); got {betas!r}")


def check_rates(memories: dict[int, ProductKeyMemory], **rates: Any) -> None:
    """Refuse a learning rate that is infinite in the table's dtype: the first step would make its rows infinite."""
    dtypes = {memory.values.dtype for memory in memories.values()}
    for name, rate in rates.items():
        for dtype in dtypes if isinstance(rate, (int, float)) else ():
            if torch.finfo(dtype).max < rate < math.inf:
                most = torch.finfo(dtype).max
                raise ConfigError(f"{name} must be at most {most:.3g}, the largest number of {dtype}; got {rate!r}")


def check_names(**options: tuple[str, tuple[str, ...]]) -> None:
    """Refuse names that are not among the allowed ones."""
    for name, (value, allowed) in options.items():
        if value not in allowed:
            raise ConfigError(f"{name}={value!r} is not known; use one of {list(allowed)}")


def check_healing(rule: str | Rule, background: Background | None) -> None:
    """Refuse a choice of rows for a model that trains its whole memory."""
    if rule == "all" or (rule == "kl" and background is None):  # asked for, or nothing was
        return
    given = f"rule={rule!r}" + (" and a background" if background is not None else "")
    raise ConfigError(
        f'the model is set to train="memory" (healing), which trains every row that is read (rule="all"); got {given}. '
        'To train chosen rows, call smf.set_train(model, "rows") first'
    )


def check_provenance(provenance: bool, update: str) -> None:
    """Refuse an update that moves rows in steps that did not choose them."""
    if provenance and update == "masked-adam":
        raise ConfigError(
            'provenance=True with update="masked-adam", which moves rows long after they were chosen, so that no '
            'example of a step wrote them; use update="adam" or "sgd"'
        )


def check_background(rule: str | Rule, background: Any, memories: dict[int, ProductKeyMemory]) -> None:
    """Refuse a missing or foreign background."""
    if background is None:
        if rule in NEED_BACKGROUND:
            raise BackgroundError(
                f"rule={rule!r} weighs the step's reads against general text and needs a background: pass "
                'smf.read_background(model, texts, tokenizer=tokenizer), or use rule="tf", "random" or "all"'
            )
        return
    if not isinstance(background, Background):
        raise BackgroundError(
            f"background must come from smf.read_background or Background.load; got {type(background).__name__}"
        )
    if background.identity != background_identity(memories):
        raise BackgroundError(
            f"the background belongs to another base, config, query or keys than this model: it is of layers "
            f"{list(background.layers)}, identity {background.identity[:12]}; the model has layers {list(memories)}. "
            "Read it again with this model"
        )
