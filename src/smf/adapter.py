"""Sparse memory as a PEFT method: the layer that wraps an MLP, the tuner and its registration."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn

from .config import TRAINED, SparseMemoryConfig
from .decoder import find_decoder, refuse_base
from .errors import ConfigError, SmfError, UnsupportedModelError
from .fingerprint import base_hash
from .frozen import FrozenBelow
from .memory import KINDS, MemoryHost, MemoryShape, ProductKeyMemory
from .sharding import refuse_replica
from .table_rows import VALUES, changed_rows, check_tensors, with_whole_tables
from .tokens import TokenMask

CHECKPOINT = re.compile(r"checkpoint-\d+")  # folders that Trainer makes


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
        refuse_replica(self)
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
    rows_only = False  # while Trainer's checkpoint is written

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
            print(f"smf: memory at decoder layers {decoder.chosen(None)} of {len(decoder.blocks)} (layers=None)")
        config.layers = decoder.chosen(config.layers)
        names = decoder.mlp_names(config.layers, replace=config.mode == "replacement")
        found = base_hash(model)
        if not fresh and found is not None and found != config.base_hash:
            raise UnsupportedModelError(
                f"this adapter belongs to another base: it was made on {config.base_model_name_or_path!r} with weights "
                f"hash {str(config.base_hash)[:12]}, this model's weights have {found[:12]}; load the base it names, "
                "in float32 or bfloat16 (float16 rounds its weights)"
            )
        like = next(model.parameters())
        shape = config.shape(config.layers[0], decoder.width, like.dtype if like.is_floating_point() else torch.float32)
        shape.check_room(len(names) if like.device.type == "cpu" else 1)  # before the first layer is wrapped
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
            if not existing:
                tokens.handles += FrozenBelow(self._decoder).handles
            layer = SparseMemoryLayer(target, self._decoder.index(current_key), tokens)
            layer.train(target.training)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.update_layer(adapter_name, peft_config, self._decoder.width)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own also looks for child.weight, which an MLP has not

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        pass  # the config says which dtype each tensor has

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """What PEFT saves: with `rows_only`, of each table only what differs from its start."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        if not getattr(getattr(model, "base_model", None), "rows_only", False):
            return found
        for name, shape in _shapes(model, adapter_name).items():
            entries = changed_rows(found.pop(f"{name}.{VALUES}.{adapter_name}"), shape)
            found |= {f"{name}.{part}.{adapter_name}": tensor for part, tensor in entries.items()}
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What PEFT loads: whole tables, also where rows were saved."""
        shapes = _shapes(model, adapter_name)
        prefix = "base_model.model."  # in files always, in models only within a PeftModel
        named = {f"{prefix}{name}": shape for name, shape in shapes.items() if not name.startswith(prefix)}
        whole = with_whole_tables(state_dict, shapes | named)
        check_tensors(whole, shapes, prefix)  # PEFT loads in part, with a warning, and torch whatever numbers there are
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, whole)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(
            "a memory cannot be merged into the base: it is a table that is looked up, not a change of weights. "
            "Keep the adapter, save the changed rows with smf.save_patch, or get the base back with unload()"
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        layers = [m for m in self.model.modules() if isinstance(m, SparseMemoryLayer)]
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for layer in layers:
            layer.tokens.close()
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


def _shapes(model: nn.Module, adapter: str) -> dict[str, MemoryShape]:
    """Sizes and start of an adapter's memories, by the name of their module."""
    layers = _memory_layers(model).items()
    return {name: layer.memories[adapter].shape for name, layer in layers if adapter in layer.memories}


def _memory_layers(model: nn.Module) -> dict[str, SparseMemoryLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseMemoryLayer)}


def _detach(model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
    """Give a base that PEFT has attached memories to, and nothing else, its MLPs and what it trained back."""
    for name, layer in (layers := _memory_layers(model)).items():
        layer.tokens.close()
        model.set_submodule(name, layer.base_layer)
    if layers:
        vars(model).pop("peft_config", None)
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _undone_unless_ended(undo: Callable[[], Any]) -> Iterator[None]:
    """PEFT attaches before it opens a file: whatever is wrong with that, and whoever interrupts, it is undone."""
    with contextlib.ExitStack() as stack:
        stack.callback(undo)
        yield
        stack.pop_all()


# -- registration -----------------------------------------------------------------------------------------------------


def _register() -> None:
    """Make PEFT know the method, let its summary count table rows, which are frozen for autograd, and its checkpoints
    hold changed rows; and leave no memory behind where a file is refused."""
    register_peft_method(name="sparse_memory", config_cls=SparseMemoryConfig, model_cls=SparseMemoryModel)
    count, show = PeftModel.get_nb_trainable_parameters, PeftModel.print_trainable_parameters
    save, read, add = PeftModel.save_pretrained, PeftModel.from_pretrained.__func__, PeftModel.load_adapter

    def get_nb_trainable_parameters(self: PeftModel) -> tuple[int, int]:
        if not isinstance(self.base_model, SparseMemoryModel):
            return count(self)
        return self.base_model.describe_trainable()[0], sum(p.numel() for p in self.parameters())

    def print_trainable_parameters(self: PeftModel) -> None:
        show(self)
        if isinstance(self.base_model, SparseMemoryModel):
            print(self.base_model.describe_trainable()[1])

    @functools.wraps(save)
    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """In Trainer's checkpoint folders rows in place of whole tables; elsewhere what every loader can read."""
        if not isinstance(self.base_model, SparseMemoryModel):
            return save(self, save_directory, *args, **kwargs)
        self.base_model.rows_only = CHECKPOINT.fullmatch(os.path.basename(os.path.normpath(save_directory))) is not None
        try:
            return save(self, save_directory, *args, **kwargs)
        finally:
            self.base_model.rows_only = False

    @functools.wraps(read)
    def from_pretrained(cls: type[PeftModel], model: Any, *args: Any, **kwargs: Any) -> PeftModel:
        """A base whose adapter is refused is as it was."""
        known, trained = bool(_memory_layers(model)), [p for p in model.parameters() if p.requires_grad]
        with _undone_unless_ended(lambda: known or _detach(model, trained)):
            return read(cls, model, *args, **kwargs)

    @functools.wraps(add)
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """So is a model to which one is added."""
        if adapter_name in self.peft_config or not isinstance(self.base_model, SparseMemoryModel):
            return add(self, model_id, adapter_name, *args, **kwargs)
        with _undone_unless_ended(lambda: adapter_name in self.peft_config and self.delete_adapter(adapter_name)):
            return add(self, model_id, adapter_name, *args, **kwargs)

    PeftModel.from_pretrained, PeftModel.load_adapter = classmethod(from_pretrained), load_adapter  # type: ignore[assignment]
    PeftModel.save_pretrained = save_pretrained
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
