"""The loss of training: that of all logits, of which only labelled ones are ever made, some at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, Qwen2ForCausalLM

import smf
import smf.loss
from conftest import tiny_base, tiny_model
from smf.errors import TrainingError
from smf.loss import MeanTokenLoss, summed_loss, token_loss
from test_architectures import MODELS, tiny
from test_memory_growth import LargeOutputs

MORE_THAN_LINEAR = {"Gemma2", "Granite", "Cohere"}  # caps and scales of logits


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three positions of tests' vocabularies."""
    monkeypatch.setattr(smf.loss, "AT_ONCE", 300)


def lesson() -> tuple[Tensor, Tensor]:
    """Tokens and labels: answers of unequal length, and an example without any."""
    ids = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, answered in enumerate((5, 3, 0, 9)):
        labels[row, : 12 - answered] = -100
    return ids, labels


def gradients(model: Any, inside: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of all that trains, of a memory's reads too."""
    ids, labels = lesson()
    model.zero_grad()
    loss_of = MeanTokenLoss(model)
    if inside:
        with loss_of:
            loss = loss_of(model(input_ids=ids), labels, 20)
    else:
        loss = loss_of(model(input_ids=ids), labels, 20)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for layer, memory in smf.memory_layers(model).items():
        found[f"reads {layer}"] = memory.pending[-1].g_TD.clone()
    return loss.detach(), found


def trained(kind: str) -> Any:
    if kind == "smf":
        model: Any = tiny_model(layers=[1, 2], init="paper")
        model.optimizer = smf.SparseMemoryOptimizer(model, lr=0.1, rule="tf")  # for which the model keeps its reads
        return model
    base = tiny_base(tie_word_embeddings=kind == "tied").requires_grad_(True)
    return get_peft_model(base, LoraConfig(target_modules="all-linear")) if kind == "lora" else base


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and a
    for name, grad in a.items():
        assert (grad - b[name]).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("kind", ["smf", "lora", "full", "tied"])
def test_loss_and_gradients_are_those_of_all_logits(kind: str):
    model = trained(kind).train()
    loss, of_all = gradients(model, inside=False)
    parts, of_parts = gradients(model, inside=True)
    assert loss > 0 and torch.isclose(loss, parts, rtol=1e-6)
    assert_close(of_all, of_parts)
    assert any("lm_head" in name for name in of_parts) == (kind == "full")


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_has_the_same_loss_and_only_plain_heads_make_fewer_logits(name: str):
    model: PreTrainedModel = tiny(name).requires_grad_(True).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss, of_all = gradients(model, inside=False)
    parts, of_parts = gradients(model, inside=True)
    assert torch.isclose(loss, parts, rtol=1e-5)
    assert_close(of_all, of_parts)
    with MeanTokenLoss(model):
        positions = model(input_ids=lesson()[0]).logits.shape[1]
    assert positions == (12 if name in MORE_THAN_LINEAR else 1)


def test_no_more_logits_are_made_than_some_positions_have():
    model, (ids, labels) = trained("smf").train(), lesson()

    def made() -> list[str]:
        return [name for name, shape in large.found if shape[-1] == model.config.vocab_size]

    with MeanTokenLoss(model) as loss_of, LargeOutputs(5 * model.config.vocab_size, list(model.parameters())) as large:
        loss_of(model(input_ids=ids), labels).backward()
    assert made() == []
    with LargeOutputs(5 * model.config.vocab_size, list(model.parameters())) as large:
        MeanTokenLoss(model)(model(input_ids=ids), labels).backward()
    assert made()


class Held(TorchDispatchMode):
    """Keeps every tensor of a shape that operations return, so that no two share an address by turns."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.kept = shape, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.kept += [each for each in tree_leaves(out) if isinstance(each, Tensor) and each.shape == self.shape]
        return out


def test_a_part_holds_its_logits_once():
    head = torch.nn.Linear(8, 100, bias=False).requires_grad_(False)
    with Held((3, 100)) as held:
        summed_loss(torch.randn(3, 8, requires_grad=True), head, torch.arange(3)).backward()
    assert len(held.kept) > 1 and len({each.untyped_storage().data_ptr() for each in held.kept}) == 1


def test_scoring_on_the_way_sees_all_logits_and_so_does_everyone_afterwards():
    model, (ids, _) = trained("smf").eval(), lesson()
    before = model(input_ids=ids).logits
    with MeanTokenLoss(model):
        assert torch.equal(model(input_ids=ids).logits, before)  # in evaluation mode
        with torch.no_grad():
            assert torch.allclose(model.train()(input_ids=ids).logits, before, atol=1e-5)
        assert model(input_ids=ids).logits.shape[1] == 1
    assert model(input_ids=ids).logits.shape == before.shape
    with pytest.raises(ZeroDivisionError), MeanTokenLoss(model):
        raise ZeroDivisionError
    assert model(input_ids=ids).logits.shape == before.shape


class InPlace(Qwen2ForCausalLM):
    """Changes the logits that its head has made."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits.mul_(3)
        return outputs


class Asking(Qwen2ForCausalLM):
    """Needs more than tokens."""

    def forward(self, *args: Any, attention_mask: Tensor, **kwargs: Any) -> Any:
        return super().forward(*args, attention_mask=attention_mask, **kwargs)


def other_heads() -> dict[str, Any]:
    hooked = tiny_base()
    hooked.lm_head.register_forward_hook(lambda head, args, made: 3 * made)
    lora = [["q_proj", "lm_head"], None], [["q_proj"], ["lm_head"]]
    adapted, copied = (
        get_peft_model(tiny_base(), LoraConfig(target_modules=targets, modules_to_save=saved))
        for targets, saved in lora
    )
    return {"adapted": adapted, "copied": copied, "hooked": hooked, "in place": InPlace(tiny_base().config)}


@pytest.mark.parametrize("kind", ["adapted", "copied", "hooked", "in place"])
def test_a_head_that_is_adapted_or_whose_logits_are_changed_makes_all_of_them(kind: str):
    model, (ids, labels) = other_heads()[kind].train(), lesson()
    expected = token_loss(model(input_ids=ids).logits, labels).sum() / 20
    with MeanTokenLoss(model) as loss_of:
        outputs = model(input_ids=ids)
        assert outputs.logits.shape[1] == 12
        assert torch.isclose(loss_of(outputs, labels, 20), expected)


def test_a_model_that_needs_more_than_tokens_makes_all_logits():
    model, (ids, labels) = Asking(tiny_base().config).train(), lesson()
    with MeanTokenLoss(model) as loss_of:
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert outputs.logits.shape[1] == 12 and loss_of(outputs, labels) > 0


def test_a_loss_is_of_what_the_model_read_last_or_refused():
    model, (ids, labels) = trained("full").train(), lesson()
    with MeanTokenLoss(model) as loss_of:
        model(input_ids=ids)  # nobody takes its loss
        outputs = model.eval()(input_ids=ids.flip(0))
        expected = token_loss(outputs.logits, labels).sum() / (labels[:, 1:] != -100).sum()
        assert torch.equal(loss_of(outputs, labels), expected)
        model.train()(input_ids=ids)
        with pytest.raises(TrainingError, match="two forward passes"):
            model(input_ids=ids)
        with pytest.raises(TrainingError, match=r"labels \[4, 11\].*\[4, 12\]"):
            loss_of(None, labels[:, 1:])
        with pytest.raises(TrainingError, match="open already"), loss_of:
            pass


def test_in_autocast_the_head_works_as_the_model_does():
    model, (ids, labels) = trained("full").train(), lesson()
    with torch.autocast("cpu", torch.bfloat16):
        expected = token_loss(model(input_ids=ids).logits, labels).sum() / 20
    with MeanTokenLoss(model) as loss_of:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(input_ids=ids)
        loss = loss_of(outputs, labels, 20)  # outside of it, as accelerate has it
    assert torch.isclose(loss, expected, rtol=1e-6) and loss.dtype == torch.float32
    narrow, wide = (torch.autograd.grad(each, [*model.parameters()]) for each in (loss, expected))
    for a, b in zip(narrow, wide, strict=True):
        assert (a - b).norm() <= 0.05 * b.norm()


def test_a_micro_batch_without_labels_costs_nothing_and_leaves_no_gradient_out():
    model, (ids, labels) = trained("full").train(), lesson()
    with MeanTokenLoss(model) as loss_of:
        loss = loss_of(model(input_ids=ids), torch.full_like(labels, -100), 7)
        loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in model.parameters())  # all have one, as DDP needs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_a_narrow_model_is_not_rounded_and_its_sums_do_not_overflow(dtype: torch.dtype):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 100, bias=True).to(dtype)
    hidden = (30 * torch.randn(4000, 16) + 40).to(dtype).requires_grad_()
    next_L = torch.randint(100, (4000,))
    next_L[:2500] = 7  # whose sum of hidden states is above float16's largest number, 65,504
    loss = summed_loss(hidden, head, next_L) / 4000
    wide = token_loss(torch.cat([head(hidden), head(hidden[-1:])])[None], torch.cat([next_L[:1], next_L])[None]).sum()
    assert loss.dtype == torch.float32 and loss * 4000 > 65_504 and torch.isclose(loss, wide / 4000, rtol=1e-5)
    grads = [torch.autograd.grad(each, [hidden, head.weight, head.bias]) for each in (loss, wide / 4000)]
    for a, b in zip(*grads, strict=True):
        assert a.dtype == dtype and a.isfinite().all()
        assert (a.float() - b.float()).norm() <= 0.01 * b.float().norm()
