"""A table as the rows that differ from its reproducible start: how Trainer's checkpoints hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import PatchError
from .fingerprint import MEMORY_PREFIX, tensors_hash
from .memory import MemoryShape
from .row_sets import same_rows

VALUES = f"{MEMORY_PREFIX}values"
IDS = f"{MEMORY_PREFIX}row_ids"  # beside values that are rows: which ones
START = f"{MEMORY_PREFIX}start"  # SHA-256 of the table that the rows are changes of, as bytes


def changed_rows(values_ND: Tensor, shape: MemoryShape) -> dict[str, Tensor]:
    """The entries of a checkpoint for a table: its changed rows, or where those are most of it, the whole."""
    values_ND = values_ND.detach().cpu()
    start_ND = shape.start()["values"]
    ids_R = (~same_rows(values_ND, start_ND)).nonzero().flatten()
    if 2 * len(ids_R) > len(values_ND):
        return {VALUES: values_ND}
    return {VALUES: values_ND[ids_R], IDS: ids_R, START: _hash_bytes(start_ND)}


def whole_table(entries: Mapping[str, Tensor], shape: MemoryShape, where: str) -> Tensor:
    """The table `[N, D]` that `changed_rows` was given.

    Raises:
        PatchError: where this machine draws another start, or the rows do not fit.
    """
    rows_RD, ids_R = entries[VALUES], entries[IDS]
    table_ND = shape.start()["values"]
    saved = entries.get(START)
    if saved is None or saved.dtype != torch.uint8 or not torch.equal(saved.cpu(), _hash_bytes(table_ND)):
        raise PatchError(
            f"{where}: the start that config and seed give here is not what the saved rows are changes of; this "
            "machine or torch draws other initial values"
        )
    fits = ids_R.dtype == torch.int64 and ids_R.dim() == 1 and rows_RD.shape == (len(ids_R), shape.d)
    inside = fits and (not len(ids_R) or (int(ids_R.min()) >= 0 and int(ids_R.max()) < shape.n_rows))
    if not inside or len(torch.unique(ids_R)) != len(ids_R):
        raise PatchError(
            f"{where}: {tuple(ids_R.shape)} ids ({ids_R.dtype}) with rows {tuple(rows_RD.shape)}; expected int64 ids "
            f"within 0 to {shape.n_rows - 1}, each once, and one row of width {shape.d} for each"
        )
    table_ND[ids_R.cpu()] = rows_RD.cpu().to(table_ND.dtype)
    return table_ND


def with_whole_tables(state: Mapping[str, Tensor], shapes: Mapping[str, MemoryShape]) -> dict[str, Tensor]:
    """A checkpoint's tensors with whole tables in place of rows.

    Args:
        state: by name.
        shapes: of the memories, by the name of their module.
    """
    whole: dict[str, Any] = dict(state)
    for name in [key.removesuffix(f".{IDS}") for key in state if key.endswith(f".{IDS}")]:
        entries = {part: whole.pop(f"{name}.{part}") for part in (VALUES, IDS, START) if f"{name}.{part}" in whole}
        if name not in shapes or VALUES not in entries:
            raise PatchError(f"the checkpoint has rows of a memory at {name}, but the model has {sorted(shapes)}")
        whole[f"{name}.{VALUES}"] = whole_table(entries, shapes[name], name)
    return whole


def check_tensors(state: Mapping[str, Tensor], shapes: Mapping[str, MemoryShape], prefix: str) -> None:
    """Refuse a checkpoint that lacks a tensor of the model's memories, or has one of another size or without numbers.

    Args:
        state: by name; none of it is loaded where it is refused.
        shapes: of the memories, by the name of their module in the model.
        prefix: that the names in `state` may have before that.
    """
    for name, shape in shapes.items():
        for kind, (_, size) in shape.layouts().items():
            key = f"{name}.{MEMORY_PREFIX}{kind}"
            tensor = state.get(f"{prefix}{key}", state.get(key))
            if tensor is None:
                raise PatchError(f"{name}: the file has no {kind}, which its config promises")
            if tuple(tensor.shape) != size:
                raise PatchError(f"{name}: {kind} is {tuple(tensor.shape)} in the file; the model has {size}")
            if not all_finite(tensor):
                raise PatchError(f"{name}: {kind} holds NaN or infinity in the file")


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; torch cannot say so of float8."""
    return bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())


def _hash_bytes(start_ND: Tensor) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(tensors_hash({"values": start_ND})), dtype=torch.uint8)
