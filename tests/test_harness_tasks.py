"""Tasks of lm-evaluation-harness by name: their window, metric and filter, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from smf.doubts import doubts
from smf.errors import ConfigError, DataError
from smf.harness import check_task, task_records
from smf.prepare import load_set
from smf.recipe import asked as recipe_asked
from smf.recipe_file import load_recipe
from smf.tasks import harness_task
from tiny import WORDS, make_base, make_tokenizer, make_world, write_lines

TOKENIZER = make_tokenizer()
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {folder}/rows.jsonl}}
test_split: train
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
"""
SAY = "output_type: generate_until\ngeneration_kwargs: {until: ['.'], do_sample: false"
TWO = "filter_list: [{name: strict, filter: [{function: take_first}]}, {name: blind, filter: [{function: regex, "
TWO += "regex_pattern: '(?!)', fallback: word1}, {function: take_first}]}]\n"
OWN = {
    "says": SAY + "}\nmetric_list: [{metric: exact_match}]\n",
    "picks": "output_type: multiple_choice\ndoc_to_choice: '{{c}}'\ndoc_to_target: 0\nmetric_list: [{metric: acc}, "
    "{metric: acc_norm}, {metric: f1}]\n",
    "errors": SAY + ", max_gen_toks: 4}\nmetric_list: [{metric: exact_match, higher_is_better: false}]\n",
    "rolls": "output_type: loglikelihood_rolling\nmetric_list: [{metric: word_perplexity}]\n",
    "filters": SAY + ", max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n" + TWO,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tasks of one's own; looking through a folder takes seconds, so all tests have one."""
    made = tmp_path_factory.mktemp("tasks")
    rows = [{"q": " ".join(WORDS[i : i + 100]), "a": WORDS[i], "c": WORDS[i : i + 2]} for i in range(3)]
    write_lines(made / "rows.jsonl", rows)
    for name, text in OWN.items():
        (made / f"{name}.yaml").write_text(TASK.format(name=name, folder=made) + text)
    away = "task: away\ndataset_path: nobody/nothing\ntest_split: train\n"
    (made / "away.yaml").write_text(away + OWN["picks"])
    return str(made)


def asked(task: str) -> harness_task.HarnessTask:
    return harness_task.parse(f"lm_eval:{task}", 0)


def base_of(window: int) -> Any:
    model = make_base()
    model.config.max_position_embeddings = window
    return model


def test_tasks_have_the_models_own_window_and_not_that_of_training(folder: str):
    model, read = base_of(512), []
    model.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"].shape[1]), with_kwargs=True)
    records = task_records(model, TOKENIZER, asked("says"), folder=folder, batch_size=4)
    assert len(records) == 3 and max(read) == 100  # the whole prompt, with room for the harness's 256 tokens


def test_answers_that_the_window_has_no_room_for_are_refused_by_name(folder: str):
    with pytest.raises(ConfigError, match="'says' lets a model say 256 tokens, and the base reads 128 at most"):
        check_task(asked("says"), folder, 128)


def test_a_document_is_counted_once_after_the_first_filter_or_the_one_that_is_named(folder: str):
    model, options = base_of(512), {"folder": folder, "batch_size": 4}
    first = task_records(model, TOKENIZER, asked("filters"), **options)
    assert [record["id"] for record in first] == ["filters.0", "filters.1", "filters.2"]
    assert first == task_records(model, TOKENIZER, asked("filters:exact_match,strict"), **options)
    blind = task_records(model, TOKENIZER, asked("filters:exact_match,blind"), **options)
    assert [record["score"] for record in blind] == [0, 1, 0]
    with pytest.raises(ConfigError, match=r"'filters' has no filter 'bling'; it has \['strict', 'blind'\]"):
        check_task(asked("filters:exact_match,bling"), folder, 512)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("picks:acc_nrom", r"'picks' has no metric 'acc_nrom'; it has \['acc', 'acc_norm', 'f1'\]"),
        ("picks:f1", r"'picks': f1 is no mean over documents, .* those that are: \['acc', 'acc_norm'\]"),
        ("rolls", '\'rolls\' scores whole texts at once; use task = "wikitext" or "perplexity" of smf'),
        ("pick", "no task 'pick'; near: .*'picks'"),
    ],
)
def test_what_no_document_has_as_its_score_is_refused_before_work(task: str, said: str, folder: str):
    with pytest.raises(ConfigError, match=said):
        check_task(asked(task), folder, 512)
    check_task(asked("picks:acc_norm"), folder, 512)


def test_a_data_set_that_cannot_be_loaded_is_one_error_naming_table_task_data_set_and_remedy(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = load_recipe(make_world(tmp_path), ['probes.hs.task="lm_eval:away"', f'lm_eval_tasks="{folder}"'])
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as raised:
        load_set(recipe, recipe_asked(recipe)["hs"], TOKENIZER)
    said = str(raised.value)
    assert said.startswith("[probes.hs] lm_eval task 'away': its data set nobody/nothing cannot be loaded: ")
    assert said.endswith(". Load it once while online, or remove the table")
    assert raised.value.__cause__ is not None and isinstance(raised.value.__cause__.__cause__, OSError)


def test_a_score_that_is_better_when_lower_stands_there_as_its_negative(folder: str):
    model = base_of(512)
    assert {r["score"] for r in task_records(model, TOKENIZER, asked("errors"), folder=folder, batch_size=4)} == {0}
    model.generate = lambda input_ids, **_: torch.cat(
        [input_ids, TOKENIZER(WORDS[0], return_tensors="pt")["input_ids"].expand(len(input_ids), -1)], 1
    )
    wrong = task_records(model, TOKENIZER, asked("errors"), folder=folder, batch_size=4)
    assert [record["score"] for record in wrong] == [-1, 0, 0]


def test_a_base_that_guesses_at_a_task_of_the_harness_is_doubted(folder: str):
    records = task_records(base_of(512), TOKENIZER, asked("picks:acc_norm"), folder=folder, batch_size=4)
    assert [record["choices"] for record in records] == [2, 2, 2]
    records = [record | {"score": number % 2} for number, record in enumerate(records * 40)]
    for role, share, doubted in (("probe", 0.5, True), ("probe", 1.0, False), ("target", 0.5, False)):
        own = [record | {"score": 1} if share == 1 else record for record in records]
        score = {"role": role, "task": "lm_eval:picks:acc_norm", "metrics": {"score": share}, "records": own}
        found = doubts({"hellaswag": score})
        assert (
            found
            == [f"the base answers the probe 'hellaswag' by chance (score {share:.2f}): it has nothing to lose there"]
        ) == doubted
