"""What is counted on tensors without numbers is what real ones take, and what a plan says of it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Qwen2Config

import smf.plan as planning
from smf import cli
from smf.adapter import set_train
from smf.costs import Live, _loss, _quiet, bytes_of, costs_of, count_passes, model_of
from smf.errors import ConfigError
from smf.loss import MeanTokenLoss
from smf.memory import memory_layers
from smf.optimizer import SparseMemoryOptimizer
from smf.plan import BACKBONES, Measured, _shape, measure, seconds_of, short
from smf.recipe import MemoryOptions, Method, Recipe, TrainOptions
from smf.recipe_file import load_recipe
from smf.shape import available_memory
from tiny import make_world

SMALL = _shape(32, 48, 4, 4, 2, 96, True)
MEMORY = MemoryOptions(n_keys=16, heads=2, knn=4, k_dim=16)
METHODS = {
    "smf": Method(rule="tf", rows_per_step=8, lr=0.1),
    "scale": Method(rule="tf", rows_per_step=8, lr=0.1, train="rows+scale"),
    "lora": Method(kind="lora", r=4, lr=0.1),
    "full": Method(kind="full", lr=0.1),
    "base": Method(kind="base"),
}


def recipe_of(**train: Any) -> Recipe:
    options = TrainOptions(**({"steps": 3, "batch_size": 2, "micro_batch_size": 2, "max_length": 16} | train))
    return Recipe(base="here", memory=MEMORY, train=options, methods=METHODS)


def real(recipe: Recipe, method: Method, config: Any) -> Any:
    """The same with numbers; of what trains, the optimizer."""
    base = planning._random(recipe, config)
    if method.kind == "base":
        return base.requires_grad_(False), None
    model, optimizer = planning._prepared(recipe, method, base)
    if method.kind == "smf" and method.train != "rows":
        set_train(model, method.train)
        optimizer = SparseMemoryOptimizer(model, lr=0.1, rule="tf", rows_per_step=method.rows_per_step)
    return model, optimizer


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_without_numbers_the_same_bytes_and_operations_are_counted_as_with_them(name: str, times: int):
    recipe, method, config = recipe_of(), METHODS[name], Qwen2Config(**SMALL)
    counted = count_passes(model_of(recipe, method, config), 2, 16, times)
    model, optimizer = real(recipe, method, config)
    model.train()
    ids = torch.zeros(2, 16, dtype=torch.long)
    live = Live(tensor for tensors in (model.parameters(), model.buffers(), [ids]) for tensor in tensors)
    with (
        _quiet(),
        MeanTokenLoss(model) as loss_of,
        live,
        torch.set_grad_enabled(optimizer is not None),
        FlopCounterMode(display=False) as counter,
    ):
        for _ in range(times):
            loss = _loss(model, loss_of, ids)
            if optimizer is not None:
                loss.backward()
    assert counted.held == pytest.approx(live.most, rel=0.02)
    row_sums = sum(2 * m.shape.heads * m.shape.knn * m.shape.d * 32 for m in memory_layers(model).values())
    assert counted.flops == counter.get_total_flops() / times + row_sums


def test_costs_are_those_of_the_model_and_its_optimizer():
    recipe, config = recipe_of(), Qwen2Config(**SMALL)
    for name in ("smf", "lora", "full"):
        method = METHODS[name]
        costs = costs_of(recipe, method, config, 3)
        model, optimizer = real(recipe, method, config)
        model.train()
        for _ in range(3):
            ids = torch.randint(96, (2, 16))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state_dict()
        held = _tensor_bytes(state)
        assert costs is not None and costs.weights == bytes_of(model.parameters())
        counts = 4 * len(list(model.parameters()))  # of AdamW's steps
        assert held <= costs.states + counts, name
        assert costs.states <= 2 * held, name  # of rows, as if each step had chosen others
    full, base = costs_of(recipe, METHODS["full"], config, 3), costs_of(recipe, METHODS["base"], config, 3)
    assert full is not None and base is not None
    assert full.states == 2 * full.weights == 2 * base.weights and base.states == base.exchanged == 0
    assert full.flops == pytest.approx(3 * base.flops, rel=0.1) and full.exchanged == 4 * full.numbers


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def test_what_grows_with_the_table_and_what_does_not():
    recipe, config = recipe_of(), Qwen2Config(**SMALL)
    small, large = (
        costs_of(recipe, replace(METHODS["smf"], memory=replace(MEMORY, n_keys=n)), config, 3) for n in (16, 1024)
    )
    assert small is not None and large is not None
    assert large.table == 1024**2 // 16**2 * small.table and large.table == 3 * 1024**2 * 32 * 4
    assert large.factors == small.factors and large.exchanged == small.exchanged and large.patch == small.patch
    assert large.passes < small.passes + 3 * 32 * 2 * 2 * 1024 * 4 * 2  # scores against sub-keys alone


def test_a_model_that_fits_nowhere_can_be_counted():
    """72B on this machine: a few of its layers, and tables of a million rows, 32 GiB each."""
    sizes = BACKBONES["72B"] | {"num_hidden_layers": 4}
    recipe = replace(recipe_of(), dtype="bfloat16")
    method = replace(METHODS["smf"], memory=MemoryOptions(n_keys=1024))
    costs = costs_of(recipe, method, Qwen2Config(**sizes), 10)
    assert costs is not None and costs.table == 3 * 2**20 * 8192 * 4 and costs.weights > costs.table + 10 * 2**30


def test_seconds_are_those_measured_where_nothing_differs(monkeypatch: pytest.MonkeyPatch):
    recipe = recipe_of()
    costs = costs_of(recipe, METHODS["lora"], Qwen2Config(**SMALL), 3)
    assert costs is not None
    like = Measured(2.0, 0.5, 1e9, 0, 0, costs)
    monkeypatch.setattr(planning, "product_speed", lambda *_: 1e9)
    assert seconds_of(costs, like, 32, recipe) == pytest.approx(2.5)
    monkeypatch.setattr(planning, "product_speed", lambda *_: 2e9)
    double = replace(costs, flops=4 * costs.flops, numbers=3 * costs.numbers)
    assert seconds_of(double, like, 64, recipe) == pytest.approx(4 + 1.5)


def test_steps_are_measured_on_random_tokens():
    recipe = recipe_of()
    found = measure(recipe, METHODS["smf"], LlamaConfig(**SMALL), 1, torch.get_num_threads())
    assert found.passes > 0 and found.step > 0 and found.efficiency > 0 and found.peak > 0 < found.before
    with pytest.raises(ConfigError, match="trains nothing"):
        measure(recipe, METHODS["base"], LlamaConfig(**SMALL), 1, torch.get_num_threads())


def test_passes_are_counted_once_for_methods_that_choose_and_move_rows_otherwise():
    recipe, config, counted = recipe_of(), Qwen2Config(**SMALL), {}
    smf = METHODS["smf"]
    others = [replace(smf, rule="all"), replace(smf, reads="gradient", lr=9.0, rows_per_step=3), METHODS["lora"]]
    for method in (smf, *others, replace(smf, train="rows+scale"), replace(smf, layers=[0])):
        assert costs_of(recipe, method, config, 3, counted) == costs_of(recipe, method, config, 3)
    assert len(counted) == 4  # rows, LoRA, a scale that trains too, another layer


@pytest.mark.parametrize("settings", [(), ('base="someone/not-here"',)])
def test_the_command_says_what_was_measured_and_what_not(
    settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    configs = []

    def alone(recipe: Recipe, method: Method, config: Any) -> Measured:
        configs.append(config)
        costs = costs_of(recipe_of(), METHODS[method.kind], Qwen2Config(**SMALL), 3)
        assert costs is not None
        return Measured(1.0, 0.1, 1e9, 2**28, 2**29, costs)

    monkeypatch.setattr(planning, "measure_alone", alone)
    monkeypatch.setattr(planning, "BACKBONES", {"tiny": SMALL})
    monkeypatch.setattr(planning, "TABLES", (16, 32))
    given = ["smf", "doctor", "--plan", "demo.toml", *(["--set", *settings] if settings else [])]
    monkeypatch.setattr(sys, "argv", given)
    cli.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "measured: 2 steps each of smf, lora, full on" in printed and "extrapolated: seconds" in printed
    assert ("not on this machine" in printed) == bool(settings) == ("a stand-in of 8 layers" in printed)
    assert [config is None for config in configs] == [not settings] * 3
    assert ("Larger models" in printed) == bool(settings)  # where nothing is known of the base itself
    monkeypatch.setattr(sys, "argv", [*given, "--larger", "--format", "json"])
    cli.main()
    found = json.loads(capsys.readouterr().out)
    seconds = {each["method"]: each["seconds"] for each in found["recipe"]}
    assert all((each is None) == (name == "base") for name, each in seconds.items())  # no step is one of the base
    assert {each["rows"] for each in found["larger"]} == {0, 256, 1024}
    names = [each["method"] for each in found["recipe"]]
    assert names == ([] if settings else list(load_recipe("demo.toml").methods))


def three_methods(folder: Path) -> Path:
    """A world whose recipe has one method of each kind that is measured, since each that is counted takes seconds."""
    recipe = make_world(folder)
    before, after = recipe.read_text().split("[methods.base]")[0], recipe.read_text().split("[methods.lora]")[1]
    recipe.write_text(f"{before}[methods.smf]\nlr = 0.1\nrule = 'tf'\n[methods.lora]{after}")
    return recipe


def print_plan_of(
    recipe: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[dict[str, Any], list[tuple[Method, bool]]]:
    """As JSON, and the methods that would have been measured, each with whether it was on the recipe's own base."""
    measured = []

    def alone(recipe: Recipe, method: Method, config: Any) -> Measured:
        measured.append((method, config is None))
        costs = costs_of(recipe, method, Qwen2Config(**SMALL) if config is None else config, 3)
        assert costs is not None and costs.memory < available_memory() / 2
        return Measured(1.0, 0.1, 1e9, 2**28, 2**29, costs)

    monkeypatch.setattr(planning, "measure_alone", alone)
    monkeypatch.setattr(sys, "argv", ["smf", "doctor", "--plan", str(recipe), "--format", "json", "--set", *settings])
    cli.main()
    return json.loads(capsys.readouterr().out), measured


HUGE = {  # settings, and the method whose sizes fit nowhere
    "memory": (["memory.n_keys=46000"], "smf"),
    "rank": (["methods.lora.r=500000000"], "lora"),
}


@pytest.mark.parametrize("case", HUGE)
def test_what_fits_nowhere_is_predicted_and_something_else_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, case: str
):
    settings, name = HUGE[case]
    found, measured = print_plan_of(three_methods(tmp_path), settings, monkeypatch, capsys)
    predicted = {each["method"]: each for each in found["recipe"]}
    assert set(predicted) == {"smf", "lora", "full"}
    assert predicted[name]["memory"] > available_memory() and predicted[name]["costs"]["flops"] > 0
    assert predicted[name]["seconds"] is None and predicted["full"]["seconds"] > 0
    assert any(line.startswith(f"{name}: no seconds, since it takes") for line in found["about"])
    assert [method.kind for method, _ in measured] == ["smf", "lora", "full"]
    assert all(own == (method.kind != name) for method, own in measured)
    assert f"{name} on a stand-in of 8 layers of width 512 with usual options, since {name} does not fit" in " ".join(
        found["about"]
    )


def test_sizes_that_no_tensor_can_have_are_refused_by_name(tmp_path: Path):
    recipe = load_recipe(three_methods(tmp_path), ["methods.lora.r=4000000000000000000"])
    with pytest.raises(ConfigError, match=r"\[methods\.lora\] cannot be counted"):
        planning.plan(recipe)


def test_many_sequences_are_predicted_from_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    large = ["train.batch_size=1000000000", "train.micro_batch_size=1000000000"]
    found, measured = print_plan_of(three_methods(tmp_path), large, monkeypatch, capsys)
    assert all(own for _, own in measured) and all(each["seconds"] is None for each in found["recipe"])
    assert {each["costs"]["tokens"] for each in found["recipe"]} == {64 * 10**9}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_predicted_from_few_sequences_is_what_all_of_them_take(name: str, monkeypatch: pytest.MonkeyPatch):
    recipe, config = recipe_of(batch_size=128, micro_batch_size=64), Qwen2Config(**SMALL)
    whole = costs_of(recipe, METHODS[name], config, 3)
    monkeypatch.setattr("smf.costs.COUNTED", 16 * 16)
    few = costs_of(recipe, METHODS[name], config, 3)
    assert whole is not None and few is not None
    assert few.flops == pytest.approx(whole.flops) and few.passes == pytest.approx(whole.passes, rel=0.02)
    assert replace(few, flops=whole.flops, passes=whole.passes) == whole


def test_what_the_base_cannot_read_is_refused_and_what_is_not_counted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    world = three_methods(tmp_path)
    with pytest.raises(ConfigError, match=r"max_length = 1000000, but the base reads 128 tokens at most"):
        planning.plan(load_recipe(world, ["train.max_length=1000000"]))
    own = ["methods.mine={kind = 'nowhere_at_all:f', lr = 0.1}", "methods.theirs={kind = 'json:dumps', lr = 0.1}"]
    found, _ = print_plan_of(world, own, monkeypatch, capsys)
    about = "\n".join(found["about"])
    assert "mine is not counted, and would not run: kind = 'nowhere_at_all:f': module 'nowhere_at_all' cannot" in about
    assert "theirs is not counted: what kind 'json:dumps' trains" in about
    assert not {"mine", "theirs"} & {each["method"] for each in found["recipe"]}


@pytest.mark.parametrize(("cut", "steps"), [("", 5), ("train.examples=16", 2), ('base="not/here"', None)])
def test_steps_are_those_of_the_data_that_is_here(tmp_path: Path, cut: str, steps: int | None):
    few = ["train.steps=0", "train.epochs=1", *filter(None, [cut])]  # 40 examples, 8 a step
    recipe, about = load_recipe(make_world(tmp_path), few), []
    assert planning._steps(recipe, about) == (steps or planning.UNKNOWN)
    assert [("1,000 steps" in line) for line in about] == ([] if steps else [True])


def test_a_measured_step_is_short_whatever_the_recipe():
    long = short(recipe_of(batch_size=512, micro_batch_size=64, max_length=4096))
    assert (long.train.batch_size, long.train.micro_batch_size, long.train.max_length) == (1, 1, planning.TOKENS)
    few = short(recipe_of(batch_size=64, micro_batch_size=32, max_length=16)).train
    assert few.micro_batch_size * few.max_length <= planning.TOKENS
