"""What each method trains: a model and its optimizer, made from a recipe and a base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from .adapter import SparseMemoryConfig, set_train
from .background import read_background
from .optimizer import SparseMemoryOptimizer
from .patch import Patch, save_patch
from .recipe import MemoryOptions, Method, Recipe


@dataclass
class Prepared:
    """A method, ready to train.

    Args:
        model: the base, with whatever the method adds.
        optimizer: None for the base.
        max_grad_norm: what the training loop clips to; 0 where the optimizer clips by itself.
        trained: numbers that training may change (of a memory: its whole tables, and what else trains).
        save: writes the result into a folder and returns what it changed: `rows_changed`, `numbers_changed`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    max_grad_norm: float
    trained: int
    save: Callable[[Path], dict[str, Any]]


def memory_config(options: MemoryOptions, seed: int, train: str = "rows") -> SparseMemoryConfig:
    """The config of a recipe's memory."""
    keys: dict[str, Any] = asdict(options)
    return SparseMemoryConfig(**keys, seed=seed, train=train)  # type: ignore[arg-type]


def base(model: nn.Module, method: Method, recipe: Recipe) -> Prepared:
    """The untouched base: what the other rows are compared with."""
    return Prepared(model, None, 0.0, 0, lambda folder: {"rows_changed": 0, "numbers_changed": 0})


def full(model: nn.Module, method: Method, recipe: Recipe) -> Prepared:
    """Every weight, by AdamW."""
    model.requires_grad_(True)
    return _dense(model, method, recipe)


def lora(model: Any, method: Method, recipe: Recipe) -> Prepared:
    """PEFT's LoRA on all linear layers, by AdamW."""
    config = LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,  # type: ignore[arg-type]  # PEFT annotates int, scales by alpha / r
        lora_dropout=method.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return _dense(get_peft_model(model, config), method, recipe)


def _dense(model: Any, method: Method, recipe: Recipe) -> Prepared:
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained = sum(p.numel() for p in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=method.lr, weight_decay=recipe.train.weight_decay)

    def save(folder: Path) -> dict[str, Any]:
        model.save_pretrained(folder / "model")
        return {"rows_changed": 0, "numbers_changed": trained}

    return Prepared(model, optimizer, recipe.train.max_grad_norm, trained, save)


def healing(model: Any, recipe: Recipe) -> Prepared:
    """The whole memory on general text; leaves an adapter, healed, that a training of rows can start from."""
    assert recipe.heal is not None  # checked with the recipe
    set_train(model, "memory")
    optimizer = SparseMemoryOptimizer(
        model,
        lr=recipe.heal.lr,
        rule="all",
        weight_decay=recipe.train.weight_decay,
        max_grad_norm=recipe.train.max_grad_norm,
        seed=recipe.seed,
    )

    def save(folder: Path) -> dict[str, Any]:
        model.save_pretrained(folder)
        return {"rows_changed": 0, "numbers_changed": 0}

    return Prepared(model, optimizer, 0.0, model.get_nb_trainable_parameters()[0], save)


def attach(model: Any, method: Method, recipe: Recipe) -> Any:
    """The base with the method's memory at its start."""
    return get_peft_model(model, memory_config(method.memory or recipe.memory, recipe.seed, method.train))


def counts(patch: Patch) -> dict[str, Any]:
    """How many rows and numbers a patch changes."""
    numbers = sum(new.numel() for new in patch.new.values())
    numbers += sum(t.numel() for others in patch.new_others.values() for t in others.values())
    by_layer = {str(layer): len(ids) for layer, ids in patch.rows.items()}
    return {"rows_changed": sum(by_layer.values()), "rows_by_layer": by_layer, "numbers_changed": numbers}


def smf(model: Any, method: Method, recipe: Recipe, *, tokenizer: Any, background_texts: Sequence[str]) -> Prepared:
    """Rows of the memory that `attach` added (and healing may have trained)."""
    set_train(model, method.train)
    background = None
    if background_texts:
        assert recipe.background is not None
        background = read_background(
            model, background_texts, tokenizer=tokenizer, max_length=recipe.background.max_length
        )
    optimizer = SparseMemoryOptimizer(
        model,
        background,
        lr=method.lr,
        lr_other=method.lr_other or None,
        rows_per_step=method.rows_per_step,
        rule=method.rule,
        reads=method.reads,
        update=method.update,
        select_every=method.select_every,
        weight_decay=recipe.train.weight_decay,
        max_grad_norm=recipe.train.max_grad_norm,
        seed=recipe.seed,
    )

    def save(folder: Path) -> dict[str, Any]:
        model.save_pretrained(folder / "adapter")
        patch = save_patch(model, folder / "patch.smf", method=asdict(method), seed=recipe.seed)
        return counts(patch)

    return Prepared(model, optimizer, 0.0, model.get_nb_trainable_parameters()[0], save)
