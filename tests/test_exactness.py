"""How a step is cut into micro-batches, padded or checkpointed changes nothing; gradients equal dense autograd's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor

import smf
from conftest import VOCABULARY, batch, tiny_base, tiny_config
from dense import DenseMemory, dense_twin, double_model, gradients, padded, with_labels
from smf.adapter import SparseMemoryLayer
from smf.gradient import row_gradient
from smf.memory import weighted_row_sum

STEPS, SEQUENCES, READS_A_TOKEN = 4, 16, 2 * 4
LAYERS = (1, 2)


# -- one step, cut in different ways ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """How the 16 sequences of a step reach the model."""

    sizes: tuple[int, ...] = (SEQUENCES,)
    left: bool = False
    extra: int = 0
    reentrant: bool | None = None  # of activation checkpointing; None: none
    one_backward: bool = False  # of all micro-batches together


CUTS = {
    "4x4": Cut((4, 4, 4, 4)),
    "16x1": Cut((1,) * SEQUENCES),
    "unequal": Cut((7, 1, 5, 3)),
    "wider": Cut(extra=9),
    "left": Cut(left=True),
    "left, wider, unequal": Cut((7, 1, 5, 3), left=True, extra=4),
    "checkpointing, reentrant": Cut(reentrant=True),
    "checkpointing, not reentrant": Cut(reentrant=False),
    "checkpointing, reentrant, unequal": Cut((7, 1, 5, 3), reentrant=True),
    "checkpointing, not reentrant, unequal": Cut((7, 1, 5, 3), reentrant=False),
    "one backward": Cut((7, 1, 5, 3), one_backward=True),
    "one backward, checkpointing, not reentrant": Cut((7, 1, 5, 3), reentrant=False, one_backward=True),
}


def sequences(step: int, longest: int = 14) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    lengths = torch.randint(2, longest + 1, (SEQUENCES,), generator=generator).tolist()
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


def collate(part: list[Tensor], cut: Cut) -> dict[str, Tensor]:
    width = max(map(len, part)) + cut.extra
    ids = torch.zeros(len(part), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, tokens in enumerate(part):
        place = slice(width - len(tokens), width) if cut.left else slice(0, len(tokens))
        ids[i, place], mask[i, place] = tokens, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if cut.left else inputs


def summed_loss(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Cross entropy summed over every token but the first of each sequence."""
    logits = model(**inputs, use_cache=False).logits
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    first = inputs["attention_mask"].cumsum(-1) == 1
    labels = labels.masked_fill(first, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def backward_of_a_step(model: PeftModel, everything: list[Tensor], cut: Cut) -> None:
    total, start, losses = sum(len(tokens) - 1 for tokens in everything), 0, []
    for size in cut.sizes:
        losses.append(summed_loss(model, collate(everything[start : start + size], cut)) / total)
        start += size
        if not cut.one_backward:
            losses.pop().backward()
    if losses:
        torch.stack(losses).sum().backward()


def checkpointed(model: PeftModel, reentrant: bool | None) -> PeftModel:
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert model.is_gradient_checkpointing
    model.train()
    return model


@dataclass
class Trained:
    rows: list[dict[int, list[int]]]
    reads: list[dict[int, Tensor]]  # c of every row of the table, each step
    tables: dict[int, Tensor]
    others: dict[int, Tensor]


def spread(reads: smf.selection.Reads) -> Tensor:
    return torch.zeros(256, dtype=torch.float64).index_copy_(0, reads.rows_R, reads.c_R)


def trained(cut: Cut, dtype: torch.dtype, kind: str, update: str, *, longest: int = 14, scale: bool = False) -> Trained:
    """Train `STEPS` steps by kl, cut in this way."""
    train = "rows+scale" if scale else "rows"
    model = get_peft_model(tiny_base().to(dtype), tiny_config(train=train))
    background = smf.read_background(model, [padded(seed=5)])
    checkpointed(model, cut.reentrant)
    lr = 0.02 if update == "adam" else 1.0
    optimizer = smf.SparseMemoryOptimizer(model, background, lr=lr, rows_per_step=24, reads=kind, update=update)
    memories = smf.memory_layers(model)
    done = Trained([], [], {}, {})
    for step in range(STEPS):
        backward_of_a_step(model, sequences(step, longest), cut)
        pending = {layer: memory._pending for layer, memory in memories.items()}
        counts = {x: smf.selection.count_reads(factors, kind, torch.device("cpu")) for x, factors in pending.items()}
        done.reads.append({layer: spread(reads) for layer, reads in counts.items()})
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.last_step is not None
        done.rows.append({layer: rows.tolist() for layer, rows in optimizer.last_step.rows.items()})
    done.tables = {layer: memory.values.detach().clone() for layer, memory in memories.items()}
    done.others = {layer: memory.tensor("scale").detach().clone() for layer, memory in memories.items()}
    return done


@functools.cache
def whole(dtype: torch.dtype, kind: str, update: str, **more: object) -> Trained:
    return trained(Cut(), dtype, kind, update, **more)


def test_the_reference_run_has_something_to_choose_and_to_learn():
    for kind in ("hits", "gradient"):
        run = whole(torch.float64, kind, "adam")
        for layer in LAYERS:
            assert all(len(rows[layer]) == 24 for rows in run.rows)
            assert all(int((reads[layer] > 0).sum()) > 100 for reads in run.reads)
            assert len({row for rows in run.rows for row in rows[layer]}) > 30
            assert run.tables[layer].abs().max() > 0.01
    assert whole(torch.float64, "hits", "adam").rows != whole(torch.float64, "gradient", "adam").rows


@pytest.mark.parametrize("update", ["adam", "sgd"])
@pytest.mark.parametrize("kind", ["hits", "gradient"])
@pytest.mark.parametrize("name", CUTS)
def test_in_float64_rows_and_tables_do_not_depend_on_the_cut(name, kind, update):
    expected = whole(torch.float64, kind, update)
    got = trained(CUTS[name], torch.float64, kind, update)
    assert got.rows == expected.rows
    for layer in LAYERS:
        difference = (got.tables[layer] - expected.tables[layer]).abs().max()
        assert difference <= 1e-9 * expected.tables[layer].abs().max()


@pytest.mark.parametrize("name", ["unequal", "left, wider, unequal", "checkpointing, reentrant"])
def test_in_float64_scale_does_not_depend_on_the_cut_either(name):
    expected = whole(torch.float64, "gradient", "adam", scale=True)
    got = trained(CUTS[name], torch.float64, "gradient", "adam", scale=True)
    assert got.rows == expected.rows
    for layer in LAYERS:
        assert got.others[layer].item() == pytest.approx(expected.others[layer].item(), rel=1e-9)
        assert abs(got.others[layer].item() - 1) > 0.001


@pytest.mark.parametrize("update", ["adam", "sgd"])
@pytest.mark.parametrize("name", CUTS)
def test_in_float32_at_most_one_read_in_ten_thousand_differs(name, update):
    expected = whole(torch.float32, "hits", update, longest=60)
    got = trained(CUTS[name], torch.float32, "hits", update, longest=60)
    total = sum(float(reads.sum()) for step in expected.reads for reads in step.values())
    assert total > 20_000
    pairs = [(a[x], b[x]) for a, b in zip(got.reads, expected.reads, strict=True) for x in LAYERS]
    assert sum(float((a - b).abs().sum()) / 2 for a, b in pairs) <= 1e-4 * total


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("kind", ["hits", "gradient"])
def test_checkpointing_counts_each_read_once_and_no_pad(reentrant, kind):
    run = trained(Cut((7, 1, 5, 3), extra=3, reentrant=reentrant), torch.float64, kind, "adam")
    for step, reads in enumerate(run.reads):
        tokens = sum(map(len, sequences(step)))
        for layer in LAYERS:
            if kind == "hits":
                assert int(reads[layer].sum()) == tokens * READS_A_TOKEN
            else:
                assert torch.allclose(reads[layer], whole(torch.float64, kind, "adam").reads[step][layer], rtol=1e-9)


# -- several forward passes before one backward pass ------------------------------------------------------------------


def wide_and_narrow() -> list[dict[str, Tensor]]:
    return [with_labels(padded([5, 9, 2], seed=1)), with_labels(padded([4, 1], seed=2, left=True, extra=2))]


def same_shape() -> list[dict[str, Tensor]]:
    return [with_labels(padded([5, 9, 2], seed=1)), with_labels(padded([3, 9, 9], seed=2))]


def chosen_after(model: PeftModel, backward: Callable[[PeftModel], None]) -> smf.StepReport:
    optimizer = smf.SparseMemoryOptimizer(model, lr=0.1, rule="tf", reads="gradient", rows_per_step=12)
    backward(model)
    optimizer.step()
    assert optimizer.last_step is not None
    return optimizer.last_step


def one_backward(batches: list[dict[str, Tensor]]) -> Callable[[PeftModel], None]:
    return lambda model: torch.stack([model(**inputs).loss for inputs in batches]).sum().backward()


def each_backward(batches: list[dict[str, Tensor]]) -> Callable[[PeftModel], None]:
    return lambda model: [model(**inputs).loss.backward() for inputs in batches] and None


def same_step(one: smf.StepReport, two: smf.StepReport) -> bool:
    rows = [torch.equal(one.rows[layer], two.rows[layer]) for layer in LAYERS]
    return all(rows) and one.reads == two.reads and one.grad_norm == pytest.approx(two.grad_norm, rel=1e-9)


@pytest.mark.parametrize("batches", [wide_and_narrow, same_shape])
@pytest.mark.parametrize("reentrant", [None, False])
def test_two_forward_passes_with_different_masks_before_one_backward(reentrant, batches):
    expected = chosen_after(checkpointed(double_model(), None), each_backward(batches()))
    report = chosen_after(checkpointed(double_model(), reentrant), one_backward(batches()))
    assert report.reads[1] == sum(int(inputs["attention_mask"].sum()) for inputs in batches()) * READS_A_TOKEN
    assert same_step(report, expected)


@pytest.mark.parametrize("batches", [wide_and_narrow, same_shape])
def test_with_use_reentrant_two_forward_passes_with_different_masks_are_refused(batches):
    model = checkpointed(double_model(), True)
    with pytest.raises(smf.TrainingError, match=r"different attention masks.*use_reentrant=False"):
        chosen_after(model, one_backward(batches()))
    expected = chosen_after(checkpointed(double_model(), None), each_backward(batches()))
    assert same_step(chosen_after(model, each_backward(batches())), expected), "it goes on after the refusal"


def test_with_use_reentrant_two_forward_passes_with_equal_masks_work():
    batches = [with_labels(padded([5, 9, 2], seed=seed)) for seed in (1, 2)]
    expected = chosen_after(checkpointed(double_model(), None), each_backward(batches))
    assert same_step(chosen_after(checkpointed(double_model(), True), one_backward(batches)), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_pass_without_gradients_between_forward_and_backward_changes_nothing(reentrant, training):
    wide, narrow = wide_and_narrow()

    def backward(model: PeftModel) -> None:
        loss = model(**wide).loss
        model.train(training)
        with torch.no_grad():
            model(**narrow)
        model.train()
        loss.backward()

    expected = chosen_after(checkpointed(double_model(), None), each_backward([wide]))
    assert same_step(chosen_after(checkpointed(double_model(), reentrant), backward), expected)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_mask_that_tells_no_pads_from_tokens_is_refused(reentrant):
    model = checkpointed(double_model(), reentrant)
    inputs = batch(2, 6)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    with pytest.raises(smf.TrainingError, match=r"attention_mask \[B, S\].*got \(2, 1, 6, 6\)"):
        chosen_after(model, each_backward([inputs | {"attention_mask": mask}]))


# -- gradients against dense autograd ---------------------------------------------------------------------------------


def random_model(dtype: torch.dtype, train: str = "rows") -> PeftModel:
    """Three memories over each other, whose tables are far from zero."""
    model = get_peft_model(tiny_base().to(dtype), tiny_config(layers=[0, 1, 3], train=train, init="paper"))
    for memory in smf.memory_layers(model).values():
        with torch.no_grad():
            memory.tensor("scale").fill_(0.7)
    model.train()
    return model


def factors_of(model: PeftModel, batches: list[dict[str, Tensor]]) -> dict[int, Tensor]:
    """The gradient of every row of every table, multiplied out from the factors."""
    optimizer = smf.SparseMemoryOptimizer(model, lr=0.1, rule="all")
    for inputs in batches:
        model(**inputs).loss.backward()
    assert all(memory.belongs_to(optimizer) for memory in smf.memory_layers(model).values())
    every = torch.arange(256)
    return {layer: row_gradient(m.take(), every, m.values) for layer, m in smf.memory_layers(model).items()}


@pytest.mark.parametrize("batches", [1, 3])
def test_row_gradients_equal_dense_autograd_in_float64(batches):
    model, inputs = random_model(torch.float64), [with_labels(padded(seed=i)) for i in range(batches)]
    twin, dense = dense_twin(model)
    got = factors_of(model, inputs)
    dense_gradients = [gradients(twin, dense, one) for one in inputs]
    for layer in (0, 1, 3):
        expected = sum(one[layer] for one in dense_gradients)
        assert (got[layer] - expected).norm() <= 1e-10 * expected.norm()
        unread = expected.norm(dim=1) == 0
        assert 0 < int(unread.sum()) < 200
        assert torch.equal(got[layer][unread], expected[unread])


def test_row_gradients_equal_dense_autograd_in_float32_by_row():
    model, inputs = random_model(torch.float32), with_labels(padded())
    twin, dense = dense_twin(model)
    got, expected = factors_of(model, [inputs]), gradients(twin, dense, inputs)
    for layer in (0, 1, 3):
        error, norm = (got[layer] - expected[layer]).norm(dim=1), expected[layer].norm(dim=1)
        assert bool((error <= 1e-5 * norm).all())
        assert int((norm > 0).sum()) > 100


def test_the_gradient_of_a_lower_memory_goes_through_the_upper_ones():
    model, inputs = random_model(torch.float64), with_labels(padded())
    twin, dense = dense_twin(model)
    through = gradients(twin, dense, inputs)[0]
    for upper in (dense[1], dense[3]):
        upper.scale.data.zero_()
    around = gradients(twin, dense, inputs)[0]
    assert (through - around).norm() > 0.01 * through.norm(), "else the other tests show nothing"


@pytest.mark.parametrize("kind", ["query_weight", "query_bias", "keys", "gate", "out", "scale"])
def test_gradients_of_all_other_parameters_equal_dense_autograd(kind):
    model, inputs = random_model(torch.float64, "memory"), with_labels(padded())
    twin, dense = dense_twin(model)
    expected = gradients(twin, dense, inputs, kind)
    factors_of(model, [inputs])
    for layer, memory in smf.memory_layers(model).items():
        got = memory.tensor(kind).grad
        assert expected[layer].norm() > 0
        assert (got - expected[layer]).norm() <= 1e-10 * expected[layer].norm()


def test_gradients_of_chosen_rows_are_those_of_all_rows():
    model, inputs = random_model(torch.float64), with_labels(padded())
    twin, dense = dense_twin(model)
    optimizer = smf.SparseMemoryOptimizer(model, lr=0.1, rule="all")
    model(**inputs).loss.backward()
    expected = gradients(twin, dense, inputs)
    rows = torch.tensor([0, 3, 77, 78, 200, 255])
    for layer, memory in smf.memory_layers(model).items():
        assert memory.belongs_to(optimizer)
        factors = memory.take()
        got = row_gradient(factors, rows, memory.values)
        assert torch.allclose(got, expected[layer][rows], rtol=1e-10, atol=1e-18)
        assert row_gradient(factors, rows[:0], memory.values).shape == (0, 32)


def test_no_gradient_of_the_size_of_the_table_is_ever_made():
    model = random_model(torch.float64)
    factors_of(model, [with_labels(padded())])
    for memory in smf.memory_layers(model).values():
        assert memory.values.grad is None
        assert not memory.values.requires_grad


# -- the forward pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_equal_those_of_the_dense_reference(dtype):
    model, inputs = random_model(dtype), padded()
    twin, _ = dense_twin(model)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    got, expected = model(**inputs).logits, twin(**inputs).logits
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    model.eval()
    with model.disable_adapter(), torch.no_grad():
        assert (model(**inputs).logits - expected).abs().max() > 1e-3, "the memory says something"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("knn", [1, 4, 16])
def test_product_key_search_equals_exact_search_over_all_keys(knn, dtype):
    model = get_peft_model(tiny_base().to(dtype), tiny_config(layers=[1], knn=knn))
    memory = smf.memory_layers(model)[1]
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    idx_TR, w_TR = memory.search(x)
    ids, weights = DenseMemory(torch.nn.Identity(), memory).search(x)
    assert idx_TR.dtype == torch.int32
    assert torch.equal(idx_TR.long(), ids.flatten(1))
    assert torch.allclose(w_TR, weights.flatten(1), rtol=1e-6)
    assert torch.allclose(w_TR.view(200, 2, knn).sum(-1), torch.ones(200, 2, dtype=dtype))


def test_a_bfloat16_table_is_read_in_float32():
    table = torch.randn(256, 32, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    idx_TR, w_TR = torch.randint(256, (50, 8), generator=generator), torch.rand(50, 8, generator=generator)
    expected = torch.einsum("tr,trd->td", w_TR.double(), table[idx_TR].double())
    got = weighted_row_sum(table, idx_TR, w_TR)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_long_gather_in_pieces_equals_one(monkeypatch):
    model, inputs = random_model(torch.float64), with_labels(padded())
    expected, once = factors_of(model, [inputs]), random_model(torch.float64)
    monkeypatch.setattr("smf.memory.GATHER_ELEMENTS", 5 * 8 * 32)  # five tokens a piece
    for layer, gradient in factors_of(once, [inputs]).items():
        assert torch.allclose(gradient, expected[layer], rtol=1e-12, atol=1e-18)


def test_under_autocast_the_memory_computes_in_float32():
    model = get_peft_model(tiny_base(), tiny_config(init="paper"))
    layer = next(module for module in model.modules() if isinstance(module, SparseMemoryLayer))
    memory = smf.memory_layers(model)[layer.layer]
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(3))
    expected = memory.forward(x, None, training=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(memory.forward(x, None, training=False), expected)
        assert memory.forward(x.bfloat16(), None, training=False).dtype == torch.bfloat16
