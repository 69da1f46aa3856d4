"""Which examples wrote which rows, and how far each of them moved a row.

A step moves a chosen row along its gradient, which is a sum over the examples that read it. The distance that the row
moved is divided among them by the norms of their parts. Shape letters: R rows of a patch, P pairs of a row and an
example.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import PatchError
from .rows import find

SHIFT = 32  # bits of an example's number
KEPT = 64  # examples of a row that are kept
EVERY = 256  # steps after which rows are cut to them
REST = "(others)"  # in place of the names of the others

Parts = Sequence[tuple[Tensor, Tensor]]  # pairs of rows and examples, and the norms of what each example adds


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
    """What each example wrote, collected while training, on the CPU.

    Of each row the `KEPT` examples that moved it furthest are kept; what the others moved is added up. That bounds the
    memory by the rows written. Rows are cut to it every `EVERY` steps, so that a resumed training cuts when an
    uninterrupted one does.

    Args:
        layers: that have a memory.
    """

    def __init__(self, layers: Collection[int]):
        self._layers = {layer: Sums.none() for layer in layers}
        self._pending: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
        self._steps = dict.fromkeys(layers, 0)

    def note(self, layer: int, rows_t: Tensor, moved_t: Tensor, parts: Parts) -> None:
        """Divide what the rows of one step moved among the examples that wrote them.

        Args:
            layer: of the decoder.
            rows_t: chosen rows, ascending.
            moved_t: distances that they moved.
            parts: of the rows' gradients, by example, of each micro-batch.
        """
        pair_P, norm_P = add_up(*(torch.cat(column) for column in zip(*parts, strict=True)))
        place_P = find(rows_t, unpair(pair_P)[0])[0]
        total_t = norm_P.new_zeros(len(rows_t)).index_add_(0, place_P, norm_P)
        moved_P = moved_t.double()[place_P] * norm_P / total_t[place_P]
        self._pending[layer].append((pair_P.cpu(), moved_P.cpu()))
        self._steps[layer] += 1
        if self._steps[layer] % EVERY == 0:
            self._layers[layer] = self._added_up(layer).cut()

    def of(self, layer: int) -> Sums:
        """What was collected of a layer."""
        return self._added_up(layer).cut()

    def _added_up(self, layer: int) -> Sums:
        if self._pending[layer]:
            pairs, moved = zip(*self._pending[layer], strict=True)
            self._layers[layer] = self._layers[layer].plus(torch.cat(pairs), torch.cat(moved))
            self._pending[layer] = []
        return self._layers[layer]

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """For a resume."""
        sums = {layer: self._added_up(layer) for layer in self._layers}
        return {str(layer): vars(each) | {"steps": self._steps[layer]} for layer, each in sums.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue from a `state_dict`."""
        for layer in self._layers:
            own = dict(state[str(layer)])
            self._steps[layer] = int(own.pop("steps"))
            self._layers[layer] = Sums(**{name: tensor.cpu() for name, tensor in own.items()})
            self._pending[layer] = []


@dataclass(frozen=True)
class Sums:
    """How far examples moved the rows of one layer.

    Args:
        pairs: of row and example, ascending, `[P]`.
        moved: by each of them, `[P]`, float64.
        rows: that more examples wrote, ascending, `[R]`.
        rest: how far those moved them, `[R]`, float64.
    """

    pairs: Tensor
    moved: Tensor
    rows: Tensor
    rest: Tensor

    @classmethod
    def none(cls) -> Sums:
        """Of no step yet."""
        empty = torch.empty(0, dtype=torch.int64)
        return cls(empty, empty.double(), empty, empty.double())

    def plus(self, pairs: Tensor, moved: Tensor) -> Sums:
        """With more pairs."""
        both = add_up(torch.cat([self.pairs, pairs]), torch.cat([self.moved, moved]))
        return Sums(*both, self.rows, self.rest)

    def cut(self) -> Sums:
        """With the `KEPT` examples that moved each row furthest, and the rest added up."""
        row_P = unpair(self.pairs)[0]
        if len(row_P) <= KEPT:
            return self
        order = torch.argsort(self.moved, descending=True, stable=True)
        order = order[torch.argsort(row_P[order], stable=True)]  # by row, and within it by distance
        sorted_P = row_P[order]
        place_P = torch.arange(len(order)) - torch.searchsorted(sorted_P, sorted_P)  # within the row
        kept_P = torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[place_P < KEPT], True)
        rest = add_up(torch.cat([self.rows, row_P[~kept_P]]), torch.cat([self.rest, self.moved[~kept_P]]))
        return Sums(self.pairs[kept_P], self.moved[kept_P], *rest)

    def without(self, rows: Tensor) -> Sums:
        """Without what is known of some rows."""
        pair_kept, row_kept = (~torch.isin(of, rows) for of in (unpair(self.pairs)[0], self.rows))
        return Sums(self.pairs[pair_kept], self.moved[pair_kept], self.rows[row_kept], self.rest[row_kept])


@dataclass(frozen=True)
class Provenance:
    """Of the rows of a patch, in their order, the examples that wrote them.

    Args:
        names: of the examples that are kept of any row.
        counts: for each layer of how many examples each row knows the name, `[R]`, int64.
        examples: their places in `names`, row after row, ascending within a row, `[P]`, int32.
        moved: how far each of them moved the row, `[P]`, bfloat16.
        rest: how far examples moved the row whose names are not kept, `[R]`, bfloat16; 0: there are none.
    """

    names: list[str]
    counts: dict[int, Tensor]
    examples: dict[int, Tensor]
    moved: dict[int, Tensor]
    rest: dict[int, Tensor]

    def writers(self, layer: int, place: int) -> dict[str, float]:
        """Names of the examples that wrote the row at this place, with their shares, largest first, then the rest."""
        counts, rest = self.counts[layer], float(self.rest[layer][place])
        end = int(counts[: place + 1].sum())
        some = slice(end - int(counts[place]), end)
        moved = self.moved[layer][some].double()
        if float(moved.sum()) == 0:  # only steps with a learning rate of zero: in equal parts
            moved = torch.ones_like(moved)
        shares = (moved / (moved.sum() + rest)).tolist()
        found = zip(self.examples[layer][some].tolist(), shares, strict=True)
        named = {self.names[example]: share for example, share in sorted(found, key=lambda item: (-item[1], item[0]))}
        return named | ({REST: rest / (float(moved.sum()) + rest)} if rest else {})

    def written_by(self, names: Collection[str], share: float) -> dict[int, Tensor]:
        """Which rows `[R]` (bool) these examples wrote to at least such a share; 1.0: which no other example wrote."""
        chosen = set(names)
        strange = sorted(chosen - set(self.names))
        if strange:
            raise PatchError(
                f"{len(strange)} of {len(chosen)} examples are not among those that are known to have written a row of "
                f"this patch, such as {strange[0]!r}; known are {self.names[:3]} and {max(0, len(self.names) - 3)} more"
            )
        named = torch.tensor([name in chosen for name in self.names], dtype=torch.bool)
        found = {}
        for layer, counts in self.counts.items():
            by_P, rest = named[self.examples[layer].long()], self.rest[layer].double()
            row_P = torch.arange(len(counts)).repeat_interleave(counts)
            if share >= 1:  # counted, not measured: nothing is rounded
                enough = (torch.zeros_like(counts).index_add_(0, row_P, by_P.long()) == counts) & (rest == 0)
            else:
                moved_P = self.moved[layer].double()
                total, theirs = (rest.clone().index_add_(0, row_P, moved_P), rest.new_zeros(len(rest)))
                theirs.index_add_(0, row_P, moved_P * by_P)
                enough = (theirs >= share * total) & (theirs > 0)
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
            {layer: rest[which[layer]] for layer, rest in self.rest.items()},
        ).with_used_names()

    def with_used_names(self) -> Provenance:
        """Without the names of examples that wrote none of the rows."""
        used = torch.unique(torch.cat([self.examples[layer] for layer in self.examples])).long()
        names = [self.names[place] for place in used.tolist()]
        places = {layer: find(used, examples.long())[0].int() for layer, examples in self.examples.items()}
        return Provenance(names, self.counts, places, self.moved, self.rest)


def provenance_of(writers: Writers, rows: Mapping[int, Tensor], names: Sequence[str] | None) -> Provenance:
    """What a training collected, of these rows.

    Args:
        writers: collected.
        rows: of each layer, ascending.
        names: of the examples, by their numbers; none: the numbers.
    """
    sums = {layer: writers.of(layer) for layer in rows}
    numbers = torch.unique(torch.cat([unpair(each.pairs)[1] for each in sums.values()]))
    if names is None:
        names = [str(int(number)) for number in numbers]
        sums = {
            layer: Sums(pair(unpair(s.pairs)[0], find(numbers, unpair(s.pairs)[1])[0]), s.moved, s.rows, s.rest)
            for layer, s in sums.items()
        }
    else:
        names = _checked_names(names)
        if len(numbers) and int(numbers[-1]) >= len(names):
            raise PatchError(
                f"example {int(numbers[-1])} was trained, but there are names of {len(names)} examples only"
            )
    return _made(names, rows, sums)


def _checked_names(names: Sequence[str]) -> list[str]:
    found = [] if isinstance(names, str) else list(names)
    if not found or not all(isinstance(name, str) for name in found):
        raise PatchError("examples must be names, a string for each example, in the order of their numbers")
    if len(set(found)) < len(found):
        raise PatchError(f"two examples have one name: {len(set(found))} names of {len(found)} examples")
    return found


def merge_provenance(
    parts: Sequence[Provenance | None],
    part_rows: Sequence[Mapping[int, Tensor]],
    rows: Mapping[int, Tensor],
    replaced: Mapping[int, Tensor],
) -> Provenance | None:
    """Who wrote the rows of a merged patch: what each example moved in any of them.

    Args:
        parts: of the patches; None of one that does not know: nor does what they are merged to.
        part_rows: their rows.
        rows: of the merged patch.
        replaced: rows of which the last patch that has them is all that is left.
    """
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    names = list(dict.fromkeys(name for part in known for name in part.names))
    place = {name: number for number, name in enumerate(names)}
    sums = {}
    for layer in rows:
        found = Sums.none()
        for part, own in zip(known, part_rows, strict=True):
            found = found.without(replaced[layer][torch.isin(replaced[layer], own[layer])])
            number_of = torch.tensor([place[name] for name in part.names], dtype=torch.int64)
            row_P = own[layer].repeat_interleave(part.counts[layer])
            pairs = pair(row_P, number_of[part.examples[layer].long()])
            more, rest = part.rest[layer] > 0, part.rest[layer].double()
            every = add_up(torch.cat([found.rows, own[layer][more]]), torch.cat([found.rest, rest[more]]))
            found = Sums(
                *add_up(torch.cat([found.pairs, pairs]), torch.cat([found.moved, part.moved[layer].double()])), *every
            )
        sums[layer] = found
    return _made(names, rows, sums)


def _made(names: list[str], rows: Mapping[int, Tensor], sums: Mapping[int, Sums]) -> Provenance:
    counts, examples, moved, rests = {}, {}, {}, {}
    for layer, ids in rows.items():
        row_P, example_P = unpair(sums[layer].pairs)
        place_P, kept_P = find(ids, row_P)
        place_R, more_R = find(ids, sums[layer].rows)
        counts[layer] = torch.bincount(place_P[kept_P], minlength=len(ids))
        examples[layer], moved[layer] = example_P[kept_P].int(), sums[layer].moved[kept_P].bfloat16()
        rests[layer] = torch.zeros(len(ids), dtype=torch.float64).index_add_(
            0, place_R[more_R], sums[layer].rest[more_R]
        )
    rests = {layer: rest.bfloat16() for layer, rest in rests.items()}
    return Provenance(names, counts, examples, moved, rests).with_used_names()
