"""The shipped recipes for real models and data, at reduced size, on what lies in ../shared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smf.compare import compare
from smf.dry_run import dry_run
from smf.prepare import load
from smf.recipe import Recipe, limited, shortened
from smf.recipe_file import load_recipe
from tiny import write_lines

SMALL = ["memory.layers=[0,1]", "memory.n_keys=16", "memory.k_dim=32", "train.max_length=256", 'train.too_long="drop"']
REPLACED = '{mode = "replacement", layers = [0, 1], n_keys = 16, heads = 2, knn = 8, k_dim = 32, init = "paper"}'
OWN = {"medmcqa_paper": [f"methods.replacement-{rule}.memory={REPLACED}" for rule in ("kl", "tfidf")]}
TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It was Anna."}]


def reduced(name: str, shared: Path, output: Path, model: str = "tinystories-656k") -> Recipe:
    settings = [*SMALL, *OWN.get(name, [])]
    options = {"base": str(shared / "models" / model), "data": str(shared / "data"), "output": str(output)}
    return load_recipe(f"{name}.toml", settings, **options)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with the files that your_data.toml names, and a task of lm-evaluation-harness of one's own."""
    texts = [f"Once there was a child called number {i}, who liked the letter {chr(97 + i % 26)}." for i in range(40)]
    write_lines(tmp_path / "train.jsonl", [{"prompt": f"Say {i}:", "completion": f" It is {i}."} for i in range(30)])
    write_lines(tmp_path / "test.jsonl", [{"prompt": f"Tell {i}:", "completion": f" It is {i}."} for i in range(9)])
    write_lines(tmp_path / "general.jsonl", [{"text": text} for text in texts[:20]])
    write_lines(tmp_path / "general_test.jsonl", [{"text": text} for text in texts[20:]])
    questions = [{"q": f"{i} or {i + 1}?", "c": [" yes", " no"], "a": i % 2} for i in range(12)]
    write_lines(tmp_path / "questions.jsonl", questions)
    (tmp_path / "own_task.yaml").write_text(
        f"task: own_task\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/questions.jsonl}}\n"
        'test_split: train\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\n'
        'doc_to_target: "{{a}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n'
    )
    return tmp_path


def your_data(mine: Path, shared: Path) -> Recipe:
    tasks = ['target.eval.arc.task="lm_eval:own_task"', 'probes.hellaswag.task="lm_eval:own_task:acc_norm"']
    settings = [*SMALL, *tasks, f'lm_eval_tasks="{mine}"']
    base = str(shared / "models" / "tinystories-656k")
    return load_recipe("your_data.toml", settings, base=base, data=str(mine), output=str(mine / "runs"))


@pytest.mark.parametrize("name", ["medmcqa_paper", "medmcqa", "facts", "facts_triviaqa"])
def test_nothing_stops_the_recipes_on_local_copies_of_their_data(name: str, shared: Path, tmp_path: Path):
    plan = dry_run(reduced(name, shared, tmp_path))
    assert plan.problems == [] and plan.unchecked == []
    assert {rows for _, _, rows, *_ in plan.sets}.isdisjoint({"?", "0"})
    assert all(trained != "?" for *_, trained, _ in plan.methods)


def test_of_your_data_all_but_the_harness_tasks_is_checked(mine: Path, shared: Path):
    plan = dry_run(your_data(mine, shared))
    assert plan.problems == [] and [line.split("]")[0] for line in plan.unchecked] == [
        "[target.eval.arc",
        "[probes.hellaswag.source",
    ]


def test_the_facts_that_are_scored_are_those_that_are_taught(shared: Path, tmp_path: Path):
    recipe = reduced("facts", shared, tmp_path)
    loaded = load(recipe)
    taught = {example.id.rpartition(".")[0] for example in loaded.train}
    asked = {name: {item["id"] for item in loaded.scored[name].items} for name in ("held-out", "seen", "validation")}
    assert asked["held-out"] == asked["seen"] and not asked["held-out"] & asked["validation"]
    assert asked["held-out"] | asked["validation"] == taught and len(taught) == 1000


def scored(results: list[dict[str, Any]]) -> dict[str, set[str]]:
    return {name: set(score["metrics"]) for name, score in results[0]["scores"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["medmcqa_paper", "medmcqa", "facts", "facts_triviaqa"])
def test_every_method_of_the_recipes_trains_and_is_scored(name: str, shared: Path, tmp_path: Path):
    recipe = limited(shortened(reduced(name, shared, tmp_path), 2), 6)
    recipe = replace(recipe, train=replace(recipe.train, batch_size=4, micro_batch_size=2))
    results = compare(recipe)
    assert [result["method"] for result in results] == list(recipe.methods)
    metrics = scored(results)
    assert metrics["wikitext"] == {"nats", "perplexity", "word_perplexity"}
    if name.startswith("medmcqa"):
        assert metrics["exam"] == {"acc", "answer_norm", "letter", "loss"}
        assert metrics["triviaqa"] == {"alias", "exact_match", "f1"}
    else:
        assert metrics["gsm8k"] == {"loss", "perplexity"} and metrics["nq"] == {"f1", "exact_match"}


@pytest.mark.slow
def test_your_data_is_learned_and_scored_beside_tasks_of_the_harness(mine: Path, shared: Path):
    results = compare(shortened(your_data(mine, shared), 2))
    assert scored(results)["arc"] == scored(results)["hellaswag"] == {"score"}
    assert len(results[0]["scores"]["arc"]["records"]) == 12 and results[0]["scores"]["arc"]["role"] == "target"
