"""What the commands show of a folder: all runs of a recipe's methods, of whichever command, and what failed."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import smf.compare
import smf.train
from fakes import base, recipe, result, scores, write
from smf import cli
from smf.errors import ConfigError, TrainingError
from smf.recipe import Method, Recipe
from smf.recipe_file import to_toml
from smf.runs import FAILED, read_runs
from smf.tune import at_rate

LORA = Method(kind="lora", lr=0.1)


def add(own: Recipe, name: str, held: float, *, validation: float | None = None, **changes: Any) -> Path:
    """A run as the recipe names it, at its rate or another one, under its seed or another one."""
    lr, seed = changes.get("lr", own.methods[name].lr), changes.get("seed", own.seed)
    method = replace(own.methods[name], lr=lr)
    at = replace(at_rate(own, name, lr), seed=seed)
    if method.kind == "base":
        made = base(held=held)
    else:
        made = result(name, scores(held, validation=validation), seed=seed) | {"kind": method.kind}
        made["options"] = vars(method)
    folder = Path(own.output) / at.run_id(name)
    return write(folder, made | {"comparison": own.comparison_id()}, at)


@pytest.fixture
def own(tmp_path: Path) -> Recipe:
    """A recipe, in a file beside its folder; LoRA was tuned and is best at another rate than the recipe's."""
    own = recipe(tmp_path / "runs")
    (tmp_path / "own.toml").write_text(to_toml(own))
    add(own, "base", 0.25)
    for lr, held in ((0.05, 0.4), (0.1, 0.5), (0.2, 0.6)):
        add(own, "lora", held, lr=lr)
    add(own, "lora", 0.55, seed=1)
    add(own, "smf", 0.45)
    (tmp_path / "runs" / "recipe.toml").write_text(to_toml(own))
    return own


def file_of(own: Recipe) -> Path:
    return Path(own.output).parent / "own.toml"


def published(own: Recipe) -> dict[str, Any]:
    return json.loads((Path(own.output) / "summary.json").read_text())


def chosen(own: Recipe) -> dict[str, float]:
    return {method["method"]: method["lr"] for method in published(own)["methods"]}


# -- one answer -------------------------------------------------------------------------------------------------------


def test_compare_and_report_give_one_answer(own: Recipe, capsys: pytest.CaptureFixture):
    results = smf.compare.compare(own)
    assert [r["options"]["lr"] for r in results] == [0.0, 0.1, 0.1]  # in Python, its own runs
    cli.compare(file_of(own), cli.Comparing(format="json"))
    compared = capsys.readouterr().out
    assert chosen(own) == {"lora": 0.2, "smf": 0.1} and len(published(own)["points"]) == 4
    cli.report((Path(own.output),), format="json")
    assert capsys.readouterr().out == compared


def test_the_recipe_that_was_compared_last_says_how_points_are_chosen(own: Recipe, capsys: pytest.CaptureFixture):
    for lr, loss in ((0.05, 0.1), (0.1, 2.0), (0.2, 2.0)):  # the smallest rate has the smallest loss
        folder = Path(own.output) / at_rate(own, "lora", lr).run_id("lora")
        made = json.loads((folder / "result.json").read_text())
        made["scores"]["validation"] |= scores(0.5, loss=loss)["validation"]
        write(folder, made)
    by_loss = replace(own, target=replace(own.target, metrics=["loss", "acc"]))
    file_of(own).write_text(to_toml(by_loss))
    cli.compare(file_of(own), cli.Comparing(format="json"))
    compared = capsys.readouterr().out
    assert chosen(own)["lora"] == 0.05
    cli.report((Path(own.output),), format="json")
    assert capsys.readouterr().out == compared


def test_runs_of_other_recipes_are_no_points_and_not_named(own: Recipe, capsys: pytest.CaptureFixture):
    shorter = replace(own, train=replace(own.train, steps=7))  # of which there are more runs
    for name, lr in (
        ("lora", 0.1),
        ("lora", 0.2),
        ("lora", 0.4),
        ("smf", 0.1),
        ("smf", 0.2),
        ("smf", 0.4),
        ("base", 0),
    ):
        add(shorter, name, 0.9, lr=lr)
    edited = replace(own, methods=own.methods | {"lora": replace(own.methods["lora"], r=3)})
    add(edited, "lora", 0.9)
    former = replace(own, methods=own.methods | {"former": LORA})
    add(former, "former", 0.9)
    cli.compare(file_of(own), cli.Comparing())
    assert chosen(own) == {"lora": 0.2, "smf": 0.1} and "skipped" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["smf", "lora"])
def test_methods_asked_for_are_printed_and_the_files_show_the_whole_folder(
    own: Recipe, name: str, capsys: pytest.CaptureFixture
):
    cli.compare(file_of(own), cli.Comparing(methods=(name,), format="json"))
    assert [row["method"] for row in json.loads(capsys.readouterr().out)["methods"]] == [name]
    assert chosen(own) == {"smf": 0.1, "lora": 0.2}
    assert len(published(own)["points"]) == 4  # three rates of lora, one of smf


def test_a_trial_has_a_folder_of_its_own(own: Recipe):
    file = file_of(own)
    assert (
        cli.Overrides(limit=5).load(file).output
        == cli.Overrides(max_steps=2).load(file).output
        == own.output + "-trial"
    )
    assert cli.Overrides(limit=5, output="runs/x").load(file).output == "runs/x"
    assert cli.Overrides().load(file).output == cli.Overrides(limit=0).load(file).output == own.output


def test_a_table_with_axes_stands_for_its_methods():
    methods = ["base", "g-t=1", "g-t=2-keys=4", "g-other", "g2-t=1", "h"]
    assert smf.compare.named(["g", "h", "g-t=1"], methods) == ["g-t=1", "g-t=2-keys=4", "h"]
    assert smf.compare.named([], methods) == []
    for name in ("g-o", "i", "g-t", ""):
        with pytest.raises(ConfigError, match=f"no method '{name}'; there are"):
            smf.compare.named([name], methods)


def test_the_version_is_told(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["smf", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"smf {version('sparse-memory-finetuning')}\n"


# -- what the others are compared with --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lroa", "base"])
def test_a_reference_that_is_no_method_is_refused_before_anything_runs(
    own: Recipe, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(smf.compare, "run_missing", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ConfigError, match=rf"no method '{name}' to compare with; there are \['lora', 'smf'\]"):
        cli.compare(file_of(own), cli.Comparing(against=name))


def test_the_reference_is_shown_beside_the_methods_asked_for(own: Recipe):
    cli.compare(file_of(own), cli.Comparing(methods=("smf",), against="lora"))
    assert set(chosen(own)) == {"lora", "smf"} and published(own)["reference"] == "lora"
    (Path(own.output) / "summary.json").unlink()
    cli.report((Path(own.output),), methods=("smf",), against="lora")
    assert set(chosen(own)) == {"lora", "smf"} and published(own)["reference"] == "lora"


# -- what failed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("against", [None, "lora", "third"])
def test_what_finished_is_published_before_it_is_said_what_did_not(
    own: Recipe, against: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    more = replace(own, methods=own.methods | {"third": LORA})
    file_of(own).write_text(to_toml(more))
    monkeypatch.setattr(smf.compare, "run_missing", lambda recipe, runs, ray: [(more, "third")])
    with pytest.raises(TrainingError, match=rf"did not finish: \['third, lr 0.1.*smf report {own.output}"):
        cli.compare(file_of(own), cli.Comparing(against=against))
    assert chosen(own) == {"lora": 0.2, "smf": 0.1} and "lora" in capsys.readouterr().out
    assert published(own)["reference"] == "lora"


def test_where_nothing_finished_it_is_said_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = recipe(tmp_path / "runs")
    (tmp_path / "own.toml").write_text(to_toml(own))
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(smf.compare, "run_missing", lambda recipe, runs, ray: runs)
    with pytest.raises(TrainingError, match="did not finish") as raised:
        cli.compare(tmp_path / "own.toml", cli.Comparing())
    assert "are kept" not in str(raised.value) and "The same command goes on" in str(raised.value)


def try_run(own: Recipe, name: str, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> Path:
    """One run as a process of its own does it, which leaves with an error or with nothing; returns its folder."""
    folder = smf.compare.result_path(own, name).parent

    def run_method(*_: object, **__: object) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "recipe.toml").write_text(to_toml(own))
        if error is not None:
            raise error

    monkeypatch.setattr(smf.train, "run_method", run_method)
    if error is None:
        smf.compare._run(own, name, None)  # type: ignore[arg-type]
    else:
        with pytest.raises(type(error)):
            smf.compare._run(own, name, None)  # type: ignore[arg-type]
    return folder


def test_a_run_whose_training_failed_leaves_why_until_a_later_try_succeeds(
    own: Recipe, monkeypatch: pytest.MonkeyPatch
):
    hot = at_rate(own, "lora", 0.4)
    folder = try_run(hot, "lora", monkeypatch, TrainingError("the norm is not finite"))
    written = {"method": "lora", "options": vars(hot.methods["lora"]), "seed": 0, "code": None}
    written["comparison"] = own.comparison_id()
    assert json.loads((folder / FAILED).read_text()) == written | {"reason": "the norm is not finite"}
    for found in (read_runs([Path(own.output)]), read_runs([Path(own.output)], own)):
        assert found.failed == [written | {"reason": "the norm is not finite"}]
    assert not read_runs([Path(own.output)]).skipped  # it is told once
    try_run(hot, "lora", monkeypatch, None)
    assert not (folder / FAILED).exists()
    assert "no result yet" in read_runs([Path(own.output)]).skipped[str(folder)]
    try_run(hot, "lora", monkeypatch, ConfigError("no such layer"))
    assert not (folder / FAILED).exists()


def test_failures_are_those_of_the_comparison_and_of_no_run_that_succeeded(
    own: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    error = TrainingError("diverged")
    kept = try_run(at_rate(own, "lora", 0.8), "lora", monkeypatch, error)
    try_run(at_rate(own, "lora", 0.4), "lora", monkeypatch, error)
    try_run(replace(own, train=replace(own.train, steps=7)), "lora", monkeypatch, error)  # of another comparison
    finished = try_run(own, "lora", monkeypatch, error)  # as when the file could not be removed
    elsewhere = replace(own, output=str(tmp_path / "more"))
    (tmp_path / "more").mkdir()
    try_run(replace(at_rate(elsewhere, "smf", 0.1)), "smf", monkeypatch, error)  # succeeded in the first folder
    try_run(at_rate(elsewhere, "lora", 0.8), "lora", monkeypatch, error)
    found = read_runs([Path(own.output), tmp_path / "more", Path(own.output)])
    assert [(run["method"], run["options"]["lr"]) for run in found.failed] == [("lora", 0.4), ("lora", 0.8)]
    assert (kept / FAILED).is_file() and str(finished) not in found.skipped
    cli.report((Path(own.output),), methods=("smf",))
    assert published(own)["failed"] == []
    cli.compare(file_of(own), cli.Comparing())
    assert [run["options"]["lr"] for run in published(own)["failed"]] == [0.4, 0.8]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"method": "lora"}', b"\xff\xfe"])
def test_a_broken_file_of_a_failure_is_as_none(own: Recipe, monkeypatch: pytest.MonkeyPatch, content: str | bytes):
    folder = try_run(at_rate(own, "lora", 0.4), "lora", monkeypatch, TrainingError("diverged"))
    (folder / FAILED).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read_runs([Path(own.output)])
    assert found.failed == [] and "no result yet" in found.skipped[str(folder)]
