"""Which examples wrote which rows, and how far each of them moved a row.

A step moves a chosen row along its gradient, which is a sum over the examples that read it. The distance that the row
moved is divided among them by the norms of their parts. Shape letters: R rows of a patch, P pairs of a row and an
example.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PatchError
from .rows import find

SHIFT = 32  # bits of an example's number
PENDING = 2**20  # pairs that wait to be added up, at least


def pair(row: Tensor, example: Tensor) -> Tensor:
    """Row and example in one int64; ordered by row first."""
    return (row.long() << SHIFT) | example.long()


def unpair(pair_P: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and examples of pairs."""
    return pair_P >> SHIFT, pair_P & (2**SHIFT - 1)


def add_up(pair_P: Tensor, moved_P: Tensor) -> tuple[Tensor, Tensor]:
    """Each pair once, ascending, with the sum of what it moved."""
    once, place = torch.unique(pair_P, return_inverse=True)
    return once, moved_P.new_zeros(len(once)).index_add_(0, place, moved_P)


class Writers:
    """What each example wrote, collected while training: grows with the pairs that there are, on the CPU.

    Args:
        layers: that have a memory.
    """

    def __init__(self, layers: Collection[int]):
        empty = torch.empty(0, dtype=torch.int64)
        self._sums = {layer: (empty, empty.double()) for layer in layers}
        self._pending: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def note(self, layer: int, rows_t: Tensor, moved_t: Tensor, pair_P: Tensor, norm_P: Tensor) -> None:
        """Divide what the rows of one step moved among the examples that wrote them.

        Args:
            layer: of the decoder.
            rows_t: chosen rows, ascending.
            moved_t: distances that they moved.
            pair_P: rows and examples.
            norm_P: of each example's part of the row's gradient.
        """
        place_P = find(rows_t, unpair(pair_P)[0])[0]
        total_t = norm_P.new_zeros(len(rows_t)).index_add_(0, place_P, norm_P)
        moved_P = moved_t.double()[place_P] * norm_P / total_t[place_P]
        self._pending[layer].append((pair_P.cpu(), moved_P.cpu()))
        if sum(len(pairs) for pairs, _ in self._pending[layer]) > max(PENDING, len(self._sums[layer][0])):
            self.of(layer)

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """All pairs of a layer, ascending, and the distance that each example moved each row."""
        if self._pending[layer]:
            every = [self._sums[layer], *self._pending[layer]]
            self._sums[layer] = add_up(torch.cat([p for p, _ in every]), torch.cat([m for _, m in every]))
            self._pending[layer] = []
        return self._sums[layer]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """For a resume."""
        return {str(layer): dict(zip(("pairs", "moved"), self.of(layer), strict=True)) for layer in self._sums}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from a `state_dict`."""
        self._sums = {layer: (state[str(layer)]["pairs"], state[str(layer)]["moved"]) for layer in self._sums}
        self._pending = {layer: [] for layer in self._sums}


@dataclass(frozen=True)
class Provenance:
    """Of the rows of a patch, in their order, the examples that wrote them.

    Args:
        names: of examples.
        counts: for each layer how many examples wrote each row, `[R]`, int64.
        examples: their places in `names`, row after row, ascending within a row, `[P]`, int32.
        moved: how far each of them moved the row, `[P]`, bfloat16.
    """

    names: list[str]
    counts: dict[int, Tensor]
    examples: dict[int, Tensor]
    moved: dict[int, Tensor]

    def writers(self, layer: int, place: int) -> dict[str, float]:
        """Names of the examples that wrote the row at this place, with their shares, largest first."""
        counts = self.counts[layer]
        end = int(counts[: place + 1].sum())
        some = slice(end - int(counts[place]), end)
        moved = self.moved[layer][some].double()
        found = zip(self.examples[layer][some].tolist(), (moved / moved.sum()).tolist(), strict=True)
        return {self.names[example]: share for example, share in sorted(found, key=lambda item: (-item[1], item[0]))}

    def written_by(self, names: Collection[str], share: float) -> dict[int, Tensor]:
        """Which rows `[R]` (bool) these examples wrote to at least such a share; 1.0: which no other example wrote."""
        strange = sorted(set(names) - set(self.names))
        if strange:
            raise PatchError(
                f"{len(strange)} of {len(set(names))} examples wrote no row of this patch, such as {strange[0]!r}; "
                f"examples that did: {self.names[:3]} and {max(0, len(self.names) - 3)} more"
            )
        chosen = set(names)
        named = torch.tensor([name in chosen for name in self.names], dtype=torch.bool)
        found = {}
        for layer, counts in self.counts.items():
            by_P = named[self.examples[layer].long()]
            row_P = torch.arange(len(counts)).repeat_interleave(counts)
            if share >= 1:  # counted, not measured: nothing is rounded
                enough = torch.zeros_like(counts).index_add_(0, row_P, by_P.long()) == counts
            else:
                moved_P = self.moved[layer].double()
                total, theirs = (
                    torch.zeros(len(counts), dtype=torch.float64).index_add_(0, row_P, part)
                    for part in (moved_P, moved_P * by_P)
                )
                enough = theirs >= share * total
            found[layer] = enough & (counts > 0)
        return found

    def take(self, which: Mapping[int, Tensor]) -> Provenance:
        """Of some of the rows, by mask."""
        kept = {layer: which[layer].repeat_interleave(counts) for layer, counts in self.counts.items()}
        return Provenance(
            self.names,
            {layer: counts[which[layer]] for layer, counts in self.counts.items()},
            {layer: examples[kept[layer]] for layer, examples in self.examples.items()},
            {layer: moved[kept[layer]] for layer, moved in self.moved.items()},
        )


def provenance_of(writers: Writers, rows: Mapping[int, Tensor], names: Sequence[str] | None) -> Provenance:
    """What a training collected, of these rows.

    Args:
        writers: collected.
        rows: of each layer, ascending.
        names: of the examples, by their numbers; none: the numbers.
    """
    found = {}
    for layer, ids in rows.items():
        pairs, moved = writers.of(layer)
        kept = find(ids, unpair(pairs)[0])[1]
        found[layer] = pairs[kept], moved[kept]
    numbers = torch.unique(torch.cat([unpair(pairs)[1] for pairs, _ in found.values()]))
    if names is None:
        names = [str(int(number)) for number in numbers]
        found = {
            layer: (pair(unpair(pairs)[0], find(numbers, unpair(pairs)[1])[0]), moved)
            for layer, (pairs, moved) in found.items()
        }
    elif len(numbers) and int(numbers[-1]) >= len(names):
        raise PatchError(f"example {int(numbers[-1])} was trained, but there are names of {len(names)} examples only")
    if len(set(names)) < len(names):
        raise PatchError(f"two examples have one name: {len(set(names))} names of {len(names)} examples")
    return _made(list(names), rows, found)


def merge_provenance(
    parts: Sequence[Provenance], part_rows: Sequence[Mapping[int, Tensor]], rows: Mapping[int, Tensor]
) -> Provenance:
    """Who wrote the rows of a merged patch: what each example moved in any of them."""
    names = list(dict.fromkeys(name for part in parts for name in part.names))
    place = {name: number for number, name in enumerate(names)}
    found = {}
    for layer, ids in rows.items():
        pairs, moved = [], []
        for part, own in zip(parts, part_rows, strict=True):
            number_of = torch.tensor([place[name] for name in part.names], dtype=torch.int64)
            row_P = own[layer].repeat_interleave(part.counts[layer])
            pairs.append(pair(row_P, number_of[part.examples[layer].long()]))
            moved.append(part.moved[layer].double())
        every, sums = add_up(torch.cat(pairs), torch.cat(moved))
        kept = find(ids, unpair(every)[0])[1]
        found[layer] = every[kept], sums[kept]
    return _made(names, rows, found)


def _made(names: list[str], rows: Mapping[int, Tensor], found: Mapping[int, tuple[Tensor, Tensor]]) -> Provenance:
    counts, examples, moved = {}, {}, {}
    for layer, ids in rows.items():
        row_P, example_P = unpair(found[layer][0])
        counts[layer] = torch.bincount(find(ids, row_P)[0], minlength=len(ids))
        examples[layer], moved[layer] = example_P.int(), found[layer][1].bfloat16()
    return Provenance(names, counts, examples, moved)
