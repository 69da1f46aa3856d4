"""Patches: the rows that a training changed, put into a model and taken out again bit for bit, merged and compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import SparseMemoryConfig
from .errors import ConfigError, PatchError
from .fingerprint import base_hash, tensor_bytes, tensors_hash
from .memory import MemoryShape, ProductKeyMemory, memory_layers
from .provenance import Provenance, merge_provenance
from .row_sets import Difference, Overlap, Policy, RowSet, difference, merge_rows, overlap, same_rows

DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16)}
Tables = Mapping[int, Mapping[str, Tensor]]  # of each layer the parameters of its memory, by kind
Side = Mapping[int, tuple[Tensor, Tensor, Mapping[str, Tensor]]]  # of each layer ids, rows, other parameters


@dataclass(frozen=True, repr=False)
class Patch:
    """Rows before and after a training, and what they belong to.

    Args:
        rows: for each layer the ids of the changed rows, ascending.
        old, new: the rows `[R, D]` before and after, by layer.
        old_others, new_others: other parameters that the training changed, whole, by layer and kind.
        metadata: what the patch belongs to (base, config, checksums of what it does not change) and what trained it.
        provenance: which examples wrote which rows, where the optimizer was made with `provenance=True`.
    """

    rows: dict[int, Tensor]
    old: dict[int, Tensor]
    new: dict[int, Tensor]
    old_others: dict[int, dict[str, Tensor]]
    new_others: dict[int, dict[str, Tensor]]
    metadata: dict[str, Any]
    provenance: Provenance | None = None

    def __repr__(self) -> str:
        rows = {layer: len(ids) for layer, ids in self.rows.items()}
        return f"Patch(rows={rows}, base={self.metadata['base']!r}, metadata={self.metadata['metadata']})"

    @property
    def config(self) -> SparseMemoryConfig:
        """A config that attaches the memory this patch belongs to: `get_peft_model(base, patch.config)`."""
        return SparseMemoryConfig(**self.metadata["config"], base_model_name_or_path=self.metadata["base"])

    def shape(self, layer: int) -> MemoryShape:
        """Sizes and start of the memory at a layer."""
        return self.config.shape(layer, self.metadata["width"], DTYPES[self.metadata["dtype"]])

    def row_set(self, layer: int) -> RowSet:
        """The rows of one layer, before and after."""
        return RowSet(self.rows[layer], self.old[layer], self.new[layer])

    # -- in a model ---------------------------------------------------------------------------------------------------

    def check_base(self, model: nn.Module) -> None:
        """Refuse a model whose own weights are not those that the patch was trained beside."""
        self.check_hash(base_hash(model), "attach the memory")

    def check_hash(self, found: str | None, verb: str) -> None:
        """Refuse another base by the hash of its weights."""
        if self.metadata["base_hash"] != found:
            raise PatchError(
                f"cannot {verb}: the patch belongs to another base, {self.metadata['base']!r} with weights hash "
                f"{str(self.metadata['base_hash'])[:12]}; this one's weights have {str(found)[:12]}"
            )

    def apply(self, model: nn.Module, adapter: str | None = None) -> None:
        """Put the new rows in place of the old ones; refuses, changing nothing, where a row is not its old value."""
        self._put_into_model(model, adapter, "apply")

    def revert(self, model: nn.Module, adapter: str | None = None) -> None:
        """Put the old rows back; refuses, changing nothing, where a row is not its new value."""
        self._put_into_model(model, adapter, "revert")

    def _put_into_model(self, model: nn.Module, adapter: str | None, verb: str) -> None:
        memories = fitting_memories(model, adapter, self, verb)
        for layer, memory in memories.items():
            memory.note_old_rows(self.rows[layer])  # a training's own patch then knows of this one
        self.put_into(tables_of(memories), verb)

    def put_into(self, tables: Tables, verb: str) -> None:
        """Apply or revert on the parameters of the memories, in place; nothing is changed after any error.

        Args:
            tables: of a base, config and start that fit.
            verb: "apply" or "revert".
        """
        self.check_present(tables, verb)
        before, after = (self._side(tables, apply) for apply in (verb != "apply", verb == "apply"))
        try:
            _copy(tables, after)
        except BaseException:  # a key pressed: not half of it
            _copy(tables, before)
            raise

    def check_present(self, tables: Tables, verb: str) -> None:
        """Refuse memories where a row or another parameter is not what applying or reverting replaces."""
        rows_before = self.old if verb == "apply" else self.new
        others_before = self.old_others if verb == "apply" else self.new_others
        for layer, rows in self.rows.items():
            table = tables[layer]
            present = table["values"].detach()[rows.to(table["values"].device)].cpu()
            wrong = rows[~same_rows(present, rows_before[layer])]
            if len(wrong) > 0:
                been = "applied" if verb == "apply" else "reverted"
                raise PatchError(
                    f"cannot {verb}: {len(wrong)} of {len(rows)} rows of layer {layer} are not what the patch "
                    f"{'replaced' if verb == 'apply' else 'wrote'}: rows {wrong[:8].tolist()}. "
                    f"Another training or patch changed them, or this one is {been} already; nothing was changed now"
                )
            for kind, tensor in others_before[layer].items():
                if not same(table[kind].cpu(), tensor):
                    raise PatchError(
                        f"cannot {verb}: {kind} of layer {layer} was changed since; nothing was changed now"
                    )

    def _side(self, tables: Tables, new: bool) -> Side:
        """Ids, rows and other parameters before or after the training, where the tables are."""
        rows, others = (self.new, self.new_others) if new else (self.old, self.old_others)
        found = {}
        for layer, ids in self.rows.items():
            device = tables[layer]["values"].device
            moved = {kind: tensor.to(device) for kind, tensor in others[layer].items()}
            found[layer] = (ids.to(device), rows[layer].to(device), moved)
        return found

    # -- with other patches -------------------------------------------------------------------------------------------

    def merge(
        self,
        *others: Patch,
        policy: Policy = "refuse",
        weights: Sequence[float] | None = None,
        **metadata: Any,
    ) -> Patch:
        """A patch that does what this one and others do.

        Rows that one of them changed are taken as they are. Patches trained one after the other, each with the one
        before applied, are joined: the last value counts. Rows that several changed from one start are settled by the
        policy; `overlap` lists them. Of patches stored as bfloat16, what several changed are new values: the merged
        patch is stored unrounded.

        Args:
            others: of the same base and memory, in the order of their trainings.
            policy: "refuse"; "sum" of the changes; "weighted" mean of the values; "last" patch's value.
            weights: one for each patch, this one's first; none: equal.
            metadata: JSON values to keep with the patch.

        Raises:
            PatchError: for patches that do not belong together, rows that were trained from other values, and, by
                the policy, rows that several changed.
        """
        patches = [self, *others]
        weights = [1.0] * len(patches) if weights is None else list(weights)
        _check_policy(policy, weights, len(patches))
        for number, other in enumerate(others, 2):
            _check_siblings(self, other, number)
        about = {key: value for key, value in self.metadata.items() if key != "stored"}
        merged, clashes = Patch({}, {}, {}, {}, {}, about), {}
        for layer in self.rows:
            found, clashes[layer] = merge_rows([p.row_set(layer) for p in patches], policy, weights, f"layer {layer}")
            merged.rows[layer], merged.old[layer], merged.new[layer] = found.ids_R, found.old_RD, found.new_RD
            old, new = _merge_others(patches, layer, policy, weights)
            merged.old_others[layer], merged.new_others[layer] = old, new
        merged.metadata["metadata"] = {
            "merged": [patch.metadata["metadata"] for patch in patches],
            "policy": policy,
            "weights": weights,
            "rows_of_several": {str(layer): len(rows) for layer, rows in clashes.items()},
        } | metadata
        replaced = {layer: rows if policy == "last" else rows[:0] for layer, rows in clashes.items()}
        known = merge_provenance([p.provenance for p in patches], [p.rows for p in patches], merged.rows, replaced)
        return replace(merged, provenance=known)

    def overlap(self, other: Patch) -> dict[int, Overlap]:
        """By layer the rows that this patch and another one both changed, with the sizes of their changes."""
        _check_siblings(self, other, 2)
        return {layer: overlap(self.row_set(layer), other.row_set(layer)) for layer in self.rows}

    def diff(self, other: Patch) -> dict[int, Difference]:
        """By layer how the two differ in what they leave."""
        _check_siblings(self, other, 2)
        return {layer: difference(self.row_set(layer), other.row_set(layer)) for layer in self.rows}

    # -- by example ---------------------------------------------------------------------------------------------------

    def why(self, layer: int, row: int) -> dict[str, float]:
        """The examples that wrote a row, and their shares of the way that it moved, largest first."""
        rows = self.rows.get(layer, torch.empty(0, dtype=torch.int64)).tolist()
        if row not in rows:
            raise PatchError(f"the patch does not change row {row} of layer {layer}; its layers: {list(self.rows)}")
        return self._known().writers(layer, rows.index(row))

    def written_by(self, examples: Collection[str], share: float = 1.0) -> Patch:
        """The part of the patch that these examples wrote: `.revert(model)` takes it out. No unlearning guarantee.

        Args:
            examples: their names.
            share: of the way that a row moved, at least so much is theirs; 1: no other example wrote the row.
        """
        if isinstance(examples, str) or not all(isinstance(name, str) for name in examples):
            raise ConfigError(f"examples must be several names of examples, such as ['17']; got {examples!r:.60}")
        if not 0 < share <= 1:
            raise ConfigError(f"share = {share}; expected a number above 0, up to 1")
        part = self.take(self._known().written_by(examples, share))
        # beside their rows nothing is theirs: the scale is left as it is
        return replace(part, old_others=self.new_others)

    def without(self, part: Patch) -> Patch:
        """The patch without the rows of a part of it."""
        if list(part.rows) != list(self.rows):
            raise PatchError(f"the part is of layers {list(part.rows)}, the patch of {list(self.rows)}")
        return self.take({layer: ~torch.isin(rows, part.rows[layer]) for layer, rows in self.rows.items()})

    def _known(self) -> Provenance:
        if self.provenance is None:
            raise PatchError(
                "the patch does not know which examples wrote its rows: train with SparseMemoryOptimizer(..., "
                "provenance=True), in recipes provenance = true; of merged patches all must know"
            )
        return self.provenance

    def take(self, which: dict[int, Tensor]) -> Patch:
        """Some of the rows of each layer, by mask."""
        rows, old, new = ({n: side[n][keep] for n, keep in which.items()} for side in (self.rows, self.old, self.new))
        known = None if self.provenance is None else self.provenance.take(which)
        return replace(self, rows=rows, old=old, new=new, provenance=known)


def _check_policy(policy: str, weights: Sequence[float], count: int) -> None:
    if policy not in ("refuse", "sum", "weighted", "last"):
        raise ConfigError(f'policy = {policy!r}; expected "refuse", "sum", "weighted" or "last"')
    if len(weights) != count or not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"weights = {weights}; expected a finite number above 0 for each of {count} patches")


def _merge_others(
    patches: Sequence[Patch], layer: int, policy: Policy, weights: Sequence[float]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Other parameters of one layer, each as a table of one row."""
    old, new = {}, {}
    for kind, like in patches[0].new_others[layer].items():
        sets = [
            RowSet(
                torch.zeros(1, dtype=torch.int64),
                p.old_others[layer][kind].reshape(1, -1),
                p.new_others[layer][kind].reshape(1, -1),
            )
            for p in patches
        ]
        merged, _ = merge_rows(sets, policy, weights, f"{kind} of layer {layer}")
        if len(merged):
            old[kind], new[kind] = merged.old_RD.reshape(like.shape), merged.new_RD.reshape(like.shape)
        else:  # back at its first value
            old[kind] = new[kind] = patches[0].old_others[layer][kind]
    return old, new


def _check_siblings(first: Patch, other: Patch, number: int) -> None:
    """Refuse patches that do not belong to one base and one memory."""
    a, b = first.metadata, other.metadata
    if a["base_hash"] != b["base_hash"]:
        raise PatchError(
            f"patch {number} belongs to another base, {b['base']!r} with weights hash {str(b['base_hash'])[:12]}; the "
            f"first one's is {a['base']!r} with {str(a['base_hash'])[:12]}"
        )
    if list(first.rows) != list(other.rows):
        raise PatchError(f"patch {number} is for memory at layers {list(other.rows)}, the first at {list(first.rows)}")
    for layer in first.rows:
        if first.shape(layer) != other.shape(layer):
            raise PatchError(
                f"patch {number} is for {other.shape(layer)} at layer {layer}, the first {first.shape(layer)}"
            )
        frozen, others = ([each["layers"][str(layer)][key] for each in (a, b)] for key in ("frozen", "others"))
        if others[0] != others[1]:
            raise PatchError(
                f"patch {number} changes {others[1] or 'rows alone'} at layer {layer}, the first "
                f"{others[0] or 'rows alone'}; "
                'only patches of one train mode ("rows" or "rows+scale") go together'
            )
        if frozen[0] != frozen[1]:
            raise PatchError(
                f"patch {number} was trained beside other queries, keys, gate, out or scale at layer {layer} than the "
                "first (another healing?)"
            )


@torch.no_grad()
def _copy(tables: Tables, side: Side) -> None:
    for layer, (ids, rows, others) in side.items():
        tables[layer]["values"].index_copy_(0, ids, rows)
        for kind, tensor in others.items():
            tables[layer][kind].copy_(tensor)


def from_tables(
    config: SparseMemoryConfig,
    found: str | None,
    shapes: Mapping[int, MemoryShape],
    before: Tables,
    after: Tables,
    ids: Mapping[int, Tensor] = {},
) -> Patch:
    """The patch of what differs between two states of the memories.

    Args:
        config: that attached the memories.
        found: hash of the base's weights.
        shapes: of the memories.
        before, after: their parameters, by layer and kind.
        ids: by layer, of which rows `before` has the values; none: of the whole table.
    """
    shape = next(iter(shapes.values()))
    about: dict[str, Any] = {
        "base": config.base_model_name_or_path,
        "base_hash": found,
        "config": {option: getattr(config, option) for option in SparseMemoryConfig.__annotations__},
        "width": shape.d,
        "dtype": str(shape.dtype),
        "layers": {},
        "metadata": {},
    }
    patch = Patch({}, {}, {}, {}, {}, about)
    for layer, table in after.items():
        rows, values = ids.get(layer), table["values"].detach()
        rows = torch.arange(len(values)) if rows is None else rows
        old, new = before[layer]["values"], values[rows.to(values.device)].cpu()
        changed = ~same_rows(new, old)
        patch.rows[layer], patch.old[layer], patch.new[layer] = rows[changed], old[changed], new[changed]
        others = {k: t.detach().cpu().clone() for k, t in table.items() if k not in ("values", "anchor")}
        moved = {kind: tensor for kind, tensor in others.items() if not same(tensor, before[layer][kind])}
        patch.new_others[layer], patch.old_others[layer] = moved, {kind: before[layer][kind] for kind in moved}
        frozen = tensors_hash({kind: tensor for kind, tensor in others.items() if kind not in moved})
        about["layers"][str(layer)] = {"frozen": frozen, "others": sorted(moved)}
    return patch


# -- what a model must be ---------------------------------------------------------------------------------------------


def layout(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    """Dtype and shape."""
    return tensor.dtype, tensor.shape


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit."""
    return layout(a) == layout(b) and tensor_bytes(a) == tensor_bytes(b)


def tables_of(memories: Mapping[int, ProductKeyMemory]) -> Tables:
    """The parameters of memories: those that the model uses, not copies."""
    return {layer: {kind: memory.tensor(kind) for kind in memory.kinds} for layer, memory in memories.items()}


def fitting_memories(
    model: nn.Module, adapter: str | None, patch: Patch, verb: str, known_hash: str | None = None
) -> dict[int, ProductKeyMemory]:
    """The model's memories, after checking that base, shapes and frozen parameters are those of the patch."""
    try:
        memories = memory_layers(model, adapter)
    except ConfigError as error:
        raise PatchError(f"cannot {verb}: {error}") from error
    wanted = sorted(patch.rows)
    if list(memories) != wanted:
        raise PatchError(
            f"cannot {verb}: the patch is for memory at layers {wanted}, the model has some at {list(memories)}; "
            "attach it with get_peft_model(base, patch.config)"
        )
    patch.check_hash(known_hash or base_hash(model), verb)
    for layer, memory in memories.items():
        if memory.shape != patch.shape(layer):
            raise PatchError(
                f"cannot {verb}: the memory at layer {layer} is {memory.shape}, the patch is for {patch.shape(layer)}"
            )
    check_frozen(patch, tables_of(memories), verb)
    return memories


def check_frozen(patch: Patch, tables: Tables, verb: str) -> None:
    """Refuse memories whose parameters that the patch does not change are others than those it was trained with."""
    for layer in patch.rows:
        about = patch.metadata["layers"][str(layer)]
        kept = {kind: t for kind, t in tables[layer].items() if kind not in ("values", "anchor", *about["others"])}
        if tensors_hash(kept) != about["frozen"]:
            raise PatchError(
                f"cannot {verb}: query, keys, gate, out or scale of layer {layer} differ from those the patch was "
                "trained with (another healing?); load the adapter that it was trained on first"
            )
