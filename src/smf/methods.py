"""What each method trains: a model and its optimizer, made from a recipe and a base."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, OFTConfig, OSFConfig, ShiraConfig, get_peft_model
from torch import nn

from .adapter import set_train
from .addon import add_dense, save_dense
from .background import read_background
from .config import SparseMemoryConfig
from .data import Loaded
from .decoder import find_decoder, positions_of
from .errors import ConfigError
from .optimizer import SparseMemoryOptimizer
from .patch import Patch
from .patch_file import save_patch
from .recipe import Method, Recipe


@dataclass
class Prepared:
    """A method, ready to train.

    Args:
        model: the base, with whatever the method adds.
        optimizer: None for the base.
        max_grad_norm: what the training loop clips to; 0 where the optimizer clips by itself.
        trained: numbers that training may change (of a memory: its whole tables, and what else trains).
        save: writes the result into a folder and returns what it changed: `rows_changed` (None where all may have)
            and `numbers_changed`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    max_grad_norm: float
    trained: int
    save: Callable[[Path], dict[str, Any]]


# From the base (with a memory, where the kind wants one), the method's options, the recipe and all that it reads.
# Functions of users have this signature too: docs/methods.md.
MakeMethod = Callable[[Any, Method, Recipe, Loaded], Prepared]


def base(model: nn.Module, method: Method, recipe: Recipe, loaded: Loaded) -> Prepared:
    """The untouched base: what the other rows are compared with."""
    return Prepared(model, None, 0.0, 0, lambda folder: {"rows_changed": 0, "numbers_changed": 0})


def full(model: nn.Module, method: Method, recipe: Recipe, loaded: Loaded) -> Prepared:
    """Every weight, by AdamW."""
    return dense(model.requires_grad_(True), method, recipe)


def lora(model: Any, method: Method, recipe: Recipe, loaded: Loaded) -> Prepared:
    """LoRA (arXiv 2106.09685), of PEFT, by AdamW."""
    options = {"r": method.r, "lora_alpha": method.alpha, "lora_dropout": method.dropout}
    return _peft(LoraConfig, model, method, recipe, options)


def oft(model: Any, method: Method, recipe: Recipe, loaded: Loaded) -> Prepared:
    """Orthogonal finetuning (arXiv 2306.07280), of PEFT, by AdamW."""
    return _peft(OFTConfig, model, method, recipe, {})


def osf(model: Any, method: Method, recipe: Recipe, loaded: Loaded) -> Prepared:
    """Orthogonal subspace finetuning (arXiv 2504.07097), of PEFT, by AdamW."""
    return _peft(OSFConfig, model, method, recipe, {})


def shira(model: Any, method: Method, recipe: Recipe, loaded: Loaded) -> Prepared:
    """Sparse high-rank adapters (arXiv 2406.13175), of PEFT, by AdamW."""
    return _peft(ShiraConfig, model, method, recipe, {"r": method.r, "random_seed": recipe.seed})


def _peft(config: Any, model: Any, method: Method, recipe: Recipe, options: dict[str, Any]) -> Prepared:
    """A method of PEFT on all linear layers, or those of some decoder layers, with the recipe's options on top."""
    where = "all-linear" if method.layers is None else _linear(model, method.layers)
    try:
        made = config(**({"target_modules": where, "task_type": "CAUSAL_LM"} | options | method.options))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"options = {method.options} do not fit PEFT's {config.__name__}: {error}") from error
    return dense(get_peft_model(model, made), method, recipe)


def _linear(model: nn.Module, layers: list[int]) -> list[str]:
    """Names of the linear layers within some decoder layers."""
    decoder = find_decoder(model)
    layers = decoder.chosen(layers)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in names if name.startswith(f"{decoder.name}.") and decoder.index(name) in layers]


def dense(model: Any, method: Method, recipe: Recipe) -> Prepared:
    """All parameters that require gradients, by AdamW; saved by the model's own `save_pretrained`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained = sum(p.numel() for p in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=method.lr, weight_decay=recipe.train.weight_decay)

    def save(folder: Path) -> dict[str, Any]:
        model.save_pretrained(folder / "model")
        return {"rows_changed": 0, "numbers_changed": trained}

    return Prepared(model, optimizer, recipe.train.max_grad_norm, trained, save)


def dense_addon(model: Any, method: Method, recipe: Recipe, loaded: Loaded) -> Prepared:
    """Control: beside the same layers, in place of a memory, a gated MLP of equally many FLOPs a token, by AdamW."""
    prepared = dense(add_dense(model.requires_grad_(False), memory_config(recipe, method)), method, recipe)

    def save(folder: Path) -> dict[str, Any]:
        save_dense(model, folder / "addon.safetensors")
        return {"rows_changed": 0, "numbers_changed": prepared.trained}

    return replace(prepared, save=save)


# -- methods with a memory --------------------------------------------------------------------------------------------


def memory_config(recipe: Recipe, method: Method) -> SparseMemoryConfig:
    """The config of a method's memory."""
    keys: dict[str, Any] = asdict(method.memory or recipe.memory)
    layers = keys["layers"] if method.layers is None else method.layers
    return SparseMemoryConfig(**(keys | {"layers": layers}), seed=recipe.seed, train=method.train)  # type: ignore[arg-type]


def attach(model: Any, method: Method, recipe: Recipe) -> Any:
    """The base with the method's memory at its start."""
    return get_peft_model(model, memory_config(recipe, method))


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
    trained = model.get_nb_trainable_parameters()[0]

    def save(folder: Path) -> dict[str, Any]:
        model.save_pretrained(folder)
        return {"rows_changed": None, "numbers_changed": trained}

    return Prepared(model, optimizer, 0.0, trained, save)


def attached(model: Any, method: Method, recipe: Recipe, loaded: Loaded) -> Prepared:
    """Control: the memory as it starts, so that what attaching it costs by itself is seen."""

    def save(folder: Path) -> dict[str, Any]:
        model.save_pretrained(folder / "adapter")
        return {"rows_changed": 0, "numbers_changed": 0}

    return Prepared(model, None, 0.0, 0, save)


def healed(model: Any, method: Method, recipe: Recipe, loaded: Loaded) -> Prepared:
    """Control: the healed memory as it is, so that what healing learned and forgot by itself is seen."""
    trained = healing(model, recipe).trained

    def save(folder: Path) -> dict[str, Any]:
        model.save_pretrained(folder / "adapter")
        return {"rows_changed": None, "numbers_changed": trained}

    return Prepared(model, None, 0.0, trained, save)


def smf(model: Any, method: Method, recipe: Recipe, loaded: Loaded) -> Prepared:
    """Rows of the memory that `attach` added (and healing may have trained)."""
    set_train(model, method.train)
    background = None
    if recipe.background is not None:  # also where the rule does not look at it: the log says who writes its hubs
        length = min(recipe.background.max_length, positions_of(model.config))
        background = read_background(model, loaded.background, tokenizer=loaded.tokenizer, max_length=length)
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
        betas=(method.betas[0], method.betas[1]),
        weight_decay=recipe.train.weight_decay,
        max_grad_norm=recipe.train.max_grad_norm,
        seed=recipe.seed,
        provenance=method.provenance,
    )

    def save(folder: Path) -> dict[str, Any]:
        model.save_pretrained(folder / "adapter")
        names = list(loaded.places) if method.provenance else None
        patch = save_patch(model, folder / "patch.smf", examples=names, method=asdict(method), seed=recipe.seed)
        if background is not None:
            background.save(folder / "background.safetensors")  # with which `smf patch inspect` knows hubs
        return counts(patch)

    return Prepared(model, optimizer, 0.0, model.get_nb_trainable_parameters()[0], save)


def counts(patch: Patch) -> dict[str, Any]:
    """How many rows and numbers a patch changes."""
    numbers = sum(new.numel() for new in patch.new.values())
    numbers += sum(t.numel() for others in patch.new_others.values() for t in others.values())
    by_layer = {str(layer): len(ids) for layer, ids in patch.rows.items()}
    return {"rows_changed": sum(by_layer.values()), "rows_by_layer": by_layer, "numbers_changed": numbers}


# -- by name ----------------------------------------------------------------------------------------------------------

METHODS: dict[str, MakeMethod] = {
    "base": base,
    "smf": smf,
    "attached": attached,
    "healed": healed,
    "dense-addon": dense_addon,
    "lora": lora,
    "oft": oft,
    "osf": osf,
    "shira": shira,
    "full": full,
}
WITH_MEMORY = ("smf", "attached", "healed")
BESIDE_THE_MLP = (*WITH_MEMORY, "dense-addon")


def find_method(kind: str) -> MakeMethod:
    """The function of a method's kind: one of ours by name, one of a user's by "module:function"."""
    if kind in METHODS:
        return METHODS[kind]
    module, _, name = kind.partition(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ConfigError(f"kind = {kind!r}: module {module!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ConfigError(f"kind = {kind!r}: module {module!r} has no function {name!r}")
    return function  # type: ignore[return-value]  # what it returns is seen when it is called
