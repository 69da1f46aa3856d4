"""Scores of a model on what a recipe names: losses here, questions by smf.harness."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import Collator, Example, pad_id
from .harness import answer_records, choice_records
from .memory import evaluation_mode
from .recipe import Recipe
from .stats import RATIOS
from .tasks import find_task


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


# -- the recipe's target and probes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoredSet:
    """One target or probe set of a recipe, loaded and checked before anything trains.

    Args:
        role: "target" or "probe".
        task: name of its task.
        items: examples of a text, or what is asked (`smf.tasks`).
    """

    role: str
    task: str
    items: list[Any]


def score(model: nn.Module, tokenizer: Any, recipe: Recipe, sets: dict[str, ScoredSet]) -> dict[str, Any]:
    """Scores of every set, with a record for every example.

    Returns:
        `{name: {"role", "task", "metrics", "records"}}`; shares from 0 to 1, losses in nats per token.
    """
    return {name: score_set(model, tokenizer, recipe, name, scored) for name, scored in sets.items()}


def score_set(model: nn.Module, tokenizer: Any, recipe: Recipe, name: str, scored: ScoredSet) -> dict[str, Any]:
    """Score of one set."""
    print(f"smf: scoring {name}: {len(scored.items):,} items", file=sys.stderr)
    task = find_task(scored.task)
    size, length = recipe.eval_batch_size, recipe.train.max_length
    if task.KIND == "text":
        records = example_losses(model, scored.items, tokenizer, loss="full", batch_size=size, title=name)
    else:
        ask = choice_records if task.KIND == "choice" else answer_records
        records = ask(model, tokenizer, scored.items, batch_size=size, max_length=length)
    metrics = {metric: mean_of(records, metric) for metric in task.METRICS}
    return {"role": scored.role, "task": scored.task, "metrics": metrics, "records": records}


def mean_of(records: Sequence[dict[str, Any]], metric: str) -> float:
    """A metric over all examples; losses weigh tokens equally."""
    if metric in RATIOS:
        return nats_per_token(records)
    if metric == "perplexity":
        return math.exp(min(nats_per_token(records), 700.0))
    return sum(record[metric] for record in records) / len(records)
