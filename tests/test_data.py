import gzip
import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import smf.loss
from conftest import tiny_base
from smf import world
from smf.data import Collator, Example, encode, in_order, keep_answered, numbered
from smf.errors import DataError
from smf.evaluate import example_losses, nats_per_token
from smf.fingerprint import part_of
from smf.loss import MeanTokenLoss, token_loss
from smf.prepare import load, load_set, load_training
from smf.recipe import Source, asked
from smf.recipe_file import load_recipe
from smf.sources import load_rows, load_texts
from smf.tasks import choices, closed_book, find_task, medmcqa, perplexity
from test_memory_growth import LargeOutputs
from tiny import WORDS, make_base, make_tokenizer, make_world, question, write_lines

PARTS = {"background": 0.4, "healing": 0.3, "probe": 0.3}


def rows_of_part(path: str, data: str, part: str) -> list[str]:
    return [row["text"] for row in load_rows(Source(path=path, part=part), data, PARTS, ["text"])]


def test_parts_are_disjoint_and_cover_the_collection(tmp_path: Path):
    texts = [f"story number {i}" for i in range(200)]
    write_lines(tmp_path / "stories.jsonl", [{"text": text} for text in [*texts, " story number 7 "]])
    parts = {part: rows_of_part("stories.jsonl", str(tmp_path), part) for part in PARTS}
    stripped = {part: {text.strip() for text in rows} for part, rows in parts.items()}
    assert set.union(*stripped.values()) == set(texts)
    assert sum(map(len, stripped.values())) == len(texts), "a story is in two parts"
    assert sum(map(len, parts.values())) == 201
    assert all(len(rows) > 40 for rows in parts.values())


def test_parts_of_the_real_stories_are_disjoint(shared: Path):
    data = str(shared / "data")
    parts = [set(rows_of_part("tinystories/train.jsonl.gz", data, part)) for part in PARTS]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert sum(map(len, parts)) == 1000


def test_part_depends_on_the_text_alone():
    assert part_of("a story", PARTS) == part_of("  a story\n", PARTS)


def test_a_part_without_shares_is_refused(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    with pytest.raises(DataError, match="parts"):
        load_rows(Source(path="a.jsonl", part="train"), str(tmp_path), {}, ["text"])


def test_rows_of_gzip_and_plain_files_are_equal(tmp_path: Path):
    rows = [{"text": "one"}, {"text": "two"}]
    write_lines(tmp_path / "a.jsonl", rows)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    first, second = (load_rows(Source(path=p), str(tmp_path), {}, ["text"]) for p in ("a.jsonl", "b.jsonl.gz"))
    assert first == second == rows


@pytest.mark.parametrize("name", ["tr[ab]in.jsonl", "data[1]/*.jsonl", "a?b/train [0-9].jsonl", "{a,b}.jsonl"])
def test_a_name_is_no_pattern_by_which_another_file_is_found(name: str, tmp_path: Path):
    for other in ("train.jsonl", "trbin.jsonl", "data1/train.jsonl", "a.jsonl", "acb/train 0.jsonl"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / other, [{"text": "another"}])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_lines(tmp_path / name, [{"text": "one"}, {"text": "two"}])
    assert [row["text"] for row in load_rows(Source(path=name), str(tmp_path), {}, ["text"])] == ["one", "two"]


def test_a_cache_that_cannot_be_made_is_not_taken_for_a_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/nowhere/cache")
    with pytest.raises(DataError, match=r"cache of datasets cannot be written: .*nowhere.*; set HF_DATASETS_CACHE"):
        load_rows(Source(path="a.jsonl"), str(tmp_path), {}, ["text"])


def test_missing_file_column_and_broken_json_are_named(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl has no column 'question'; its columns are \['text'\]"):
        load_rows(Source(path="a.jsonl"), str(tmp_path), {}, ["question"])
    with pytest.raises(DataError, match=r"no data file at .*missing\.jsonl"):
        load_rows(Source(path="missing.jsonl"), str(tmp_path), {}, [])
    with pytest.raises(DataError, match=r"broken\.jsonl cannot be read"):
        load_rows(Source(path="broken.jsonl"), str(tmp_path), {}, [])
    with pytest.raises(DataError, match="names no hub data set"):
        load_rows(Source(path="a.jsonl"), "hub", {}, [])


@pytest.mark.parametrize(("column", "value"), [("cop", 4), ("cop", None), ("opb", " "), ("question", None)])
def test_bad_questions_are_named_by_row(column: str, value: object):
    rows = [question(i, random.Random(i)) for i in range(3)]
    rows[1][column] = value
    with pytest.raises(DataError, match=f"file, row 2: .*{column}"):
        medmcqa.select(rows, "file")


def test_response_begins_after_the_prompt_and_ends_with_eos():
    tokenizer = make_tokenizer()
    example = encode(tokenizer, "x", "Question : word1 word2 Answer :", " A . word3", 64, end=True)
    assert tokenizer.decode(example.ids[example.start :]) == "A . word3 <eos>"
    assert tokenizer.decode(example.ids[: example.start]) == "Question : word1 word2 Answer :"


@pytest.mark.parametrize(
    ("prompt", "response", "learned"),
    [
        ("What is the color of the house: ", "red", [" red"]),
        ("the color of the house: ", "the red house", [" the", " red", " house"]),
        ("the color of the house:\n", "red", ["r", "ed"]),  # no blank is joined to the word: only the answer
        ("the color of the house:", " red", [" red"]),
    ],
)
def test_the_first_word_of_an_answer_is_learned_where_the_prompt_ends_in_a_blank(prompt, response, learned):
    tokenizer = AutoTokenizer.from_pretrained(world.BASE)
    example = encode(tokenizer, "x", prompt, response, 64, end=False)
    assert [tokenizer.decode([id]) for id in example.ids[example.start :]] == learned


def test_examples_whose_prompt_ends_in_no_blank_begin_where_the_prompts_own_tokens_end():
    """As ever: committed results, and the names of their runs, go with these examples."""
    tokenizer = AutoTokenizer.from_pretrained(world.BASE)
    for row in choices.select(world.rows("exam_training"), "exam")[:300]:
        prompt, response = row["prompt"], choices.response(row, explanation=True)
        ids = tokenizer(prompt + response)["input_ids"]
        expected = Example("x", ids, len(tokenizer(prompt)["input_ids"]))
        assert not prompt[-1].isspace() and encode(tokenizer, "x", prompt, response, 128, end=False) == expected


def test_cut_answers_are_refused_or_dropped_and_counted(capsys: pytest.CaptureFixture[str]):
    examples = [Example("a", [1] * 5, 3), Example("b", [1] * 5, 5)]
    with pytest.raises(DataError, match=r"file: the answer of row b .*prompt has 5 tokens, max_length is 5"):
        keep_answered(examples, "file", "error", 5)
    assert [e.id for e in keep_answered(examples, "file", "drop", 5)] == ["a"]
    assert "file: 1 of 2 examples are left out, whose answer is cut away at max_length = 5" in capsys.readouterr().err
    assert keep_answered(examples[:1], "file", "drop", 5) and not capsys.readouterr().err
    with pytest.raises(DataError, match="no example is left"):
        keep_answered(examples[1:], "file", "drop", 5)


def test_order_is_a_permutation_a_pass_and_depends_on_the_seed_alone():
    examples = [Example(str(i), [1, 2], 1) for i in range(10)]
    order = [e.id for e in in_order(examples, 25, seed=1)]
    assert sorted(order[:10]) == sorted(order[10:20]) == [str(i) for i in range(10)]
    assert order[:10] != order[10:20]
    assert order == [e.id for e in in_order(examples, 25, seed=1)] != [e.id for e in in_order(examples, 25, seed=2)]


def test_labels_are_the_answer_or_everything_but_the_first_token_and_never_pads():
    examples = [Example("a", [5, 6, 7, 8], 2), Example("b", [9, 10], 0)]
    answer = Collator(0, "answer")(examples)["labels"].tolist()
    full = Collator(0, "full")(examples)["labels"].tolist()
    assert answer == [[-100, -100, 7, 8], [-100, 10, -100, -100]]
    assert full == [[-100, 6, 7, 8], [-100, 10, -100, -100]]


def test_gradient_does_not_depend_on_micro_batches_with_unequal_token_counts():
    model = tiny_base().double()
    torch.manual_seed(0)
    examples = [Example(str(i), torch.randint(1, 90, (4 + 3 * i,)).tolist(), 2 + i) for i in range(6)]
    collate = Collator(0, "answer")

    def gradient(groups: list[list[Example]]) -> torch.Tensor:
        model.zero_grad()
        total = sum(len(e.ids) - e.start for e in examples)
        for group in groups:
            batch = collate(group)
            labels = batch.pop("labels")
            MeanTokenLoss(model)(model(**batch), labels, torch.tensor(total)).backward()
        return model.model.embed_tokens.weight.grad.clone()

    whole = gradient([examples])
    pieces = gradient([examples[:1], examples[1:4], examples[4:]])
    assert whole.norm() > 0
    assert torch.allclose(whole, pieces, rtol=1e-10, atol=1e-14)


def test_example_losses_do_not_depend_on_batching_and_equal_the_models_own_loss():
    model, tokenizer = make_base(), make_tokenizer()
    torch.manual_seed(0)
    examples = [Example(str(i), torch.randint(3, 150, (3 + 2 * i,)).tolist(), 1) for i in range(5)]
    one = example_losses(model, examples, tokenizer, loss="full", batch_size=1)
    many = example_losses(model, examples, tokenizer, loss="full", batch_size=4)
    for a, b, example in zip(one, many, examples, strict=True):
        ids = torch.tensor([example.ids])
        own = model(input_ids=ids, labels=ids).loss.item()
        assert a["id"] == b["id"] == example.id and a["tokens"] == b["tokens"] == len(example.ids) - 1
        assert a["nats"] == pytest.approx(b["nats"], abs=1e-4) == pytest.approx(own * a["tokens"], abs=1e-4)
    assert nats_per_token(one) == pytest.approx(sum(r["nats"] for r in one) / sum(r["tokens"] for r in one))


def test_scoring_makes_no_second_copy_of_the_logits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smf.loss, "AT_ONCE", 8 * 50)
    logits = torch.randn(6, 20, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.randint(50, (6, 20), generator=torch.Generator().manual_seed(1))
    labels[:2, ::3] = -100
    with torch.no_grad(), LargeOutputs(9 * 50 * 4, [logits]) as large:
        sliced = token_loss(logits, labels)
    assert large.found == []  # nothing is larger than a slice in float32
    assert torch.equal(sliced, token_loss(logits, labels)) and not token_loss(logits, labels * 0 - 100).any()
    with torch.no_grad():
        assert not token_loss(logits, labels * 0 - 100).any()


def test_perplexity_windows_cover_every_token_of_every_text():
    tokenizer = make_tokenizer()
    rows = [{"text": " ".join(f"word{i % 100}" for i in range(25))}, {"text": "  "}, {"text": "word1 word2"}]
    windows = perplexity.examples(rows, "text", tokenizer, max_length=10)
    assert [len(w.ids) for w in windows] == [10, 10, 5, 2]


def test_texts_that_are_none_are_named_by_file_row_and_column(tmp_path: Path):
    texts = [{"text": t, "lang": "en" if i else "de"} for i, t in enumerate(["x", "word1", None, "word2"])]
    write_lines(tmp_path / "a.jsonl", texts)
    write_lines(tmp_path / "blank.jsonl", [{"text": " "}, {"text": "\n"}])
    english = Source(path="a.jsonl", where={"lang": ["en"]})
    with pytest.raises(DataError, match=r"a\.jsonl, row 3: column 'text' is None; expected a text"):
        load_texts(english, str(tmp_path), {})  # the third of the file, of the chosen ones the second
    with pytest.raises(DataError, match=r"blank\.jsonl: column 'text' of all 2 rows is blank"):
        load_texts(Source(path="blank.jsonl"), str(tmp_path), {})


def test_rows_know_their_number_in_the_file_whichever_are_chosen(tmp_path: Path):
    rows = [question(i, random.Random(i)) | {"kind": "ab"[i % 2]} for i in range(8)]
    rows[5]["opc"] = None
    write_lines(tmp_path / "a.jsonl", rows)
    chosen = load_rows(Source(path="a.jsonl", where={"kind": ["b"]}), str(tmp_path), {}, medmcqa.COLUMNS)
    assert [number for number, _ in numbered(chosen)] == [2, 4, 6, 8] and chosen == rows[1::2]
    with pytest.raises(DataError, match=r"a\.jsonl, row 6: column 'opc' is empty \(None\)"):
        medmcqa.select(chosen, "a.jsonl")


TABLES = ["background.source", "heal.source", "probes.stories.source"]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "word1 word2"}, {"text": None}], "bad.jsonl, row 2: column 'text' is None; expected a text"),
        ([{"text": "word1 word2"}, {"text": 3}], "expected a text"),
        ([{"text": ""}], "bad.jsonl: column 'text' of all 1 rows is blank"),
        ([], "bad.jsonl"),
    ],
)
def test_no_bad_text_reaches_training(table: str, rows: list, said: str, tmp_path: Path):
    recipe = make_world(tmp_path)
    write_lines(tmp_path / "data" / "bad.jsonl", rows)
    with pytest.raises(DataError) as raised:
        load(load_recipe(recipe, [f'{table}.path="bad.jsonl"', f'{table}.part=""']))
    assert said in str(raised.value)


@pytest.mark.parametrize("table", [t for t in TABLES if t != "background.source"])
def test_texts_of_one_token_are_refused_where_a_next_one_is_scored(table: str, tmp_path: Path):
    recipe = make_world(tmp_path)
    write_lines(tmp_path / "data" / "short.jsonl", [{"text": "word1"}, {"text": "word2"}])
    with pytest.raises(DataError, match=r"short\.jsonl: column 'text' has no text of two tokens or more"):
        load(load_recipe(recipe, [f'{table}.path="short.jsonl"', f'{table}.part=""']))


def test_rows_that_are_scored_too_and_ids_that_stand_twice_are_named_by_file_and_row(tmp_path: Path):
    recipe = make_world(tmp_path)
    rng = random.Random(1)
    own = [question(i, rng) for i in range(100, 106)]
    train = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "data" / "mixed.jsonl", [*own[:3], train[4]])
    write_lines(tmp_path / "data" / "twice.jsonl", [*own, own[1] | {"question": "word1 ?"}])
    with pytest.raises(DataError, match=r"1 rows are .* id 'q4': .*train\.jsonl, row 5, and .*mixed\.jsonl, row 4;"):
        load(load_recipe(recipe, ['target.eval.exam.path="mixed.jsonl"']))
    with pytest.raises(DataError, match=r"twice\.jsonl, row 7: 1 ids stand there twice, such as 'q101', .* row 2's"):
        load(load_recipe(recipe, ['target.eval.exam.path="twice.jsonl"']))
    with pytest.raises(
        DataError, match=r"such as id 'q52': .*validation\.jsonl, row 1, and .*validation\.jsonl, row 1"
    ):
        load(load_recipe(recipe, ['target.eval.exam.path="validation.jsonl"']))
    with pytest.raises(
        DataError, match=r"texts of \[heal\] are scored as well, such as that of row \d+, column 'text'"
    ):
        load(load_recipe(recipe, ['heal.source.part="probe"']))


LONG = " ".join(2 * WORDS)
ROWS = {
    "medmcqa": (question(1, random.Random(1)), {"question": LONG}, "question"),
    "choices": (
        {"id": "a", "prompt": "word1", "choices": ["word2", "word3"], "answer": 0},
        {"prompt": LONG},
        "prompt",
    ),
    "closed_book": ({"question": "word1", "answer": "word2"}, {"question": LONG}, "question"),
    "facts": (
        {"question": "What color is word1?", "answer": "word2"},
        {"question": f"What color is {LONG}?"},
        "question",
    ),
    "responses": ({"prompt": "word1", "completion": "word2"}, {"prompt": LONG}, "prompt"),
    "gsm8k_loss": ({"question": "word1", "answer": "word2"}, {"question": LONG}, "question"),
}


@pytest.mark.parametrize("task", ROWS)
def test_answers_that_are_cut_away_are_named_by_row_and_column(task: str, tmp_path: Path, capsys):
    recipe = make_world(tmp_path)
    row, change, column = ROWS[task]
    good = [row | ({"id": f"x{i}"} if "id" in row else {}) for i in range(2)]
    write_lines(tmp_path / "data" / "long.jsonl", [*good, row | {"id": "long"} | change])
    metric = find_task(task).METRICS[0]
    settings = [f'target={{task="{task}", train={{path="long.jsonl"}}, eval.exam={{path="long.jsonl"}}}}']
    settings += [f'target.metrics=["{metric}"]']
    own = load_recipe(recipe, settings)
    place = rf"long\.jsonl: the answer of row 3, column '{column}'"
    with pytest.raises(DataError, match=place):
        load_training(own, make_tokenizer())
    with pytest.raises(DataError, match=place):
        load_set(own, asked(own)["exam"], make_tokenizer())
    dropping = load_recipe(recipe, [*settings, 'train.too_long="drop"'])
    assert load_training(dropping, make_tokenizer())
    said = capsys.readouterr().err
    assert f"whose answer is cut away at max_length = 64; the first is row 3, column '{column}'" in said
    write_lines(tmp_path / "data" / "long.jsonl", [row | change])
    with pytest.raises(
        DataError, match=rf"no example is left: .* in row 1, column '{column}', whose prompt has \d+ tokens"
    ):
        load_training(dropping, make_tokenizer())


def test_answers_that_are_cut_short_are_counted(capsys: pytest.CaptureFixture[str]):
    tokenizer = make_tokenizer()
    texts = [("word1", " word2"), ("word1", f" {' '.join(WORDS)}"), ("word1", f" {' '.join(WORDS[:62])}")]
    examples = [encode(tokenizer, "x", *text, 64, end=True, row=i, column="c") for i, text in enumerate(texts, 1)]
    for too_long in ("error", "drop"):
        assert keep_answered(examples, "file", too_long, 64) == examples
        said = "file: 1 of 3 examples are cut within their answer at max_length = 64, and learned or scored up to there"
        assert f"{said}; the first is row 2, column 'c'" in capsys.readouterr().err
    keep_answered([examples[0], examples[2]], "file", "error", 64)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([*[b'{"text": "one"}'] * 5000, b"oops"], r"row 5001 is not JSON \(Expecting value.*\): b'oops"),
        ([b'{"text": "one"}', b"", b'{"text": '], "row 2 is not JSON"),
        ([b'{"text": "caf\xe9 one"}'], r"line 1 is not UTF-8: b'\\xe9.*; convert it"),
        ([b'{"text": "one"}', b"[1]"], r"row 2 is \[1\]; expected an object"),
        ([b"", b"  "], "it has no rows"),
        ([], "has no rows: it is empty"),
    ],
)
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.gz"])
def test_the_row_that_cannot_be_read_is_named(content: list[bytes], said: str, name: str, tmp_path: Path):
    packed = gzip.compress if name.endswith("gz") and content else bytes
    (tmp_path / name).write_bytes(packed(b"\n".join(content)))
    with pytest.raises(DataError, match=rf"{name}.*{said}"):
        load_rows(Source(path=name), str(tmp_path), {}, ["text"])


@pytest.mark.parametrize(
    ("select", "row", "change", "said"),
    [
        (medmcqa.select, question(1, random.Random(1)), {"id": 7}, "column 'id' is not a text (7)"),
        (medmcqa.select, question(1, random.Random(1)), {"opb": 0}, "column 'opb' is not a text (0)"),
        (medmcqa.select, question(1, random.Random(1)), {"choice_type": None}, "choice_type = None; expected 'single'"),
        (medmcqa.select, question(1, random.Random(1)), {"choice_type": "Single"}, "choice_type = 'Single'; expected"),
        (closed_book.select, {"question": "word1", "answer": "word2"}, {"question": 5}, "'question' is not a text (5)"),
        (
            choices.select,
            {"id": "a", "prompt": "word1", "choices": ["a", "b"], "answer": 0},
            {"prompt": 5},
            "column 'prompt' is not a text (5)",
        ),
    ],
)
def test_what_is_not_a_text_is_told_from_what_is_empty(select, row: dict, change: dict, said: str):
    assert len(select([row], "file")) == 1
    with pytest.raises(DataError, match=rf"^file, row 2: .*{re.escape(said)}"):
        select([row, row | change], "file")


def test_an_explanation_that_is_learned_is_a_text(tmp_path: Path):
    recipe = make_world(tmp_path)
    rows = [question(i, random.Random(i)) | {"exp": 5} for i in range(3)]
    write_lines(tmp_path / "data" / "numbers.jsonl", rows)
    path = 'target.train.path="numbers.jsonl"'
    with pytest.raises(DataError, match=r"numbers\.jsonl, row 1: column 'exp' is not a text \(5\)"):
        load_training(load_recipe(recipe, [path, "target.explanation=true"]), make_tokenizer())
    assert len(load_training(load_recipe(recipe, [path]), make_tokenizer())) == 3


def test_equal_rows_of_ones_own_are_not_scored_twice(tmp_path: Path):
    recipe = make_world(tmp_path)
    rows = [{"prompt": f"word{i}", "completion": "word9"} for i in (1, 2, 1)]
    write_lines(tmp_path / "data" / "own.jsonl", rows)
    own = load_recipe(recipe, ['probes.own={task="responses", source={path="own.jsonl"}}'])
    with pytest.raises(
        DataError, match=r"own\.jsonl, row 3: 1 ids stand there twice, .* row 1's too; leave equal rows"
    ):
        load_set(own, asked(own)["own"], make_tokenizer())


def test_where_there_are_no_explanations_the_key_that_leaves_them_out_is_named(tmp_path: Path):
    recipe = make_world(tmp_path)
    rows = [{"id": str(i), "prompt": "word1", "choices": ["word2", "word3"], "answer": 0} for i in range(3)]
    write_lines(tmp_path / "data" / "choices.jsonl", rows)
    given = ['target.task="choices"', 'target.train.path="choices.jsonl"', 'target.eval={exam={path="choices.jsonl"}}']
    with pytest.raises(
        DataError, match=r"no column 'explanation', .*; its columns .* set explanation = false in \[targ"
    ):
        load_training(load_recipe(recipe, [*given, "target.explanation=true"]), make_tokenizer())
    assert len(load_training(load_recipe(recipe, given), make_tokenizer())) == 3
