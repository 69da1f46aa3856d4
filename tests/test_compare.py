"""The grid of runs: seeds, tuning, and what happens when it is killed."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from smf.compare import compare, result_path
from smf.errors import ConfigError
from smf.recipe_file import load_recipe
from smf.stats import change
from smf.summary import summarise
from smf.table import scores_table
from smf.train import run_method
from tiny import ONE_THREAD, command, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def scores_of(result: dict) -> dict:
    return {"scores": result["scores"], "rows": result["rows_changed"], "steps": result["steps"]}


def test_seeds_are_averaged_and_the_base_runs_once(world: Path):
    done = subprocess.run(
        command("compare", world, "--methods", "smf", "--seeds", 2, "--max-steps", 2),
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "over 2 seeds and examples" in done.stdout and "smf, lr 0.05, seed 1 (3 of 3)" in done.stderr
    recipe = load_recipe(world)
    recipe = replace(recipe, train=replace(recipe.train, steps=2), heal=replace(recipe.heal, steps=2))
    base, one, two = results = compare(recipe, ["smf"], 2)
    assert [r["method"] for r in results] == ["base", "smf", "smf"] and [r["seed"] for r in results] == [0, 0, 1]
    assert one["scores"]["exam"] != two["scores"]["exam"]
    mean = (one["scores"]["exam"]["metrics"]["loss"] + two["scores"]["exam"]["metrics"]["loss"]) / 2
    records = [run["scores"]["exam"]["records"] for run in (one, two)]
    estimate = change(records, base["scores"]["exam"]["records"], "loss")
    cell = scores_table(summarise(results, ["loss"]))[1][1][1]
    assert cell == f"{mean:.3f}\n{estimate.value:+.3f}\n[{estimate.low:+.3f}, {estimate.high:+.3f}]"


def test_methods_are_checked_before_any_runs(world: Path):
    with pytest.raises(ConfigError, match="seeds must be at least 1"):
        compare(load_recipe(world, output=str(world.parent / "own")), seeds=0)
    assert not (world.parent / "own").exists()


@pytest.mark.parametrize(
    "moment",
    [pytest.param("smf-*", marks=pytest.mark.slow), "smf-*/checkpoints/checkpoint-2/smf_complete.json"],
)
def test_killed_comparison_leaves_nothing_running_and_goes_on_to_the_same_result(tmp_path: Path, moment: str):
    recipe_file = make_world(tmp_path)
    recipe_file.write_text(
        recipe_file.read_text().replace("steps = 4\n", "steps = 40\n")
    )  # long enough to be killed in
    run = command("compare", recipe_file, "--methods", "smf", "--jobs", "2")
    subprocess.run([*run, "--output", str(tmp_path / "calm")], env=ONE_THREAD, check=True, capture_output=True)
    process = subprocess.Popen(
        run, env=ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    _wait_for(lambda: list((tmp_path / "runs").glob(moment)))
    process.send_signal(signal.SIGKILL)  # the parent alone: its run must end by itself
    process.wait()
    _wait_for(lambda: not _living(process.pid))
    result = result_path(load_recipe(recipe_file), "smf")
    assert not result.is_file()
    subprocess.run(run, env=ONE_THREAD, check=True, capture_output=True, timeout=300)
    assert ("resuming from" in result.with_name("log.txt").read_text()) == ("checkpoint" in moment)
    whole = json.loads((tmp_path / "calm" / result.relative_to(tmp_path / "runs")).read_text())
    assert scores_of(json.loads(result.read_text())) == scores_of(whole)


def test_two_comparisons_in_one_folder_do_each_run_once(tmp_path: Path):
    recipe_file = make_world(tmp_path)
    line = command("compare", recipe_file, "--methods", "smf", "lora", "full", "--seeds", "2")
    both = [
        subprocess.Popen(line, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"
    ]
    printed = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], [err[-2000:] for _, err in printed]
    assert printed[0][0] == printed[1][0]  # the same tables
    results = sorted((tmp_path / "runs").glob("*/result.json"))
    assert len(results) == 7
    for result in results:
        assert result.with_name("log.txt").read_text().count("smf: scoring exam") == 1


def test_a_broken_result_is_set_aside_and_the_run_done_again(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    recipe = load_recipe(world, output=str(tmp_path))
    compare(recipe, ["lora"])
    result = result_path(recipe, "lora")
    whole = json.loads(result.read_text())
    result.write_text(result.read_text()[:1000])
    capsys.readouterr()
    compare(recipe, ["lora"])
    assert f"{result}: it cannot be read as JSON" in capsys.readouterr().err
    assert scores_of(json.loads(result.read_text())) == scores_of(whole)
    assert len(result.with_name("result.broken.json").read_text()) == 1000
    result.write_text("{")
    assert scores_of(run_method(recipe, "lora")) == scores_of(whole)  # as `smf train` does it


def _wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 200
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _living(group: int) -> list[str]:
    """Processes of a group that run (not those that only wait to be reaped)."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [" ".join(line) for line in lines if int(line[0]) == group and not line[1].startswith("Z")]
