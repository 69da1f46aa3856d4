"""The step: which rows move and by how much, against per-row formulas and dense optimizers written out by hand."""

from __future__ import annotations

import copy
import gc
import io
import math
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import smf
from conftest import batch, tiny_base, tiny_config, tiny_model
from dense import DenseMemory, dense_twin, double_model, gradients, padded, with_labels
from smf.optimizer import round_to_bfloat16
from smf.shape import seeded

LAYERS = (1, 2)
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
Tables = dict[int, Tensor]


def data(step: int) -> dict[str, Tensor]:
    """Another batch each step, of unequal documents."""
    return with_labels(padded(seed=step))


def tables(model: PeftModel) -> Tables:
    return {layer: memory.values.detach().clone() for layer, memory in smf.memory_layers(model).items()}


def optimizer_of(model: PeftModel, **options: object) -> smf.SparseMemoryOptimizer:
    model.train()
    return smf.SparseMemoryOptimizer(model, **({"lr": 0.01, "rows_per_step": 20, "rule": "tf"} | options))


def step(model: PeftModel, optimizer: smf.SparseMemoryOptimizer, number: int) -> dict[int, Tensor]:
    """One step on batch `number`; returns the rows chosen."""
    model(**data(number)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.last_step is not None
    return optimizer.last_step.rows


def moved(before: Tensor, after: Tensor) -> set[int]:
    """Rows that differ in any bit."""
    assert before.shape == after.shape
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[before.element_size()]
    return set((before.view(bits) != after.view(bits)).any(1).nonzero().flatten().tolist())


def close(one: Tensor, two: Tensor, tolerance: float = 1e-10) -> bool:
    return torch.allclose(one, two, rtol=tolerance, atol=tolerance)


# -- what moves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.002])
@pytest.mark.parametrize("update", ["adam", "sgd"])
@pytest.mark.parametrize("table_dtype", ["float32", "bfloat16"])
def test_a_step_moves_the_chosen_rows_and_no_other(update, weight_decay, table_dtype):
    t, lr = 5, 0.1 if update == "adam" else 100.0  # gradients are small at scale .01
    model = tiny_model(init="paper", table_dtype=table_dtype)
    optimizer = optimizer_of(model, update=update, weight_decay=weight_decay, rows_per_step=t, lr=lr)
    start, ever = tables(model), {layer: set() for layer in LAYERS}
    for number in range(10):
        before = tables(model)
        rows = step(model, optimizer, number)
        for layer, after in tables(model).items():
            chosen = set(rows[layer].tolist())
            assert len(chosen) == t
            assert moved(before[layer], after) <= chosen
            ever[layer] |= chosen
    for layer, after in tables(model).items():
        assert moved(start[layer], after) == ever[layer]
        assert t < len(ever[layer]) < 10 * t, "rows came and went"


def test_nothing_but_the_table_moves_when_rows_train():
    model = tiny_model(init="paper")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items() if "values" not in name}
    optimizer = optimizer_of(model, weight_decay=0.3)
    for number in range(3):
        step(model, optimizer, number)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in start.items())


def test_fewer_rows_read_than_allowed_are_all_updated():
    model = tiny_model()
    optimizer = optimizer_of(model, rows_per_step=10_000)
    rows = step(model, optimizer, 0)
    assert optimizer.last_step.rows_read == {layer: len(ids) for layer, ids in rows.items()}
    assert all(0 < len(ids) < 256 for ids in rows.values())


# -- by how much: each row alone --------------------------------------------------------------------------------------


class HandAdam:
    """Adam row by row, each with a step count of its own."""

    def __init__(self, lr: float, weight_decay: float = 0.0):
        self.lr, self.weight_decay, self.state = lr, weight_decay, {}

    def update(self, key: tuple[int, int], row: Tensor, grad: Tensor) -> Tensor:
        m, v, n = self.state.get(key, (torch.zeros_like(row), torch.zeros_like(row), 0))
        m, v, n = BETA1 * m + (1 - BETA1) * grad, BETA2 * v + (1 - BETA2) * grad**2, n + 1
        self.state[key] = m, v, n
        change = (m / (1 - BETA1**n)) / ((v / (1 - BETA2**n)).sqrt() + EPS)
        return row - self.lr * self.weight_decay * row - self.lr * change


class HandSGD(HandAdam):
    """The plain gradient step."""

    def update(self, key: tuple[int, int], row: Tensor, grad: Tensor) -> Tensor:
        return row - self.lr * self.weight_decay * row - self.lr * grad


@torch.no_grad()
def update_twin(dense: dict[int, DenseMemory], rows: dict[int, Tensor], grads: Tables, hand: HandAdam) -> None:
    for layer, memory in dense.items():
        for row in rows[layer].tolist():
            memory.values[row] = hand.update((layer, row), memory.values[row].clone(), grads[layer][row])


@pytest.mark.parametrize("weight_decay", [0.0, 0.002])
@pytest.mark.parametrize(("update", "hand"), [("adam", HandAdam), ("sgd", HandSGD)])
def test_rows_follow_the_formula_of_each_row_alone(update, hand, weight_decay):
    model = double_model(init="paper")
    twin, dense = dense_twin(model)
    lr = 0.05 if update == "adam" else 50.0
    optimizer = optimizer_of(model, update=update, weight_decay=weight_decay, max_grad_norm=0, lr=lr)
    by_hand = hand(lr, weight_decay)
    for number in range(6):
        rows = step(model, optimizer, number)
        update_twin(dense, rows, gradients(twin, dense, data(number)), by_hand)
    for layer, table in tables(model).items():
        assert close(table, dense[layer].values)
        assert not close(table, model_start(layer), 1e-4)
    if update == "adam":
        assert len({n for _, _, n in by_hand.state.values()}) > 1, "rows have counts of their own"


def model_start(layer: int) -> Tensor:
    return tables(double_model(init="paper"))[layer]


def test_a_schedule_acts_on_rows():
    model = double_model(init="paper")
    twin, dense = dense_twin(model)
    optimizer = optimizer_of(model, update="sgd", max_grad_norm=None, lr=0.08)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for number in range(3):
        rows = step(model, optimizer, number)
        update_twin(dense, rows, gradients(twin, dense, data(number)), HandSGD(0.08 * 0.5**number))
        schedule.step()
    assert all(close(table, dense[layer].values) for layer, table in tables(model).items())


# -- clipping and other parameters ------------------------------------------------------------------------------------


def chosen_norm(rows: dict[int, Tensor], grads: Tables, others: list[Tensor]) -> float:
    squares = [float((grads[layer][ids] ** 2).sum()) for layer, ids in rows.items()]
    return math.sqrt(sum(squares) + sum(float((grad**2).sum()) for grad in others))


@pytest.mark.parametrize("part", [0.1, 10.0])
def test_one_norm_over_chosen_rows_and_scale_clips_both(part):
    model = double_model(init="paper", train="rows+scale")
    twin, dense = dense_twin(model)
    grads = gradients(twin, dense, data(0))
    scales = [dense[layer].scale.grad for layer in LAYERS]
    probe = copy.deepcopy(model)
    norm = chosen_norm(step(probe, optimizer_of(probe), 0), grads, scales)
    optimizer = optimizer_of(model, update="sgd", lr=1.0, max_grad_norm=part * norm)
    model(**data(0)).loss.backward()
    optimizer.step()
    factor = min(1.0, part * norm / (norm + 1e-6))
    assert optimizer.last_step.grad_norm == pytest.approx(norm, rel=1e-12)
    update_twin(dense, optimizer.last_step.rows, {x: factor * grad for x, grad in grads.items()}, HandSGD(1.0))
    for layer, memory in smf.memory_layers(model).items():
        assert close(memory.values, dense[layer].values)
        assert close(memory.tensor("scale").grad, factor * dense[layer].scale.grad, 1e-12)


@pytest.mark.parametrize("max_grad_norm", [0, None])
def test_no_clipping_still_reports_the_norm(max_grad_norm):
    model = double_model(init="paper")
    twin, dense = dense_twin(model)
    grads = gradients(twin, dense, data(0))
    optimizer = optimizer_of(model, max_grad_norm=max_grad_norm)
    rows = step(model, optimizer, 0)
    assert optimizer.last_step.grad_norm == pytest.approx(chosen_norm(rows, grads, []), rel=1e-12)


def test_scale_trains_by_adamw_at_its_own_learning_rate():
    model = double_model(init="paper", train="rows+scale")
    twin, dense = dense_twin(model)
    optimizer = optimizer_of(model, update="sgd", lr=0.05, lr_other=0.003, weight_decay=0.1, max_grad_norm=0)
    adamw = torch.optim.AdamW([dense[layer].scale for layer in LAYERS], lr=0.003, weight_decay=0.1)
    for number in range(5):
        rows = step(model, optimizer, number)
        grads = gradients(twin, dense, data(number))
        update_twin(dense, rows, grads, HandSGD(0.05, 0.1))
        adamw.step()
    for layer, memory in smf.memory_layers(model).items():
        assert close(memory.tensor("scale"), dense[layer].scale)
        assert abs(memory.tensor("scale").item() - 0.01) > 0.001
        assert close(memory.values, dense[layer].values)


def test_a_schedule_of_betas_and_rate_acts_on_scale_too():
    model = double_model(init="paper", train="rows+scale")
    twin, dense = dense_twin(model)
    optimizer = optimizer_of(model, update="sgd", max_grad_norm=0)
    adamw = torch.optim.AdamW([dense[layer].scale for layer in LAYERS], lr=0.01, weight_decay=0)
    cycles = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=5, base_momentum=0.5)
        for o in (optimizer, adamw)
    ]
    for number in range(4):
        rate = optimizer.param_groups[0]["lr"]
        rows = step(model, optimizer, number)
        update_twin(dense, rows, gradients(twin, dense, data(number)), HandSGD(rate))
        adamw.step()
        for cycle in cycles:
            cycle.step()
    assert all(close(m.tensor("scale"), dense[layer].scale) for layer, m in smf.memory_layers(model).items())


def test_another_trainable_parameter_of_the_base_trains_too():
    model = tiny_model()
    head = model.get_output_embeddings().weight.requires_grad_(True)
    start = head.detach().clone()
    step(model, optimizer_of(model, lr_other=0.001), 0)
    assert 0 < (head - start).abs().max() < 0.0011


# -- masked-adam ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("rule", ["tf", "all"])
def test_masked_adam_is_adamw_on_the_whole_table_with_masked_gradients(rule, weight_decay):
    model = double_model(init="paper")
    twin, dense = dense_twin(model)
    optimizer = optimizer_of(
        model, update="masked-adam", rule=rule, weight_decay=weight_decay, max_grad_norm=0, betas=(0.8, 0.95)
    )
    values = [dense[layer].values for layer in LAYERS]
    adamw = torch.optim.AdamW(values, lr=0.01, betas=(0.8, 0.95), weight_decay=weight_decay)
    for number in range(6):
        rows = step(model, optimizer, number)
        gradients(twin, dense, data(number))
        for layer in LAYERS if rule == "tf" else ():  # with rule all it is dense AdamW as it stands
            masked = torch.ones(256, dtype=torch.bool)
            masked[rows[layer]] = False
            dense[layer].values.grad[masked] = 0
        adamw.step()
    for layer, table in tables(model).items():
        assert close(table, dense[layer].values, 1e-9)
        assert not close(table, model_start(layer), 1e-3)


def most_read_then_highest() -> Callable[..., Tensor]:
    """A rule that scores the most read row best in the first step, the highest id ever after."""
    calls = []

    def rule(c_R, b_R, df_R, **_):
        calls.append(len(c_R))
        return c_R if len(calls) == 1 else torch.arange(len(c_R))

    return rule


def drift(update: str, steps: int = 8, lr: float = 0.01) -> tuple[Tensor, Tensor]:
    """Where a row is that is chosen in the first step alone, after each step `[steps, D]`, and its gradient."""
    model = double_model(layers=[2])
    twin, dense = dense_twin(model)
    rule = most_read_then_highest()
    optimizer = optimizer_of(model, update=update, rule=rule, rows_per_step=1, max_grad_norm=0, lr=lr)
    row = int(step(model, optimizer, 0)[2])
    places = [tables(model)[2][row]]
    for number in range(1, steps):
        assert int(step(model, optimizer, number)[2]) != row
        places.append(tables(model)[2][row])
    return torch.stack(places), gradients(twin, dense, data(0))[2][row]


def test_masked_adam_lets_a_row_drift_by_its_closed_form():
    lr, (places, grad) = 0.01, drift("masked-adam")
    expected, position = [], torch.zeros_like(grad)
    for k in range(1, len(places) + 1):
        m_hat = BETA1 ** (k - 1) * (1 - BETA1) * grad / (1 - BETA1**k)
        v_hat = BETA2 ** (k - 1) * (1 - BETA2) * grad**2 / (1 - BETA2**k)
        position = position - lr * m_hat / (v_hat.sqrt() + EPS)
        expected.append(position)
    assert close(places, torch.stack(expected), 1e-9)
    assert places[-1].norm() > 3 * places[0].norm(), "most of its way it drifts"


@pytest.mark.parametrize("update", ["adam", "sgd"])
def test_without_the_mask_a_row_chosen_once_stays_where_it_was_put(update):
    places, _ = drift(update)
    assert places[0].norm() > 0
    assert all(torch.equal(place, places[0]) for place in places)


# -- healing ----------------------------------------------------------------------------------------------------------


def test_healing_trains_the_whole_memory_and_every_row_read():
    model = double_model(init="paper")
    smf.set_train(model, "memory")
    twin, dense = dense_twin(model)
    model.train()
    optimizer = smf.SparseMemoryOptimizer(model, lr=0.02, lr_other=0.003, rows_per_step=1, max_grad_norm=0)
    kinds = ("query_weight", "query_bias", "keys", "gate", "out", "scale")
    others = [getattr(dense[layer], kind) for layer in LAYERS for kind in kinds]
    adamw, by_hand = torch.optim.AdamW(others, lr=0.003, weight_decay=0), HandAdam(0.02)
    start = copy.deepcopy(dense)
    for number in range(4):
        rows = step(model, optimizer, number)
        grads = gradients(twin, dense, data(number))
        reads = {layer: dense[layer].reads(data(number)["attention_mask"]) for layer in LAYERS}
        assert {layer: ids.tolist() for layer, ids in rows.items()} == {x: sorted(reads[x]) for x in LAYERS}
        update_twin(dense, rows, grads, by_hand)
        adamw.step()
    for layer, memory in smf.memory_layers(model).items():
        for kind in (*kinds, "values"):
            assert close(memory.tensor(kind), getattr(dense[layer], kind), 1e-9), kind
            assert not close(memory.tensor(kind), getattr(start[layer], kind), 1e-4), kind


def test_healing_of_a_zero_table_starts_with_its_rows():
    model = double_model(train="memory")
    optimizer = optimizer_of(model, rule="all")
    before = {kind: tensor.clone() for kind, tensor in smf.memory_layers(model)[1].others().items()}
    for number in range(2):
        step(model, optimizer, number)
    after = smf.memory_layers(model)[1].others()
    assert not [kind for kind in before if torch.equal(before[kind], after[kind])]


@pytest.mark.parametrize("options", [{"rule": "tf"}, {"rule": "random"}, {"rule": lambda c_R, *_, **__: c_R}])
def test_healing_refuses_another_rule(options):
    with pytest.raises(smf.ConfigError, match=r'healing.*rule="all".*set_train'):
        optimizer_of(tiny_model(train="memory"), **options)


def test_healing_refuses_a_background():
    model = tiny_model(train="memory")
    background = smf.read_background(model, [padded()])
    with pytest.raises(smf.ConfigError, match="rule='kl' and a background"):
        smf.SparseMemoryOptimizer(model, background, lr=0.1)
    assert smf.SparseMemoryOptimizer(model, background, lr=0.1, rule="all").rule == "all"


@pytest.mark.parametrize(
    ("before", "after"),
    [("rows", "rows+scale"), ("rows", "memory"), ("rows+scale", "rows"), ("memory", "rows"), ("memory", "rows+scale")],
)
def test_set_train_after_the_optimizer_was_made_is_refused(before, after):
    model = tiny_model(init="paper", train=before)
    optimizer = optimizer_of(model, rule="all")
    step(model, optimizer, 0)
    start = tables(model)
    smf.set_train(model, after)
    with pytest.raises(smf.TrainingError, match=r"changed after the optimizer was made.*make a new"):
        step(model, optimizer, 1)
    assert not any(moved(start[layer], table) for layer, table in tables(model).items())
    step(model, optimizer_of(model, rule="all"), 1)
    assert all(moved(start[layer], table) for layer, table in tables(model).items())


def test_a_frozen_adapter_is_refused():
    model = tiny_model()
    model.add_adapter("other", tiny_config())
    model.set_adapter("other")
    with pytest.raises(smf.ConfigError, match="frozen"):
        optimizer_of(model, adapter="default")


# -- what a step needs ------------------------------------------------------------------------------------------------


def test_a_step_without_reads_raises():
    optimizer = optimizer_of(tiny_model())
    with pytest.raises(smf.TrainingError, match="no reads"):
        optimizer.step()


def test_a_step_uses_up_what_was_pending():
    model = tiny_model()
    optimizer = optimizer_of(model)
    step(model, optimizer, 0)
    with pytest.raises(smf.TrainingError, match="no reads"):
        optimizer.step()


def test_zero_grad_drops_what_is_pending():
    model, alone = double_model(), double_model()
    optimizer = optimizer_of(model)
    model(**data(0)).loss.backward()
    optimizer.zero_grad()
    with pytest.raises(smf.TrainingError, match="no reads"):
        optimizer.step()
    model(**data(0)).loss.backward()
    optimizer.zero_grad()
    rows, expected = step(model, optimizer, 1), step(alone, optimizer_of(alone), 1)
    for layer in LAYERS:
        assert torch.equal(rows[layer], expected[layer])
        assert torch.equal(tables(model)[layer], tables(alone)[layer])


def test_evaluation_mode_counts_no_reads():
    model = tiny_model()
    optimizer = optimizer_of(model)
    model.eval()
    model(**data(0)).loss.backward()
    with pytest.raises(smf.TrainingError, match="no reads"):
        optimizer.step()


def test_a_forward_pass_without_backward_counts_no_reads():
    model = tiny_model()
    optimizer = optimizer_of(model)
    model(**data(0))
    with torch.no_grad():
        model(**data(1))
    with pytest.raises(smf.TrainingError, match="no reads"):
        optimizer.step()
    step(model, optimizer, 0)
    assert set(optimizer.last_step.reads.values()) == {int(data(0)["attention_mask"].sum()) * 8}


def test_a_closure_is_called_with_gradients_on():
    model = tiny_model()
    optimizer = optimizer_of(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(**data(0)).loss
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert optimizer.last_step.step == 1


def test_backward_without_an_optimizer_raises():
    model = tiny_model()
    model.train()
    with pytest.raises(smf.TrainingError, match="no SparseMemoryOptimizer"):
        model(**data(0)).loss.backward()


def test_backward_after_the_optimizer_is_gone_raises():
    model = tiny_model()
    optimizer = optimizer_of(model)
    step(model, optimizer, 0)
    del optimizer
    gc.collect()
    with pytest.raises(smf.TrainingError, match="no SparseMemoryOptimizer"):
        model(**data(0)).loss.backward()


def test_a_second_optimizer_takes_over():
    model = tiny_model()
    first = optimizer_of(model)
    model(**data(0)).loss.backward()
    second = optimizer_of(model)
    with pytest.raises(smf.TrainingError, match="no reads"):
        second.step()
    model(**data(0)).loss.backward()
    with pytest.raises(smf.TrainingError, match="another SparseMemoryOptimizer"):
        first.step()
    second.step()
    assert second.last_step.step == 1


@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_is_refused_by_naming_bfloat16(unscale):
    model = tiny_model()
    optimizer, scaler, start = optimizer_of(model), torch.amp.GradScaler("cpu", init_scale=128.0), tables(model)
    scaler.scale(model(**data(0)).loss).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(smf.TrainingError, match="bfloat16"):
        scaler.step(optimizer)
    assert not any(moved(start[layer], table) for layer, table in tables(model).items())


def test_a_disabled_grad_scaler_is_nothing_to_refuse():
    model = tiny_model()
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(model(**data(0)).loss).backward()
    scaler.step(optimizer)
    assert optimizer.last_step.step == 1


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e30])  # of the last the gradient's norm
@pytest.mark.parametrize("reads", ["hits", "gradient"])
@pytest.mark.parametrize("train", ["rows", "rows+scale"])
def test_a_loss_that_is_not_finite_changes_nothing(reads, factor, train):
    model = tiny_model(init="paper", train=train)
    optimizer = optimizer_of(model, reads=reads)
    step(model, optimizer, 0)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = optimizer.state_dict()
    (model(**data(1)).loss * factor).backward()
    with pytest.raises(smf.TrainingError, match="step 2 is not finite; no row was changed"):
        optimizer.step()
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())
    assert same(optimizer.state_dict(), moments)
    optimizer.zero_grad()
    step(model, optimizer, 1)
    assert optimizer.last_step.step == 2


# -- resume -----------------------------------------------------------------------------------------------------------


def same(one: object, two: object) -> bool:
    """Equal to the last bit, through dicts and lists."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


RESUMED = {
    "adam": {"update": "adam"},
    "sgd": {"update": "sgd"},
    "masked-adam": {"update": "masked-adam"},
    "random rule": {"rule": "random", "update": "adam"},
    "rows+scale": {"train": "rows+scale", "lr_other": 0.003},
    "healing": {"train": "memory", "rule": "all", "lr_other": 0.003},
    "bfloat16 table": {"table_dtype": "bfloat16"},
}


@pytest.mark.parametrize("through_a_file", [False, True])
@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bit_identical(name, through_a_file):
    options = dict(RESUMED[name]) | {"weight_decay": 0.01}
    config = {"init": "paper"} | {key: options.pop(key) for key in ("train", "table_dtype") if key in options}
    model = tiny_model(**config)
    optimizer = optimizer_of(model, **options)
    for number in range(3):
        step(model, optimizer, number)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if through_a_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    resumed = tiny_model(**config)
    resumed.load_state_dict(saved["model"])
    again = optimizer_of(resumed, **(options | {"lr": 123.0}))  # the rate comes back with the state
    again.load_state_dict(saved["optimizer"])
    for number in range(3, 7):  # both go on, side by side: they share nothing
        rows, rows_again = step(model, optimizer, number), step(resumed, again, number)
        assert same(rows, rows_again)
    assert same(model.state_dict(), resumed.state_dict())
    assert same(optimizer.state_dict(), again.state_dict())
    assert again.last_step.step == 7


def test_the_state_keeps_each_rows_old_value_through_a_resume():
    model = tiny_model(init="paper")
    start, optimizer = tables(model), optimizer_of(model)
    chosen = [step(model, optimizer, number) for number in range(2)]
    resumed = tiny_model(init="paper")
    resumed.load_state_dict(model.state_dict())
    again = optimizer_of(resumed)
    again.load_state_dict(optimizer.state_dict())
    chosen.append(step(resumed, again, 2))
    for layer, state in again.state_dict()["sparse_memory"]["layers"].items():
        old = state["old_rows"]
        ever = set(torch.cat([rows[int(layer)] for rows in chosen]).tolist())
        assert set(old["ids"].tolist()) == ever
        assert len(old["ids"]) == len(ever)
        assert torch.equal(old["old"], start[int(layer)][old["ids"]])


def test_row_states_exist_only_for_rows_ever_chosen():
    model = tiny_model()
    optimizer = optimizer_of(model, rows_per_step=3)
    chosen = [step(model, optimizer, number) for number in range(2)]
    for layer, state in optimizer.state_dict()["sparse_memory"]["layers"].items():
        ever = sorted(set(torch.cat([rows[int(layer)] for rows in chosen]).tolist()))
        assert sorted(state["moments"]["ids"].tolist()) == ever
        assert state["moments"]["exp_avg"].shape == state["moments"]["exp_avg_sq"].shape == (len(ever), 32)
        assert int(state["moments"]["step"].sum()) == 6


def test_a_foreign_state_is_refused():
    optimizer = optimizer_of(tiny_model())
    with pytest.raises(smf.ConfigError, match="not the state of a SparseMemoryOptimizer"):
        optimizer.load_state_dict(torch.optim.SGD([torch.zeros(1)], lr=0.1).state_dict())
    with pytest.raises(smf.ConfigError, match=r"'update': 'sgd'.*'update': 'adam'"):
        optimizer.load_state_dict(optimizer_of(tiny_model(), update="sgd").state_dict())
    with pytest.raises(smf.ConfigError, match="layers"):
        optimizer.load_state_dict(optimizer_of(tiny_model(layers=[1, 3])).state_dict())
    with pytest.raises(smf.ConfigError, match=r"'table': \[64, 32\].*'table': \[256, 32\]"):
        optimizer.load_state_dict(optimizer_of(tiny_model(n_keys=8)).state_dict())
    with pytest.raises(smf.ConfigError, match=r"'trains': \['scale', 'anchor'\]"):
        optimizer.load_state_dict(optimizer_of(tiny_model(train="rows+scale")).state_dict())


def test_what_is_no_model_and_no_number_is_refused_by_name():
    with pytest.raises(smf.ConfigError, match="takes the model itself"):
        smf.SparseMemoryOptimizer(tiny_model().parameters(), lr=0.1, rule="tf")
    for options in ({"lr": "1e-2"}, {"lr": 0.1, "betas": None}, {"lr": float("nan")}, {"lr": 0.1, "eps": -1.0}):
        with pytest.raises(smf.ConfigError, match=r"lr|betas|eps"):
            smf.SparseMemoryOptimizer(tiny_model(), rule="tf", **options)


def test_memory_that_lost_precision_by_a_cast_is_refused():
    with pytest.raises(smf.ConfigError, match=r"attached in torch.float32 and cast to torch.bfloat16"):
        optimizer_of(tiny_model().bfloat16())


def test_optimizers_of_two_active_adapters_share_no_parameter():
    model = tiny_model(train="rows+scale")
    model.add_adapter("b", tiny_config(train="rows+scale", seed=1))
    model.base_model.set_adapter(["default", "b"])
    groups = [optimizer_of(model, adapter=name).param_groups for name in ("default", "b")]
    ids = [{id(p) for group in g for p in group["params"]} for g in groups]
    assert not ids[0] & ids[1]
    assert len(ids[0]) == len(ids[1]) == 4


def test_float16_autocast_is_refused_before_anything_trains():
    model = tiny_model()
    optimizer_of(model)
    model.train()
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(smf.TrainingError, match="bfloat16"):
        model(**batch())


# -- select_every -----------------------------------------------------------------------------------------------------


def test_micro_selection_equals_a_hand_computation():
    t, micro_batches, lr = 5, 3, 0.1
    model = double_model(init="paper")
    twin, dense = dense_twin(model)
    optimizer = optimizer_of(model, select_every="micro", rows_per_step=t, update="sgd", lr=lr, max_grad_norm=0)
    expected = {layer: dense[layer].values.detach().clone() for layer in LAYERS}
    chosen: dict[int, set[int]] = {layer: set() for layer in LAYERS}
    for number in range(micro_batches):
        model(**data(number)).loss.backward()
        grads = gradients(twin, dense, data(number))
        for layer in LAYERS:
            counts = dense[layer].reads(data(number)["attention_mask"])
            best = sorted(counts, key=lambda row: (-counts[row], row))[:t]
            expected[layer][best] -= lr * grads[layer][best]
            chosen[layer] |= set(best)
    optimizer.step()
    for layer, table in tables(model).items():
        assert optimizer.last_step.rows[layer].tolist() == sorted(chosen[layer])
        assert t < len(chosen[layer]) <= micro_batches * t
        assert close(table, expected[layer])


@pytest.mark.parametrize("select_every", ["step", "micro"])
def test_one_micro_batch_is_the_same_either_way(select_every):
    model, whole = double_model(), double_model()
    rows = step(model, optimizer_of(model, select_every=select_every), 0)
    assert same(rows, step(whole, optimizer_of(whole), 0))
    assert same(tables(model), tables(whole))


# -- bfloat16 tables --------------------------------------------------------------------------------------------------


def bfloat16_tables(seed: int = 0) -> Tables:
    model = tiny_model(table_dtype="bfloat16", init="paper")
    optimizer = optimizer_of(model, seed=seed, lr=1e-3)
    for number in range(4):
        step(model, optimizer, number)
    return tables(model)


def test_a_bfloat16_table_rounds_by_its_seed_alone():
    first = bfloat16_tables()
    torch.manual_seed(123)
    assert same(bfloat16_tables(), first)
    assert not same(bfloat16_tables(seed=1), first)
    assert {table.dtype for table in first.values()} == {torch.bfloat16}


def test_a_bfloat16_table_learns_steps_too_small_for_its_precision():
    model = tiny_model(table_dtype="bfloat16", init="paper")
    start = tables(model)
    optimizer = optimizer_of(model, lr=1e-4, rule="all")
    exact = tiny_model(init="paper")
    exact.load_state_dict(model.state_dict())  # the same rows, in float32
    exact_optimizer = optimizer_of(exact, lr=1e-4, rule="all")
    for _ in range(20):
        step(model, optimizer, 0)
        step(exact, exact_optimizer, 0)
    for layer in LAYERS:
        way = (tables(exact)[layer] - start[layer].float()).flatten()
        rounded = (tables(model)[layer].float() - start[layer].float()).flatten()
        assert float(rounded @ way / (way @ way)) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("value", [1.0 + 2**-10, -1.0 - 3 * 2**-10, 3e-5, -7e10])
def test_stochastic_rounding_goes_to_a_neighbour_and_is_unbiased(value):
    draws = 40_000
    rounded = round_to_bfloat16(torch.full((draws,), value), seeded("test", value)).double()
    exact = float(torch.tensor(value))
    low, high = sorted(set(rounded.tolist()))
    assert low < exact < high
    assert high - low <= abs(exact) * 2**-7
    up = (exact - low) / (high - low)
    deviation = math.sqrt(up * (1 - up) / draws) * (high - low)
    assert float(rounded.mean()) == pytest.approx(exact, abs=5 * deviation)


def test_stochastic_rounding_keeps_what_bfloat16_can_hold():
    exact = torch.randn(1000, generator=seeded("test")).to(torch.bfloat16)
    assert torch.equal(round_to_bfloat16(exact.float(), seeded(1)), exact)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"rows_per_step": 0}, "rows_per_step must be a whole number of at least 1; got 0"),
        ({"rows_per_step": -3}, "got -3"),
        ({"rows_per_step": 2.5}, "got 2.5"),
        ({"rows_per_step": True}, "got True"),
        ({"lr": -0.1}, "lr must be a finite number of at least 0; got -0.1"),
        ({"lr": 1e39}, r"lr must be at most 3.4e\+38, the largest number of torch.float32; got 1e\+39"),
        ({"lr": 0.1, "lr_other": 1e39}, r"lr_other must be at most 3.4e\+38"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": math.inf}, "lr must be"),
        ({"lr_other": -1.0}, "lr_other must be"),
        ({"eps": -1.0}, "eps must be"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be"),
        ({"reads": "tokens"}, "reads='tokens' is not known.*'hits', 'gradient'"),
        ({"update": "adamw"}, "update='adamw' is not known.*'adam', 'sgd', 'masked-adam'"),
        ({"select_every": "epoch"}, "select_every='epoch' is not known.*'step', 'micro'"),
        ({"rule": "KL"}, "rule='KL' is not known"),
        ({"rule": None}, "rule=None is not known"),
        ({"betas": (0.9, 1.0)}, "betas must"),
        ({"betas": (-0.1, 0.9)}, "betas must"),
        ({"betas": (0.9,)}, "betas must"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(options, complaint):
    with pytest.raises(smf.ConfigError, match=complaint):
        optimizer_of(tiny_model(), **options)


def test_a_model_without_memory_is_refused():
    with pytest.raises(smf.ConfigError, match="no memory layers; attach them first"):
        smf.SparseMemoryOptimizer(tiny_base(), lr=0.1)


@pytest.mark.parametrize("rule", ["kl", "tfidf"])
def test_rules_that_need_a_background_refuse_to_go_without(rule):
    with pytest.raises(smf.BackgroundError, match=rf"rule='{rule}'.*needs a background.*read_background"):
        optimizer_of(tiny_model(), rule=rule)


@pytest.mark.parametrize("rule", ["kl", "tfidf", "tf"])
def test_a_background_of_another_model_is_refused(rule):
    strangers = [
        tiny_model(seed=1),
        tiny_model(layers=[1, 3]),
        tiny_model(knn=3),
        get_peft_model(tiny_base(), tiny_config(seed=1)),
    ]
    for stranger in strangers:
        background = smf.read_background(stranger, [padded()])
        with pytest.raises(smf.BackgroundError, match=r"another base, config, query or keys.*Read it again"):
            optimizer_of(tiny_model(), background=background, rule=rule)


def test_what_is_no_background_is_refused():
    with pytest.raises(smf.BackgroundError, match="got str"):
        optimizer_of(tiny_model(), background="general.background", rule="kl")


def test_healing_makes_an_earlier_background_foreign():
    model = tiny_model(init="paper")
    background = smf.read_background(model, [padded()])
    optimizer_of(model, background=background, rule="kl")
    smf.set_train(model, "memory")
    step(model, optimizer_of(model, rule="all"), 0)
    smf.set_train(model, "rows")
    with pytest.raises(smf.BackgroundError, match="another base, config, query or keys"):
        optimizer_of(model, background=background, rule="kl")
    again = smf.read_background(model, [padded()])
    step(model, optimizer_of(model, background=again, rule="kl"), 0)


def test_training_rows_keeps_the_background():
    model = tiny_model(init="paper", train="rows+scale")
    background = smf.read_background(model, [padded()])
    step(model, optimizer_of(model, background=background, rule="kl"), 0)
    assert optimizer_of(model, background=background, rule="kl").background is background


def test_batches_without_padding_work_like_any_other():
    model = tiny_model()
    optimizer = optimizer_of(model)
    model(**batch(3, 7)).loss.backward()
    optimizer.step()
    assert set(optimizer.last_step.reads.values()) == {3 * 7 * 8}
