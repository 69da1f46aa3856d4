"""The optimizer that updates only the chosen rows of each memory layer.

Shape letters: R rows read, t rows chosen in a layer, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import ranks, refusals, sharding
from .background import Background
from .errors import ConfigError, NotFiniteError, TrainingError
from .fingerprint import is_memory_parameter
from .gradient import parts_by_example, row_gradient
from .memory import Factors, Journal, ProductKeyMemory, memory_layers, unwrap
from .provenance import Parts, Writers, add_up
from .rows import RowStore, find, union
from .selection import ReadsKind, Rule, count_reads, find_rule, hub_share, score_rows, select_rows
from .shape import seeded
from .tokens import ExampleIds

UpdateKind = Literal["adam", "sgd", "masked-adam"]


@dataclass(repr=False)
class StepReport:
    """What the last step did.

    Args:
        step: counted from 1.
        rows: ids of the rows chosen in each layer, ascending.
        rows_read: how many rows each layer read.
        reads: how many reads (hits) each layer counted, over all micro-batches and ranks.
        hub_share: which share of each layer's hits fell on the one percent of its rows that were read most.
        grad_norm: norm over the chosen rows and the other trainable parameters, before clipping.
    """

    step: int
    rows: dict[int, Tensor]
    rows_read: dict[int, int]
    reads: dict[int, int]
    hub_share: dict[int, float]
    grad_norm: float

    def __repr__(self) -> str:
        rows = {layer: len(ids) for layer, ids in self.rows.items()}
        return f"StepReport(step={self.step}, rows={rows}, rows_read={self.rows_read}, grad_norm={self.grad_norm:.3g})"


class SparseMemoryOptimizer(torch.optim.Optimizer):
    """Updates, in each memory layer, the `rows_per_step` rows that a rule scores best on the step's reads.

    A step covers all backward passes since the last one, on all ranks. It needs no support from the training loop
    but calls of `step()`: HF Trainer (`optimizers=(optimizer, None)`), TRL, accelerate and plain loops work unchanged.
    Learning-rate schedulers act on its parameter groups: the first holds the memory rows, the second, if there is
    one, every other trainable parameter (AdamW). The optimizer clips by itself, by one norm over both; give Trainer
    `max_grad_norm=0`.

    Args:
        model: with memory layers attached, before or after DDP.
        background: from `read_background`; needed by the rules kl and tfidf.
        lr: learning rate of rows. Rows start at zero and write to hidden states as the MLP does, so rates are far
            larger than LoRA's, and depend on the base's scale: sweep from 0.01 upwards.
        rows_per_step: rows updated in a step and layer (t); all rows read, where fewer were.
        rule: "kl", "tfidf", "tf", "random", "all", or a function of the same signature as `smf.selection.kl`.
        reads: "hits" counts 1 a read; "gradient" counts weight times the norm of the token's gradient.
        update: "adam" and "sgd" move nothing but the chosen rows; "masked-adam" is the control of arXiv 2605.03229:
            AdamW on the whole table with the gradient of all other rows set to zero.
        select_every: "step" (all micro-batches together) or "micro" (each by itself, as in that paper's code).
        betas: of adam.
        eps: of adam.
        weight_decay: decoupled; of chosen rows ("masked-adam": of the whole table) and of other parameters.
        max_grad_norm: of the norm over chosen rows and other parameters; 0 or None: no clipping.
        lr_other: learning rate of the other trainable parameters; None: `lr`.
        seed: of the rule "random", and of the rounding of a bfloat16 table.
        adapter: whose memory; None for the active one.
        provenance: keep which examples wrote which rows, for `smf.save_patch`. Every batch then has `example_ids`
            beside its `input_ids`: whole numbers `[B]`, or `[B, S]` where examples are packed.

    A model set to train="memory" (healing) trains its table by the rule "all".

    Raises:
        ConfigError, BackgroundError: at construction, naming what does not fit.
        TrainingError: from `step`, when it would train nothing or something else than it says.
    """

    def __init__(
        self,
        model: nn.Module,
        background: Background | None = None,
        *,
        lr: float,
        rows_per_step: int = 512,
        rule: str | Rule = "kl",
        reads: ReadsKind = "hits",
        update: UpdateKind = "adam",
        select_every: Literal["step", "micro"] = "step",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
        lr_other: float | None = None,
        seed: int = 0,
        adapter: str | None = None,
        provenance: bool = False,
    ):
        refusals.check_model(model)
        sharding.refuse_deepspeed()
        sharding.refuse_wrappers(model)
        self.memories = memory_layers(model, adapter)
        refusals.check_memories(self.memories)
        refusals.check_rates(self.memories, lr=lr, lr_other=lr_other)
        refusals.check_numbers(
            rows_per_step,
            betas,
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            lr_other=lr_other,
        )
        refusals.check_names(
            reads=(reads, ("hits", "gradient")),
            update=(update, ("adam", "sgd", "masked-adam")),
            select_every=(select_every, ("step", "micro")),
        )
        if any(memory.tensor("keys").requires_grad for memory in self.memories.values()):
            refusals.check_healing(rule, background)
            rule = "all"
        self.rule, self.background = rule, background
        self._score = find_rule(rule)
        refusals.check_background(rule, background, self.memories)
        every_row = max(memory.shape.n_rows for memory in self.memories.values())
        self.rows_per_step = every_row if self._score is None else rows_per_step
        self.reads_kind: ReadsKind = reads
        self.update = update
        self.select_every, self.max_grad_norm, self.seed = select_every, max_grad_norm, seed
        self.steps = 0
        self.last_step: StepReport | None = None

        self._trained = {layer: _trained_ids(memory) for layer, memory in self.memories.items()}
        anchors = [memory.tensor("anchor") for memory in self.memories.values()]
        self._others = others = _other_parameters(model, self.memories)
        sharding.refuse_parts(self.memories, others)
        groups: list[dict[str, Any]] = [{"params": anchors, "lr": lr}]
        if others:
            groups.append({"params": others, "lr": lr if lr_other is None else lr_other})
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._other_adamw = torch.optim.AdamW(others, **options) if others else None
        tables = [memory.values for memory in self.memories.values()]
        self._table_adamw = torch.optim.AdamW(tables, **options) if update == "masked-adam" else None
        self._moments = {layer: _moments(memory.values) for layer, memory in self.memories.items()}
        refusals.check_provenance(provenance, update)
        self._writers = Writers(self.memories) if provenance else None
        ExampleIds.watch(unwrap(model), self.memories.values(), wanted=provenance)
        for memory in self.memories.values():
            memory.attach(self, _journal(memory, update == "masked-adam", self._writers))
        # GradScaler then tells `step` that it scaled the loss, so that the step can refuse: factors are never unscaled
        self._step_supports_amp_scaling = True

    # -- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Reads -> rule -> rows -> their gradient -> clip -> update; the pending factors are used up."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_wrong_use()
        factors = {layer: memory.take() for layer, memory in self.memories.items()}
        report = StepReport(self.steps + 1, {}, {}, {}, {}, 0.0)
        choices = {layer: self._choose(layer, report, factors.pop(layer)) for layer in self.memories}
        grads = {layer: grad_tD for layer, (grad_tD, _) in choices.items()}
        if sum(report.reads.values()) == 0:
            raise TrainingError(
                "step() found no reads: call backward() on a loss of the model in training mode (model.train()) "
                "before every step; zero_grad() drops what is pending"
            )
        report.grad_norm = self._clip(grads)
        self.steps, self.last_step = report.step, report
        self._update_rows(report.rows, grads, {layer: parts for layer, (_, parts) in choices.items()})
        if self._other_adamw is not None:
            self._follow_schedule(self._other_adamw, self.param_groups[1])
            self._other_adamw.step()
        return loss

    def _choose(self, layer: int, report: StepReport, factors: list[Factors]) -> tuple[Tensor, Parts]:
        """Choose the rows of one layer and note them in the report; return their gradient `[t, D]` and its parts."""
        memory = self.memories[layer]
        micro = self.select_every == "micro"
        if micro and not ranks.same_everywhere(len(factors)):
            raise TrainingError('select_every="micro" needs equally many micro-batches on every rank')
        groups = [[f] for f in factors] if micro else [factors]
        rows_read, chosen, grads, hubs, parts = [], [], [], [], []
        report.reads[layer] = 0
        for i, group in enumerate(groups):
            reads = ranks.sum_reads(count_reads(group, self.reads_kind, memory.values.device))
            report.reads[layer] += int(reads.hits_R.sum())
            if not bool(reads.c_R.isfinite().all()):
                raise NotFiniteError(self._not_finite("a gradient"))
            rows = reads.rows_R
            if self._score is not None and len(rows) > 0:
                generator = seeded("rule", self.seed, report.step, layer, i)
                scores_R = score_rows(self._score, reads, layer, self.background, memory.shape.n_rows, generator)
                rows = select_rows(reads, scores_R, self.rows_per_step)
            rows_read.append(reads.rows_R)
            hubs.append(hub_share(reads.hits_R, memory.shape.n_rows))
            chosen.append(rows)
            grads.append(row_gradient(group, rows, memory.values))
            if self._writers is not None:
                parts.append(ranks.sum_by_id(*add_up(*parts_by_example(group, rows, memory.values))))
        report.hub_share[layer] = sum(hubs) / max(1, len(hubs))
        report.rows_read[layer] = len(union(rows_read, memory.values.device))
        report.rows[layer] = rows = union(chosen, memory.values.device)
        grad_tD = grads[0] if len(grads) == 1 else row_gradient([], rows, memory.values)
        if len(grads) != 1:
            for ids, grad in zip(chosen, grads, strict=True):
                grad_tD[find(rows, ids)[0]] += grad  # ids are unique within a group
        ranks.mean_(grad_tD)
        return grad_tD, parts

    def _not_finite(self, what: str) -> str:
        return (
            f"{what} of step {self.steps + 1} is not finite; no row was changed. Check the loss of this batch, or "
            "lower the learning rate"
        )

    def _clip(self, grads: dict[int, Tensor]) -> float:
        """Scale all gradients by one factor; the norm is that of chosen rows and other parameters together."""
        norm = _norm(grads, self._others)
        if not ranks.same_everywhere(norm):  # DDP has averaged them; FSDP2 ignores them, and without either nobody has
            ranks.mean_gradients_(self._others)
            norm = _norm(grads, self._others)
        if norm != norm or norm == float("inf"):
            raise NotFiniteError(self._not_finite("the gradient norm"))
        if self.max_grad_norm and norm > self.max_grad_norm:
            for grad in [*grads.values(), *_gradients(self._others)]:
                grad.mul_(self.max_grad_norm / (norm + 1e-6))
        return norm

    def _update_rows(self, rows: dict[int, Tensor], grads: dict[int, Tensor], parts: dict[int, Parts]) -> None:
        for layer, memory in self.memories.items():
            self._moments[layer].to(memory.values.device)  # the model may have moved since the optimizer was made
            memory.note_old_rows(rows[layer])
            if self._table_adamw is not None:
                memory.values.grad = torch.zeros_like(memory.values)
                memory.values.grad[rows[layer]] = grads[layer].to(memory.values.dtype)
                continue
            old_tD, new_tD = self._update_layer(layer, memory, rows[layer], grads[layer])
            if self._writers is not None and parts[layer]:
                moved_t = (new_tD.double() - old_tD.double()).norm(dim=-1)
                self._writers.note(layer, rows[layer], moved_t, parts[layer])
        if self._table_adamw is not None:
            self._follow_schedule(self._table_adamw, self.param_groups[0])
            self._table_adamw.step()
            self._table_adamw.zero_grad(set_to_none=True)

    def _update_layer(
        self, layer: int, memory: ProductKeyMemory, rows_t: Tensor, grad_tD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Move the chosen rows of one layer; return them `[t, D]` as they were and as they are."""
        group = self.param_groups[0]
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        change_tD = grad_tD
        if self.update == "adam":
            moments = self._moments[layer]
            new = moments.missing(rows_t)
            zeros = grad_tD.new_zeros(len(new), grad_tD.shape[1])
            moments.add(new, exp_avg=zeros, exp_avg_sq=zeros, step=torch.zeros_like(new))
            slots = moments.slots(rows_t)
            step_t1 = moments.read("step", slots).unsqueeze(1) + 1  # the row's own count, for bias correction
            m_tD = moments.read("exp_avg", slots).lerp_(grad_tD, 1 - beta1)
            v_tD = moments.read("exp_avg_sq", slots).mul_(beta2).addcmul_(grad_tD, grad_tD, value=1 - beta2)
            moments.write("step", slots, step_t1.squeeze(1))
            moments.write("exp_avg", slots, m_tD)
            moments.write("exp_avg_sq", slots, v_tD)
            correction1, correction2 = 1 - beta1 ** step_t1.double(), 1 - beta2 ** step_t1.double()
            root_tD = v_tD.div_(correction2.to(v_tD.dtype)).sqrt_().add_(group["eps"])  # the store has its own v
            change_tD = m_tD.div_(correction1.to(m_tD.dtype)).div_(root_tD)
        old_tD = memory.values[rows_t]
        new_tD = old_tD.to(grad_tD.dtype) * (1 - lr * group["weight_decay"]) - lr * change_tD
        if memory.values.dtype == torch.bfloat16:
            new_tD = round_to_bfloat16(new_tD, seeded("round", self.seed, self.steps, layer))
        new_tD = new_tD.to(memory.values.dtype)
        memory.values.index_copy_(0, rows_t, new_tD)
        return old_tD, new_tD

    # -- bookkeeping --------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and drop the reads and factors that are pending."""
        super().zero_grad(set_to_none)
        for memory in self.memories.values():
            memory.drop()

    def _follow_schedule(self, inner: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        for inner_group in inner.param_groups:
            inner_group.update({name: value for name, value in group.items() if name != "params"})

    def _refuse_wrong_use(self) -> None:
        if hasattr(self, "found_inf"):
            delattr(self, "found_inf")
            raise TrainingError(
                "a GradScaler scaled the loss (fp16), but it cannot unscale the rows' gradient; train in bfloat16 "
                "instead: TrainingArguments(bf16=True) or torch.autocast(..., dtype=torch.bfloat16) without a scaler"
            )
        sharding.refuse_deepspeed()
        sharding.refuse_parts(self.memories, self._others)
        for layer, memory in self.memories.items():
            if not memory.belongs_to(self):
                raise TrainingError("another SparseMemoryOptimizer was made for this model later; step that one")
            if _trained_ids(memory) != self._trained[layer]:
                raise TrainingError(
                    f"what trains at layer {layer} changed after the optimizer was made (now {memory.trained_kinds}); "
                    "make a new SparseMemoryOptimizer after smf.set_train, set_adapter or loading an adapter"
                )

    def _made_for(self) -> dict[str, Any]:
        """What a state must fit: the update, and of each layer the table's size and what trains."""
        layers = {
            str(layer): {"table": list(memory.values.shape), "trains": memory.trained_kinds}
            for layer, memory in self.memories.items()
        }
        return {"update": self.update, "layers": layers}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical resume needs beside the model: tensors and plain values only."""
        layers = {}
        for layer, memory in self.memories.items():
            assert memory.journal is not None
            journal = memory.journal
            layers[str(layer)] = {
                "old_rows": journal.rows.state_dict(),
                "old_others": {kind: tensor.clone() for kind, tensor in journal.others.items()},
                "old_table": journal.table,
                "moments": self._moments[layer].state_dict(),
            }
        inner = {"others": self._other_adamw, "tables": self._table_adamw}
        return super().state_dict() | {
            "sparse_memory": {
                "steps": self.steps,
                "made_for": self._made_for(),
                "layers": layers,
                "writers": None if self._writers is None else self._writers.state_dict(),
                "inner": {name: adamw.state_dict() for name, adamw in inner.items() if adamw is not None},
            }
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict` of an optimizer made with the same model and options."""
        mine = state_dict.get("sparse_memory")
        if mine is None:
            raise ConfigError("this is not the state of a SparseMemoryOptimizer")
        if mine["made_for"] != self._made_for():
            raise ConfigError(f"the state was made for {mine['made_for']}; this optimizer is for {self._made_for()}")
        if (self._writers is None) != (mine.get("writers") is None):
            known = "knows no" if mine.get("writers") is None else "has"
            wanted = self._writers is None
            raise ConfigError(f"the state {known} provenance; go on with provenance={wanted}, or begin anew")
        super().load_state_dict(state_dict)
        self.steps = mine["steps"]
        for layer, memory in self.memories.items():
            state = mine["layers"][str(layer)]
            assert memory.journal is not None
            memory.journal.rows.load_state_dict(state["old_rows"])
            memory.journal.others = {k: v.to(memory.tensor(k)) for k, v in state["old_others"].items()}
            memory.journal.table = None if state["old_table"] is None else state["old_table"].to(memory.values)
            self._moments[layer].load_state_dict(state["moments"])
        if self._writers is not None:
            self._writers.load_state_dict(mine["writers"])
        for name, adamw in (("others", self._other_adamw), ("tables", self._table_adamw)):
            if adamw is not None:
                adamw.load_state_dict(copy.deepcopy(mine["inner"][name]))  # torch would share its tensors


def _other_parameters(model: nn.Module, memories: dict[int, ProductKeyMemory]) -> list[nn.Parameter]:
    """What trains beside the tables: not the anchors, and nothing of other adapters' memories."""
    kept = {id(t) for memory in memories.values() for t in memory.others().values()}
    foreign = {id(p) for name, p in model.named_parameters() if is_memory_parameter(name) and id(p) not in kept}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in foreign]


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _norm(grads: dict[int, Tensor], parameters: list[nn.Parameter]) -> float:
    return torch.stack([g.norm().double().cpu() for g in [*grads.values(), *_gradients(parameters)]]).norm().item()


def round_to_bfloat16(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 up or down at random so that the expected value is `x` (stochastic rounding)."""
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32).to(x.device)
    return ((x.float().view(torch.int32) + noise) & -(2**16)).view(torch.float32).to(torch.bfloat16)


def _trained_ids(memory: ProductKeyMemory) -> set[int]:
    """Which parameters of a memory train; replaced ones differ, since the optimizer keeps the old ones alive."""
    return {id(tensor) for tensor in map(memory.tensor, memory.kinds) if tensor.requires_grad}


def _moments(values_ND: Tensor) -> RowStore:
    dtype = torch.promote_types(values_ND.dtype, torch.float32)
    rows = torch.empty(0, values_ND.shape[1], dtype=dtype, device=values_ND.device)
    return RowStore(exp_avg=rows, exp_avg_sq=rows, step=torch.empty(0, dtype=torch.int64, device=values_ND.device))


def _journal(memory: ProductKeyMemory, whole_table: bool, writers: Writers | None) -> Journal:
    others = {kind: tensor.detach().clone() for kind, tensor in memory.others().items()}
    table = memory.values.detach().clone() if whole_table else None
    return Journal(RowStore(old=memory.values.detach()[:0]), others, table, writers)
