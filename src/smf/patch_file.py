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
from .errors import PatchError, refusing
from .files import read_tensors, write_tensors
from .fingerprint import base_hash, is_memory_parameter, json_hash, tensors_hash
from .memory import KINDS, MemoryShape, ProductKeyMemory, memory_layers
from .patch import DTYPES, Patch, from_tables, layout, same, tables_of
from .provenance import Provenance, pair, provenance_of
from .row_sets import same_rows

FORMAT = 2
WRITERS = ("counts", "examples", "moved", "rest")  # of each layer, where provenance is kept
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
        tensors |= {f"{layer}.ids": rows.int(), f"{layer}.new": new}  # there are less than 2**31 rows
        tensors |= {f"{layer}.{kind}.new": tensor for kind, tensor in patch.new_others[layer].items()}
        start = patch.shape(layer).start()
        kept = _not_from_start(patch, layer, start)
        tensors |= {f"{layer}.{name}": tensor.clone() for name, tensor in kept.items()}  # old may be new
        about["layers"][str(layer)] |= {"start": tensors_hash(start)}
    if patch.provenance is not None:
        tensors |= _provenance_tensors(patch.provenance)
    header = about | {"format": FORMAT, "tensors": tensors_hash(tensors)}
    header |= {"checksum": json_hash(header)}
    patch = _patch(header, tensors)  # refuses what could not be read back, before it is written
    write_tensors(Path(path), tensors, "patch", header)
    return patch


def _not_from_start(patch: Patch, layer: int, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Old values that config and seed do not give back, with the places of those rows among the patch's."""
    old = patch.old[layer]
    others = {f"{kind}.old": t for kind, t in patch.old_others[layer].items() if not same(t, start[kind])}
    (places,) = (~same_rows(old, start["values"][patch.rows[layer]])).nonzero(as_tuple=True)
    return others | ({"old": old[places], "old_at": places.int()} if len(places) else {})


def _provenance_tensors(provenance: Provenance) -> dict[str, Tensor]:
    names = bytearray(json.dumps(provenance.names).encode())
    parts = {part: getattr(provenance, part) for part in WRITERS}
    tensors = {f"{layer}.writers.{part}": tensor for part, of in parts.items() for layer, tensor in of.items()}
    return tensors | {"examples": torch.frombuffer(names, dtype=torch.uint8)}


def load_patch(path: str | Path) -> Patch:
    """Read a patch file; raises PatchError for anything that is not a whole, unaltered one of a known format."""
    with refusing(PatchError, f"{path} is not a valid patch"):
        header, tensors = read_tensors(Path(path), "patch", FORMAT, PatchError)
        about = {key: value for key, value in header.items() if key != "checksum"}
        if header.get("checksum") != json_hash(about) or header.get("tensors") != tensors_hash(tensors):
            raise PatchError(f"{path} was altered: its content does not match its checksum")
        return _patch(header, tensors)


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
    own = (str(p.dtype) for n, p in model.named_parameters() if p.is_floating_point() and not is_memory_parameter(n))
    if (dtype := next(own)) in DTYPES:
        patch.metadata["base_dtype"] = dtype  # a memory beside a bfloat16 base is of float32
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
    _check_header(about)
    patch = Patch({}, {}, {}, {}, {}, about)
    config = patch.config
    for key, layer_about in sorted(header["layers"].items(), key=lambda item: int(item[0])):
        layer, shape = int(key), config.shape(int(key), about["width"], DTYPES[about["dtype"]])
        rows, new = tensors[f"{key}.ids"], tensors[f"{key}.new"]
        stored = torch.bfloat16 if header.get("stored") else shape.table_dtype
        _check_rows(layer, shape, rows, new, stored)
        start = shape.start()
        if tensors_hash(start) != layer_about["start"]:
            raise PatchError(
                f"layer {layer}: the start that config and seed give here is not what the patch was trained from; "
                "this machine or torch draws other initial values"
            )
        rows, new = rows.long(), new.to(shape.table_dtype)
        others = {kind: tensors[f"{key}.{kind}.new"] for kind in layer_about["others"]}
        old_others = {kind: tensors.get(f"{key}.{kind}.old", start[kind]) for kind in others}
        old = start["values"][rows]
        if f"{key}.old" in tensors:
            _put_old(layer, old, tensors[f"{key}.old"], tensors[f"{key}.old_at"])
        for kind, tensor in others.items():
            finite = all(bool(t.isfinite().all()) for t in (tensor, old_others[kind]))
            if not layout(tensor) == layout(old_others[kind]) == layout(start[kind]) or not finite:
                raise PatchError(f"layer {layer}: old and new {kind} must be finite and like the memory's")
        patch.rows[layer], patch.old[layer], patch.new[layer] = rows, old, new
        patch.old_others[layer], patch.new_others[layer] = old_others, others
    return replace(patch, provenance=_provenance(patch.rows, tensors)) if "examples" in tensors else patch


def _check_header(about: dict[str, Any]) -> None:
    """Refuse a header that lacks what applying and merging look at later."""
    kinds: dict[str, Any] = {"base": str | None, "base_hash": str | None, "config": dict, "width": int, "dtype": str}
    kinds |= {"layers": dict, "metadata": dict} | ({"lora_numbers": int} if "lora_numbers" in about else {})
    wrong = [key for key, kind in kinds.items() if key not in about or not isinstance(about[key], kind)]
    layers = [] if wrong else list(about["layers"].values())
    if not all(isinstance(each, dict) and isinstance(each.get("frozen"), str) for each in layers):
        wrong.append("layers")
    if wrong or about.get("stored") not in (None, "bfloat16"):
        raise PatchError(f"the patch's header is not whole: {wrong or ['stored']}")
    if not 1 <= about["width"] < 2**31 or not {about["dtype"], about.get("base_dtype", about["dtype"])} <= {*DTYPES}:
        raise PatchError(f"the patch's base has width {about['width']} and {about['dtype']!r:.40} numbers")
    if not 0 <= about.get("lora_numbers", 0) < 2**63:  # a table says how large a LoRA of the same base is
        raise PatchError(f"the patch's header says that a LoRA has {about['lora_numbers']!r:.40} numbers")
    config, trained = about["config"], sorted({*KINDS} - {"values", "anchor"})
    strange = sorted({*config} - {*SparseMemoryConfig.__annotations__})
    if strange:
        raise PatchError(f"the patch's config has options that this version does not know: {strange}")
    for each in layers:
        if not isinstance(each["others"], list) or not {*each["others"]} <= {*trained}:
            raise PatchError(f"the patch changes {each['others']!r:.60} beside rows; expected some of {trained}")
    named, modules = list(about["layers"]), config["target_modules"]
    if not named or named != [str(int(layer)) for layer in named] or {*map(int, named)} != {*config["layers"]}:
        raise PatchError(f"the patch's layers {named} are not those of its config, {config['layers']}")
    if not all(isinstance(module, str) for module in modules) or not len({*modules}) == len(modules) == len(named):
        raise PatchError(f"the patch's config must name one module for each layer; it names {modules!r:.200}")


def _put_old(layer: int, old: Tensor, some: Tensor, places: Tensor) -> None:
    """Old rows that are not the start's, in place."""
    within = places.dtype == torch.int32 and bool((places.diff() > 0).all())
    within = within and (not len(places) or (int(places[0]) >= 0 and int(places[-1]) < len(old)))
    if not within or layout(some) != (old.dtype, (len(places), old.shape[1])) or not bool(some.isfinite().all()):
        raise PatchError(f"layer {layer}: the old rows must be finite, like the new ones, each at a place of its own")
    old[places.long()] = some


def _provenance(rows: dict[int, Tensor], tensors: dict[str, Tensor]) -> Provenance:
    names = json.loads(tensors["examples"].numpy().tobytes())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise PatchError("the names of examples must be strings, each once")
    found = Provenance(names, {}, {}, {}, {})
    for layer, ids in rows.items():
        counts, examples, moved, rest = (tensors[f"{layer}.writers.{part}"] for part in WRITERS)
        found_layouts = [(t.dtype, tuple(t.shape)) for t in (counts, examples, moved, rest)]
        by_row, by_pair = (len(ids),), (len(examples),)
        kinds = [(torch.int64, by_row), (torch.int32, by_pair), (torch.bfloat16, by_pair), (torch.bfloat16, by_row)]
        whole = found_layouts == kinds and bool(((counts >= 0) & (counts <= len(examples))).all())
        whole = whole and int(counts.sum()) == len(examples)  # of counts that are no larger: the sum cannot wrap around
        within = not len(examples) or (int(examples.min()) >= 0 and int(examples.max()) < len(names))
        row_P = torch.arange(len(ids)).repeat_interleave(counts) if whole else examples
        if not whole or not within or not bool((pair(row_P, examples).diff() > 0).all()):
            raise PatchError(
                f"layer {layer}: the writers of {len(ids)} rows must be as many as are counted, ascending within "
                f"{len(names)} examples, each once"
            )
        if not all(bool((t.isfinite() & (t >= 0)).all()) for t in (moved, rest)):
            raise PatchError(f"layer {layer}: what examples moved must be finite and not below 0")
        found.counts[layer], found.examples[layer], found.moved[layer], found.rest[layer] = (
            counts,
            examples,
            moved,
            rest,
        )
    return found


def _check_rows(layer: int, shape: MemoryShape, rows: Tensor, new: Tensor, stored: torch.dtype) -> None:
    if rows.dtype != torch.int32 or rows.dim() != 1 or new.shape != (len(rows), shape.d) or new.dtype != stored:
        raise PatchError(
            f"layer {layer}: {len(rows)} ids ({rows.dtype}) with rows {tuple(new.shape)} ({new.dtype}); expected int32 "
            f"ids and one row of width {shape.d} ({stored}) for each"
        )
    if len(rows) and not (int(rows[0]) >= 0 and int(rows[-1]) < shape.n_rows and bool((rows.diff() > 0).all())):
        raise PatchError(f"layer {layer}: row ids must ascend within 0 to {shape.n_rows - 1}, each once")
    if not bool(new.isfinite().all()):
        raise PatchError(f"layer {layer}: the new rows hold NaN or infinity")
