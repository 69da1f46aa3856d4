"""Patch files: written from a trained model, read back whole or refused; and patches of run folders and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import SparseMemoryConfig
from .errors import PatchError
from .files import read_tensors, write_tensors
from .fingerprint import base_hash, json_hash, tensors_hash
from .memory import MemoryShape, ProductKeyMemory, memory_layers
from .patch import Patch, from_tables, layout, same, tables_of
from .provenance import Provenance, pair, provenance_of

FORMAT = 1
LORA_RANK = 16  # of the LoRA whose size a patch is shown beside
Stored = Literal["bfloat16"]


def save_patch(
    source: nn.Module | Patch,
    path: str | Path,
    *,
    adapter: str | None = None,
    stored: Stored | None = None,
    examples: Sequence[str] | None = None,
    **metadata: Any,
) -> Patch:
    """Write the rows that changed since the model's SparseMemoryOptimizer was made, and return them.

    For a model without an optimizer (one that was loaded), they are relative to the memory's reproducible start. Old
    rows that config and seed give back are left out of the file.

    Args:
        source: a model with memory layers, or a patch.
        path: of the file, written atomically.
        adapter: whose memory; None for the active one.
        stored: "bfloat16" rounds the new rows to the nearest bfloat16, which halves a file of float32 rows. The patch
            that is returned has the rounded rows: it applies and reverts bit for bit, but does not fit the model that
            it was taken from. None: as they are.
        examples: names of the examples by their `example_ids`, where the optimizer kept provenance; None: the ids.
        metadata: JSON values to keep with the patch, such as what trained it.
    """
    if examples is not None and isinstance(source, Patch):
        raise PatchError("examples = ... names those of a model that was trained; a patch has its names already")
    patch = source if isinstance(source, Patch) else patch_of(source, adapter, examples)
    if stored not in (None, "bfloat16"):
        raise PatchError(f'stored = {stored!r}; expected "bfloat16", or None for rows as they are')
    about = patch.metadata | ({"stored": stored} if stored else {})
    about |= {"metadata": (patch.metadata["metadata"] if isinstance(source, Patch) else {}) | metadata}
    try:
        about = json.loads(json.dumps(about, allow_nan=False))  # as it will be read back
    except (TypeError, ValueError) as error:
        raise PatchError(f"metadata must be JSON values: {error}") from error
    tensors: dict[str, Tensor] = {}
    for layer, rows in patch.rows.items():
        new = patch.new[layer].bfloat16() if about.get("stored") else patch.new[layer]
        tensors |= {f"{layer}.ids": rows, f"{layer}.new": new}
        tensors |= {f"{layer}.{kind}.new": tensor for kind, tensor in patch.new_others[layer].items()}
        start = patch.shape(layer).start()
        old, others = patch.old[layer], patch.old_others[layer]
        from_start = same(old, start["values"][rows]) and all(same(t, start[kind]) for kind, t in others.items())
        if not from_start:
            tensors[f"{layer}.old"] = old
            tensors |= {f"{layer}.{kind}.old": tensor.clone() for kind, tensor in others.items()}  # old may be new
        if patch.provenance is not None:
            parts = {"counts": patch.provenance.counts, "examples": patch.provenance.examples}
            parts |= {"moved": patch.provenance.moved}
            tensors |= {f"{layer}.writers.{part}": of[layer] for part, of in parts.items()}
        about["layers"][str(layer)] |= {"start": tensors_hash(start), "from_start": from_start}
    if patch.provenance is not None:
        names = json.dumps(patch.provenance.names).encode()
        tensors["examples"] = torch.frombuffer(bytearray(names), dtype=torch.uint8)
    header = about | {"format": FORMAT, "tensors": tensors_hash(tensors)}
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


# -- from a model -----------------------------------------------------------------------------------------------------


def patch_of(model: nn.Module, adapter: str | None = None, examples: Sequence[str] | None = None) -> Patch:
    """What changed since the model's optimizer was made; of a model without one, since the memory's start."""
    memories = memory_layers(model, adapter)
    if not memories:
        raise PatchError("the model has no memory layers, so there is nothing to save")
    name = next(iter(memories.values())).adapter
    config = _adapter_config(model, name)
    shapes = {layer: memory.shape for layer, memory in memories.items()}
    before = {layer: _before(memory) for layer, memory in memories.items()}
    journals = {layer: memory.journal for layer, memory in memories.items()}
    ids = {layer: each.rows.ids.cpu() for layer, each in journals.items() if each is not None and each.table is None}
    patch = from_tables(config, base_hash(model), shapes, before, tables_of(memories), ids)
    patch.metadata["lora_numbers"] = _lora_numbers(model)
    writers = next((each.writers for each in journals.values() if each is not None), None)
    if writers is None and examples is not None:
        raise PatchError("examples = ... but the optimizer was made without provenance=True")
    return patch if writers is None else replace(patch, provenance=provenance_of(writers, patch.rows, examples))


def _before(memory: ProductKeyMemory) -> dict[str, Tensor]:
    """The memory's parameters when its optimizer was made; without one, at their start. Of a table the rows chosen."""
    journal = memory.journal
    if journal is None:
        return memory.shape.start()
    values = journal.rows.get("old") if journal.table is None else journal.table
    return {"values": values.cpu()} | {kind: tensor.cpu() for kind, tensor in journal.others.items()}


def _lora_numbers(model: nn.Module) -> int:
    """How many numbers a LoRA on all linear layers of the base would have, but for the output layer."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not output]
    return sum(LORA_RANK * sum(module.weight.shape) for module in linear)


def _adapter_config(model: nn.Module, adapter: str) -> SparseMemoryConfig:
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and isinstance(configs.get(adapter), SparseMemoryConfig):
            return configs[adapter]
    raise PatchError(f"no SparseMemoryConfig of adapter {adapter!r} in this model")


# -- from a file ------------------------------------------------------------------------------------------------------


def _patch(header: dict[str, Any], tensors: dict[str, Tensor]) -> Patch:
    about = {key: value for key, value in header.items() if key not in ("format", "tensors", "checksum")}
    patch = Patch({}, {}, {}, {}, {}, about)
    for key, layer_about in sorted(header["layers"].items(), key=lambda item: int(item[0])):
        layer = int(key)
        shape = patch.shape(layer)
        rows, new = tensors[f"{key}.ids"], tensors[f"{key}.new"]
        stored = torch.bfloat16 if header.get("stored") == "bfloat16" else shape.table_dtype
        _check_rows(layer, shape, rows, new, stored)
        new = new.to(shape.table_dtype)
        others = {kind: tensors[f"{key}.{kind}.new"] for kind in layer_about["others"]}
        if layer_about["from_start"]:
            start = shape.start()
            if tensors_hash(start) != layer_about["start"]:
                raise PatchError(
                    f"layer {layer}: the start that config and seed give here is not what the patch was trained from; "
                    "this machine or torch draws other initial values"
                )
            old, old_others = start["values"][rows], {kind: start[kind] for kind in others}
        else:
            old, old_others = tensors[f"{key}.old"], {kind: tensors[f"{key}.{kind}.old"] for kind in others}
        if layout(old) != layout(new):
            raise PatchError(f"layer {layer}: old rows {tuple(old.shape)} do not match new rows {tuple(new.shape)}")
        for kind, tensor in others.items():
            if layout(tensor) != layout(old_others[kind]) or not bool(tensor.isfinite().all()):
                raise PatchError(f"layer {layer}: the new {kind} must be finite and like the old one")
        patch.rows[layer], patch.old[layer], patch.new[layer] = rows, old, new
        patch.old_others[layer], patch.new_others[layer] = old_others, others
    return replace(patch, provenance=_provenance(patch.rows, tensors)) if "examples" in tensors else patch


def _provenance(rows: dict[int, Tensor], tensors: dict[str, Tensor]) -> Provenance:
    names = json.loads(bytes(tensors["examples"].tolist()))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise PatchError("the names of examples must be strings, each once")
    found = Provenance(names, {}, {}, {})
    for layer, ids in rows.items():
        counts, examples, moved = (tensors[f"{layer}.writers.{part}"] for part in ("counts", "examples", "moved"))
        kinds = [(torch.int64, (len(ids),)), (torch.int32, (len(examples),)), (torch.bfloat16, (len(examples),))]
        if [(t.dtype, tuple(t.shape)) for t in (counts, examples, moved)] != kinds or int(counts.sum()) != len(
            examples
        ):
            raise PatchError(
                f"layer {layer}: the writers of {len(ids)} rows are not one count for each, and as many examples"
            )
        row_P = torch.arange(len(ids)).repeat_interleave(counts) if bool((counts >= 0).all()) else None
        within = len(examples) == 0 or (int(examples.min()) >= 0 and int(examples.max()) < len(names))
        if row_P is None or not within or not bool((pair(row_P, examples).diff() > 0).all()):
            raise PatchError(
                f"layer {layer}: the writers of each row must ascend within {len(names)} examples, each once"
            )
        if not bool((moved.isfinite() & (moved >= 0)).all()):
            raise PatchError(f"layer {layer}: what examples moved must be finite and not below 0")
        found.counts[layer], found.examples[layer], found.moved[layer] = counts, examples, moved
    return found


def _check_rows(layer: int, shape: MemoryShape, rows: Tensor, new: Tensor, stored: torch.dtype) -> None:
    if rows.dtype != torch.int64 or rows.dim() != 1 or new.shape != (len(rows), shape.d) or new.dtype != stored:
        raise PatchError(
            f"layer {layer}: {len(rows)} ids ({rows.dtype}) with rows {tuple(new.shape)} ({new.dtype}); expected int64 "
            f"ids and one row of width {shape.d} ({stored}) for each"
        )
    if len(rows) and not (int(rows[0]) >= 0 and int(rows[-1]) < shape.n_rows and bool((rows.diff() > 0).all())):
        raise PatchError(f"layer {layer}: row ids must ascend within 0 to {shape.n_rows - 1}, each once")
    if not bool(new.isfinite().all()):
        raise PatchError(f"layer {layer}: the new rows hold NaN or infinity")
