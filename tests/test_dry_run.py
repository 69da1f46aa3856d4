"""A dry run says what loading would refuse, and what each set is scored by."""

from __future__ import annotations

import logging
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from smf import cli, methods
from smf.base import check_models, load_base
from smf.doubts import warmup_doubts
from smf.dry_run import Plan, dry_run
from smf.errors import ConfigError, SmfError
from smf.options import Overrides
from smf.plan import plan as costs_plan
from smf.prepare import check_output, load
from smf.recipe_file import load_recipe
from tiny import WORDS, make_base, make_tokenizer, make_world, question, write_lines


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def plan_of(world: Path, *settings: str, methods: str = "") -> Plan:
    """Of the methods whose names begin so; those of another kind are counted in vain where only data are looked at."""
    recipe = load_recipe(world, settings)
    return dry_run(replace(recipe, methods={n: m for n, m in recipe.methods.items() if n.startswith(methods)}))


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


def test_a_dry_run_ends_with_a_verdict_and_leaves_nothing_behind(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Also where nothing of a run's own folders is there yet."""
    output = tmp_path / "some" / "where"
    monkeypatch.setattr(sys, "argv", ["smf", "compare", str(world), "--dry-run", "--set", "memory.layers=[1, 2]"])
    cli.compare(world, dry_run=True, overrides=Overrides(output=str(output)))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        f"Nothing here would stop this run; start it: smf compare {world} --set 'memory.layers=[1, 2]'; results go to "
        f"{output}"
    )
    with pytest.raises(ConfigError, match="1 problem would stop this run; it is listed above"):
        cli.compare(world, dry_run=True, overrides=Overrides(output=str(output), set=("memory.layers=[9]",)))
    two = ("memory.layers=[9]", "target.train.path=none.jsonl")
    with pytest.raises(ConfigError, match="2 problems would stop this run; they are listed above"):
        cli.compare(world, dry_run=True, overrides=Overrides(output=str(output), set=two))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    (problem,) = plan_of(world, f"output={tmp_path}/file/runs").problems
    assert problem.startswith(f"output = '{tmp_path}/file/runs' cannot be written: ")
    for make in (True, False):
        with pytest.raises(ConfigError, match="cannot be written: no name of a file has a null character"):
            check_output(Path("a\0b"), make=make)


@pytest.mark.parametrize(
    ("table", "base"),
    [
        ("target.train", ""),
        ("background.source", ""),
        ("probes.stories.source", ""),
        ("target.eval.exam", 'base="nobody/nothing"'),
        ("heal.source", 'base="nobody/nothing"'),
    ],
)
def test_a_missing_file_is_named_with_its_table_and_the_hub_where_there_is_one(world: Path, table: str, base: str):
    settings = [f"{table}.path=none.jsonl", *filter(None, [base])]
    folder = world.parent / "data"
    said = (
        f"[{table}]: no data file at {folder}/none.jsonl; set its path, or give --data the folder that has 'none.jsonl'"
    )
    assert plan_of(world, *settings, methods="smf").problems == [said]
    assert plan_of(world, *settings, f"{table}.hub=a/b", methods="smf").problems == [f"{said}, or hub, which has a/b"]
    if not base:
        with pytest.raises(SmfError, match=re.escape(said)):
            load(load_recipe(world, settings))


def test_the_tokenizer_does_not_warn_of_what_is_cut(world: Path):
    (own := make_tokenizer()).model_max_length = 4
    own.save_pretrained(world.parent / "short")
    make_base().save_pretrained(world.parent / "short")
    recipe, said = load_recipe(world, [f"base={world.parent}/short"]), []
    logger = logging.getLogger("transformers.tokenization_utils_base")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        load(recipe)
        assert said == []
        own(" ".join(WORDS))  # which says so where nobody asks it not to
        assert len(said) == 1
    finally:
        logger.removeHandler(handler)


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
    plan = plan_of(world, f'lm_eval_tasks="{tmp_path}"', *probes, methods="base")
    two, three, four = plan.problems
    assert "'own' has no metric 'acc_nrom'; it has ['acc', 'acc_norm']" in two
    assert "no task 'owm'; near: [" in three and "'own'" in three and "'wikitext' scores whole texts at once" in four
    shown = {table: scores for table, *_, scores in plan.sets}
    assert shown["target.eval.exam"] == "acc, answer_norm, letter, loss" and shown["probes.one.source"] == "acc_norm"
    assert shown["target.train"] == "" and len(plan.unchecked) == len(names)


def test_memory_is_that_of_the_most_of_training_healing_and_scoring(world: Path):
    """The base's is scoring alone: 160 words in float32, of a batch and of a slice."""

    def memory(name: str, *settings: str) -> float:
        recipe = load_recipe(world, settings)
        (row,) = dry_run(replace(recipe, methods={name: recipe.methods[name]})).methods
        return float(row[-1])

    big = "eval_batch_size=4000000"  # sequences of 64 to 80 tokens
    expected = 4_000_000 * 80 * 160 * 4 / 2**30
    longest = 'probes.stories.source={path="stories.jsonl"}'
    assert memory("base") == 0 and memory("base", big, longest, "train.max_length=80") == pytest.approx(
        expected, rel=0.01
    )
    assert memory("base", big, longest, "train.max_length=80", "divergence=2") == pytest.approx(2 * expected, rel=0.01)
    settings = ["train.micro_batch_size=4000000", "train.batch_size=4000000"]
    rows_alone = memory("smf-healed", *settings, "methods.smf-healed.heal=false")
    assert memory("smf-healed", *settings) > rows_alone > memory("base", *settings) == 0
    table = "methods.smf-healed.memory={layers=[2], n_keys=2048, heads=2, knn=2, k_dim=8, init='paper'}"
    rows = ["methods.smf-healed.rows_per_step=100", "train.micro_batch_size=1", "train.batch_size=1"]
    plain = memory("smf-healed", table, "methods.smf-healed.heal=false", *rows)
    assert plain == pytest.approx(2048**2 * 32 * 4 / 2**30, abs=0.1)  # the table: few rows of it train
    healed = memory("smf-healed", table, *rows, "train.micro_batch_size=99999", "train.batch_size=99999")
    assert healed > 4 * plain  # its moments and old rows, all of them
    sets = plan_of(world, methods="smf").sets
    (tokens,) = [tokens for table, _, _, tokens, _ in sets if table == "background.source"]
    assert tokens.endswith("each")


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("/no/such/folder", "base = '/no/such/folder': there is no model folder; give --base a folder or a hub name"),
        ("no name", "base = 'no name' is neither a model folder nor a name on the hub: HFValidationError: "),
    ],
)
def test_a_base_that_is_nowhere_is_a_problem_of_a_dry_run_and_an_error_of_a_plan(world: Path, base: str, said: str):
    plan = plan_of(world, f'base="{base}"')
    (problem,) = plan.problems
    assert problem.startswith(said) and not any("the base" in line and "hub" in line for line in plan.unchecked)
    with pytest.raises(ConfigError, match=said):
        costs_plan(load_recipe(world, [f'base="{base}"']))


WRONG = "layer index 9 is out of range: the model has 4 decoder layers (0 to 3; from the end, -1 to -4); "
LAST = "; [-1] is the last layer"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["memory.layers=[1, 9]"],
            f"[memory] layers = [1, 9]: {WRONG}set memory.layers, or methods.NAME.layers{LAST}",
        ),
        (
            ["methods.smf-healed.memory.layers=[9]"],
            f"[methods.smf-healed.memory] layers = [9]: {WRONG}set methods.smf-healed.memory.layers, or "
            f"methods.NAME.layers{LAST}",
        ),
        (["methods.lora.layers=[9]"], f"[methods.lora] layers = [9]: {WRONG}set methods.lora.layers{LAST}"),
    ],
)
def test_layers_that_there_are_not_are_one_problem_naming_table_and_key(world: Path, settings: list[str], said: str):
    assert plan_of(world, *settings).problems == [said]
    with pytest.raises(ConfigError) as raised:
        check_models(load_recipe(world, settings))
    assert str(raised.value) == said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (['target.train.path="none.jsonl"'], "no data file at"),
        (['target.train.path="columns.jsonl"'], "columns.jsonl has no column 'opa'"),
        (['target.eval.exam.path="counted.jsonl"'], "counted.jsonl, row 1: cop = 4; expected"),
        (['heal.source.column="story"'], "stories.jsonl has no column 'story'"),
        (['probes.stories.source.column="story"'], "stories.jsonl has no column 'story'"),
        (['probes.own={task="responses", source={path="talk.jsonl"}}'], "talk.jsonl, row 2: no message has the role"),
        (['probes.sums={task="gsm8k_loss", source={path="train.jsonl"}}'], "train.jsonl has no column 'answer'"),
        (["target.explanation=true", 'target.train.path="bare.jsonl"'], "bare.jsonl has no column 'exp'"),
    ],
)
def test_files_are_checked_though_the_base_is_on_the_hub(world: Path, settings: list[str], said: str):
    rng = random.Random(0)
    rows = [question(i, rng) for i in range(4)]
    without = {name: [{k: v for k, v in row.items() if k != name} for row in rows] for name in ("opa", "exp")}
    write_lines(world.parent / "data" / "columns.jsonl", without["opa"])
    write_lines(world.parent / "data" / "bare.jsonl", without["exp"])
    write_lines(world.parent / "data" / "counted.jsonl", [row | {"cop": 4 - i} for i, row in enumerate(rows)])
    talk = [[{"role": "user", "content": "word1"}, {"role": "assistant", "content": "word2"}]]
    write_lines(world.parent / "data" / "talk.jsonl", [{"messages": said} for said in [*talk, talk[0][:1]]])
    away = 'base="nobody/nothing"'
    assert plan_of(world, away).problems == []
    plan = plan_of(world, away, *settings)
    assert len(plan.problems) == 1 and said in plan.problems[0]


def test_without_the_bases_tokenizer_rows_are_counted_and_tokens_are_not(world: Path):
    plan = plan_of(world, 'base="nobody/nothing"')
    assert {table: (rows, tokens) for table, _, rows, tokens, _ in plan.sets}["target.train"] == ("40", "")
    unchecked = "\n".join(plan.unchecked)
    assert "train.jsonl: its tokens, for want of the base's tokenizer" in unchecked
    assert "whether rows are both trained and scored" in unchecked
    trained = {name: steps for name, _, _, steps, *_ in plan.methods}
    assert trained["smf"] == "4"


def test_a_budget_of_tokens_that_the_base_cannot_read_is_refused(world: Path):
    settings = ("train.max_length=129",)  # of 128 positions
    (problem,) = plan_of(world, *settings, methods="base").problems
    assert problem == "[train] max_length = 129, but the base reads 128 tokens at most; set it to 128 or less"
    with pytest.raises(ConfigError) as raised:
        load(load_recipe(world, settings))
    assert str(raised.value) == problem
    assert plan_of(world, "train.max_length=128", methods="base").problems == []
    long = plan_of(world, "train.steps=1000000000", "target.train.path=none.jsonl", methods="base").problems
    assert len(long) == 2 and any("at most 100,000,000 can be put in order" in problem for problem in long)


def test_of_the_backgrounds_documents_as_much_is_read_as_the_base_reads(world: Path, capsys):
    write_lines(world.parent / "data" / "long.jsonl", [{"text": " ".join(WORDS[:90] * 2)}])
    settings = ("background.max_length=512", 'background.source={path="long.jsonl", part=""}')
    plan = plan_of(world, *settings, methods="smf")
    assert plan.problems == [] and "[background] max_length = 512, but the base reads 128" in capsys.readouterr().err
    assert [tokens for table, *_, tokens, _ in plan.sets if table == "background.source"] == ["128, at most 128 each"]
    recipe = load_recipe(world, settings)
    loaded = load(recipe)
    assert "[background] max_length = 512, but the base reads 128" in capsys.readouterr().err
    method = recipe.methods["smf"]
    optimizer = methods.smf(methods.attach(load_base(recipe), method, recipe), method, recipe, loaded).optimizer
    (counts,) = {counts.total for counts in optimizer.background.layers.values()}  # type: ignore[union-attr]
    assert counts == 128 * recipe.memory.heads * recipe.memory.knn


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
@pytest.mark.parametrize(("warmup", "steps"), [(100, 3), (10, 3), (5, 5), (1, 1)])
def test_the_rate_that_a_training_within_its_warm_up_reaches_is_said(schedule: str, warmup: int, steps: int):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    (doubt,) = warmup_doubts(warmup, steps)
    assert f"only reaches {max(rates):.0%} of lr" in doubt


def test_a_training_that_is_mostly_warm_up_is_doubted_before_it_runs(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    few = ("train.steps=0", "train.epochs=1")  # 40 examples, 8 a step
    (doubt,) = plan_of(world, *few, "train.warmup_steps=100", methods="lora").doubts
    assert "the training of 5 steps ends within its warm-up of 100" in doubt and "reaches 4% of lr" in doubt
    (doubt,) = plan_of(world, *few, "train.warmup_steps=3", methods="lora").doubts
    assert "more than half of the training of 5" in doubt
    assert plan_of(world, *few, "train.warmup_steps=2", methods="lora").doubts == plan_of(world).doubts == []
    argv = ["smf", "compare", str(world), "--output", str(tmp_path), "--methods", "lora"]
    argv += ["--set", *few, "train.warmup_steps=10"]

    def run(*more: str) -> Any:
        monkeypatch.setattr(sys, "argv", [*argv, *more])
        cli.main()
        return capsys.readouterr()

    assert "Warnings:\n  the training of 5 steps ends" in run("--dry-run").out
    trial = run("--dry-run", "--max-steps", "4")
    assert "a trial of 4 steps: its warm-up has 2 in place of 10" in trial.err and "Warnings" not in trial.out
    assert run().err.count("smf: warning: the training of 5 steps ends within its warm-up of 10") == 1
