"""What training holds beyond the table depends on tokens and rows chosen, never on the size of the table."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import smf
from conftest import batch, tiny_model

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "memory_growth.py"
WIDTH = 32
ROW = 3 * WIDTH * 4  # bytes: two moments and the old value
IDS = 3 * 2 * 8 + 8  # bytes: three index columns in each of two stores, and the row's step count


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_growth", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory_growth"] = module
    spec.loader.exec_module(module)
    return module


class LargeOutputs(TorchDispatchMode):
    """Notes every operation that returns at least `limit` numbers in memory that is none of `known`."""

    def __init__(self, limit: int, known: list[Tensor]):
        super().__init__()
        self.limit = limit
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.found: list[tuple[str, tuple[int, ...]]] = []
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.limit:
                storage = tensor.untyped_storage()
                if storage.nbytes() >= self.limit and storage.data_ptr() not in self.known:
                    self.found.append((str(function), tuple(tensor.shape)))
        return out


def test_fake_tensors_have_no_memory(benchmark: ModuleType):
    """torch.compile leaves some behind, in the process that tests share."""
    before = benchmark.live_bytes()
    with FakeTensorMode():
        fake = torch.empty(1000)
    assert fake.numel() == 1000 and benchmark.live_bytes() == before


def test_held_memory_depends_on_rows_chosen_and_tokens_alone(benchmark: ModuleType):
    sizes = {"width": WIDTH, "heads": 2, "knn": 4, "k_dim": 16, "tokens": 32, "rows_per_step": 8, "steps": 5}
    small, large = (benchmark.measure(benchmark.Setup(n_keys, **sizes)) for n_keys in (16, 128))
    assert large.table == 64 * small.table == 128**2 * WIDTH * 4
    assert small.pending == large.pending == 32 * (WIDTH * 4 + 2 * 4 * 8)  # g, and ids and weights of 8 reads
    for figures in (small, large):
        assert 8 <= figures.rows_chosen <= 5 * 8
        exact = figures.rows_chosen * (ROW + IDS)
        assert exact <= figures.held <= 1.6 * exact  # columns grow by half


@pytest.mark.parametrize("update", ["adam", "sgd"])
@pytest.mark.parametrize("options", [{"rule": "tf"}, {"rule": "kl", "reads": "gradient"}], ids=["tf", "kl"])
@pytest.mark.parametrize("table_dtype", ["float32", "bfloat16"])
def test_no_step_makes_a_tensor_of_the_tables_length(table_dtype: str, options: dict[str, str], update: str):
    model = tiny_model(n_keys=128, table_dtype=table_dtype)
    background = smf.read_background(model, [batch(4, 16, seed=99)]) if options["rule"] == "kl" else None
    optimizer = smf.SparseMemoryOptimizer(model, background, lr=1e-2, rows_per_step=8, update=update, **options)
    model.train()
    with LargeOutputs(128**2, list(model.parameters())) as outputs:
        for seed in range(3):
            model(**batch(2, 8, seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert outputs.operations > 500
    assert outputs.found == []


def test_the_dense_control_does_make_such_tensors():
    model = tiny_model(n_keys=128)
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", rows_per_step=8, update="masked-adam")
    model.train()
    model(**batch(2, 8)).loss.backward()
    with LargeOutputs(128**2, list(model.parameters())) as outputs:
        optimizer.step()
    assert any(shape == (128**2, WIDTH) for _, shape in outputs.found)


def test_rows_that_are_chosen_again_cost_nothing_more(benchmark: ModuleType):
    model = tiny_model(n_keys=64, layers=[1])  # one layer: its reads of a batch do not depend on what it learned
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", rows_per_step=8)
    model.train()
    held = []
    for seed in (0, 0, 0, 1):
        model(**batch(2, 8, seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        held.append(benchmark.live_bytes())
    assert held[0] == held[1] == held[2] < held[3]
