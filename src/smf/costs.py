"""What a method takes: bytes and FLOPs of a step, counted on its own model with tensors without numbers.

The passes are torch's own, on fake tensors: nothing is assumed of an architecture, and a model of any size can be
looked at anywhere. What an optimizer keeps, writes and exchanges is known from its numbers.
"""

from __future__ import annotations

import contextlib
import io
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from . import methods
from .adapter import set_train
from .data import Loaded
from .loss import MeanTokenLoss, summed_loss
from .memory import Journal, ProductKeyMemory, memory_layers
from .recipe import Method, Recipe
from .rows import RowStore

ROW_KEPT = 3  # vectors that an optimizer keeps of a row it has chosen: two moments and the old value
ROW_IDS = 40  # bytes of a chosen row's ids, their order and its step count
COUNTED = 2**17  # tokens of a micro-batch that are looked at, at most, but two sequences in any case
READ = 24  # bytes that a rank sends of a row it read: id, what the rule counts, hits
SUMMED = 4  # bytes of a number of a gradient that ranks add up
MOVES = ["lr", "lr_other", "replay", "rule", "reads", "update", "betas", "select_every", "rows_per_step", "provenance"]
MOVES += ["heal"]  # keys of a method that say how rows move, or what is read: its passes do without


@dataclass(frozen=True)
class Passes:
    """One forward and one backward pass of a micro-batch.

    Args:
        flops: of matrix products and row sums, of both passes.
        held: bytes beside the weights that are held at once, at most: activations, logits, gradients.
    """

    flops: float
    held: int


@dataclass(frozen=True)
class Costs:
    """One step of a method on one rank; bytes, but for `tokens` and `flops`.

    Args:
        tokens: of a step on a rank.
        flops: of a step on a rank.
        weights: of the base and what the method adds, the table included.
        table: of the memory's tables.
        factors: of the row gradient that a micro-batch leaves.
        passes: activations, logits and gradients, at most at once, and the factors of other micro-batches.
        states: of the optimizer at the end of the training, at most.
        checkpoint: on disk; two are kept while training.
        result: on disk at the end, and of it the patch or what else the method would pass on.
        patch: see above.
        exchanged: what a rank hands to the others in a step, at most.
        numbers: that AdamW moves in a step, but for rows.
        reads: of a step on a rank, over all layers.
    """

    tokens: int
    flops: float
    weights: int
    table: int
    factors: int
    passes: int
    states: int
    checkpoint: int
    result: int
    patch: int
    exchanged: int
    numbers: int
    reads: int

    @property
    def memory(self) -> int:
        """Bytes of a training at its most, without the process itself."""
        return self.weights + self.states + self.passes


# -- models without numbers -------------------------------------------------------------------------------------------


def skeleton(recipe: Recipe, config: Any) -> Any:
    """The base of a configuration, without its numbers."""
    with torch.device("meta"), _quiet():
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.dtype))


def model_of(recipe: Recipe, method: Method, config: Any) -> Any:
    """The base with what a method adds and trains, without numbers; None where nobody can say before it is made."""
    base = skeleton(recipe, config)
    if method.kind in methods.WITH_MEMORY:
        with fake(), _quiet():  # the memory is drawn on the CPU, whatever its size
            model = methods.attach(base, method, recipe)
        set_train(model, "memory" if method.kind == "healed" else method.train)
        return model.requires_grad_(False) if method.kind == "attached" else model
    with torch.device("meta"), _quiet():
        if method.kind in ("base", "full"):
            return base.requires_grad_(method.kind == "full")
        if method.kind in ("lora", "oft", "shira", "dense-addon"):
            make = methods.find_method(method.kind)
            if method.kind == "shira":  # draws where its numbers are; they are as many as LoRA's
                make, method = methods.lora, replace(method, options={})
            return make(base, method, recipe, Loaded(None, [], {}, [], [], [])).model
    return None


def fake() -> FakeTensorMode:
    """The mode in which tensors have sizes and no numbers, and take no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def _to_fake(model: nn.Module) -> None:
    """Put a fake tensor in the place of each parameter and buffer; what is shared stays shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            if id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                made[id(tensor)] = (
                    nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                )
            (module._parameters if name in module._parameters else module._buffers)[name] = made[id(tensor)]  # type: ignore[assignment]


def bytes_of(tensors: Iterator[Tensor]) -> int:
    """Of some tensors, each storage once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


# -- counting ---------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations make, while they live."""

    def __init__(self, known: Iterator[Tensor]):
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, made)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, which: int, size: int) -> None:
        self._known.discard(which)
        self.now -= size


def count_passes(model: Any, rows: int, length: int, times: int = 1) -> Passes:
    """What a micro-batch of `rows` sequences of `length` tokens takes, all of which are learned.

    Args:
        model: of `model_of`; it is used up.
        rows: sequences.
        length: tokens of each.
        times: micro-batches of a step, whose gradients add up.
    """
    with fake(), _quiet():
        _to_fake(model)
        model.train()
        taker = nn.Module()  # in place of an optimizer
        memories = memory_layers(model)
        for memory in memories.values():
            memory.attach(taker, Journal(RowStore(old=memory.values.detach()[:0]), {}))
        trains = any(p.requires_grad for p in model.parameters())
        ids = torch.empty(rows, length, dtype=torch.long)
        live = Live(tensor for tensors in (model.parameters(), model.buffers(), [ids]) for tensor in tensors)
        with (
            MeanTokenLoss(model) as loss_of,
            live,
            torch.set_grad_enabled(trains),
            FlopCounterMode(display=False) as counter,
        ):
            for _ in range(again := min(times, 2)):  # the second one finds gradients there; a third one finds no more
                loss = _loss(model, loss_of, ids)
                if trains:
                    loss.backward()
        flops = (
            counter.get_total_flops() / again + sum(_row_sum(memory) for memory in memories.values()) * rows * length
        )
        return Passes(float(flops), live.most)


def _loss(model: Any, loss_of: MeanTokenLoss, ids_BS: Tensor) -> Tensor:
    """Of all positions, as `MeanTokenLoss` takes those with labels."""
    logits_BSV, kept = model(input_ids=ids_BS).logits, loss_of.taken()
    if kept is not None:
        hidden_BSD, head, _ = kept
        return summed_loss(hidden_BSD[:, :-1].flatten(0, 1), head, ids_BS[:, 1:].flatten())
    where_2L = torch.zeros(2, ids_BS[:, 1:].numel(), dtype=torch.long)
    logits_LV = logits_BSV[:, :-1][where_2L[0], where_2L[1]]
    wide_LV = logits_LV.to(torch.promote_types(logits_LV.dtype, torch.float32))
    return F.cross_entropy(wide_LV, where_2L[0], reduction="none").sum()


def _row_sum(memory: ProductKeyMemory) -> int:
    """FLOPs of a token's weighted row sum, which torch's counter does not know."""
    return 2 * memory.shape.heads * memory.shape.knn * memory.shape.d


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries warn of where tensors have no numbers, and what attaching a memory prints."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# -- a method ---------------------------------------------------------------------------------------------------------


def costs_of(
    recipe: Recipe, method: Method, config: Any, steps: int, counted: dict[str, Passes] | None = None
) -> Costs | None:
    """What a method of a recipe takes on the base of a configuration, in a training of so many steps.

    Of rows that a rule chooses nobody knows how many are other ones in every step: the most that can be is counted.

    Args:
        counted: passes that were counted for this recipe and configuration, which are not counted again; new ones are
            added. Methods that differ in which rows they choose and how far these move have the same passes.
    """
    model = model_of(recipe, method, config)
    return None if model is None else _costs(recipe, method, config, model, steps, {} if counted is None else counted)


def _passes(recipe: Recipe, method: Method, config: Any, model: Any, times: int) -> Passes:
    """Of one micro-batch; of more sequences than can be looked at, the more by as much for each as for the last ones
    that are."""
    rows, length = recipe.train.micro_batch_size, recipe.train.max_length
    most = min(rows, max(2, COUNTED // length))
    passes = count_passes(model, most, length, times)
    if most == rows:
        return passes
    half = count_passes(model_of(recipe, method, config), most // 2, length, times)
    each = (passes.held - half.held) / (most - most // 2)
    return Passes(passes.flops * rows / most, passes.held + round(each * (rows - most)))


def _costs(recipe: Recipe, method: Method, config: Any, model: Any, steps: int, counted: dict[str, Passes]) -> Costs:
    train = recipe.train
    micro, tokens = train.micro_batch_size * train.max_length, train.batch_size * train.max_length
    healing, every = method.kind == "healed", method.kind == "healed" or method.rule == "all"
    memories = memory_layers(model) if method.kind == "smf" or healing else {}
    shapes = [memory.shape for memory in memories.values()]
    weights, table = bytes_of(model.parameters()), bytes_of(memory.values for memory in memories.values())
    added = bytes_of(p for n, p in model.named_parameters() if "sparse_memory_" in n and "anchor" not in n)
    dense = [p for n, p in model.named_parameters() if p.requires_grad and "sparse_memory_anchor" not in n]
    trained, numbers = bytes_of(iter(dense)), sum({id(p): p.numel() for p in dense}.values())
    factors = sum(micro * (s.heads * s.knn * (4 + s.dtype.itemsize) + s.d * s.dtype.itemsize) for s in shapes)
    read = [min(s.n_rows, tokens * s.heads * s.knn) for s in shapes]
    chosen = [r if every else min(r, method.rows_per_step) for r in read]
    ever = [min(s.n_rows, steps * t) for s, t in zip(shapes, chosen, strict=True)]
    row = [s.d * max(4, s.table_dtype.itemsize) for s in shapes]
    kept = sum(n * (ROW_KEPT * size + ROW_IDS) for n, size in zip(ever, row, strict=True))
    gradient = sum(t * size for t, size in zip(chosen, row, strict=True))
    if method.update == "masked-adam" and not healing:
        kept = 4 * table  # old table, two moments, a gradient
    kept += (added - table) if memories else 0  # whatever else the memory has, as it was
    patch = sum(n * (s.d * s.table_dtype.itemsize + 4) for n, s in zip(ever, shapes, strict=True)) + trained
    result = patch + added if memories else trained
    times = max(1, train.batch_size // train.micro_batch_size)
    made_by = repr([(name, value) for name, value in vars(method).items() if name not in MOVES])
    if made_by not in counted:
        counted[made_by] = _passes(recipe, method, config, model, times)
    passes = counted[made_by]
    return Costs(
        tokens=tokens,
        flops=times * passes.flops + sum(2 * tokens * s.heads * s.knn * s.d for s in shapes),
        weights=weights,
        table=table,
        factors=factors,
        passes=passes.held + max(0, times - 2) * factors + 2 * gradient,
        states=kept + 2 * trained,
        checkpoint=patch + kept + 2 * trained,
        result=result,
        patch=patch,
        exchanged=sum(n * READ for n in read) + gradient + numbers * SUMMED,
        numbers=numbers,
        reads=sum(tokens * s.heads * s.knn for s in shapes),
    )
