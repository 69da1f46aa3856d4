"""Scores of a model: nats per token of any examples, and choices by lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import Collator, Example, load_rows, pad_id
from .memory import evaluation_mode
from .recipe import Probe, Recipe
from .tasks import find_task, medmcqa


def token_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Cross-entropy `[B, S - 1]` of each next token, in at least float32; zero where there is no label."""
    next_BS = labels_BS[:, 1:]
    labelled_BS = next_BS != -100
    logits_LV = logits_BSV[:, :-1][labelled_BS]  # the L positions with a label alone
    losses_L = F.cross_entropy(
        logits_LV.to(torch.promote_types(logits_LV.dtype, torch.float32)), next_BS[labelled_BS], reduction="none"
    )
    return losses_L.new_zeros(next_BS.shape).masked_scatter(labelled_BS, losses_L)


@torch.no_grad()
def example_losses(
    model: nn.Module, examples: Sequence[Example], tokenizer: Any, *, loss: str, batch_size: int, title: str = "loss"
) -> list[dict[str, Any]]:
    """For each example its id, summed nats and number of scored tokens, in the order given.

    Args:
        model: in any mode; left in the mode it came in.
        examples: what to score.
        tokenizer: for the padding token.
        loss: "answer" or "full": which tokens count.
        batch_size: sequences of a forward pass; sequences of like length go together.
        title: of the progress bar.
    """
    collate = Collator(pad_id(tokenizer), loss)
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    records: list[dict[str, Any]] = [{} for _ in examples]
    with evaluation_mode(model):
        for batch in tqdm(batches, desc=title, unit="batch", leave=False):
            inputs = {k: v.to(device) for k, v in collate([examples[i] for i in batch]).items()}
            labels = inputs.pop("labels")
            losses = token_loss(model(**inputs).logits, labels).double().sum(-1).tolist()
            counts = (labels != -100).sum(-1).tolist()
            for i, nats, tokens in zip(batch, losses, counts, strict=True):
                records[i] = {"id": examples[i].id, "nats": nats, "tokens": tokens}
    return records


def nats_per_token(records: Sequence[dict[str, Any]]) -> float:
    """Mean over all scored tokens."""
    return sum(r["nats"] for r in records) / max(1, sum(r["tokens"] for r in records))


def choice_records(
    model: nn.Module, tokenizer: Any, rows: Sequence[Any], *, batch_size: int, max_length: int
) -> list[dict[str, Any]]:
    """For each question the options' summed and mean log-probabilities, the picks and whether they are right.

    Scored by lm-evaluation-harness on the model object; `acc` picks by the sum, `answer_norm` by the mean over the
    option's tokens (arXiv 2605.03229).
    """
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    documents = datasets.Dataset.from_list(
        [{"prompt": medmcqa.prompt(r), "choices": medmcqa.choices(r), "answer": medmcqa.answer(r)} for r in rows]
    )
    task = {
        "task": "smf_choices",
        "custom_dataset": lambda **_: {"validation": documents},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": lambda doc: doc["choices"],
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    adds_bos = bool(tokenizer("")["input_ids"])  # as in training
    with evaluation_mode(model), _quiet("lm_eval"):
        make_lm: Any = HFLM  # its signature is hidden by decorators
        lm = make_lm(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            add_bos_token=adds_bos,
        )
        # not simple_evaluate: it also collects the environment, seconds a call, and seeds every generator
        loaded: Any = TaskManager(include_defaults=False).load([task])
        results: Any = lm_eval.evaluate(lm, loaded, log_samples=True, bootstrap_iters=0)
    samples = sorted(results["samples"]["smf_choices"], key=lambda sample: sample["doc_id"])
    return [_choice_record(row, sample, tokenizer) for row, sample in zip(rows, samples, strict=True)]


def _choice_record(row: Any, sample: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    prompt, choices = medmcqa.prompt(row), medmcqa.choices(row)
    sums = [float(response[0]) for response in sample["filtered_resps"]]
    start = len(tokenizer(prompt)["input_ids"])
    means = [
        total / max(1, len(tokenizer(prompt + choice)["input_ids"]) - start)
        for total, choice in zip(sums, choices, strict=True)
    ]
    right = medmcqa.answer(row)
    pick, pick_norm = (max(range(len(s)), key=s.__getitem__) for s in (sums, means))
    return {
        "id": row["id"],
        "answer": right,
        "logprobs": sums,
        "pick": pick,
        "acc": int(pick == right),
        "answer_norm": int(pick_norm == right),
    }


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


# -- the recipe's target and probes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredSets:
    """What a recipe scores: loaded, encoded and checked before anything trains."""

    target_examples: list[Example]
    target_rows: list[Any]
    probes: dict[str, list[Example]]


def probe_examples(recipe: Recipe, name: str, probe: Probe, tokenizer: Any) -> list[Example]:
    """The examples of one probe."""
    task = find_task(probe.task)
    rows = load_rows(probe.source, recipe.data, recipe.parts, [probe.source.column])
    return task.examples(rows, probe.source.column, tokenizer, recipe.train.max_length)


def score(model: nn.Module, tokenizer: Any, recipe: Recipe, sets: ScoredSets) -> dict[str, Any]:
    """Scores of target and probes, with a record for every example.

    Returns:
        `{"target": {"loss", "acc", "answer_norm", "records"}, "probes": {name: {"nats", "perplexity", "records"}}}`;
        losses in nats per token.
    """
    batch_size = recipe.eval_batch_size
    losses = example_losses(
        model, sets.target_examples, tokenizer, loss=recipe.train.loss, batch_size=batch_size, title="target loss"
    )
    picks = choice_records(
        model, tokenizer, sets.target_rows, batch_size=batch_size, max_length=recipe.train.max_length
    )
    target = {
        "loss": nats_per_token(losses),
        "acc": sum(p["acc"] for p in picks) / len(picks),
        "answer_norm": sum(p["answer_norm"] for p in picks) / len(picks),
        "records": {"loss": losses, "choice": picks},
    }
    probes = {}
    for name, examples in sets.probes.items():
        records = example_losses(model, examples, tokenizer, loss="full", batch_size=batch_size, title=f"probe {name}")
        nats = nats_per_token(records)
        probes[name] = {"nats": nats, "perplexity": math.exp(min(nats, 700.0)), "records": records}
    return {"target": target, "probes": probes}
