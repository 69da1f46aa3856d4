"""What questions score: choices and generated answers, against scores computed by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smf import world
from smf.errors import DataError
from smf.evaluate import mean_of
from smf.harness import answer_records, choice_records
from smf.tasks import TASKS, choices, closed_book
from smf.tasks.closed_book import marks, normalise
from tiny import WORDS, make_base, make_tokenizer

ASKED: dict = {"stop": closed_book.STOP, "marks": closed_book.marks}


@pytest.fixture(scope="module")
def base():
    return make_base(), make_tokenizer()


def items(count: int) -> list[dict]:
    made = []
    for i in range(count):
        options = [f" {' '.join(WORDS[(7 * i + 3 * j) % 90 :][: 1 + (i + j) % 3])}" for j in range(4)]
        made.append({"id": f"q{i}", "prompt": f"Question: {WORDS[i]} ?", "choices": options, "answer": i % 4})
    return made


def test_choices_are_scored_by_their_summed_and_mean_log_probability(base):
    model, tokenizer = base
    asked = items(9)
    for record, item in zip(choice_records(model, tokenizer, asked, batch_size=4, max_length=64), asked, strict=True):
        sums, means = [], []
        for choice in item["choices"]:
            prompt = tokenizer(item["prompt"])["input_ids"]
            ids = tokenizer(item["prompt"] + choice)["input_ids"]
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores = [logs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))]
            sums.append(sum(scores))
            means.append(sum(scores) / len(scores))
        assert record["logprobs"] == pytest.approx(sums, abs=1e-4)
        assert record["acc"] == (sums.index(max(sums)) == item["answer"])
        assert record["answer_norm"] == (means.index(max(means)) == item["answer"])
        assert record["nats"] == pytest.approx(-sums[item["answer"]], abs=1e-4)
        assert record["tokens"] == len(item["choices"][item["answer"]].split())
        assert record["said"] == item["choices"][sums.index(max(sums))].strip()


def test_choices_after_a_prompt_that_ends_in_a_blank_are_scored_over_all_of_their_tokens():
    """The harness moves the blank to the choice; with the world's tokenizer it is one token with the choice's word."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world.BASE), AutoTokenizer.from_pretrained(world.BASE)
    for blank, sides in ((" ", ("", "")), ("", (" ", " "))):
        item = {"id": "q", "prompt": f"the color of the house is{blank}", "answer": 0}
        item["choices"] = [f"{side}{word}" for side, word in zip(sides, ("red house", "the house"), strict=True)]
        (record,) = choice_records(model, tokenizer, [item], batch_size=2, max_length=64)
        assert record["tokens"] == 2 and record["said"] in ("red house", "the house")
    assert record["nats"] == pytest.approx(-record["logprobs"][0])


def test_order_of_questions_is_kept_and_batches_change_nothing(base):
    model, tokenizer = base
    asked = items(7)
    one = choice_records(model, tokenizer, asked, batch_size=1, max_length=64)
    many = choice_records(model, tokenizer, asked[::-1], batch_size=5, max_length=64)[::-1]
    assert [r["id"] for r in one] == [r["id"] for r in many] == [item["id"] for item in asked]
    for a, b in zip(one, many, strict=True):
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)


def test_answers_are_greedy_and_independent_of_the_batch(base):
    model, tokenizer = base
    asked = [{"id": str(i), "prompt": " ".join(WORDS[i : i + 2 + i % 5]), "answers": ["x"]} for i in range(6)]
    one = answer_records(model, tokenizer, asked, batch_size=1, max_length=64, **ASKED)
    many = answer_records(model, tokenizer, asked, batch_size=4, max_length=64, **ASKED)
    assert [r["said"] for r in one] == [r["said"] for r in many]
    for record, item in zip(one, asked, strict=True):
        ids = tokenizer(item["prompt"])["input_ids"]
        said = []
        while len(said) < 32:
            said.append(model(torch.tensor([ids + said])).logits[0, -1].argmax().item())
            if said[-1] == tokenizer.eos_token_id:
                break
        assert record["said"] == tokenizer.decode(said, skip_special_tokens=True).strip()


def test_a_model_that_says_the_answer_is_right(base):
    model, tokenizer = base
    asked = [{"id": "a", "prompt": WORDS[5], "answers": ["x"]}]
    said = answer_records(model, tokenizer, asked, batch_size=1, max_length=64, **ASKED)[0]["said"]
    again = answer_records(
        model, tokenizer, [asked[0] | {"answers": ["y", said]}], batch_size=1, max_length=64, **ASKED
    )
    assert (again[0]["exact_match"], again[0]["f1"]) == (1, 1.0)
    assert again[0]["right"] == f"y | {said}"


def test_scoring_leaves_the_model_as_it_was(base):
    model, tokenizer = base
    model.train()
    choice_records(model, tokenizer, items(2), batch_size=2, max_length=64)
    assert model.training and all(p.grad is None for p in model.parameters())
    model.eval()


@pytest.mark.parametrize(
    ("said", "answers", "exact", "f1"),
    [
        ("The Lute.", ["lute"], 1, 1.0),
        ("a  lute", ["harp", "Lute!"], 1, 1.0),
        ("old lute", ["lute"], 0, 2 / 3),
        ("harp", ["lute"], 0, 0.0),
        ("", ["lute"], 0, 0.0),
        ("lute lute", ["lute"], 0, 2 / 3),
        ("", ["A"], 0, 0.0),
        ("a.", ["A"], 1, 1.0),
    ],
)
def test_marks_of_an_answer(said, answers, exact, f1):
    assert marks(said, answers) == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_normalising_twice_changes_nothing():
    for text in ("The U.S.A., an answer", "  a the  ", "Ünïcode — dash"):
        assert normalise(normalise(text)) == normalise(text)


def test_means_weigh_examples_or_tokens():
    records = [{"acc": 1, "nats": 3.0, "tokens": 1}, {"acc": 0, "nats": 1.0, "tokens": 3}]
    assert mean_of(records, "acc") == 0.5
    assert mean_of(records, "loss") == mean_of(records, "nats") == 1.0
    assert mean_of(records, "perplexity") == pytest.approx(2.718281828)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_have_what_the_others_call(name: str):
    task = TASKS[name]
    needed = {"choice": ("select", "item", "response"), "answer": ("select", "item", "response", "marks")}
    assert task.METRICS and isinstance(task.COLUMNS, tuple)
    assert all(callable(getattr(task, function)) for function in needed.get(task.KIND, ("examples",)))


def test_bad_rows_are_refused_by_number():
    row = {"id": 1, "prompt": "Question: x", "choices": [" a", " b"], "answer": 1, "explanation": "because"}
    assert choices.response(row, explanation=True) == " b\nExplanation: because"
    assert choices.response(row, explanation=False) == " b"
    bad = [
        {"prompt": " "},
        {"choices": [" a"]},
        {"choices": " ab"},
        {"choices": [" a", ""]},
        {"answer": 2},
        {"answer": "b"},
    ]
    for change in bad:
        with pytest.raises(DataError, match="file, row 2"):
            choices.select([row, row | change], "file")
    asked = {"id": 1, "prompt": "Question: x", "answers": ["a"]}
    assert closed_book.response(asked, explanation=True) == " a"
    for change in ({"prompt": ""}, {"answers": []}, {"answers": 3}, {"answers": [" "]}):
        with pytest.raises(DataError, match="file, row 2"):
            closed_book.select([asked, asked | change], "file")
