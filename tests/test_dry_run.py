"""A dry run says what loading would refuse, and what each set is scored by."""

from __future__ import annotations

from pathlib import Path

import pytest

from smf.dry_run import Plan, dry_run
from smf.errors import SmfError
from smf.prepare import load
from smf.recipe_file import load_recipe
from tiny import make_world, write_lines


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def plan_of(world: Path, *settings: str) -> Plan:
    return dry_run(load_recipe(world, settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (['target.eval.exam.path="train.jsonl"'], "40 rows are both trained and scored"),
        (['target.validation.path="eval.jsonl"'], "12 validation rows are in target.eval too"),
        (['heal.source.part="probe"'], "texts of [heal] are scored as well"),
        (['replay={source={path="stories.jsonl", part="probe"}}', "methods.lora.replay=0.5"], "texts of [replay]"),
    ],
)
def test_overlaps_that_loading_refuses_are_problems(world: Path, settings: list[str], said: str):
    (problem,) = plan_of(world, *settings).problems
    assert said in problem
    with pytest.raises(SmfError) as raised:
        load(load_recipe(world, settings))
    assert str(raised.value) == problem


def test_text_that_no_method_trains_on_may_be_scored(world: Path):
    plan = plan_of(world, 'replay={source={path="stories.jsonl", part="probe"}}')
    assert plan.problems == [] and plan.unchecked == []


def test_tasks_of_the_harness_are_looked_up_and_what_sets_are_scored_by_is_shown(world: Path, tmp_path: Path):
    write_lines(tmp_path / "rows.jsonl", [{"q": "word1"}])
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/rows.jsonl}}\ntest_split: train\n"
        "output_type: multiple_choice\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    names = {"one": "own:acc_norm", "two": "own:acc_nrom", "three": "owm", "four": "wikitext"}
    probes = [f'probes.{name}.task="lm_eval:{task}"' for name, task in names.items()]
    plan = plan_of(world, f'lm_eval_tasks="{tmp_path}"', *probes)
    two, three, four = plan.problems
    assert "'own' has no metric 'acc_nrom'; it has ['acc', 'acc_norm']" in two
    assert "no task 'owm'; near: ['own'" in three and "'wikitext' scores whole texts at once" in four
    shown = {table: scores for table, *_, scores in plan.sets}
    assert shown["target.eval.exam"] == "acc, answer_norm, letter, loss" and shown["probes.one.source"] == "acc_norm"
    assert shown["target.train"] == "" and len(plan.unchecked) == len(names)
