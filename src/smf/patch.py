"""Patches: the rows that a training changed, as one file that can be applied to a model and reverted, bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import SparseMemoryConfig
from .errors import ConfigError, PatchError
from .files import read_tensors, write_tensors
from .fingerprint import base_hash, json_hash, tensor_bytes, tensors_hash
from .memory import MemoryShape, ProductKeyMemory, memory_layers

FORMAT = 1
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16)}


@dataclass(frozen=True, repr=False)
class Patch:
    """Rows before and after a training, and what they belong to.

    Args:
        rows: for each layer the ids of the changed rows, ascending.
        old, new: the rows `[R, D]` before and after, by layer.
        old_others, new_others: other parameters that the training changed, whole, by layer and kind.
        metadata: what the file says of itself: base, config, checksums, and what trained it.
    """

    rows: dict[int, Tensor]
    old: dict[int, Tensor]
    new: dict[int, Tensor]
    old_others: dict[int, dict[str, Tensor]]
    new_others: dict[int, dict[str, Tensor]]
    metadata: dict[str, Any]

    def __repr__(self) -> str:
        rows = {layer: len(ids) for layer, ids in self.rows.items()}
        return f"Patch(rows={rows}, base={self.metadata['base']!r}, metadata={self.metadata['metadata']})"

    @property
    def config(self) -> SparseMemoryConfig:
        """A config that attaches the memory this patch belongs to: `get_peft_model(base, patch.config)`."""
        return _config(self.metadata)

    def check_base(self, model: nn.Module) -> None:
        """Refuse a model whose own weights are not those that the patch was trained beside."""
        _check_base(model, self.metadata, "attach the memory")

    def apply(self, model: nn.Module, adapter: str | None = None) -> None:
        """Put the new rows in place of the old ones; refuses, changing nothing, where a row is not its old value."""
        self._copy(model, adapter, (self.old, self.old_others), (self.new, self.new_others), "apply")

    def revert(self, model: nn.Module, adapter: str | None = None) -> None:
        """Put the old rows back; refuses, changing nothing, where a row is not its new value."""
        self._copy(model, adapter, (self.new, self.new_others), (self.old, self.old_others), "revert")

    @torch.no_grad()
    def _copy(self, model: nn.Module, adapter: str | None, before: tuple, after: tuple, verb: str) -> None:
        memories = _fitting_memories(model, adapter, self.metadata, verb)
        for layer, rows in self.rows.items():
            memory = memories[layer]
            present = memory.values[rows.to(memory.values.device)].cpu()
            wrong = rows[~_same_rows(present, before[0][layer])]
            if len(wrong) > 0:
                raise PatchError(
                    f"cannot {verb}: {len(wrong)} of {len(rows)} rows of layer {layer} are not what the patch "
                    f"{'replaced' if verb == 'apply' else 'wrote'}: rows {wrong[:8].tolist()}. "
                    "Another training or patch changed them; nothing was changed now"
                )
            for kind, tensor in before[1][layer].items():
                if not _same(memory.tensor(kind).cpu(), tensor):
                    raise PatchError(
                        f"cannot {verb}: {kind} of layer {layer} was changed since; nothing was changed now"
                    )
        for layer, rows in self.rows.items():
            values = memories[layer].values
            values.index_copy_(0, rows.to(values.device), after[0][layer].to(values.device))
            for kind, tensor in after[1][layer].items():
                memories[layer].tensor(kind).copy_(tensor)


def save_patch(model: nn.Module, path: str | Path, *, adapter: str | None = None, **metadata: Any) -> Patch:
    """Write the rows that changed since the model's SparseMemoryOptimizer was made, and return them.

    For a model without an optimizer (one that was loaded), they are relative to the memory's reproducible start.

    Args:
        model: with memory layers.
        path: of the file, written atomically.
        adapter: whose memory; None for the active one.
        metadata: JSON values to keep with the patch, such as what trained it.
    """
    memories = memory_layers(model, adapter)
    if not memories:
        raise PatchError("the model has no memory layers, so there is nothing to save")
    name = next(iter(memories.values())).adapter
    config = _adapter_config(model, name)
    layers: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for layer, memory in memories.items():
        start = memory.shape.start()
        rows, old, new, old_others, new_others = _changes(memory, start)
        tensors |= {f"{layer}.ids": rows, f"{layer}.new": new}
        tensors |= {f"{layer}.{kind}.new": tensor for kind, tensor in new_others.items()}
        from_start = _same(old, start["values"][rows]) and all(_same(t, start[k]) for k, t in old_others.items())
        if not from_start:
            tensors[f"{layer}.old"] = old
            tensors |= {f"{layer}.{kind}.old": tensor for kind, tensor in old_others.items()}
        frozen = {k: t for k, t in memory.others().items() if k not in new_others}
        layers[str(layer)] = {
            "start": tensors_hash(start),
            "from_start": from_start,
            "frozen": tensors_hash(frozen),
            "others": sorted(new_others),
        }
    header = {
        "format": FORMAT,
        "base": config.base_model_name_or_path,
        "base_hash": base_hash(model),
        "config": {option: getattr(config, option) for option in SparseMemoryConfig.__annotations__},
        "width": next(iter(memories.values())).shape.d,
        "dtype": str(next(iter(memories.values())).shape.dtype),
        "layers": layers,
        "tensors": tensors_hash(tensors),
        "metadata": metadata,
    }
    try:
        header = json.loads(json.dumps(header, allow_nan=False))  # as it will be read back
    except (TypeError, ValueError) as error:
        raise PatchError(f"metadata must be JSON values: {error}") from error
    header |= {"checksum": json_hash(header)}
    patch = _patch(header, tensors)  # refuses what could not be read back, before it is written
    write_tensors(Path(path), tensors, "patch", header)
    return patch


def load_patch(path: str | Path) -> Patch:
    """Read a patch file; raises PatchError for anything that is not a whole, unaltered one of a known format."""
    header, tensors = read_tensors(Path(path), "patch", FORMAT, PatchError)
    about = {key: value for key, value in header.items() if key != "checksum"}
    if header.get("checksum") != json_hash(about) or header.get("tensors") != tensors_hash(tensors):
        raise PatchError(f"{path} was altered: its content does not match its checksum")
    try:
        return _patch(header, tensors)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PatchError(f"{path} is not a valid patch: {error}") from error


def _patch(header: dict[str, Any], tensors: dict[str, Tensor]) -> Patch:
    config = _config(header)
    patch = Patch({}, {}, {}, {}, {}, header)
    for key, about in sorted(header["layers"].items(), key=lambda item: int(item[0])):
        layer = int(key)
        shape = config.shape(layer, header["width"], DTYPES[header["dtype"]])
        rows, new = tensors[f"{key}.ids"], tensors[f"{key}.new"]
        _check_rows(layer, shape, rows, new)
        others = {kind: tensors[f"{key}.{kind}.new"] for kind in about["others"]}
        if about["from_start"]:
            start = shape.start()
            if tensors_hash(start) != about["start"]:
                raise PatchError(
                    f"layer {layer}: the start that config and seed give here is not what the patch was trained from; "
                    "this machine or torch draws other initial values"
                )
            old, old_others = start["values"][rows], {kind: start[kind] for kind in others}
        else:
            old, old_others = tensors[f"{key}.old"], {kind: tensors[f"{key}.{kind}.old"] for kind in others}
        if _layout(old) != _layout(new):
            raise PatchError(f"layer {layer}: old rows {tuple(old.shape)} do not match new rows {tuple(new.shape)}")
        for kind, tensor in others.items():
            if _layout(tensor) != _layout(old_others[kind]) or not bool(tensor.isfinite().all()):
                raise PatchError(f"layer {layer}: the new {kind} must be finite and like the old one")
        patch.rows[layer], patch.old[layer], patch.new[layer] = rows, old, new
        patch.old_others[layer], patch.new_others[layer] = old_others, others
    return patch


def _check_rows(layer: int, shape: MemoryShape, rows: Tensor, new: Tensor) -> None:
    if (
        rows.dtype != torch.int64
        or rows.dim() != 1
        or new.shape != (len(rows), shape.d)
        or new.dtype != shape.table_dtype
    ):
        raise PatchError(
            f"layer {layer}: {len(rows)} ids ({rows.dtype}) with rows {tuple(new.shape)} ({new.dtype}); expected int64 "
            f"ids and one row of width {shape.d} ({shape.table_dtype}) for each"
        )
    if len(rows) and not (int(rows[0]) >= 0 and int(rows[-1]) < shape.n_rows and bool((rows.diff() > 0).all())):
        raise PatchError(f"layer {layer}: row ids must ascend within 0 to {shape.n_rows - 1}, each once")
    if not bool(new.isfinite().all()):
        raise PatchError(f"layer {layer}: the new rows hold NaN or infinity")


def _changes(memory: ProductKeyMemory, start: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict, dict]:
    """Ids, old and new rows, and old and new other parameters, of what differs from the journal or the start."""
    values = memory.values.detach()
    journal = memory.journal
    if journal is None or journal.table is not None:
        old = start["values"] if journal is None or journal.table is None else journal.table.cpu()
        ids = torch.arange(len(values))
    else:
        old, ids = journal.rows.get("old").cpu(), journal.rows.ids.cpu()
    new = values[ids.to(values.device)].cpu()
    changed = ~_same_rows(new, old)
    before = start if journal is None else {kind: tensor.cpu() for kind, tensor in journal.others.items()}
    others = {kind: tensor.detach().cpu().clone() for kind, tensor in memory.others().items()}
    others = {kind: tensor for kind, tensor in others.items() if not _same(tensor, before[kind])}
    return ids[changed], old[changed], new[changed], {kind: before[kind] for kind in others}, others


def _layout(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit."""
    return _layout(a) == _layout(b) and tensor_bytes(a) == tensor_bytes(b)


def _same_rows(a_RD: Tensor, b_RD: Tensor) -> Tensor:
    """Which rows `[R]` are equal to the last bit."""
    if a_RD.dtype != b_RD.dtype or a_RD.shape != b_RD.shape:
        return torch.zeros(len(a_RD), dtype=torch.bool)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a_RD.element_size()]
    return (a_RD.contiguous().view(whole) == b_RD.contiguous().view(whole)).all(-1)


def _adapter_config(model: nn.Module, adapter: str) -> SparseMemoryConfig:
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and isinstance(configs.get(adapter), SparseMemoryConfig):
            return configs[adapter]
    raise PatchError(f"no SparseMemoryConfig of adapter {adapter!r} in this model")


def _config(header: dict[str, Any]) -> SparseMemoryConfig:
    return SparseMemoryConfig(**header["config"], base_model_name_or_path=header["base"])


def _fitting_memories(
    model: nn.Module, adapter: str | None, header: dict[str, Any], verb: str
) -> dict[int, ProductKeyMemory]:
    """The model's memories, after checking that base, shapes and frozen parameters are those of the patch."""
    try:
        memories = memory_layers(model, adapter)
    except ConfigError as error:
        raise PatchError(f"cannot {verb}: {error}") from error
    wanted = sorted(int(layer) for layer in header["layers"])
    if list(memories) != wanted:
        raise PatchError(
            f"cannot {verb}: the patch is for memory at layers {wanted}, the model has some at {list(memories)}; "
            "attach it with get_peft_model(base, patch.config)"
        )
    _check_base(model, header, verb)
    config = _config(header)
    for layer, memory in memories.items():
        shape = config.shape(layer, header["width"], DTYPES[header["dtype"]])
        if memory.shape != shape:
            raise PatchError(f"cannot {verb}: the memory at layer {layer} is {memory.shape}, the patch is for {shape}")
        about = header["layers"][str(layer)]
        frozen = {kind: tensor for kind, tensor in memory.others().items() if kind not in about["others"]}
        if tensors_hash(frozen) != about["frozen"]:
            raise PatchError(
                f"cannot {verb}: query, keys, gate, out or scale of layer {layer} differ from those the patch was "
                "trained with (another healing?); load the adapter that it was trained on first"
            )
    return memories


def _check_base(model: nn.Module, header: dict[str, Any], verb: str) -> None:
    found = base_hash(model)
    if header["base_hash"] != found:
        raise PatchError(
            f"cannot {verb}: the patch belongs to another base, {header['base']!r} with weights hash "
            f"{str(header['base_hash'])[:12]}; this model's weights have {str(found)[:12]}"
        )
