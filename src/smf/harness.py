"""What a model picks and what it says, scored by lm-evaluation-harness on the model object."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .memory import evaluation_mode
from .tasks.closed_book import marks

LONGEST_ANSWER = 32  # tokens
ADDED = {"choice": {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}}
ADDED["answer"] = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": LONGEST_ANSWER, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


def choice_records(
    model: nn.Module, tokenizer: Any, items: Sequence[dict[str, Any]], *, batch_size: int, max_length: int
) -> list[dict[str, Any]]:
    """For each question the choices' log-probabilities, the pick and whether it is right.

    `acc` picks by the summed log-probability, `answer_norm` by the mean over the choice's tokens (arXiv 2605.03229);
    `nats` and `tokens` are those of the right choice.
    """
    samples = _samples("choice", model, tokenizer, items, batch_size, max_length)
    return [_choice_record(item, sample, tokenizer) for item, sample in zip(items, samples, strict=True)]


def _choice_record(item: dict[str, Any], sample: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    prompt, choices, right = item["prompt"], item["choices"], item["answer"]
    sums = [float(response[0]) for response in sample["filtered_resps"]]
    start = len(tokenizer(prompt)["input_ids"])
    tokens = [max(1, len(tokenizer(prompt + choice)["input_ids"]) - start) for choice in choices]
    means = [total / count for total, count in zip(sums, tokens, strict=True)]
    pick, pick_norm = (max(range(len(s)), key=s.__getitem__) for s in (sums, means))
    return {
        "id": item["id"],
        "question": prompt,
        "right": choices[right].strip(),
        "said": choices[pick].strip(),
        "logprobs": sums,
        "acc": int(pick == right),
        "answer_norm": int(pick_norm == right),
        "nats": -sums[right],
        "tokens": tokens[right],
    }


def answer_records(
    model: nn.Module, tokenizer: Any, items: Sequence[dict[str, Any]], *, batch_size: int, max_length: int
) -> list[dict[str, Any]]:
    """For each question what the model says, greedily and up to the end of the line, with exact match and F1."""
    samples = _samples("answer", model, tokenizer, items, batch_size, max_length)
    records = []
    for item, sample in zip(items, samples, strict=True):
        said = sample["filtered_resps"][0].strip()
        texts = {"question": item["prompt"], "right": " | ".join(item["answers"]), "said": said}
        records.append({"id": item["id"]} | texts | marks(said, item["answers"]))
    return records


def _samples(
    kind: str, model: nn.Module, tokenizer: Any, items: Sequence[dict[str, Any]], batch_size: int, max_length: int
) -> list[dict[str, Any]]:
    """The harness's record of every item, in the order given."""
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    from .shared_prompts import SharedPromptLM

    documents = datasets.Dataset.from_list(list(items))
    task = {
        "task": "smf",
        "custom_dataset": lambda **_: {"validation": documents},
        "validation_split": "validation",
        "doc_to_text": lambda doc: doc["prompt"],
        "doc_to_choice": lambda doc: doc["choices"],
        "doc_to_target": (lambda doc: doc["answer"]) if kind == "choice" else (lambda doc: doc["answers"][0]),
        "target_delimiter": "",
    }
    if kind == "answer":
        del task["doc_to_choice"]
    adds_bos = bool(tokenizer("")["input_ids"])  # as in training
    with evaluation_mode(model), _quiet("lm_eval"):
        make_lm: Any = SharedPromptLM  # its signature is hidden by decorators
        lm = make_lm(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=_room(model, max_length, kind),
            add_bos_token=adds_bos,
        )
        # not simple_evaluate: it also collects the environment, seconds a call, and seeds every generator
        loaded: Any = TaskManager(include_defaults=False).load([task | ADDED[kind]])
        results: Any = lm_eval.evaluate(lm, loaded, log_samples=True, bootstrap_iters=0)
    return sorted(results["samples"]["smf"], key=lambda sample: sample["doc_id"])


def _room(model: Any, max_length: int, kind: str) -> int:
    """Tokens of a sequence; generation reserves those of the answer, as far as the model has positions for them."""
    longest = getattr(model.config, "max_position_embeddings", None) or max_length + LONGEST_ANSWER
    return max_length if kind == "choice" else min(max_length + LONGEST_ANSWER, longest)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    loggers = [logging.getLogger(n) for n in [name, *logging.root.manager.loggerDict] if n.split(".")[0] == name]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
