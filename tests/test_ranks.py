"""Several ranks: what they agree on, what they do alike to one process, and what they survive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smf
from conftest import batch, tiny_model
from ddp_script import LOOPS, everything
from smf.compare import result_path
from smf.recipe import Recipe
from smf.recipe_file import load_recipe
from smf.train import run_method
from test_faults import assert_same_runs, wait_for
from test_loops import identical
from tiny import make_world

HERE = Path(__file__).parent
BOTH = [2, pytest.param(4, marks=pytest.mark.slow)]


def torchrun(ranks: int, script: str, *arguments: object, restarts: int = 0, **environment: str) -> subprocess.Popen:
    """A job of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    line = [*command, f"--max-restarts={restarts}", str(HERE / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    return subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(job: subprocess.Popen) -> str:
    """What a job that ended well printed."""
    printed = job.communicate(timeout=600)[1]
    assert job.returncode == 0, printed[-5000:]
    return printed


# -- loops and scripts of one's own -----------------------------------------------------------------------------------

Results = list[dict[str, Any]]  # of each rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder: Path) -> Results:
    """What two ranks leave behind."""
    ended(torchrun(2, "ddp_script.py", f"{folder / '2'}{os.pathsep}nowhere"))
    return [torch.load(folder / "2" / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def single(two: Results, folder: Path) -> dict[str, Any]:
    """What a single process leaves behind, and where it goes on from a checkpoint of two ranks."""
    return everything(0, 1, folder / "1", folder / "2" / "checkpoint-2")


@pytest.fixture(scope="module", params=BOTH)
def ranks(request: pytest.FixtureRequest, two: Results, folder: Path) -> Results:
    """What two ranks leave behind, and four, which go on from a checkpoint of two as well."""
    if request.param == 2:
        return two
    ended(torchrun(4, "ddp_script.py", f"{folder / '4'}{os.pathsep}{folder / '2' / 'checkpoint-2'}"))
    return [torch.load(folder / "4" / f"rank{rank}.pt", weights_only=True) for rank in range(4)]


def assert_alike(many: dict[str, torch.Tensor], one: dict[str, torch.Tensor]) -> None:
    """Rows and reads equal, all other numbers but for rounding in float64."""
    assert many.keys() == one.keys()
    assert sum(key.startswith("rows.") for key in many) >= 4
    for key in many:
        if key.startswith(("rows.", "reads.")):
            assert torch.equal(many[key], one[key]), key
        else:
            torch.testing.assert_close(many[key], one[key], atol=1e-9, rtol=1e-9, msg=key)


@pytest.mark.parametrize("name", [*LOOPS, "trainer", "resumed", "odd"])
def test_ranks_are_bit_identical_to_each_other(name: str, ranks: Results):
    assert all(identical(ranks[0][name], other[name]) for other in ranks[1:])


@pytest.mark.parametrize("name", [*(name for name in LOOPS if name != "float32"), "trainer", "odd"])
def test_ranks_do_what_a_single_process_does(name: str, ranks: Results, single: dict):
    """Of an epoch that leaves ranks without examples Trainer repeats the first ones, which then count again."""
    assert_alike(ranks[0][name], single[name])


def test_ranks_resume_bit_identically(ranks: Results, single: dict):
    for results in (*ranks, single):
        resumed, whole = results["resumed"], results["trainer"]
        assert sum(key.startswith("rows.") for key in resumed) == 2 * 2  # steps 3 and 4, two layers
        assert all(torch.equal(resumed[key], whole[key]) for key in resumed)


def test_other_numbers_of_ranks_go_on_from_a_checkpoint_of_two(ranks: Results, single: dict):
    for results in (*ranks, single):
        if "other ranks" in results:
            assert_alike(results["other ranks"], single["resumed"])
    assert "other ranks" in single and ("other ranks" in ranks[0]) == (len(ranks) == 4)


def test_every_rank_of_fsdp2_saves_the_same_patch(ranks: Results, folder: Path):
    for name in ("fsdp2", "fsdp2+checkpointing"):
        files = [folder / str(len(ranks)) / f"{name}.{rank}.smf" for rank in range(len(ranks))]
        assert len({file.read_bytes() for file in files}) == 1
        model = tiny_model(train="rows+scale" if name == "fsdp2" else "rows").double()
        smf.load_patch(files[0]).apply(model)
        for layer, memory in smf.memory_layers(model).items():
            (trained,) = (t for key, t in ranks[0][name].items() if f"layers.{layer}." in key and "_values" in key)
            assert torch.equal(memory.values, trained) and bool(trained.any())


@pytest.mark.slow
def test_a_script_whose_rank_dies_is_started_anew_by_torchrun_and_ends_alike(two: Results, folder: Path):
    """Without the variable early ranks of the second start find addresses of the first one: torch's own limit."""
    job = torchrun(
        2,
        "ddp_script.py",
        f"{folder / 'killed'}{os.pathsep}nowhere",
        "killed",
        restarts=1,
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    assert "exitcode: -9" in ended(job)
    for rank in range(2):
        results = torch.load(folder / "killed" / f"rank{rank}.pt", weights_only=True)["trainer"]
        assert sum(key.startswith("rows.") for key in results) == 2 * 2  # from the checkpoint after step 2
        assert all(torch.equal(tensor, two[rank]["trainer"][key]) for key, tensor in results.items())


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_not_whole_on_each_rank_is_refused_before_it_trains(ranks: Results):
    for results in ranks:
        said = dict(results["refused"])
        beside = said.pop("all but the memory")
        assert beside.startswith("ConfigError: what trains beside the rows is split over ranks") and len(said) == 3
        for words in said.values():
            assert words.startswith("ConfigError: the memory at layer 1 is split over ranks, but must be whole on each")
            assert "fully_shard(module, ignored_params=" in words


class DeepSpeedEngine(nn.Module):
    """Holds a model as DeepSpeed's does."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


class FullyShardedDataParallel(DeepSpeedEngine):
    """Holds a model as FSDP1 does."""


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (DeepSpeedEngine, "DeepSpeed puts an optimizer of its own"),
        (FullyShardedDataParallel, "FSDP1 flattens the memory"),
        (nn.DataParallel, "nn.DataParallel copies the memory"),
    ],
)
def test_wrappers_that_a_memory_cannot_train_in_are_refused_by_name(wrap: Any, message: str):
    with pytest.raises(smf.ConfigError, match=rf"{message}.*Use DDP.*fully_shard\(module, ignored_params="):
        smf.SparseMemoryOptimizer(wrap(tiny_model()), rule="tf", lr=0.1)


def test_deepspeed_is_refused_before_and_after_the_optimizer_is_made(monkeypatch: pytest.MonkeyPatch):
    """By the variable that accelerate launch and Trainer's Accelerator set."""
    model = tiny_model()
    optimizer = smf.SparseMemoryOptimizer(model, rule="tf", lr=0.1)
    before = [memory.values.clone() for memory in smf.memory_layers(model).values()]
    model.train()
    model(**batch()).loss.backward()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(smf.ConfigError, match="DeepSpeed puts"):
        optimizer.step()
    with pytest.raises(smf.ConfigError, match="DeepSpeed puts"):
        smf.SparseMemoryOptimizer(model, rule="tf", lr=0.1)
    after = [memory.values for memory in smf.memory_layers(model).values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_replica_of_data_parallel_is_refused():
    """As Trainer makes them where there are several GPUs and no torchrun."""
    layer = next(m for m in tiny_model().modules() if isinstance(m, smf.adapter.SparseMemoryLayer))
    replica = layer._replicate_for_data_parallel()
    with pytest.raises(smf.ConfigError, match=r"nn.DataParallel copies.*CUDA_VISIBLE_DEVICES=0"):
        replica(torch.zeros(1, 2, 32))


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path)


def training(ranks: int, world: Path, output: Path, when: str = "", **more: Any) -> subprocess.Popen:
    return torchrun(ranks, "rank_script.py", when, "train", world, "--method", "smf", "--output", output, **more)


def recipes(world: Path, *outputs: Path) -> list[Recipe]:
    return [load_recipe(world, output=str(output)) for output in outputs]


@pytest.mark.parametrize(
    ("ranks", "when"),
    [
        (2, "0 1 step 6 KILL, 1 1 step 1 TERM"),
        pytest.param(
            4,
            "0 0 save 1 KILL, 1 3 step 3 KILL, 2 2 step 1 TERM, 3 0 score 1 KILL, 4 0 finish 1 KILL",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_job_whose_ranks_die_is_started_anew_by_torchrun_and_ends_as_if_they_had_not(
    world: Path, tmp_path: Path, ranks: int, when: str
):
    """Killed in steps, a save, scoring and the end; with SIGTERM to one rank all save a checkpoint first."""
    ended(training(ranks, world, tmp_path / "calm"))
    printed = ended(training(ranks, world, tmp_path / "killed", when, restarts=len(when.split(","))))
    assert printed.count("failed (exitcode: ") == len(when.split(",")), printed[-5000:]  # of whoever ended first
    assert "stopped by SIGTERM after step" in printed and "resuming from" in printed
    assert "Traceback" not in printed, printed[-5000:]
    assert_same_runs(*recipes(world, tmp_path / "calm", tmp_path / "killed"), ("smf",))


def stop(job: subprocess.Popen, metrics: Path, lines: int) -> str:
    """What a job prints that gets SIGTERM after it has written some lines."""
    wait_for(lambda: job.poll() is not None or (metrics.is_file() and len(metrics.read_text().splitlines()) > lines))
    job.send_signal(signal.SIGTERM)
    printed = job.communicate(timeout=200)[1]
    assert job.returncode != 0
    return printed


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_a_checkpoint_that_any_number_of_ranks_goes_on_from(world: Path, tmp_path: Path):
    """Rows are those of one process, which never stopped, but for ties: in float32 ranks round differently."""
    world.write_text(
        world.read_text().replace("steps = 4\n", "steps = 400\n").replace("save_every = 2", "save_every = 999")
    )
    calm, stopped = recipes(world, tmp_path / "calm", tmp_path / "stopped")
    run_method(calm, "smf")
    folder = result_path(stopped, "smf").parent
    for ranks in (2, 4):
        before = sum(1 for _ in folder.glob("checkpoints/checkpoint-*"))
        printed = stop(training(ranks, world, tmp_path / "stopped"), folder / "metrics.jsonl", 3 * ranks)
        assert printed.count("stopped by SIGTERM after step") == ranks, printed[-3000:]
        assert sum(1 for _ in folder.glob("checkpoints/checkpoint-*")) == before + 1
    assert run_method(stopped, "smf")["steps"] == 400
    results = [run_method(recipe, "smf") for recipe in (calm, stopped)]
    one, other = (smf.load_patch(result_path(recipe, "smf").with_name("patch.smf")) for recipe in (calm, stopped))
    for layer in one.rows:
        rows = [set(patch.rows[layer].tolist()) for patch in (one, other)]
        print(f"layer {layer}: {len(rows[0] & rows[1])} of {len(rows[0] | rows[1])} rows are those of both")
        assert len(rows[0] & rows[1]) >= 0.8 * len(rows[0] | rows[1])
    losses = [result["scores"]["exam"]["metrics"]["loss"] for result in results]
    print("losses", losses)
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
