"""Learning rates are chosen from grids of one size, on validation questions."""

import itertools
import json
import math
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import smf.tune
from smf import cli
from smf.compare import result_path
from smf.errors import ConfigError, DataError
from smf.files import write_atomically
from smf.prepare import load, scored_rows, training_rows
from smf.recipe import Recipe, asked
from smf.recipe_file import load_recipe, to_toml
from smf.runs import read_runs
from smf.summary import summarise
from smf.tune import at_rate, tune, tuned_recipe, tuned_toml, tuning_table
from tiny import ONE_THREAD, command, make_world, write_lines


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def fake_run(
    best: float,
    calls: list[float],
    above: float = math.inf,
    then: float | None = None,
    digits: int | None = None,
    top: dict[str, float] | None = None,
):
    """Runs whose validation score is highest at the learning rate `best`, and `then` above a rate; None: they fail.

    The highest score is 1, or that of the method in `top`.
    """

    def run(recipe: Recipe, runs: Sequence[tuple[Recipe, str]], ray: str | None) -> list[tuple[Recipe, str]]:
        for own, name in runs:
            file = result_path(own, name)
            if file.is_file() or own.methods[name].kind == "base":
                continue
            lr = own.methods[name].lr
            calls.append(lr)
            write_atomically(file.with_name("recipe.toml"), to_toml(own))
            if lr > above and then is None:
                continue
            score = then if lr > above else 1 - abs(math.log(lr / best)) / 10 if lr else 0.0
            score = score if digits is None else round(score, digits)
            score -= 0 if top is None else 1 - top[name]
            metrics = {"acc": score, "answer_norm": score, "loss": 1 - score}
            scores = {"validation": {"role": "validation", "task": "medmcqa", "metrics": metrics, "records": []}}
            result = {"format": 1, "comparison": own.comparison_id(), "method": name, "kind": "lora", "seed": 0}
            result |= {"steps": 4, "options": {"lr": lr}, "scores": scores, "rows_changed": 0, "seconds": 1.0}
            file.write_text(json.dumps(result))
        return []

    return run


@pytest.mark.parametrize("metric", ["acc", "loss"])
@pytest.mark.parametrize(("best", "points"), [(1e-2, 5), (2e-2, 5), (4e-2, 6), (8e-2, 7), (2.5e-3, 6), (1e3, 10)])
def test_grids_have_one_size_and_grow_until_the_best_is_interior(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: float, points: int, metric: str
):
    calls: list[float] = []
    monkeypatch.setattr(smf.tune, "run_missing", fake_run(best, calls))
    recipe = load_recipe(world, output=str(tmp_path))
    recipe = replace(recipe, target=replace(recipe.target, metrics=[metric]))
    everything = tune(recipe, ["lora"])
    tuned = everything["methods"]["lora"]  # lr = 1e-2 in the recipe
    rates = [point["lr"] for point in tuned["grid"]]
    assert len(rates) == len(calls) == points and rates == sorted(rates) and len(set(rates)) == points
    assert tuned["interior"] == (points < 10)
    assert tuned_recipe(recipe, everything).methods["lora"].lr == tuned["best"]
    if tuned["interior"]:
        assert tuned["best"] == pytest.approx(best) and tuned["best"] not in (rates[0], rates[-1])


@pytest.mark.parametrize(("best", "points", "chosen"), [(2.83e-2, 6, 2e-2), (3.54e-3, 6, 2.5e-3), (1.41e-2, 5, 1e-2)])
def test_a_tie_with_the_end_of_a_grid_is_not_interior(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: float, points: int, chosen: float
):
    """The best rate lies halfway between two of the grid, whose scores are equal."""
    monkeypatch.setattr(smf.tune, "run_missing", fake_run(best, [], digits=2))
    recipe = load_recipe(world, output=str(tmp_path))
    recipe = replace(recipe, target=replace(recipe.target, metrics=["acc"]))
    tuned = tune(recipe, ["lora"])["methods"]["lora"]  # lr = 1e-2 in the recipe
    scores = [point["score"] for point in tuned["grid"]]
    assert scores.count(max(scores)) == 2 and len(scores) == points
    assert tuned["interior"] and tuned["best"] == pytest.approx(chosen)


def test_tuning_shows_every_point(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smf.tune, "run_missing", fake_run(1e-2, []))
    tuned = tune(load_recipe(world, output=str(tmp_path)), points=3)
    table = tuning_table(tuned)
    assert set(tuned["methods"]) == {"smf", "smf-all", "smf-healed", "lora", "full"}
    for entry in tuned["methods"].values():
        assert all(f"{point['lr']:g}: {point['score']:.3f}" in table for point in entry["grid"])


def test_a_rate_at_which_training_diverges_is_a_bad_one_and_not_the_end(tmp_path: Path, capfd: pytest.CaptureFixture):
    recipe = load_recipe(make_world(tmp_path), ["train.max_skipped=0"])
    tuned = tune(recipe, ["lora"], points=3, factor=1e30)
    assert "is not finite" in capfd.readouterr().err
    grid = tuned["methods"]["lora"]["grid"]
    assert grid[-1]["score"] is None and tuned["methods"]["lora"]["best"] < grid[-1]["lr"]
    assert f"{grid[-1]['lr']:g}: failed" in tuning_table(tuned)
    found = read_runs([Path(recipe.output)])
    (failed,) = found.failed
    assert failed["options"]["lr"] == grid[-1]["lr"] and "is not finite" in failed["reason"]
    assert summarise(found.results, ["loss"], failed=found.failed).rates == [len(grid)]


def test_a_rate_that_failed_is_not_tried_again_while_grids_grow(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[float] = []
    monkeypatch.setattr(smf.tune, "run_missing", fake_run(1e-3, calls, above=1e-2))
    recipe = load_recipe(world, output=str(tmp_path))
    grid = tune(recipe, ["lora"])["methods"]["lora"]["grid"]
    assert [point["score"] is None for point in grid] == [False] * (len(grid) - 2) + [True] * 2
    assert len(grid) > 5 and sorted(calls) == [point["lr"] for point in grid]
    tune(recipe, ["lora"])
    assert calls[len(grid) :] == [2e-2, 4e-2]  # another call tries them once more


@pytest.mark.parametrize("factor", [3.0, 10**0.5, 1.7])
def test_tuned_again_around_a_rounded_rate_no_rate_is_run_twice(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
):
    calls: list[float] = []
    recipe = load_recipe(world, output=str(tmp_path))
    for best in (2e-2 / factor**3, 2e-2 / factor, 2e-2 * factor**2, 2e-2):
        monkeypatch.setattr(smf.tune, "run_missing", fake_run(best, calls))
        for file in tmp_path.glob("*/result.json"):
            file.unlink()  # so that it is done again with another best rate
        recipe = tuned_recipe(recipe, tune(at_rate(recipe, "lora", 2e-2), ["lora"], factor=factor))
    rates = sorted(set(calls))
    assert len(rates) > 5 and all(high / low > 1.5 for low, high in itertools.pairwise(rates))
    assert 2e-2 in rates
    for start in rates:
        tune(at_rate(recipe, "lora", start), ["lora"], factor=factor)
    rates = sorted(set(calls))
    assert all(high / low > 1.5 for low, high in itertools.pairwise(rates))


@pytest.mark.parametrize("metric", ["acc", "loss"])
@pytest.mark.parametrize(("top", "steps"), [(1.0, 0), (1.05, 0), (1.08, 1), (1.15, 2), (1.4, 5), (0.9, None)])
def test_matched_methods_take_the_lowest_rate_that_learns_as_much(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top: float, steps: int | None, metric: str
):
    """A score falls by log(2) / 10, .069, with each step of the grid away from the best rate."""
    calls: list[float] = []
    monkeypatch.setattr(smf.tune, "run_missing", fake_run(1e-2, calls, top={"lora": 1.0, "full": 0.8, "smf": top}))
    recipe = load_recipe(world, output=str(tmp_path))
    recipe = replace(recipe, target=replace(recipe.target, metrics=[metric]))
    for name in ("lora", "full", "smf"):
        recipe = at_rate(recipe, name, 1e-2)
    recipe = replace(recipe, match=["lora", "full"])
    found = tune(recipe, ["smf"])
    assert list(found["methods"]) == ["smf", "lora", "full"]  # those that it is matched with are tuned too
    lora, full, own = (found["methods"][name] for name in ("lora", "full", "smf"))
    assert lora["best"] == full["best"] == 1e-2 and "reached" not in lora
    assert own["interior"] and own["best"] == pytest.approx(1e-2 / 2 ** (steps or 0))
    assert ("reached" in own) == (steps is not None)
    table = tuning_table(found)
    assert ("the lowest that reaches" in table) == (steps is not None)
    lowest = own["grid"][0]["lr"]
    assert lowest < own["best"] and (steps or 0) < len(own["grid"]) <= 10
    tuned = tuned_recipe(recipe, found)
    assert tuned.methods["smf"].lr == own["best"]
    tuned_file = tmp_path / "tuned.toml"
    tuned_file.write_text(tuned_toml(recipe, found, tmp_path))
    assert "# Of the methods beside lora, full: the lowest that learn as much" in tuned_file.read_text()
    again = load_recipe(tuned_file)  # with which smf compare shows the chosen rates
    assert again.match == ["lora", "full"] and again.run_id("smf") == tuned.run_id("smf")
    assert replace(again, match=[]).run_id("smf") == again.run_id("smf")  # finished runs are kept, matched or not


def test_what_is_matched_is_checked_when_the_recipe_is_read_and_axes_stand_for_all_that_they_make(world: Path):
    with pytest.raises(ConfigError, match=r"match = \['lore'\]: there is no method 'lore'"):
        load_recipe(world, ["match=['lore']"])
    made = load_recipe(world, ["match=['lora']", "methods.lora.axes={r=[2, 4]}"])
    assert made.match == ["lora-r=2", "lora-r=4"]


def test_tuning_without_validation_rows_is_refused(world: Path):
    recipe = load_recipe(world)
    with pytest.raises(ConfigError, match=r"no \[target.validation\]"):
        tune(replace(recipe, target=replace(recipe.target, validation=None)))
    for points, factor in ((2, 2.0), (4, 2.0), (5, 1.0)):
        with pytest.raises(ConfigError, match="odd number"):
            tune(recipe, points=points, factor=factor)
    with pytest.raises(ConfigError, match=r"no method 'smff'; there are"):
        tune(recipe, ["smff"])
    with pytest.raises(ConfigError, match=r"no method 'lore'; there are"):
        tune(replace(recipe, match=["lore"]))
    with pytest.raises(ConfigError, match="'base' has no learning rate"):
        tune(replace(recipe, match=["base"]))


def test_what_is_said_where_there_are_no_validation_rows_makes_them():
    with pytest.raises(ConfigError) as raised:
        tune(load_recipe("your_data.toml"))
    (setting,) = re.findall(r"--set (\S+)\.", str(raised.value))
    validation = load_recipe("your_data.toml", [setting]).target.validation
    assert validation is not None and validation.path == "validation.jsonl"


@pytest.mark.parametrize("column", ["prompt", "messages", "text"])
def test_the_share_of_training_rows_that_docs_show_is_not_trained(column: str, tmp_path: Path):
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    (shown,) = re.findall(r"```toml\n(\[parts\].*?)```", text, re.DOTALL)
    said = [{"role": "user", "content": "ask"}]
    own: Any = {
        "prompt": lambda i: {"prompt": f"ask {i}", "completion": "say"},
        "messages": lambda i: {"messages": [*said, {"role": "assistant", "content": f"say {i}"}]},
        "text": lambda i: {"text": f"say {i}"},
    }[column]
    write_lines(tmp_path / "train.jsonl", [own(i) for i in range(200)])
    recipe = load_recipe("your_data.toml", [shown.replace('"prompt"', f'"{column}"')], data=str(tmp_path))
    train, tested = training_rows(recipe), scored_rows(recipe, asked(recipe)["validation"])
    numbers = [row.number for row in (*train, *tested)]
    assert sorted(numbers) == list(range(1, 201)) and 0 < len(tested) < 30


def test_tune_command_resumes_and_its_runs_are_those_of_compare(tmp_path: Path):
    recipe = make_world(tmp_path)
    line = command("tune", recipe, "--methods", "full", "--points", 3, "--max-steps", 2)
    line += ["--output", str(tmp_path / "runs")]
    for _ in range(2):
        done = subprocess.run(line, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "finished, kept" in done.stderr and "| full |" in done.stdout
    runs = tmp_path / "runs"
    tuned = json.loads((runs / "tune.json").read_text())["methods"]["full"]
    assert len(tuned["grid"]) >= 3 and all("stories" in point["scores"] for point in tuned["grid"])
    before = sorted(runs.glob("full-*"))
    assert load_recipe(runs / "tuned.toml").methods["full"].lr == tuned["best"]
    done = subprocess.run(
        command("compare", runs / "tuned.toml", "--methods", "full", "--seeds", 2, "--format", "json"),
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(sorted(runs.glob("full-*"))) == len(before) + 1  # the second seed alone was run
    assert [len(method["runs"]) for method in json.loads(done.stdout)["methods"]] == [2]


# -- tune.json --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned_file(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a tuning of LoRA alone, best at 2e-2."""
    monkeypatch.setattr(smf.tune, "run_missing", fake_run(2e-2, []))
    tune_again(world, tmp_path, "lora")
    return tmp_path / "tune.json"


def tune_again(world: Path, output: Path, *names: str, **changes: Any) -> dict[str, Any]:
    cli.tune(world, names, **({"points": 3} | changes), overrides=cli.Overrides(output=str(output)))
    return json.loads((output / "tune.json").read_text(), parse_constant=lambda word: pytest.fail(word))["methods"]


def test_methods_tuned_before_keep_their_rates(
    world: Path, tmp_path: Path, tuned_file: Path, capsys: pytest.CaptureFixture
):
    lora = json.loads(tuned_file.read_text())["methods"]["lora"]
    methods = tune_again(world, tmp_path, "full", "smf")
    assert list(methods) == ["smf", "lora", "full"] and methods["lora"] == lora  # in the recipe's order
    assert load_recipe(tmp_path / "tuned.toml").methods["lora"].lr == lora["best"] == 2e-2
    printed = capsys.readouterr()
    assert "| lora |" in printed.out and printed.err == ""
    assert tune_again(world, tmp_path, "full") == methods


def test_the_tuned_recipe_says_what_was_tuned(world: Path, tmp_path: Path, tuned_file: Path):
    first, *rest = (tmp_path / "tuned.toml").read_text().splitlines()
    assert first == f"# smf compare {tmp_path / 'tuned.toml'} --seeds 5"
    untuned = next(line for line in rest if line.startswith("# Not tuned, at the recipe's own rates: "))
    assert "full" in untuned and "lora" not in untuned and "base" not in untuned


def test_a_method_that_is_no_better_than_the_base_is_said_to_be(tuned_file: Path):
    tuned = json.loads(tuned_file.read_text())
    best = max(-point["score"] for point in tuned["methods"]["lora"]["grid"])  # the metric is a loss
    for before, said in ((-best, True), (-best - 1e-9, True), (-best + 1, False), (None, False)):
        assert ("no better than the base" in tuning_table(tuned | {"base": before})) == said


@pytest.mark.parametrize(
    "changes", [{"factor": 3.0}, {"points": 5}, {"match": ("full",)}, {"metric": "acc"}, {"steps": 3}]
)
def test_rates_of_other_grids_or_another_comparison_are_not_kept(
    world: Path, tmp_path: Path, tuned_file: Path, capsys: pytest.CaptureFixture, changes: dict[str, Any]
):
    recipe = load_recipe(world)
    if "metric" in changes:
        recipe = replace(recipe, target=replace(recipe.target, metrics=[changes.pop("metric")]))
    if "steps" in changes:
        recipe = replace(recipe, train=replace(recipe.train, steps=changes.pop("steps")))
    file = tmp_path / "changed.toml"
    file.write_text(to_toml(recipe))
    assert list(tune_again(file, tmp_path, "full", **changes)) == ["full"]
    assert f"{tuned_file} is of another comparison, metric, match or size of grids" in capsys.readouterr().err


def test_methods_that_the_recipe_has_no_longer_are_dropped(
    world: Path, tmp_path: Path, tuned_file: Path, capsys: pytest.CaptureFixture
):
    recipe = load_recipe(world)
    file = tmp_path / "changed.toml"
    methods = {name: method for name, method in recipe.methods.items() if name != "lora"}
    file.write_text(to_toml(replace(recipe, methods=methods)))
    assert list(tune_again(file, tmp_path, "full")) == ["full"]
    file.write_text(to_toml(replace(recipe, methods=methods | {"full": replace(methods["full"], kind="lora")})))
    assert list(tune_again(file, tmp_path, "smf")) == ["smf"]  # full is another method now
    assert f"{tuned_file}: full is not kept: there is no run of it" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["half", "list", "entry", "rate", "bytes"])
def test_a_broken_file_is_replaced_and_said(
    world: Path, tmp_path: Path, tuned_file: Path, capsys: pytest.CaptureFixture, end: str
):
    text = tuned_file.read_text()
    broken = {
        "half": text[: len(text) // 2],
        "list": "[]",
        "entry": text.replace('"interior"', '"inside"'),
        "rate": text.replace('"lr": 0.02', '"lr": "0.02"'),
    }
    tuned_file.write_bytes(b"\xff" if end == "bytes" else broken[end].encode())
    assert list(tune_again(world, tmp_path, "full")) == ["full"]
    assert f"smf: {tuned_file} cannot be read (" in capsys.readouterr().err


@pytest.mark.parametrize("best", ["0.03", "NaN", '"0.02"'])
def test_a_rate_without_a_run_is_not_kept(
    world: Path, tmp_path: Path, tuned_file: Path, capsys: pytest.CaptureFixture, best: str
):
    tuned_file.write_text(tuned_file.read_text().replace('"best": 0.02', f'"best": {best}'))
    assert list(tune_again(world, tmp_path, "full")) == ["full"]
    assert "lora is not kept: there is no run of it" in capsys.readouterr().err


def test_scores_of_training_that_diverged_are_null(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(smf.tune, "run_missing", fake_run(5e-3, [], above=1e-2, then=math.nan))
    (entry,) = tune_again(world, tmp_path, "lora").values()
    assert entry["grid"][-1]["score"] is entry["grid"][-1]["scores"]["validation"]["acc"] is None
    assert "0.02: failed" in capsys.readouterr().out
    tune_again(world, tmp_path, "full")


def test_validation_rows_may_not_be_trained_on(tmp_path: Path):
    recipe_file = make_world(tmp_path)
    recipe_file.write_text(recipe_file.read_text().replace('"validation.jsonl"', '"train.jsonl"'))
    with pytest.raises(DataError, match="both trained and scored"):
        load(load_recipe(recipe_file))


def test_probe_may_not_take_the_validation_sets_name(tmp_path: Path):
    recipe_file = make_world(tmp_path)
    recipe_file.write_text(recipe_file.read_text().replace("[probes.stories]", "[probes.validation]"))
    with pytest.raises(ConfigError, match="'validation' is the name of the set"):
        load_recipe(recipe_file)


def test_validation_rows_may_not_be_scored_too(world: Path):
    recipe = load_recipe(world)
    with pytest.raises(DataError, match="12 validation rows are in"):
        tune(replace(recipe, target=replace(recipe.target, validation=recipe.target.eval["exam"])))
