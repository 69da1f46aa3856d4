"""The Triton kernels against PyTorch's operators and float64, in Triton's interpreter and, where one is, on a GPU."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import smf
from conftest import tiny_base, tiny_model
from kernels_script import SHAPES
from smf.memory import weighted_row_sum

HERE = Path(__file__).parent


GPU = pytest.param("0", id="gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@pytest.fixture(scope="module", params=[pytest.param("1", id="interpreter"), GPU])
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What kernels_script.py printed."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'sparse-memory-finetuning[cuda]'")
    done = subprocess.run(
        [sys.executable, HERE / "kernels_script.py"],
        env=os.environ | {"TRITON_INTERPRET": request.param, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_each_kernel_is_as_near_to_float64_as_torch_and_repeats_bit_by_bit(found, name, dtype):
    figures = found[f"{name}, {dtype}"]
    for kernel in ("sum", "dot", "rows"):
        assert figures[f"{kernel}, kernel"] <= max(1e-6, 3 * figures[f"{kernel}, torch"])  # NaN is no such number
        assert figures[f"{kernel}, repeat"]
    assert figures["unread row"] == 0
    assert figures["dtypes"]


def test_no_tokens_and_no_chosen_rows(found):
    assert found["empty"] == dict.fromkeys(("sum", "dot", "no tokens", "no rows"), True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_with_kernels_moves_the_same_rows_as_one_without(found, dtype):
    figures = found[f"training, {dtype}"]
    assert figures["moved"] > 0
    assert figures["same rows"] and figures["repeat"]
    # stochastic rounding of a bfloat16 table turns a last bit of float32 now and then into one of bfloat16
    assert figures["difference"] < (1e-5 if dtype == "float32" else 2e-2)


def test_the_gradient_of_the_query_is_that_without_kernels(found):
    assert found["weights' gradient"] < 1e-5


def test_torch_compile_breaks_no_graph_at_the_kernels(found):
    assert found["compiled"] < 1e-5


def test_other_dtypes_are_refused(found):
    assert "float32 or bfloat16, not torch.float64" in found["refused"]["table"]
    assert "the memory's input is torch.float64" in found["refused"]["input"]


def test_a_model_on_the_cpu_is_refused_and_nothing_is_turned_on():
    pytest.importorskip("triton", reason="without it that is what is refused")
    model = tiny_model()
    with pytest.raises(smf.ConfigError, match=r"CUDA device, but its table is on cpu.*model\.to\(\"cuda\"\)"):
        smf.use_kernels(model)
    assert not any(memory.kernels for memory in smf.memory_layers(model).values())


def test_without_triton_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(smf.ConfigError, match=r"need triton.*\[cuda\]"):
        smf.use_kernels(tiny_model())


def test_a_model_without_memory_is_refused():
    with pytest.raises(smf.ConfigError, match="no memory layers"):
        smf.use_kernels(tiny_base())


def test_a_copy_brought_to_the_cpu_says_how_to_turn_the_kernels_off():
    pytest.importorskip("triton", reason="the kernels' module needs it")
    model = tiny_model(init="paper")
    for memory in smf.memory_layers(model).values():
        memory.kernels = True  # as on a GPU
    moved = copy.deepcopy(model)
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(smf.ConfigError, match=r"smf\.use_kernels\(model, False\)"):
        moved(input_ids=ids)
    smf.use_kernels(moved, False)
    assert moved(input_ids=ids).logits.isfinite().all()


def test_kernels_are_off_at_first():
    assert not any(memory.kernels for memory in smf.memory_layers(tiny_model()).values())
    values_ND, idx_TR = torch.eye(3), torch.tensor([[0, 2]])
    assert weighted_row_sum(values_ND, idx_TR, torch.tensor([[1.0, 2.0]])).tolist() == [[1.0, 0.0, 2.0]]
