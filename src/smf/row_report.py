"""What a patch changed, by rows: how many and how much, whether they are hubs or shared, and what room is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .background import SEARCH, Background, read_by
from .errors import ConfigError
from .fingerprint import json_hash, tensors_hash
from .patch import Patch


@dataclass(frozen=True)
class LayerReport:
    """Of one layer.

    Args:
        layer: of the decoder.
        n_rows: of the table.
        changed: rows that the patch changes.
        mean_size, largest_size: lengths of the rows' changes.
        hubs: of the changed rows, how many are hubs of the background: among the one percent that general text reads
            most. None without a background.
        read: of the changed rows, how many general text reads at all. None without a background.
        shared: for each other patch how many of the changed rows it changes too.
        room: rows that neither the patch nor the others change.
        quiet_room: of these, how many general text never reads. None without a background.
    """

    layer: int
    n_rows: int
    changed: int
    mean_size: float
    largest_size: float
    hubs: int | None
    read: int | None
    shared: tuple[int, ...]
    room: int
    quiet_room: int | None


def row_report(patch: Patch, others: Sequence[Patch] = (), background: Background | None = None) -> list[LayerReport]:
    """One line for each layer.

    Args:
        patch: to report on.
        others: of the same base and memory, to compare with.
        background: of the same memory.

    Raises:
        PatchError: for patches that do not belong together.
        ConfigError: for a background of other layers, or of another base or memory. Of a healed memory a patch does not
            know the search, so that it cannot tell.
    """
    if background is not None and sorted(background.layers) != sorted(patch.rows):
        raise ConfigError(f"the background is of layers {sorted(background.layers)}, the patch of {sorted(patch.rows)}")
    if background is not None and _identity(patch) not in (None, background.identity):
        raise ConfigError(
            "the background was read with another base or another memory than the patch was trained on; read general "
            "text with that model (smf.read_background)"
        )
    shared = [patch.overlap(other) for other in others]
    made = []
    for layer, rows in patch.rows.items():
        n_rows = patch.shape(layer).n_rows
        if background is not None and len(known := background.layers[layer].ids) and int(known[-1]) >= n_rows:
            raise ConfigError(
                f"the background reads row {int(known[-1])} of layer {layer}, but the patch's table has {n_rows}: it "
                "is of another memory"
            )
        sizes = (patch.new[layer].double() - patch.old[layer].double()).norm(dim=-1)
        taken = torch.unique(torch.cat([rows, *(other.rows[layer] for other in others)]))
        read = None if background is None else background.layers[layer].ids
        hubs = None if background is None else background.hubs(layer, n_rows)
        made.append(
            LayerReport(
                layer,
                n_rows,
                len(rows),
                float(sizes.mean()) if len(rows) else 0.0,
                float(sizes.max()) if len(rows) else 0.0,
                _within(rows, hubs),
                _within(rows, read),
                tuple(len(found[layer].ids_R) for found in shared),
                n_rows - len(taken),
                None if read is None else n_rows - len(torch.unique(torch.cat([taken, read]))),
            )
        )
    return made


def _identity(patch: Patch) -> str | None:
    """As a background of the patch's memory has it; None where config and seed do not give the memory's search back."""
    known = {}
    for layer, about in patch.metadata["layers"].items():
        shape = patch.shape(int(layer))
        start = shape.start() | patch.new_others[int(layer)]
        frozen = {kind: t for kind, t in start.items() if kind not in ("values", "anchor", *about["others"])}
        if tensors_hash(frozen) != about["frozen"]:  # it was healed
            return None
        known[int(layer)] = read_by(patch.metadata["base_hash"], shape, {kind: start[kind] for kind in SEARCH})
    return json_hash(known)


def _within(rows: Tensor, some: Tensor | None) -> int | None:
    return None if some is None else int(torch.isin(rows, some).sum())


@dataclass(frozen=True)
class Belongs:
    """What a patch belongs to, and how large it is.

    Args:
        about: for people, by name.
        layers: row by row.
        metadata: what trained it.
    """

    about: Mapping[str, str]
    layers: Sequence[LayerReport] = field(default_factory=list)
    metadata: Mapping[str, object] = field(default_factory=dict)


def belongs(patch: Patch, size: int, layers: Sequence[LayerReport]) -> Belongs:
    """What to say of a patch.

    Args:
        patch: to report on.
        size: bytes of its file.
        layers: as `row_report` makes them.
    """
    config, shape = patch.config, patch.shape(next(iter(patch.rows)))
    rows, table = sum(each.changed for each in layers), sum(each.n_rows for each in layers)
    numbers = sum(new.numel() for new in patch.new.values())
    reads = f"{config.heads} heads x {config.knn} reads, {config.mode}, init {config.init}, seed {config.seed}"
    stored = ", stored in bfloat16" if patch.metadata.get("stored") else ""
    others = sorted({kind for kinds in patch.new_others.values() for kind in kinds})
    known = patch.provenance
    about = {
        "base": f"{patch.metadata['base']} (weights {str(patch.metadata['base_hash'])[:12]})",
        "memory": f"layers {config.layers}, {shape.n_rows:,} rows of {shape.d}, {reads}",
        "rows changed": f"{rows:,} of {table:,}",
        "other parameters": ", ".join(others) or "none",
        "size": f"{size / 1e6:.2f} MB: {numbers:,} numbers{stored}",
    }
    if known is not None:
        about["examples"] = f"{len(known.names):,} are known to have written rows: --why LAYER:ROW"
    lora = patch.metadata.get("lora_numbers")
    if lora:
        megabytes = lora * shape.dtype.itemsize / 1e6
        about["a LoRA of rank 16"] = f"{megabytes:.2f} MB: {lora:,} numbers, on all linear layers of the same base"
    return Belongs(about, layers, patch.metadata["metadata"])
