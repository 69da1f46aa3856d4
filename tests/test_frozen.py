"""Below the lowest memory layer nothing is kept for the backward pass, and nothing runs in it."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import smf
from conftest import batch, tiny_model

LOWEST = 2  # of four layers


class Inputs:
    """What entered each decoder layer, held weakly, and how often it was called; `_run` counts calls of its MLP."""

    def __init__(self, model: PeftModel):
        self.entered: dict[int, weakref.ref[Tensor]] = {}
        self.runs: dict[int, int] = {}
        for number, block in enumerate(model.get_base_model().model.layers):
            block.register_forward_pre_hook(lambda module, args, number=number: self._note(number, args[0]))
            block.mlp.register_forward_pre_hook(lambda module, args, number=number: self._run(number))

    def _note(self, number: int, hidden: Tensor) -> None:
        self.entered[number] = weakref.ref(hidden)

    def _run(self, number: int) -> None:
        self.runs[number] = self.runs.get(number, 0) + 1

    def kept(self) -> list[int]:
        gc.collect()
        return [number for number, entered in self.entered.items() if entered() is not None]


def ready(**changes: object) -> tuple[PeftModel, smf.SparseMemoryOptimizer, Inputs]:
    model = tiny_model(layers=[LOWEST, 3], init="paper", **changes)
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", rows_per_step=8)
    return model.train(), optimizer, Inputs(model)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("asked", [False, True], ids=["", "enable_input_require_grads"])
def test_nothing_is_kept_and_nothing_runs_again_below_the_lowest_memory(checkpointed: bool, asked: bool):
    model, optimizer, inputs = ready()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if asked:
        model.enable_input_require_grads()
    loss = model(**batch()).loss
    assert inputs.kept() == ([LOWEST, 3] if checkpointed else [LOWEST + 1])  # attention below a memory keeps nothing
    loss.backward()
    assert inputs.runs == {0: 1, 1: 1} | dict.fromkeys((LOWEST, 3), 2 if checkpointed else 1)
    optimizer.step()
    assert all(len(rows) == 8 for rows in optimizer.last_step.rows.values())


def test_with_use_reentrant_training_works_and_a_warning_names_the_other_way():
    model, optimizer, inputs = ready()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        loss = model(**batch()).loss
    loss.backward()
    assert inputs.runs == dict.fromkeys(range(4), 2)
    optimizer.step()
    assert all(len(rows) == 8 for rows in optimizer.last_step.rows.values())


def test_without_use_reentrant_nothing_is_warned_of():
    model, _optimizer, _ = ready()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*use_reentrant.*")
        model(**batch()).loss.backward()


def test_embeddings_that_train_keep_their_gradient():
    model, _optimizer, inputs = ready()
    embeddings = model.get_base_model().model.embed_tokens.weight.requires_grad_()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch()).loss.backward()
    assert embeddings.grad is not None
    assert float(embeddings.grad.norm()) > 0
    assert inputs.runs == dict.fromkeys(range(4), 2)


def test_a_trained_layer_below_keeps_its_gradient():
    model, _optimizer, _ = ready()
    weight = model.get_base_model().model.layers[0].mlp.up_proj.weight.requires_grad_()
    model(**batch()).loss.backward()
    assert float(weight.grad.norm()) > 0


def test_given_hidden_states_keep_their_gradient():
    model, _optimizer, _ = ready()
    tokens = batch()
    embeddings = model.get_base_model().model.embed_tokens(tokens["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=tokens["labels"]).loss.backward()
    assert float(embeddings.grad.norm()) > 0


def test_unload_leaves_no_hook_behind():
    model, _optimizer, _ = ready()
    owner = model.get_base_model().model
    assert len(owner._forward_pre_hooks) == 2
    model.unload()
    assert len(owner._forward_pre_hooks) == 0
    assert len(owner.layers[0]._forward_pre_hooks) == 1  # of this test
    assert torch.isfinite(model.get_base_model()(**batch()).loss)
