"""Tasks: what they ask of real and hand-made rows, and which rows they refuse, by file, row and column."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smf.data import Collator, Example
from smf.errors import ConfigError, DataError
from smf.evaluate import example_losses
from smf.harness import choice_records
from smf.prepare import load_set
from smf.recipe import Source, asked
from smf.recipe_file import load_recipe
from smf.sources import load_rows
from smf.tasks import (
    closed_book,
    facts,
    find_task,
    gsm8k_loss,
    lessons,
    medmcqa,
    nq_open,
    responses,
    triviaqa,
    wikitext,
)
from tiny import WORDS, make_base, make_tokenizer, make_world, question, write_lines

TOKENIZER = make_tokenizer()


def rows_of(shared: Path, path: str, **options: Any) -> list[Any]:
    return load_rows(Source(path=path, **options), str(shared / "data"), {}, [])


# -- questions and answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        ({"prompt": "Say it:", "answers": ["a", "b"]}, "Say it:", ["a", "b"]),
        ({"question": "Who?", "answer": {"value": "A", "aliases": ["B", "A"]}}, "Question: Who?\nAnswer:", ["A", "B"]),
        ({"question": "Who?", "answer": "A", "aliases": ["B", "A"]}, "Question: Who?\nAnswer:", ["A", "B"]),
        ({"question": "who", "answer": ["A", "B"]}, "Question: who\nAnswer:", ["A", "B"]),
        ({"question": "Who?", "possible_answers": '["A", "B"]'}, "Question: Who?\nAnswer:", ["A", "B"]),
        ({"question": "Who?", "aliases": ["A"]}, "Question: Who?\nAnswer:", ["A"]),
        ({"question": "Who?", "answer": "A"}, "Question: Who?\nAnswer:", ["A"]),
        ({"question": "Who?", "answer": '["A", "B"]'}, "Question: Who?\nAnswer:", ["A", "B"]),
        ({"question": "Who?", "answers": '["A", "B"]', "answer": "B"}, "Question: Who?\nAnswer:", ["B", "A"]),
        ({"question": "Who?", "answer": "[sic] A"}, "Question: Who?\nAnswer:", ["[sic] A"]),
    ],
)
def test_every_schema_of_questions_and_answers_is_read(row, prompt, answers):
    (selected,) = closed_book.select([row], "file")
    assert (selected["prompt"], selected["answers"]) == (prompt, answers)
    assert closed_book.select([row | {"id": 7}], "file")[0]["id"] == "7"
    assert closed_book.select([row | {"question_id": "q"}], "file")[0]["id"] == "q"
    assert len(closed_book.select([row, row], "file")) == 1  # nothing tells them apart
    assert len(closed_book.select([row | {"id": 1}, row | {"id": 2}], "file")) == 2
    assert len(closed_book.select([row | {"id": 1}, row | {"id": 1}], "file")) == 1  # as where a data set repeats rows
    assert len(closed_book.select([row | {"id": 1}, row | {"id": 1, "answers": ["other"]}], "file")) == 2


@pytest.mark.parametrize(
    ("change", "column"),
    [
        ({"question": None}, "'question'"),
        ({"question": " "}, "'question'"),
        ({"answers": []}, "answers"),
        ({"answers": [None]}, "answers"),
        ({"answers": None}, "column 'answers' is empty (None), and no column holds answers"),
        ({"answers": None, "answer": {"value": None, "aliases": []}}, "a value and a list of aliases"),
        ({"answers": None, "possible_answers": "[1"}, "not JSON"),
        ({"answers": "[1, 2]"}, "expected a text, or a list"),
    ],
)
def test_bad_questions_name_file_row_and_column(change, column):
    good = {"question": "Who?", "answers": ["A"]}
    with pytest.raises(DataError, match=f"some file, row 2: .*{re.escape(column)}"):
        closed_book.select([good, good | change], "some file")
    with pytest.raises(DataError, match="neither a column 'prompt' nor 'question'"):
        closed_book.select([{"answers": ["A"]}], "some file")


def test_triviaqa_finds_an_alias_anywhere_and_the_others_look_at_the_first_line():
    said = "It was, I think, the Queens Park Rangers.\nQuestion: who"
    marks = triviaqa.marks(said, ["QPR", "Queens Park Rangers"])
    assert marks["alias"] == 1 and marks["exact_match"] == 0 and 0 < marks["f1"] < 1
    assert triviaqa.marks("\nParis", ["paris"]) == {"alias": 1, "exact_match": 1, "f1": 1.0}
    assert triviaqa.marks("Rome\nParis", ["paris"]) == {"alias": 1, "exact_match": 0, "f1": 0.0}
    assert triviaqa.marks("", ["paris"])["alias"] == 0


def test_real_questions_are_read(shared: Path):
    for path, task in (
        ("triviaqa/validation.jsonl.gz", triviaqa),
        ("nq_open/validation.jsonl.gz", nq_open),
        ("popqa/test.jsonl.gz", closed_book),
        ("trivia7m/known_trivia.jsonl.gz", triviaqa),
    ):
        rows = rows_of(shared, path)
        selected = task.select(rows, path)
        assert 0.95 * len(rows) <= len(selected) <= len(rows)
        for row in selected[:50]:
            assert task.marks(row["answers"][0], row["answers"])[task.METRICS[0]] == 1


# -- facts ------------------------------------------------------------------------------------------------------------


def test_every_question_of_popqa_is_of_one_relation_and_training_never_reads_its_form(shared: Path):
    selected = facts.select(rows_of(shared, "popqa/test.jsonl.gz"), "popqa")
    assert {row["relation"] for row in selected} == set(range(16))
    for row in selected:
        taught = facts.lessons(row)
        assert len({prompt for prompt, _ in taught}) == 3 and facts.item(row)["prompt"] not in [p for p, _ in taught]
        assert facts.item(row, "seen")["prompt"] in [prompt for prompt, _ in taught]
        assert all(row["subject"] in prompt and row["answers"][0].strip() in said for prompt, said in taught)
        known = {key: row[key] for key in ("id", "prompt", "answers")}
        assert facts.item(row) == known


@given(st.text(min_size=1).filter(str.strip))
def test_subjects_are_found_whatever_they_are(subject):
    subject = subject.strip()
    asked = f"Who was the director of {subject}?"
    if "\n" not in subject and "\r" not in subject:
        (row,) = facts.select([{"question": asked, "answer": "Someone"}], "file")
        assert row["subject"] == subject


def test_questions_of_no_relation_are_refused():
    rows = [{"question": asked, "answer": "Because"} for asked in ("What color is snow?", "Why?")]
    with pytest.raises(DataError, match=r"file, row 2: question = 'Why\?' is none of PopQA's forms"):
        facts.select(rows, "file")


# -- MedMCQA ----------------------------------------------------------------------------------------------------------


def test_letters_are_scored_beside_the_options():
    rows = [question(number, random.Random(number)) for number in range(12)]
    items = [medmcqa.item(row) for row in medmcqa.select(rows, "file")]
    model = make_base()
    for record, item in zip(choice_records(model, TOKENIZER, items, batch_size=8, max_length=64), items, strict=True):
        ids = TOKENIZER(item["prompt"])["input_ids"]
        logs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        letters = [logs[TOKENIZER(letter)["input_ids"][0]].item() for letter in "ABCD"]
        assert record["letter"] == int(letters.index(max(letters)) == item["answer"])
        assert len(record["logprobs"]) == 4 and {"acc", "answer_norm"} <= record.keys()


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ([1, 2, 4, 3], "counts from 1.*subtract 1 from every cop"),
        ([0, 1, -1], r"row 3: cop = -1.*test split"),
        ([0, 4], r"row 2: cop = 4; expected the right option's number, 0 to 3$"),
        ([0, None], r"row 2: cop = None"),
        ([0, "b"], r"row 2: cop = 'b'"),
        ([0, True], r"row 2: cop = True"),
        ([1, None, 4], r"row 2: cop = None; .*counts from 1.*subtract 1 from every cop"),
        ([1, 2, 4, 5], r"row 3: cop = 4; .*counts from 1.*subtract 1 from every cop"),
        (["1", "4"], r"row 1: cop = '1'; .* 0 to 3, as a whole number\. The file counts from 1"),
        (["0", "3"], r"row 1: cop = '0'; .* 0 to 3, as a whole number$"),
        ([0.0, 3.0], r"row 1: cop = 0\.0; .* 0 to 3, as a whole number$"),
    ],
)
def test_wrong_numbers_of_the_right_option_are_told_apart(numbers, said):
    rows = [question(i, random.Random(i)) | {"cop": number} for i, number in enumerate(numbers)]
    with pytest.raises(DataError, match=said):
        medmcqa.select(rows, "file")


def test_a_file_in_which_no_right_option_is_the_first_is_warned_of(capsys: pytest.CaptureFixture[str]):
    rows = [question(i, random.Random(i)) | {"cop": 1 + i % 3} for i in range(20)]
    assert len(medmcqa.select(rows, "file")) == 20
    assert "smf: warning: file: cop is 0 in none of 20 rows; where the file counts from 1" in capsys.readouterr().err
    medmcqa.select(rows[:19], "file")
    medmcqa.select([*rows, rows[0] | {"cop": 0}], "file")
    assert not capsys.readouterr().err


def test_questions_of_which_none_has_one_right_option_are_refused():
    rows = [question(i, random.Random(i)) | {"choice_type": "multi"} for i in range(3)]
    with pytest.raises(DataError, match=r"file: none of 3 rows has choice_type 'single'"):
        medmcqa.select(rows, "file")
    assert medmcqa.select([*rows, rows[0] | {"choice_type": "single"}], "file") == [rows[0] | {"choice_type": "single"}]


# -- responses --------------------------------------------------------------------------------------------------------

PLAIN = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} . {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} .{% endgeneration %} {% else %}{{ m['content'] }} . {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
FORGETFUL = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else 'word99' }}")
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
TALK = [
    {"role": "user", "content": "word1 word2"},
    {"role": "assistant", "content": "word3"},
    {"role": "user", "content": "word4"},
    {"role": "assistant", "content": "word5 word6"},
]


def chatting(template: str | None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def learned(example: Example) -> list[str]:
    labels = Collator(0, "answer")([example])["labels"][0].tolist()
    return TOKENIZER.convert_ids_to_tokens([label for label in labels if label != -100])


@pytest.mark.parametrize(
    "written", ["{%generation%}", "{%-   generation %}", "{%+ generation -%}", "{%\n generation\t%}"]
)
def test_markers_are_found_however_they_are_written(written):
    """Without them this template, which rewrites history, would be refused."""
    template = MARKED.replace("{% generation %}", written).replace(
        "{{ m['content'] }} .{%", "{{ m['content'] if loop.last else 'word99' }} .{%"
    )
    (example,) = responses.examples([{"messages": TALK}], "file", chatting(template), 64)
    assert learned(example) == ["word99", ".", "word5", "word6", "."]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_what_the_assistant_says_is_learned(template):
    (example,) = responses.examples([{"messages": TALK}], "file", chatting(template), 64)
    assert learned(example) == ["word3", ".", "word5", "word6", "."]
    (short,) = responses.examples([{"messages": TALK}], "file", chatting(template), len(example.ids) - 3)
    assert learned(short) == ["word3", "."] and len(short.ids) == len(example.ids) - 3
    (pair,) = responses.examples([{"prompt": TALK[:3], "completion": TALK[3:]}], "file", chatting(template), 64)
    assert pair == Example(pair.id, example.ids, example.start, example.gaps)


def test_of_a_conversation_that_the_assistant_begins_neither_header_nor_default_system_prompt_is_learned():
    default = "{% if messages[0]['role'] != 'system' %}system : word90 . {% endif %}" + PLAIN
    talk = [{"role": "assistant", "content": "word7 word8"}, *TALK]
    for template in (PLAIN, default):
        (example,) = responses.examples([{"messages": talk}], "file", chatting(template), 64)
        assert learned(example) == ["word7", "word8", ".", "word3", ".", "word5", "word6", "."]


def test_pairs_and_texts():
    pair, text = responses.examples(
        [{"prompt": "word1 word2", "completion": " word3"}, {"text": "word4 word5", "id": 3}], "file", TOKENIZER, 64
    )
    assert learned(pair)[:1] == ["word3"] and pair.start == 2
    assert text.id == "3" and text.start == 0


def test_equal_rows_have_equal_ids_and_others_do_not():
    rows = [{"text": "word1"}, {"text": "word2"}, {"text": "word1", "more": 3}]
    one, other, again = responses.examples(rows, "file", TOKENIZER, 64)
    assert one.id == again.id != other.id


@pytest.mark.parametrize(
    ("row", "template", "said"),
    [
        ({"messages": TALK}, None, "no chat template"),
        ({"messages": TALK}, FORGETFUL, "no {% generation %} markers and writes message 2 otherwise"),
        (
            {"messages": [{"role": "system", "content": "word9"}, *TALK]},
            STRICT,
            "refuses this conversation: System role",
        ),
        ({"messages": TALK[:1]}, PLAIN, "no message has the role 'assistant'"),
        ({"messages": []}, PLAIN, "column 'messages' = []"),
        ({"messages": "hello"}, PLAIN, "column 'messages' = 'hello'"),
        ({"messages": [{"role": "assistant"}]}, PLAIN, "message 1 of column 'messages'"),
        ({"messages": [{"role": "assistant", "content": None}]}, PLAIN, "message 1 of column 'messages'"),
        ({"prompt": "word1", "completion": " "}, PLAIN, "column 'completion' = ' '"),
        ({"prompt": 3, "completion": "word1"}, PLAIN, "column 'prompt' = 3"),
        ({"text": ""}, PLAIN, "column 'text' = ''"),
        ({"question": "x"}, PLAIN, "no column that is read; expected 'messages', or 'prompt' and 'completion', or"),
        ({"question": "x"}, PLAIN, "'text'; there are ['question']"),
        (
            {"prompt": "x"},
            PLAIN,
            "column 'completion' is not there, so its 'prompt' has no answer; expected 'messages'",
        ),
        ({"prompt": "x", "completion": None}, PLAIN, "column 'completion' is null or missing in this row, so its"),
        ({"prompt": None, "completion": "x"}, PLAIN, "column 'prompt' = None; expected a text"),
        (
            {"prompt": None, "completion": None},
            PLAIN,
            "of columns ['prompt', 'completion'] all are null or missing in this row; expected",
        ),
    ],
)
def test_bad_rows_of_ones_own_name_file_row_and_column(row, template, said):
    with pytest.raises(DataError, match=f"mine, row 2: .*{re.escape(said)}"):
        responses.examples([{"text": "word1"}, row], "mine", chatting(template), 64)


def test_a_last_message_can_be_learned_with_a_template_that_rewrites_history():
    (example,) = responses.examples([{"messages": TALK[:2]}], "file", chatting(PLAIN), 64)
    assert learned(example) == ["word3", "."]


def test_gsm8k_is_a_question_and_its_solution(shared: Path):
    rows = rows_of(shared, "gsm8k/test.jsonl.gz", limit=5)
    for example, row in zip(gsm8k_loss.examples(rows, "gsm8k", TOKENIZER, 512), rows, strict=True):
        assert 0 < example.start < len(example.ids) and row["question"]
    with pytest.raises(DataError, match="gsm8k, row 1: column 'answer' is empty"):
        gsm8k_loss.examples([rows[0] | {"answer": None}], "gsm8k", TOKENIZER, 512)


def test_solutions_of_gsm8k_are_scored_whole_though_training_is_shorter(tmp_path: Path):
    recipe = make_world(tmp_path)
    row = {"question": " ".join(WORDS[:30]), "answer": " ".join(WORDS[:40])}
    write_lines(tmp_path / "data" / "sums.jsonl", [row])
    given = ["train.max_length=32", 'probes.sums={task="gsm8k_loss", source={path="sums.jsonl"}}']

    def scored(*more: str) -> int:
        own = load_recipe(recipe, [*given, *more])
        (example,) = load_set(own, asked(own)["sums"], TOKENIZER).items
        return len(example.ids) - example.start

    assert scored() == 41  # all of its words, and the end
    assert scored("probes.sums.window=60") == 60 - 34
    with pytest.raises(
        ConfigError, match=r"\[probes.sums.source\] window = 999, but the base reads 128 tokens at most"
    ):
        scored("probes.sums.window=999")


# -- WikiText ---------------------------------------------------------------------------------------------------------


def lines(count: int) -> list[dict[str, str]]:
    found = []
    for page in range(3):
        found += [{"text": f" = word{page} word9 = \n"}, {"text": " \n"}]
        found += [{"text": f" {' '.join(WORDS[(7 * page + i) % 80 :][:9])} \n"} for i in range(count)]
    return found


@pytest.mark.parametrize("room", [8, 15, 64, 1000])
def test_windows_score_every_token_but_the_first_once(room):
    ids = TOKENIZER("\n\n".join(row["text"].strip() for row in lines(6) if row["text"].strip()))["input_ids"]
    examples = wikitext.examples(lines(6), "text", TOKENIZER, room)
    scored = [token for example in examples for token in example.ids[max(1, example.start) :]]
    assert scored == ids[1:] and all(len(example.ids) <= room for example in examples)
    for example in examples[1:-1]:
        assert example.start == room - room // 2


@pytest.mark.parametrize("room", [16, 40])
def test_words_are_scored_as_by_the_harness_own_task(room):
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.wikitext import preprocess_wikitext as theirs

    model = make_base()
    texts = ["".join(row["text"] for row in lines(6)[8 * n : 8 * n + 8]) for n in range(3)]
    documents = datasets.Dataset.from_list([{"page": text} for text in texts])
    task = {
        "task": "wikitext",
        "custom_dataset": lambda **_: {"test": documents},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": theirs.wikitext_detokenizer,
        "process_results": lambda doc, found: dict(
            zip(("nats", "words"), theirs.process_results(doc, found)["word_perplexity"], strict=True)
        ),
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("nats", "words")
        ],
    }
    lm = HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=4, max_length=room - 1, add_bos_token=False)
    loaded = TaskManager(include_defaults=False).load([task])
    found = lm_eval.evaluate(lm, loaded, bootstrap_iters=0)["results"]["wikitext"]
    expected = math.exp(-found["nats,none"] / found["words,none"])
    pages = wikitext.pages(lines(6), "text", TOKENIZER, room)
    records = example_losses(model, pages, TOKENIZER, loss="answer", batch_size=4)
    assert math.exp(sum(r["nats"] for r in records) / sum(p.words for p in pages)) == pytest.approx(expected, rel=1e-4)
    assert pages == wikitext.pages([{"text": text} for text in texts], "text", TOKENIZER, room)


# -- names ------------------------------------------------------------------------------------------------------------


def test_unknown_tasks_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"task = 'trivia' is not known; use one of .*'triviaqa'.*lm_eval:NAME"):
        find_task("trivia")


def test_what_training_reads_of_a_question_is_its_answer():
    (row,) = nq_open.select([{"question": "who", "answer": ["a", "b"]}], "file")
    assert lessons(nq_open, row, explanation=True) == [("Question: who\nAnswer:", " a")]


def test_rows_can_be_chosen_by_their_columns(tmp_path: Path):
    rows = [{"text": f"word{i}" * (i + 1), "lang": "en" if i % 2 else "de", "rank": i % 3} for i in range(12)]
    write_lines(tmp_path / "a.jsonl", rows)

    def chosen(**options: Any) -> list[int]:
        found = load_rows(Source(path="a.jsonl", **options), str(tmp_path), {"x": 0.5, "y": 0.5}, ["text"])
        return [rows.index(dict(row)) for row in found]

    assert chosen(where={"lang": ["en"], "rank": [0, 1]}) == [1, 3, 7, 9]
    assert chosen(where={"lang": ["en"]}, limit=2) == [1, 3] and chosen(min_chars=60) == [10, 11]
    assert sorted(chosen(limit=6, part="x") + chosen(limit=6, part="y")) == list(range(6))
    drawn = chosen(sample=5)
    assert len(drawn) == 5 and drawn == sorted(drawn) != list(range(5))
    assert set(drawn) < set(chosen(sample=6)) and chosen(sample=5, limit=2) == drawn[:2]
    assert sorted(chosen(sample=5, part="x") + chosen(sample=5, part="y")) == drawn
    write_lines(tmp_path / "a.jsonl", rows[::-1])  # the same texts, in another order
    assert chosen(sample=5) == drawn[::-1]
    write_lines(tmp_path / "a.jsonl", [*rows, *rows])  # equal rows count once
    assert chosen(sample=5) == drawn
    write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"none of its 12 rows has lang among \['fr'\]; the columns hold lang: .*'de'"):
        chosen(where={"lang": ["fr"]})
    with pytest.raises(DataError, match=r"has no column 'land'; its columns are .*; did you mean 'lang'\?"):
        chosen(where={"land": ["en"]})


def test_parts_of_a_file_that_is_sorted_by_hash_have_their_share(tmp_path: Path):
    import hashlib

    texts = sorted((f"text {i}" for i in range(1000)), key=lambda text: hashlib.sha256(text.encode()).digest())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = load_rows(Source(path="a.jsonl", limit=200, part="x"), str(tmp_path), {"x": 0.5, "y": 0.5}, ["text"])
    assert 70 < len(found) < 130
