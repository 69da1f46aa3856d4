"""Rows of a large table, kept by id: what was touched, and nothing of what was not."""

from __future__ import annotations

import torch
from torch import Tensor


def find(sorted_ids_R: Tensor, ids_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of `ids_Q` in ascending `sorted_ids_R`, and which of them are there: `(position_Q, found_Q)`.

    Positions of ids that are not there are valid but meaningless.
    """
    if len(sorted_ids_R) == 0:
        zeros = torch.zeros_like(ids_Q)
        return zeros, zeros.bool()
    position_Q = torch.searchsorted(sorted_ids_R, ids_Q).clamp_(max=len(sorted_ids_R) - 1)
    return position_Q, sorted_ids_R[position_Q] == ids_Q


def union(ids: list[Tensor], device: torch.device) -> Tensor:
    """The ids that are in any of some tensors, each of which is ascending without repeats; ascending, int64."""
    if len(ids) == 1:
        return ids[0]
    return torch.unique(torch.cat([torch.empty(0, dtype=torch.int64, device=device), *ids]))


class RowStore:
    """Tensors for the rows that were ever added, found by row id; memory grows with those rows, not with the table.

    Columns are appended to storage that grows by half of its size, so adding is cheap on average; a sorted index of
    the ids finds them again.

    Args:
        columns: for each name an empty tensor `[0, ...]` that gives the dtype, device and shape of one row.
    """

    def __init__(self, **columns: Tensor):
        self._columns = columns
        device = next(iter(columns.values())).device
        self._ids = torch.empty(0, dtype=torch.int64, device=device)  # in order of arrival
        self._sorted_ids = self._ids
        self._sorted_slots = self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def to(self, device: torch.device) -> None:
        """Move everything to a device, where it is elsewhere."""
        if self._ids.device != device:
            self._columns = {name: column.to(device) for name, column in self._columns.items()}
            self._ids = self._ids.to(device)
            self._sorted_ids, self._sorted_slots = self._sorted_ids.to(device), self._sorted_slots.to(device)

    @property
    def ids(self) -> Tensor:
        """The row ids `[R]`, ascending."""
        return self._sorted_ids

    def get(self, name: str) -> Tensor:
        """Column `name` of every row `[R, ...]`, in the order of `ids` (a copy)."""
        return self._columns[name][self._sorted_slots]

    def missing(self, ids_Q: Tensor) -> Tensor:
        """Those of `ids_Q` that are not stored."""
        return ids_Q[~find(self._sorted_ids, ids_Q)[1]]

    def slots(self, ids_Q: Tensor) -> Tensor:
        """Storage positions of stored rows, for `read` and `write`; a row that is not stored raises KeyError."""
        position_Q, found_Q = find(self._sorted_ids, ids_Q)
        if not bool(found_Q.all()):
            raise KeyError(f"rows {ids_Q[~found_Q][:5].tolist()} are not stored")
        return self._sorted_slots[position_Q]

    def read(self, name: str, slots_Q: Tensor) -> Tensor:
        """Column `name` `[Q, ...]` at `slots_Q` (a copy)."""
        return self._columns[name][slots_Q]

    def write(self, name: str, slots_Q: Tensor, column_Q: Tensor) -> None:
        """Overwrite column `name` at `slots_Q`."""
        self._columns[name][slots_Q] = column_Q

    def add(self, ids_Q: Tensor, **columns_Q: Tensor) -> None:
        """Append rows that are not stored yet, with a value `[Q, ...]` for every column."""
        if len(ids_Q) == 0:
            return
        start, end = len(self._ids), len(self._ids) + len(ids_Q)
        for name, new_Q in columns_Q.items():
            column = self._columns[name]
            if len(column) < end:
                grown = column.new_empty((max(end, start + start // 2), *column.shape[1:]))
                grown[:start] = column[:start]
                self._columns[name] = column = grown
            column[start:end] = new_Q
        self._ids = torch.cat([self._ids, ids_Q])
        self._sorted_ids, self._sorted_slots = torch.sort(self._ids)

    def state_dict(self) -> dict[str, Tensor]:
        """Ids and columns in order of arrival, exactly as long as the number of rows (copies)."""
        return {"ids": self._ids.clone()} | {k: v[: len(self)].clone() for k, v in self._columns.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace what is stored by `state`."""
        device = self._ids.device
        self._columns = {k: state[k].to(device, v.dtype).clone() for k, v in self._columns.items()}
        self._ids = state["ids"].to(device).clone()
        self._sorted_ids, self._sorted_slots = torch.sort(self._ids)
