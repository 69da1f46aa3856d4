"""Sets of changed rows put together or compared, for one table at a time. Shape letters: R rows of a set, D width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import PatchError
from .rows import find

Policy = Literal["refuse", "sum", "weighted", "last"]


def same_rows(a_RD: Tensor, b_RD: Tensor) -> Tensor:
    """Which rows `[R]` are equal to the last bit."""
    if a_RD.dtype != b_RD.dtype or a_RD.shape != b_RD.shape:
        return torch.zeros(len(a_RD), dtype=torch.bool)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a_RD.element_size()]
    return (a_RD.contiguous().view(whole) == b_RD.contiguous().view(whole)).all(-1)


@dataclass(frozen=True)
class RowSet:
    """Rows of one table before and after a training.

    Args:
        ids_R: ascending.
        old_RD, new_RD: the rows.
    """

    ids_R: Tensor
    old_RD: Tensor
    new_RD: Tensor

    def __len__(self) -> int:
        return len(self.ids_R)

    def take(self, which_R: Tensor) -> RowSet:
        """Some of the rows, by mask or position."""
        return RowSet(self.ids_R[which_R], self.old_RD[which_R], self.new_RD[which_R])


@dataclass(frozen=True)
class Overlap:
    """Rows that two sets both changed, and how.

    Args:
        ids_R: the rows.
        sizes_2R: the length of either's change.
        cosine_R: between the two changes; NaN where one of them is no change.
    """

    ids_R: Tensor
    sizes_2R: Tensor
    cosine_R: Tensor


def overlap(a: RowSet, b: RowSet) -> Overlap:
    """Rows that both changed."""
    position_R, found_R = find(b.ids_R, a.ids_R)
    mine, theirs = a.take(found_R), b.take(position_R[found_R])
    changes = [side.new_RD.double() - side.old_RD.double() for side in (mine, theirs)]
    sizes_2R = torch.stack([change.norm(dim=-1) for change in changes])
    return Overlap(mine.ids_R, sizes_2R, (changes[0] * changes[1]).sum(-1) / sizes_2R.prod(0))


@dataclass(frozen=True)
class Difference:
    """How two patches differ at one layer.

    Args:
        only_first, only_second: ids of rows that one of them changes.
        equal: ids of rows that both leave equal, to the last bit.
        apart: ids of rows that they leave different.
        distances: between the two values of each row in `apart`.
    """

    only_first: Tensor
    only_second: Tensor
    equal: Tensor
    apart: Tensor
    distances: Tensor


def difference(a: RowSet, b: RowSet) -> Difference:
    """How two sets of rows of one table differ in what they leave."""
    shared = overlap(a, b).ids_R
    mine, theirs = (side.take(torch.isin(side.ids_R, shared)) for side in (a, b))
    equal = same_rows(mine.new_RD, theirs.new_RD)
    distances = (mine.new_RD.double() - theirs.new_RD.double()).norm(dim=-1)
    only = [side.ids_R[~torch.isin(side.ids_R, shared)] for side in (a, b)]
    return Difference(only[0], only[1], shared[equal], shared[~equal], distances[~equal])


def merge_rows(sets: Sequence[RowSet], policy: Policy, weights: Sequence[float], where: str) -> tuple[RowSet, Tensor]:
    """One set that changes what each of them changes, and the ids that more than one changed apart from each other.

    A row whose value before the second training is the one that the first left was trained in sequence: the second's
    value counts. A row that both trainings changed from one value is settled by the policy: "sum" adds both changes,
    "weighted" takes the mean of both values by weight, "last" the last set's value, "refuse" refuses. A row that is
    back at its first value is left out.

    Args:
        sets: of one table, in the order of the trainings.
        policy: see above.
        weights: of the sets, for "weighted".
        where: names the table in errors.

    Raises:
        PatchError: for a row that was trained from neither value, or by policy.
    """
    merged, clashes = sets[0], []
    total_R = torch.full((len(merged),), weights[0], dtype=torch.float64)  # weight of what is merged into each row
    for number, (own, weight) in enumerate(zip(sets[1:], weights[1:], strict=True), 2):
        position_R, found_R = find(merged.ids_R, own.ids_R)
        slots, both = position_R[found_R], own.take(found_R)
        follows = same_rows(both.old_RD, merged.new_RD[slots])
        beside = same_rows(both.old_RD, merged.old_RD[slots]) & ~follows
        _refuse_strangers(both, ~(follows | beside), number, where)
        clash = both.ids_R[beside]
        if len(clash) and policy == "refuse":
            raise PatchError(
                f"{len(clash)} rows of {where} are changed by patch {number} and by an earlier one, such as rows "
                f'{clash[:8].tolist()}; choose a policy for them: "sum", "weighted" or "last"'
            )
        clashes.append(clash)
        new_RD = _settled(merged.take(slots), both, beside, policy, total_R[slots], weight)
        total_R[slots] = torch.where(beside, total_R[slots] + weight, total_R[slots])
        merged_new = merged.new_RD.clone()
        merged_new[slots] = new_RD
        added = own.take(~found_R)
        ids, order = torch.sort(torch.cat([merged.ids_R, added.ids_R]))
        old, new = torch.cat([merged.old_RD, added.old_RD]), torch.cat([merged_new, added.new_RD])
        merged = RowSet(ids, old[order], new[order])
        total_R = torch.cat([total_R, torch.full((len(added),), weight, dtype=torch.float64)])[order]
    changed = ~same_rows(merged.old_RD, merged.new_RD)
    return merged.take(changed), torch.unique(torch.cat([sets[0].ids_R[:0], *clashes]))


def _refuse_strangers(both: RowSet, stranger_R: Tensor, number: int, where: str) -> None:
    if bool(stranger_R.any()):
        ids = both.ids_R[stranger_R]
        raise PatchError(
            f"{len(ids)} rows of {where}, such as rows {ids[:8].tolist()}, were trained by patch {number} from values "
            "that the earlier patches neither started from nor left; merge patches that were trained from one start, "
            "or one after the other, in that order"
        )


def _settled(earlier: RowSet, both: RowSet, beside_R: Tensor, policy: Policy, total_R: Tensor, weight: float) -> Tensor:
    """The new values `[R, D]` of rows that both have: the later one's where it follows, else by the policy."""
    before, mine, theirs = (t.double() for t in (both.old_RD, earlier.new_RD, both.new_RD))
    if policy == "sum":
        mixed = mine + (theirs - before)
    elif policy == "weighted":
        mixed = (total_R.unsqueeze(1) * mine + weight * theirs) / (total_R + weight).unsqueeze(1)
    else:
        mixed = theirs
    return torch.where(beside_R.unsqueeze(1), mixed.to(both.new_RD.dtype), both.new_RD)
