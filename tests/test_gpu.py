"""What only a GPU can show; skipped where there is none. What the kernels compute there: test_kernels.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import smf
from conftest import batch, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def trained(*, moves_late: bool = False) -> list[Tensor]:
    """Tables after three steps on the GPU."""
    model = tiny_model(init="paper")
    background = smf.read_background(model, [batch(8, 16, seed=99)])
    if not moves_late:
        model.cuda()
    optimizer = smf.SparseMemoryOptimizer(model.train(), background, lr=1e-2, rows_per_step=8)
    model.cuda()
    for seed in range(3):
        model(**{name: each.cuda() for name, each in batch(seed=seed).items()}).loss.backward()
        optimizer.step()
    return [memory.values.detach().cpu() for memory in smf.memory_layers(model).values()]


def test_a_training_repeats_bit_by_bit():
    for first, second in zip(trained(), trained(), strict=True):
        assert torch.equal(first, second)


def test_a_model_may_move_to_the_gpu_after_its_optimizer_was_made():
    for early, late in zip(trained(), trained(moves_late=True), strict=True):
        assert torch.equal(early, late)


def test_a_patch_of_a_training_on_the_gpu_applies_on_the_cpu(tmp_path):
    model = tiny_model(init="paper").cuda().train()
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", rows_per_step=8)
    model(**{name: each.cuda() for name, each in batch().items()}).loss.backward()
    optimizer.step()
    smf.save_patch(model, tmp_path / "gpu.smf")
    fresh = tiny_model(init="paper")
    smf.load_patch(tmp_path / "gpu.smf").apply(fresh)
    for layer, memory in smf.memory_layers(fresh).items():
        assert torch.equal(memory.values, smf.memory_layers(model)[layer].values.cpu())
