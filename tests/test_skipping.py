"""Steps whose loss or gradient is not finite."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import smf.loop as loop
from smf.compare import result_path
from smf.data import Collator, in_order
from smf.errors import TrainingError
from smf.loss import MeanTokenLoss
from smf.prepare import load
from smf.recipe_file import load_recipe
from smf.skipping import SKIPPED
from smf.train import run_method
from tiny import make_world

MARK = 159  # a token that no text of the tiny world has


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


class Marking(Collator):
    """Batches in which an example is marked, so that the loss can know it."""

    marked = frozenset({"none"})

    def __call__(self, examples):
        batch = super().__call__(examples)
        for row, example in enumerate(examples):
            if example.id in self.marked:
                batch["labels"][row, -1] = MARK
        return batch


def poison(monkeypatch: pytest.MonkeyPatch, examples: set[str], spoil: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Make the loss of batches with these examples what `spoil` makes of loss and logits."""
    real = MeanTokenLoss.__call__

    def loss_of(self, outputs, labels, num_items_in_batch=None):
        marked = labels == MARK
        loss = real(self, outputs, labels.masked_fill(marked, -100), num_items_in_batch)
        return spoil(loss, outputs.logits) if bool(marked.any()) else loss

    class Marked(Marking):
        marked = frozenset(examples)

    monkeypatch.setattr(MeanTokenLoss, "__call__", loss_of)
    monkeypatch.setattr(loop, "Collator", Marked)


@pytest.fixture(scope="module")
def order(world: Path) -> list[str]:
    """The ids of the examples in the order that they are trained in."""
    recipe = load_recipe(world)
    return [example.id for example in in_order(load(recipe).train, 32, recipe.seed)]


def as_nan(loss: Tensor, logits: Tensor) -> Tensor:
    return loss * math.nan


def as_infinity(loss: Tensor, logits: Tensor) -> Tensor:
    return loss + math.inf  # its gradient is finite


def as_bad_gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return loss + (logits.sum() * 0).abs().sqrt()  # adds 0, whose gradient is not a number


def as_too_large(loss: Tensor, logits: Tensor) -> Tensor:
    return loss * 1e25  # a finite loss and finite gradients, whose norm is infinite


def saved_tensors(folder: Path) -> list[Tensor]:
    """All numbers of a run's last checkpoint: weights, rows, moments."""
    from safetensors.torch import load_file

    last = max(folder.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    found: list[Tensor] = []

    def collect(value: object) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            collect(inner)

    collect(torch.load(last / "optimizer.pt", weights_only=True))
    for file in last.glob("*.safetensors"):
        collect(load_file(file))
    return found


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("smf", as_nan),
        ("smf-healed", as_bad_gradient),
        ("masked", as_bad_gradient),
        ("lora", as_infinity),
        ("full", as_bad_gradient),
        ("smf", as_too_large),
        ("hits", as_too_large),
        ("unclipped", as_too_large),
        ("smf-all", as_too_large),
        ("smf-healed", as_too_large),
        ("masked", as_too_large),
        ("lora", as_too_large),
        ("full", as_too_large),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_counted_and_its_examples_named(
    world: Path, order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, spoil: Callable
):
    recipe = load_recipe(world, output=str(tmp_path / "runs"))
    masked = replace(recipe.methods["smf"], update="masked-adam", train="rows+scale")
    added = {"masked": masked, "hits": replace(recipe.methods["smf"], reads="hits")}
    recipe = replace(recipe, methods=recipe.methods | added | {"unclipped": replace(added["hits"], update="sgd")})
    if name == "unclipped":
        recipe = replace(recipe, train=replace(recipe.train, max_grad_norm=0.0))
    poison(monkeypatch, {order[13]}, spoil)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # the last checkpoint stays
    result = run_method(recipe, name)
    assert result["skipped_steps"] == 1 and result["steps"] == 4 and result["numbers_changed"] > 0
    folder = result_path(recipe, name).parent
    what = "gradient" if spoil in (as_bad_gradient, as_too_large) else "loss"
    listed = json.loads((folder / SKIPPED).read_text())
    assert listed == [{"step": 2, "not_finite": what, "examples": order[8:16]}]
    assert all(bool(tensor.isfinite().all()) for tensor in saved_tensors(folder))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 1, 1]
    assert "grad_norm" not in lines[1] and "rows" not in lines[1] and lines[2]["grad_norm"] > 0


def test_a_skipped_step_moves_nothing(world: Path, order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With all steps but the first skipped, the rows are those that one step leaves."""
    recipe = load_recipe(world, output=str(tmp_path / "runs"))
    constant = replace(recipe.train, schedule="constant_with_warmup", max_skipped=3)
    recipe = replace(recipe, train=constant)
    for name, spoil in (("smf", as_nan), ("lora", as_nan), ("smf-all", as_too_large), ("lora", as_too_large)):
        recipe = replace(recipe, output=str(tmp_path / f"{name} {spoil.__name__}"))
        one = replace(recipe, train=replace(constant, steps=1))
        first = run_method(one, name)
        with monkeypatch.context() as patched:
            poison(patched, set(order[8:]), spoil)
            rest = run_method(recipe, name)
        assert rest["skipped_steps"] == 3 and rest["numbers_changed"] == first["numbers_changed"]
        assert rest["scores"] == first["scores"]


def test_too_many_such_steps_end_the_training_and_it_can_go_on(
    world: Path, order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = load_recipe(world, output=str(tmp_path / "runs"), settings=["train.max_skipped=1"])
    folder = result_path(recipe, "smf").parent
    with monkeypatch.context() as patched:
        poison(patched, {order[0], order[25]}, as_nan)
        with pytest.raises(
            TrainingError,
            match=r"the loss of step 4 is not finite, and 1 steps were skipped before; at most 1 may be \(max_skipped",
        ):
            run_method(recipe, "smf")
    assert [entry["step"] for entry in json.loads((folder / SKIPPED).read_text())] == [1, 4]
    with monkeypatch.context() as patched:
        poison(patched, {order[0]}, as_nan)
        whole = run_method(replace(recipe, output=str(tmp_path / "whole")), "smf")
        resumed = run_method(recipe, "smf")  # from step 2
    assert resumed["skipped_steps"] == whole["skipped_steps"] == 1 and resumed["scores"] == whole["scores"]
    other = result_path(replace(recipe, output=str(tmp_path / "whole")), "smf").parent
    for file in ("metrics.jsonl", "patch.smf", SKIPPED):
        assert (folder / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.parametrize("steps", [1, 2])
def test_what_has_diverged_is_said_and_not_skipped_nor_finished(world: Path, tmp_path: Path, steps: int):
    """Whether there is a step after the update that spoilt it or not."""
    rates = ["methods.smf.lr=1e38", "train.weight_decay=100"]  # which multiply to what float32 has not
    recipe = load_recipe(world, [*rates, f"train.steps={steps}"], output=str(tmp_path / "runs"))
    with pytest.raises(TrainingError, match="not finite after step 1: the training has diverged"):
        run_method(recipe, "smf")
    assert not result_path(recipe, "smf").exists()
    assert not result_path(recipe, "smf").with_name(SKIPPED).exists()


def test_the_key_leaves_the_names_of_runs(world: Path):
    recipe = load_recipe(world)
    assert recipe.train.max_skipped == 3
    other = load_recipe(world, settings=["train.max_skipped=9"])
    assert other.run_id("smf") != recipe.run_id("smf")
    assert load_recipe(world, settings=["train.max_skipped=3"]).run_id("smf") == recipe.run_id("smf")


RANKS = """
import os, sys
from smf.loss import MeanTokenLoss
from smf.recipe_file import load_recipe
from smf.train import run_method

real, calls = MeanTokenLoss.__call__, []

def loss_of(*arguments, **options):
    calls.append(1)
    spoilt = os.environ["RANK"] == "1" and len(calls) == 3  # of the second step, two micro-batches a step and rank
    return real(*arguments, **options) * (float(sys.argv[2]) if spoilt else 1.0)

MeanTokenLoss.__call__ = loss_of
recipe = load_recipe(sys.argv[1])
for name in sys.argv[3:]:
    calls.clear()
    skipped = run_method(recipe, name)["skipped_steps"]
    sys.stderr.write(f"{name} of rank {os.environ['RANK']}: {skipped}\\n")  # at once, since ranks share the pipe
"""


@pytest.mark.slow
@pytest.mark.parametrize("factor", ["nan", "1e25"])
def test_ranks_skip_together_what_one_of_them_sees(world: Path, tmp_path: Path, factor: str):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(world.read_text().replace(f"{world.parent}/runs", f"{tmp_path}/runs"))
    (tmp_path / "script.py").write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    line = [*launch, str(tmp_path / "script.py"), str(recipe), factor, "smf", "lora"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("smf", "lora"):
        assert all(f"{name} of rank {rank}: 1" in done.stderr for rank in (0, 1))
        result = json.loads(result_path(load_recipe(recipe), name).read_text())
        assert result["skipped_steps"] == 1 and math.isfinite(result["scores"]["exam"]["metrics"]["loss"])
