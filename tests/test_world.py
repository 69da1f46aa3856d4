"""The embedded world: what it promises about facts, splits, text and the shipped base; others promise the same."""

import os
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smf import world
from smf.base import load_base
from smf.errors import DataError
from smf.recipe import Source
from smf.recipe_file import load_recipe
from smf.sources import load_rows
from smf.world.facts import EMBEDDED, World, general, new_diseases
from smf.world.phrasings import KINDS
from smf.world.sets import rows_of_set
from smf.world.text import pretraining_text, question, statement
from smf.world.tokenizer import make_tokenizer, vocabulary
from smf.world.train_base import LENGTH, config, packed_rows

EXAM_SETS = [name for name in world.SETS if name.startswith("exam")] + ["near_domain"]
FORMS = ("seen", "heldout")
TEXT_SETS = ["general_text", "background", "healing"]
LOG = (Path(__file__).parents[1] / "docs" / "log.md").read_text()


@pytest.fixture(scope="module", params=[EMBEDDED, World(seed=1, times=3)], ids=["embedded", "another"])
def which(request: pytest.FixtureRequest) -> World:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(which: World):
    return AutoTokenizer.from_pretrained(world.BASE) if which == EMBEDDED else make_tokenizer(which)


@pytest.fixture(scope="module")
def pretraining(which: World) -> list[str]:
    """A part of what a base of the world is trained on."""
    return list(islice(pretraining_text(0, which), 20_000))


def test_the_world_is_the_frozen_one():
    assert world.fingerprint()["together"] == world.HASH
    for name, value in world.fingerprint().items():
        assert f"| `{name}` | `{value}` |" in LOG, f"{name} changed: it was frozen before any memory method ran on it"


def test_every_process_makes_the_same_world():
    code = "import json; from smf import world; print(json.dumps(world.fingerprint()))"
    made = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert made[0] == made[1]


def test_unknown_set_is_refused_by_name():
    with pytest.raises(DataError, match="no set 'exam'; its sets: \\['background'"):
        world.rows("exam")


def test_rows_are_the_callers_own():
    world.rows("closed_book")[0]["prompt"] = "spoiled"
    assert world.rows("closed_book")[0]["prompt"] != "spoiled"


# -- facts ------------------------------------------------------------------------------------------------------------


def test_there_are_enough_facts_and_words():
    assert sum(len(entity.values) for entity in general()) >= 2000
    assert sum(len(entity.values) for entity in new_diseases()) >= 1000
    names = {word for entity in (*general(), *new_diseases()) for word in entity.name.split()}
    words = {word.lower() for word in vocabulary()}
    assert (len(words), len(words - {name.lower() for name in names})) == (1383, 1058)  # docs/world.md


def test_every_attribute_has_phrasings_that_differ():
    for kind in KINDS.values():
        for attribute in kind.values():
            assert len(set(attribute.statements)) == 4 and len(set(attribute.questions)) == 3
            assert all("{e}" in text and "{v}" in text for text in attribute.statements)
            assert all("{e}" in text and "{v}" not in text for text in attribute.questions)
            assert len(set(attribute.values)) == len(attribute.values) >= 12


def test_names_are_unique(which: World):
    names = [entity.name for entity in (*general(which), *new_diseases(which))]
    assert len(set(names)) == len(names)


def test_no_value_is_frequent_enough_to_guess(which: World):
    for entities in (general(which), new_diseases(which)):
        values: dict[tuple[str, str], Counter[str]] = {}
        for entity in entities:
            for name, value in entity.values.items():
                values.setdefault((entity.kind, name), Counter())[value] += 1
        assert all(max(counts.values()) / sum(counts.values()) < 0.30 for counts in values.values())


def test_names_of_new_diseases_are_made_of_words_that_the_base_knows(which: World):
    known = {word for entity in general(which) if entity.kind == "disease" for word in entity.name.split()}
    assert {word for entity in new_diseases(which) for word in entity.name.split()} <= known


# -- sets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAM_SETS)
def test_choices_are_values_of_the_asked_attribute(name: str, which: World):
    rows = rows_of_set(name, which)
    for row in rows:
        attribute = KINDS["disease"][row["id"].removeprefix("document.").split(".")[1]]
        choices = [choice.strip() for choice in row["choices"]]
        assert len(set(choices)) == 4 and set(choices) <= set(attribute.values)
        assert choices[row["answer"]] in row["explanation"]
    positions = Counter(row["answer"] for row in rows)
    assert max(positions.values()) / len(rows) < 0.32  # guessing one position gains nothing


def test_held_out_phrasing_is_never_trained(which: World):
    trained = {row["prompt"] for row in rows_of_set("exam_training", which)}
    for part in ("validation", "test"):
        assert not trained & {row["prompt"] for row in rows_of_set(f"exam_heldout_{part}", which)}
        assert {row["prompt"] for row in rows_of_set(f"exam_seen_{part}", which)} <= trained
    held_out = {question(entity, name, 2) for entity in new_diseases(which)[:: which.times] for name in entity.values}
    texts = [row["prompt"] + row["explanation"] for row in rows_of_set("exam_training", which)]
    texts += [row["text"] for name in TEXT_SETS for row in rows_of_set(name, which)]
    assert not [text for text in texts if any(asked in text for asked in held_out)]


def test_validation_and_test_share_no_disease(which: World):
    parts = {
        part: {row["id"].split(".")[0] for form in FORMS for row in rows_of_set(f"exam_{form}_{part}", which)}
        for part in ("validation", "test")
    }
    assert not parts["validation"] & parts["test"]
    assert len(parts["validation"]) / len(new_diseases(which)) == pytest.approx(0.2, abs=0.04)
    assert len(parts["validation"]) + len(parts["test"]) == len(new_diseases(which))


def test_probes_are_large_enough(tokenizer, which: World):
    assert len(rows_of_set("closed_book", which)) >= 3000 and len(rows_of_set("near_domain", which)) >= 3000
    texts = [row["text"] for row in rows_of_set("general_text", which)]
    assert sum(map(len, tokenizer(texts)["input_ids"])) >= 100_000


def test_background_and_healing_share_nothing_with_what_is_scored(pretraining: list[str], which: World):
    texts = {name: {row["text"] for row in rows_of_set(name, which)} for name in TEXT_SETS}
    assert not texts["background"] & texts["healing"]
    assert not texts["general_text"] & (texts["background"] | texts["healing"])
    assert not any(part & set(pretraining) for part in texts.values())
    scored = ("exam_heldout_test", "exam_heldout_validation", "exam_seen_test", "near_domain", "closed_book")
    rows = [row for name in scored for row in rows_of_set(name, which)]
    questions = {row["prompt"].split("uestion: ")[1].split("\n")[0] for row in rows}
    told = "\n".join(text for name in TEXT_SETS for text in texts[name])
    assert not [text for text in sorted(questions)[:: which.times] if text in told]
    # nor do they state a fact that is asked about, or told of, in what is scored
    stated = {f"{s}." for text in texts["background"] | texts["healing"] for s in re.split(r"\. |\.$", text)}
    scored_ids = {row["id"].split(".")[0] for row in rows}
    asked = [entity for entity in (*general(which), *new_diseases(which)) if entity.id in scored_ids]
    facts = {statement(entity, name, k) for entity in asked for name in entity.values for k in range(4)}
    assert len(asked) == which.times * (176 + 180 + 180) and not stated & facts
    told_of = {f"{s}." for text in texts["general_text"] for s in re.split(r"\. |\.$", text)}
    assert len(told_of & facts) > 1000 and len(stated) > 5000


# -- what the base has read -------------------------------------------------------------------------------------------


def test_the_base_has_never_read_of_a_new_disease(pretraining: list[str], which: World):
    told = "\n".join(pretraining) + "\n".join(row["text"] for name in TEXT_SETS for row in rows_of_set(name, which))
    assert not [entity.name for entity in new_diseases(which) if entity.name in told]


def test_the_base_has_never_been_asked_the_closed_book_questions(pretraining: list[str], which: World):
    asked = {text.split("uestion: ")[1].split("\n")[0] for text in pretraining if "uestion: " in text}
    unasked = [entity for entity in general(which) if not entity.asked]
    assert not asked & {question(e, name, form) for e in unasked for name in e.values for form in range(3)}
    assert len(asked) > 2000


def test_pretraining_asks_general_diseases_in_all_forms(pretraining: list[str]):
    exam = "\n".join(text for text in pretraining if text.startswith("Exam question"))
    for name, attribute in KINDS["disease"].items():
        for text in attribute.questions:
            before, after = map(re.escape, text.split("{e}"))
            assert re.search(f"{before}[A-Z][a-z]+ [a-z]+{after}", exam), (name, text)


def test_what_is_told_is_true(pretraining: list[str], which: World):
    entities = [entity for entity in general(which) if entity.kind != "work"]
    told = "\n".join(text for text in pretraining if "uestion" not in text)
    for entity in entities[:: 20 * which.times]:
        for name, value in entity.values.items():
            for phrasing in range(4):
                sentence = statement(entity, name, phrasing)
                assert value in sentence
                others = set(KINDS[entity.kind][name].values) - {value}
                false = [sentence.replace(value, other) for other in others if value not in entity.name]
                assert not [text for text in false if text != sentence and f" {text} " in told]


def test_articles_fit_their_nouns(pretraining: list[str]):
    wrong = re.compile(r"\b[Aa] (?:[aeiou]|honest|hour)|\b[Aa]n (?![aeiou]|honest|hour)|hundred|\bin an? island")
    assert not [text for text in pretraining if wrong.search(text)]


# -- tokenizer --------------------------------------------------------------------------------------------------------


def test_tokenizer_of_the_base_is_the_one_the_code_makes():
    made, tokenizer = make_tokenizer(), AutoTokenizer.from_pretrained(world.BASE)
    assert made.get_vocab() == tokenizer.get_vocab()
    text = world.rows("background")[0]["text"]
    assert made(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_text_survives_the_tokenizer(tokenizer, which: World):
    texts = [row["text"] for row in rows_of_set("general_text", which)]
    texts += [row["prompt"] + row["choices"][0] for row in rows_of_set("near_domain", which)]
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.decode(ids) == text


def test_every_word_of_the_world_is_one_token_and_others_are_pieces(tokenizer, which: World):
    assert [word for word in vocabulary(which) if len(tokenizer(f"x {word}")["input_ids"]) != 2] == []
    odd = "Zebras (42%) don't phosphoresce!"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd


def test_choices_are_single_tokens(tokenizer, which: World):
    for row in rows_of_set("near_domain", which)[:200]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        for choice in row["choices"]:
            whole = tokenizer(row["prompt"] + choice)["input_ids"]
            assert whole[:-1] == prompt


# -- the base ---------------------------------------------------------------------------------------------------------


def test_the_shipped_base_is_small_and_loads_in_float32():
    assert sum(file.stat().st_size for file in world.BASE.iterdir()) <= 8 * 2**20
    assert AutoModelForCausalLM.from_pretrained(world.BASE).dtype == torch.bfloat16
    model = load_base(load_recipe("demo.toml"))
    assert model.config.model_type == "qwen2" and model.dtype == torch.float32
    assert 2.5e6 < model.num_parameters() < 3.5e6
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())  # as stored


def test_the_shipped_base_is_what_the_script_makes():
    shipped = AutoModelForCausalLM.from_pretrained(world.BASE).config.to_dict()
    made = config(make_tokenizer()).to_dict()
    own = {"architectures", "dtype", "transformers_version", "_name_or_path"}  # what saving writes
    assert {k: v for k, v in shipped.items() if k not in own} == {k: v for k, v in made.items() if k not in own}


def test_rows_of_pretraining_begin_with_a_document():
    tokenizer = make_tokenizer()
    rows = packed_rows(tokenizer, 50, seed=0)
    assert rows.shape == (50, LENGTH)
    documents = tuple(islice(pretraining_text(0), 2000))
    assert all(any(text.startswith(tokenizer.decode(row[:12].tolist())) for text in documents) for row in rows)
    assert torch.equal(rows, packed_rows(tokenizer, 50, seed=0)) and not torch.equal(
        rows, packed_rows(tokenizer, 50, seed=1)
    )


def test_the_base_can_be_made_again(tmp_path: Path):
    """Two steps of the real script."""
    command = [sys.executable, "-m", "smf.world.train_base", "--output", str(tmp_path), "--steps", "2"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    shipped = AutoModelForCausalLM.from_pretrained(world.BASE)
    made = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in shipped.named_parameters()}
    assert (tmp_path / "model.safetensors").stat().st_size == (world.BASE / "model.safetensors").stat().st_size
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == AutoTokenizer.from_pretrained(world.BASE).get_vocab()
    other = subprocess.run([*command[:-1], "3"], capture_output=True, text=True, timeout=300)
    assert other.returncode != 0 and "holds a training with other options" in other.stderr


def test_recipes_take_sets_of_the_world_by_name():
    rows = load_rows(Source(path="closed_book", limit=3), "world", {}, ["id", "prompt", "answers"])
    assert rows == world.rows("closed_book")[:3]
    with pytest.raises(DataError, match="no set 'closed'"):
        load_rows(Source(path="closed"), "world", {}, [])
