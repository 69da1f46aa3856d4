"""Sparse memory as a PEFT method: its config, the layer that wraps an MLP, the tuner and its registration."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, PeftType, TaskType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn

from .decoder import default_layers, find_decoder, refuse_base
from .errors import ConfigError, SmfError, UnsupportedModelError
from .fingerprint import base_hash
from .memory import KINDS, MemoryHost, MemoryShape, ProductKeyMemory
from .tokens import TokenMask

TRAINED: dict[str, tuple[str, ...]] = {  # kinds that autograd trains; the table is trained through the anchor
    "rows": ("anchor",),
    "rows+scale": ("anchor", "scale"),
    "memory": ("anchor", "scale", "query_weight", "query_bias", "keys", "gate", "out"),
}


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
        layers: decoder layers that get a memory; None: at one quarter, the middle and three quarters of the depth.
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
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1; got {value!r}")
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
        raise ConfigError(f"layers must be a list of decoder layer indices like [10, 12, 14]; got {layers!r}")
    if not layers or len(set(layers)) != len(layers):
        raise ConfigError(f"layers must name at least one layer, each once; got {layers!r}")
    return sorted(layers)


class SparseMemoryLayer(MemoryHost, BaseTunerLayer):  # type: ignore[override]
    """A decoder layer's MLP with the memories of its adapters.

    Parameters lie flat as `sparse_memory_<kind>.<adapter>`: the one layout that PEFT's and transformers' loaders both
    read back. `memories` are views of them.
    """

    adapter_layer_names = tuple(f"sparse_memory_{kind}" for kind in KINDS)

    def __init__(self, base_layer: nn.Module, layer: int, tokens: TokenMask):
        super().__init__()
        self.base_layer = base_layer
        self.layer = layer
        self.tokens = tokens
        self.memories = {}
        self._configs: dict[str, SparseMemoryConfig] = {}
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ParameterDict())
        self._active_adapter = []
        self.merged_adapters = []

    def update_layer(self, adapter: str, config: SparseMemoryConfig, d: int) -> None:
        """Add the memory of one adapter, at its reproducible start."""
        like = next(self.base_layer.parameters())
        shape = config.shape(self.layer, d, like.dtype if like.is_floating_point() else torch.float32)
        device = like.device if like.device.type != "meta" else torch.device("cpu")
        for kind, tensor in shape.start().items():
            self._kind(kind)[adapter] = nn.Parameter(tensor.to(device), requires_grad=False)
        parameters: Any = {kind: self._kind(kind) for kind in KINDS}
        self.memories[adapter] = ProductKeyMemory(shape, parameters, adapter, config.base_hash)
        self._configs[adapter] = config

    def _kind(self, kind: str) -> nn.ParameterDict:
        return getattr(self, f"sparse_memory_{kind}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The MLP's output with the active memories added to it, or put in its place."""
        active = [] if self.disable_adapters else [n for n in self.active_adapters if n in self.memories]
        replaced = any(self._configs[name].mode == "replacement" for name in active)
        out = None if replaced else self.base_layer(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))  # an MLP's first argument, whatever it is called
        for name in active:
            mask_T = self.tokens.flat(x) if self.training and self.memories[name].trainable else None
            y = self.memories[name].forward(x, mask_T, training=self.training)
            out = y if out is None else _add(out, y)
        return out

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones; of those, only what their train mode names requires gradients."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._active_adapter = names
        for adapter in self.memories:
            self._set_trainable(adapter, adapter in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze adapters, or let what their train mode names require gradients."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for adapter in names:
            if adapter in self.memories:
                self._set_trainable(adapter, requires_grad)

    def _set_trainable(self, adapter: str, trainable: bool) -> None:
        trained = TRAINED[self._configs[adapter].train] if trainable else ()
        for kind in self.memories[adapter].kinds:
            self._kind(kind)[adapter].requires_grad_(kind in trained)

    def set_train(self, adapter: str, mode: Literal["rows", "rows+scale", "memory"]) -> None:
        """Change what trains."""
        self._configs[adapter].train = mode
        self._set_trainable(adapter, True)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter's memory."""
        self.memories.pop(adapter_name, None)
        self._configs.pop(adapter_name, None)
        super().delete_adapter(adapter_name)


def _add(out: Any, y: Tensor) -> Any:
    if isinstance(out, tuple):  # some MoE blocks return router scores too
        return (out[0] + y.to(out[0].dtype), *out[1:])
    return out + y.to(out.dtype)


class SparseMemoryModel(BaseTuner):
    """The PEFT tuner: finds the MLPs by shape, wraps them, and refuses what it cannot serve before it changes it."""

    prefix = "sparse_memory_"
    tuner_layer_cls = SparseMemoryLayer

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        configs = getattr(model, "peft_config", None)  # PEFT adds to it before it injects
        before = dict(configs or {})
        try:
            refuse_base(model)
            super().__init__(model, *args, **kwargs)
        except SmfError:
            if configs is not None:
                configs.clear()
                configs.update(before)
            elif getattr(model, "_hf_peft_config_loaded", False):
                model._hf_peft_config_loaded = False  # transformers' add_adapter sets it before it calls PEFT
            raise

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Check everything, then attach (PEFT calls this for each adapter)."""
        # a copy: the user's config object may serve another base too, and keeps its open choices
        config: Any = copy.copy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        decoder = find_decoder(model)
        taken = [m.layer for m in model.modules() if isinstance(m, SparseMemoryLayer) and adapter_name in m.memories]
        if taken:
            raise ConfigError(f"adapter {adapter_name!r} has memory at layers {taken} already; choose another name")
        fresh = config.base_hash is None
        if config.layers is None:
            config.layers = default_layers(len(decoder.blocks))
            print(f"smf: memory at decoder layers {config.layers} of {len(decoder.blocks)} (layers=None)")
        names = decoder.mlp_names(config.layers, replace=config.mode == "replacement")
        found = base_hash(model)
        if not fresh and found is not None and found != config.base_hash:
            raise UnsupportedModelError(
                f"this adapter belongs to another base: it was made on {config.base_model_name_or_path!r} with weights "
                f"hash {str(config.base_hash)[:12]}, this model's weights have {found[:12]}; load the base it names, "
                "in float32 or bfloat16 (float16 rounds its weights)"
            )
        config.base_hash = config.base_hash or found
        config.target_modules = names
        self._decoder = decoder
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config  # inject_adapter has prepared it

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, SparseMemoryConfig)
        if not isinstance(target, SparseMemoryLayer):
            existing = [m.tokens for m in self.model.modules() if isinstance(m, SparseMemoryLayer)]
            tokens = existing[0] if existing else TokenMask(self._decoder.owner)
            layer = SparseMemoryLayer(target, self._decoder.index(current_key), tokens)
            layer.train(target.training)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.update_layer(adapter_name, peft_config, self._decoder.width)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own also looks for child.weight, which an MLP has not

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        pass  # the config says which dtype each tensor has

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(
            "a memory cannot be merged into the base: it is a table that is looked up, not a change of weights. "
            "Keep the adapter, save the changed rows with smf.save_patch, or get the base back with unload()"
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        layers = [m for m in self.model.modules() if isinstance(m, SparseMemoryLayer)]
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for layer in layers:
            layer.tokens.handle.remove()
        return model

    def describe_trainable(self) -> tuple[int, str]:
        """How many numbers training can change, and a sentence that says what a step changes."""
        memories = [
            memory
            for m in self.model.modules()
            if isinstance(m, SparseMemoryLayer)
            for memory in m.memories.values()
            if memory.trainable
        ]
        tables = sum(memory.values.numel() for memory in memories)
        dense = sum(
            p.numel() for n, p in self.model.named_parameters() if p.requires_grad and "sparse_memory_anchor" not in n
        )
        size = f"{memories[0].shape.n_rows:,} x {memories[0].shape.d}" if memories else "0"
        rows_per_step = memories[0].rows_per_step if memories else 0
        rows = "unknown until an optimizer is made" if rows_per_step is None else rows_per_step
        return tables + dense, (
            f"table: {len(memories)} layers x {size} = {tables:,} numbers || rows a step and layer: {rows} || "
            f"other trainable params: {dense:,}"
        )


# -- registration -----------------------------------------------------------------------------------------------------


def _register() -> None:
    """Make PEFT know the method, and let its summary count table rows, which are frozen for autograd."""
    register_peft_method(name="sparse_memory", config_cls=SparseMemoryConfig, model_cls=SparseMemoryModel)
    count, show = PeftModel.get_nb_trainable_parameters, PeftModel.print_trainable_parameters

    def get_nb_trainable_parameters(self: PeftModel) -> tuple[int, int]:
        if not isinstance(self.base_model, SparseMemoryModel):
            return count(self)
        return self.base_model.describe_trainable()[0], sum(p.numel() for p in self.parameters())

    def print_trainable_parameters(self: PeftModel) -> None:
        show(self)
        if isinstance(self.base_model, SparseMemoryModel):
            print(self.base_model.describe_trainable()[1])

    PeftModel.get_nb_trainable_parameters = get_nb_trainable_parameters
    PeftModel.print_trainable_parameters = print_trainable_parameters


_register()


def set_train(model: nn.Module, mode: Literal["rows", "rows+scale", "memory"], adapter: str | None = None) -> None:
    """Change what trains, as from healing ("memory") to "rows". Make the optimizer afterwards.

    Args:
        model: with memory layers.
        mode: "rows", "rows+scale" or "memory".
        adapter: the adapter's name; None for all active ones.
    """
    layers = [m for m in model.modules() if isinstance(m, SparseMemoryLayer)]
    names = {adapter} if adapter else {n for layer in layers for n in layer.active_adapters}
    chosen = [(layer, name) for layer in layers for name in sorted(names) if name in layer.memories]
    if not chosen:
        raise ConfigError(f"no memory layer of adapter {adapter or sorted(names)} in this model")
    for layer, name in chosen:
        layer._configs[name].check_train(mode)
    for layer, name in chosen:
        layer.set_train(name, mode)
