"""Tokenizers without a pad token, without an end-of-sequence token, or with neither train and score as others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from smf.base import load_tokenizer
from smf.data import encode
from smf.dry_run import dry_run
from smf.errors import ConfigError
from smf.harness import answer_records, choice_records
from smf.prepare import load
from smf.recipe_file import load_recipe
from smf.tasks import closed_book, triviaqa
from smf.train import run_method
from tiny import RECIPE, WORDS, make_base, make_tokenizer, make_world, write_lines

SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
KEPT = {
    "no pad": ("unk_token", "eos_token"),
    "no eos": ("pad_token", "unk_token"),
    "neither": ("unk_token",),
    "none": (),
}


def incomplete(name: str) -> PreTrainedTokenizerFast:
    special: dict[str, Any] = {kind: SPECIAL[kind] for kind in KEPT[name]}
    return PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer, **special)


def talkative_base() -> LlamaForCausalLM:
    """A base with an embedding for each token of the tokenizer and no more, that often says pads and ends."""
    model = make_base()
    model.resize_token_embeddings(len(make_tokenizer()))
    with torch.no_grad():
        model.lm_head.weight[[0, 2]] *= 6
    return model


def in_order(counts: list[int]) -> list[str]:
    return [" ".join(WORDS[7 * i : 7 * i + count]) for i, count in enumerate(counts)]


PROMPTS = in_order([3, 5, 2, 9, 4, 6, 1, 8])


@pytest.mark.parametrize("name", KEPT)
def test_choices_score_as_with_a_complete_tokenizer(name: str):
    model, tokenizer = talkative_base(), incomplete(name)
    options = [" word1", " word2 word3", " word4"]
    items = [{"id": str(i), "prompt": p, "choices": options, "answer": i % 3} for i, p in enumerate(PROMPTS)]
    ours, theirs = (choice_records(model, t, items, batch_size=5, max_length=64) for t in (tokenizer, make_tokenizer()))
    assert [record["logprobs"] for record in ours] == [pytest.approx(record["logprobs"], abs=1e-5) for record in theirs]
    assert len(tokenizer) == len(make_tokenizer()) and (tokenizer.pad_token is None) == ("pad_token" not in KEPT[name])


@pytest.mark.parametrize("end", [2, [2, 5], None])
@pytest.mark.parametrize("task", [closed_book, triviaqa])
@pytest.mark.parametrize("name", KEPT)
def test_answers_end_where_the_model_ends_and_pads_are_no_part_of_them(name: str, task: Any, end: Any):
    model, tokenizer = talkative_base(), incomplete(name)
    model.generation_config.eos_token_id = end
    ends = {2} if end is not None or "eos_token" in KEPT[name] else set()
    asked = [{"id": str(i), "prompt": prompt, "answers": ["x"]} for i, prompt in enumerate(PROMPTS)]
    options = {"batch_size": 4, "max_length": 64, "stop": task.STOP, "marks": task.marks}
    lengths = set()
    for record, item in zip(answer_records(model, tokenizer, asked, **options), asked, strict=True):
        ids, said = tokenizer(item["prompt"])["input_ids"], []
        while len(said) < 32 and not ends & set(said):
            said.append(model(torch.tensor([ids + said])).logits[0, -1].argmax().item())
        said = said[:-1] if ends & set(said) else said
        assert record["said"] == tokenizer.decode(said, skip_special_tokens=True)
        lengths.add(len(said))
    assert len(lengths) > 1 or not ends
    assert tokenizer.pad_token is None or "pad_token" in KEPT[name]


def test_no_end_is_learned_where_the_tokenizer_has_none():
    ids = {name: encode(incomplete(name), "x", "word1", " word2", 9, end=True).ids for name in KEPT}
    plain = make_tokenizer()("word1 word2")["input_ids"]
    assert ids == {"no pad": [*plain, 2], "no eos": plain, "neither": plain, "none": plain}


MORE = """
[probes.questions]
task = "closed_book"
source = {{ path = "questions.jsonl" }}

[probes.encyclopedia]
task = "wikitext"
source = {{ path = "stories.jsonl", part = "probe" }}

[probes.pairs]
task = "responses"
source = {{ path = "pairs.jsonl" }}

[probes.harness]
task = "lm_eval:own_task"
"""
OWN_TASK = """
task: own_task
dataset_path: json
dataset_kwargs: {{data_files: {folder}/data/own.jsonl}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: acc}}]
"""


def world_with(name: str, folder: Path) -> Path:
    """The tiny world with a probe of every kind, a base of as many tokens as its tokenizer, and that incomplete."""
    recipe = make_world(folder)
    recipe.write_text(f'lm_eval_tasks = "{folder}/tasks"\n{(RECIPE + MORE).format(folder=folder)}')
    talkative_base().save_pretrained(folder / "base")
    for file in (folder / "base").glob("*token*.json"):
        file.unlink()
    incomplete(name).save_pretrained(folder / "base")
    write_lines(folder / "data" / "questions.jsonl", [{"prompt": p, "answers": ["word1"]} for p in PROMPTS])
    write_lines(folder / "data" / "pairs.jsonl", [{"prompt": p, "completion": " word1 word2"} for p in PROMPTS])
    own = [{"q": p, "c": [" word1", " word2 word3"], "a": i % 2} for i, p in enumerate(["", *PROMPTS])]
    write_lines(folder / "data" / "own.jsonl", own)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "own_task.yaml").write_text(OWN_TASK.format(folder=folder))
    return recipe


def test_a_whole_run_without_special_tokens_trains_and_scores_every_kind_of_task(tmp_path: Path):
    recipe = load_recipe(world_with("none", tmp_path), ["train.score_at=[0.5]"])
    tokenizer = load_tokenizer(recipe)
    assert tokenizer.eos_token_id is None and tokenizer.pad_token_id is None
    plan = dry_run(recipe)
    assert plan.problems == [] and plan.base["answers end with"].startswith("nothing: the tokenizer has no end")
    loaded = load(recipe)
    result = run_method(recipe, "smf", loaded)
    before, after = result["on_the_way"][0]["scores"], result["scores"]
    assert set(after) == {"exam", "validation", "stories", "questions", "encyclopedia", "pairs", "harness"}
    assert after["exam"]["metrics"]["loss"] != before["exam"]["metrics"]["loss"]
    assert len(loaded.tokenizer) == len(make_tokenizer()) and loaded.tokenizer.pad_token is None


@pytest.mark.parametrize("name", ["eos", "pad"])
def test_a_token_that_the_base_has_no_embedding_of_is_refused_by_run_and_dry_run(name: str, tmp_path: Path):
    path = make_world(tmp_path)
    known = len(make_tokenizer())
    model = make_base()
    model.resize_token_embeddings(known)
    model.save_pretrained(tmp_path / "base")
    assert dry_run(load_recipe(path)).problems == []
    more = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer, **(SPECIAL | {f"{name}_token": "<new>"})
    )
    more.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError) as raised:
        load(load_recipe(path))
    said = f"the tokenizer's {name}_token '<new>' has the id {known}, but the base's embedding has {known} rows (the "
    assert said + f"tokenizer has {known + 1} tokens)" in str(raised.value)
    assert dry_run(load_recipe(path)).problems == [str(raised.value)]


def test_a_vocabulary_that_is_larger_than_the_bases_embedding_is_refused(tmp_path: Path):
    path = make_world(tmp_path)
    model = make_base()
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="last token 'word119' has the id 134, but the base's embedding has 100 rows"):
        load_tokenizer(load_recipe(path))


@pytest.mark.parametrize("model", ["trivia-7m", "tinystories-656k", "hf_stories260K"])
def test_the_tokenizers_of_real_models_are_not_refused(model: str, shared: Path):
    """That of trivia-7m has an unknown token that its class added, of which the base has no embedding."""
    recipe = load_recipe("facts.toml", base=str(shared / "models" / model))
    assert load_tokenizer(recipe)("Who was Anna?")["input_ids"]
