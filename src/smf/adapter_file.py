"""Saved adapters as files: patches taken from them, applied to them and reverted, without loading the base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from .config import SparseMemoryConfig
from .errors import ConfigError, PatchError, refusing
from .files import read_text, write_atomically
from .fingerprint import MEMORY_PREFIX
from .memory import MemoryShape
from .patch import DTYPES, Patch, Tables, check_frozen, from_tables
from .patch_file import load_patch
from .table_rows import all_finite, with_whole_tables

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
RANK = 1024  # so much of LoRA is made, though no tensor has it
PREFIX = "base_model.model."  # PEFT's, before the names of modules


@dataclass(frozen=True)
class AdapterFile:
    """A saved adapter.

    Args:
        config: of its memory.
        tensors: by name; the tables are whole.
        tables: views of the tensors, by layer and kind.
    """

    config: SparseMemoryConfig
    tensors: dict[str, Tensor]
    tables: Tables

    @property
    def shapes(self) -> dict[int, MemoryShape]:
        """Sizes and start of each memory."""
        return {layer: _shape(self.config, layer, table["query_weight"]) for layer, table in self.tables.items()}


def open_patch(path: str | Path) -> Patch:
    """The patch in a file, a run's folder, or a folder with a saved adapter, such as Trainer's checkpoints.

    What a saved adapter changed is relative to the reproducible start of its memory.
    """
    path = Path(path)
    with refusing(PatchError, f"{path} cannot be read"):
        if (path / "patch.smf").is_file():
            return load_patch(path / "patch.smf")
        if (path / CONFIG).is_file():
            return patch_of_adapter(path)
        if path.is_dir():
            raise PatchError(
                f"{path} has neither a patch.smf nor an {CONFIG}; give a patch, a run's folder or an adapter's"
            )
        return load_patch(path)


def load(base: Any, patch: str | Path | Patch, **options: Any) -> Any:
    """The model of a base and a patch: loaded, the memory attached, the rows put in, in evaluation mode.

    Args:
        base: a loaded base, or what `AutoModelForCausalLM.from_pretrained` takes.
        patch: a file, or whatever else `open_patch` takes.
        options: of `from_pretrained`; without a dtype among them, the base is loaded in that of the training, or, for a
            saved adapter, which does not know it, in that of its memory. Code that comes with a base runs with
            trust_remote_code=True among them alone.

    Raises:
        PatchError: for a base that the patch does not belong to, or a patch that was trained on more than config and
            seed give (load the adapter that it was trained on, and `patch.apply` it). A loaded base is left as it was.
    """
    patch = patch if isinstance(patch, Patch) else open_patch(patch)
    if isinstance(base, nn.Module) and options:
        raise PatchError(f"options {sorted(options)} are of from_pretrained, but the base is a loaded model")
    put_into_adapter(patch, fresh_adapter(patch), "apply")  # refuses before the base is touched
    dtype = DTYPES[patch.metadata.get("base_dtype", patch.metadata["dtype"])]
    options = {"dtype": dtype, "trust_remote_code": False} | options
    model = base if isinstance(base, nn.Module) else AutoModelForCausalLM.from_pretrained(base, **options)
    patch.check_base(model)
    model: Any = get_peft_model(model, patch.config)  # type: ignore[arg-type]
    try:
        patch.apply(model)
    except PatchError:  # a base in another dtype has a memory in another
        model.unload()
        raise
    return model.eval()


def patch_of_adapter(folder: str | Path) -> Patch:
    """What differs in a saved adapter from the reproducible start of its memory."""
    found = read_adapter(folder)
    before = {layer: shape.start() for layer, shape in found.shapes.items()}
    for layer, table in found.tables.items():
        wrong = [kind for kind, tensor in table.items() if not all_finite(tensor)]
        if wrong:
            raise PatchError(f"the adapter in {folder} holds NaN or infinity in {wrong} of layer {layer}")
    return from_tables(found.config, found.config.base_hash, found.shapes, before, found.tables)


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read a saved adapter of sparse memory, of PEFT or of a checkpoint of Trainer."""
    folder = Path(folder)
    with refusing(PatchError, f"{folder} has no adapter that can be read"):
        for file in (folder / CONFIG, folder / TENSORS):
            if not file.is_file():  # PEFT would look for the folder's name on the hub, and wait for a pipe
                raise PatchError(f"{folder} has no adapter that can be read: there is no file {file.name}")
        return _adapter(PeftConfig.from_pretrained(str(folder)), load_file(folder / TENSORS), folder)


def _adapter(config: PeftConfig, tensors: dict[str, Tensor], folder: Path) -> AdapterFile:
    if not isinstance(config, SparseMemoryConfig) or not config.target_modules or not config.layers:
        raise PatchError(f"the adapter in {folder} is no sparse memory, but {config.peft_type}")
    if len(config.layers) != len(config.target_modules):
        raise PatchError(f"{folder / CONFIG} names {len(config.target_modules)} modules for layers {config.layers}")
    modules = dict(zip(config.layers, config.target_modules, strict=True))
    try:
        names = {layer: _full_name(tensors, name) for layer, name in modules.items()}
        queries = {name: tensors[f"{name}.{MEMORY_PREFIX}query_weight"] for name in names.values()}
    except KeyError as error:
        raise PatchError(f"{folder / TENSORS} has no {error}, which its {CONFIG} promises") from error
    if not len(set(names.values())) == len(config.layers) == len(names):
        raise PatchError(f"{folder / CONFIG} names a layer or a module twice: {modules}")
    flat = [name for name, query in queries.items() if query.dim() != 2 or not query.shape[1]]
    if flat:
        raise PatchError(f"{folder / TENSORS}: query_weight of {flat} must have a width")
    shapes = {name: _shape(config, layer, queries[name]) for layer, name in names.items()}
    for name, shape in shapes.items():
        _check_layouts(_kinds(tensors, f"{name}.{MEMORY_PREFIX}"), shape, folder)
        shape.check_room()
    tensors = with_whole_tables(tensors, shapes)
    tables = {layer: _kinds(tensors, f"{name}.{MEMORY_PREFIX}") for layer, name in names.items()}
    return AdapterFile(config, tensors, tables)


def write_adapter(adapter: AdapterFile, folder: Path) -> None:
    """Write an adapter where PEFT's loaders find it; the tensors first, the config last."""
    tensors = {name: tensor.contiguous() for name, tensor in sorted(adapter.tensors.items())}
    write_atomically(folder / TENSORS, save(tensors, metadata={"format": "pt"}))
    config = {
        key: sorted(value) if isinstance(value, set) else value for key, value in adapter.config.to_dict().items()
    }
    write_atomically(folder / CONFIG, json.dumps(config | {"inference_mode": True}, indent=2, sort_keys=True))


def fresh_adapter(patch: Patch) -> AdapterFile:
    """The adapter at its reproducible start that a patch belongs to."""
    config, tensors = patch.config, {}
    assert config.target_modules is not None  # a patch's config is that of an attached memory
    try:
        patch.shape(next(iter(patch.rows))).check_room(len(patch.rows))
    except ConfigError as error:
        raise PatchError(f"the adapter of this patch cannot be made: {error}") from error
    for layer, name in zip(patch.rows, config.target_modules, strict=True):
        start = patch.shape(layer).start()
        tensors |= {f"{PREFIX}{name}.{MEMORY_PREFIX}{kind}": tensor for kind, tensor in start.items()}
    names = dict(zip(patch.rows, config.target_modules, strict=True))
    tables = {layer: _kinds(tensors, f"{PREFIX}{name}.{MEMORY_PREFIX}") for layer, name in names.items()}
    return AdapterFile(config, tensors, tables)


def put_into_adapter(patch: Patch, adapter: AdapterFile, verb: str) -> None:
    """Apply or revert a patch on a saved adapter's tensors, in place; refuses like `Patch.apply` and `Patch.revert`."""
    patch.check_hash(adapter.config.base_hash, verb)
    mine, theirs = adapter.shapes, {layer: patch.shape(layer) for layer in patch.rows}
    if mine != theirs:
        raise PatchError(
            f"cannot {verb}: the adapter's memory is {list(mine.values())}, the patch is for {list(theirs.values())}"
        )
    check_frozen(patch, adapter.tables, verb)
    patch.put_into(adapter.tables, verb)


def _full_name(tensors: dict[str, Tensor], module: str) -> str:
    return next(
        (name for name in (f"{PREFIX}{module}", module) if f"{name}.{MEMORY_PREFIX}query_weight" in tensors), module
    )


def _kinds(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _shape(config: SparseMemoryConfig, layer: int, query_weight: Tensor) -> MemoryShape:
    return config.shape(layer, query_weight.shape[-1], query_weight.dtype)


def _check_layouts(table: dict[str, Tensor], shape: MemoryShape, folder: Path) -> None:
    """Refuse tensors that are not the config's, but for a table as rows, which is looked at when it is made whole."""
    skipped = {"values", "row_ids", "start"} if "row_ids" in table else set()
    expected = {kind: layout for kind, layout in shape.layouts().items() if kind not in skipped}
    found = {kind: (tensor.dtype, tuple(tensor.shape)) for kind, tensor in table.items() if kind not in skipped}
    if missing := sorted({*expected} - {*found}):
        raise PatchError(
            f"{folder}: the file has no {', '.join(missing)} of layer {shape.layer}; its config promises it"
        )
    if found != expected:
        wrong = sorted(kind for kind in {*found, *expected} if found.get(kind) != expected.get(kind))
        raise PatchError(
            f"{folder}: {wrong} of layer {shape.layer} are {[found.get(kind) for kind in wrong]}; its config promises "
            f"{[expected.get(kind) for kind in wrong]}"
        )


def check_saved(folder: str) -> None:
    """Refuse a saved adapter, of whatever method, that holds no numbers, and one of LoRA whose ranks no tensor has.

    PEFT makes what the configuration says before it looks at the tensors.
    """
    with refusing(ConfigError, f"the adapter in {folder!r} cannot be loaded"):
        config = json.loads(read_text(Path(folder) / CONFIG))
        json.dumps(config, allow_nan=False)  # infinity is no JSON, but Python reads it
        tensors = load_peft_weights(folder, device="cpu")  # pickles as weights only
        wrong = [name for name, tensor in tensors.items() if not all_finite(tensor)]
        if wrong:
            raise ConfigError(f"it holds NaN or infinity in {', '.join(wrong)}")
        if config.get("peft_type") != "LORA":
            return
        most = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
        ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
        if beyond := [rank for rank in ranks if isinstance(rank, int) and rank > max(most, RANK)]:
            raise ConfigError(f"its configuration has rank {max(beyond):,}, its tensors no side beyond {most:,}")
        if config.get("layer_replication"):
            raise ConfigError("layer_replication repeats layers of the base; smf compares one base with itself")
