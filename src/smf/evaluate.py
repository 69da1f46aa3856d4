"""Scores of a model on what a recipe names: losses here, questions by smf.harness."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import Collator, Example, ScoredSet, encode, pad_id
from .harness import answer_records, choice_records, task_records
from .loss import places_of, token_loss
from .memory import evaluation_mode
from .recipe import Recipe
from .stats import RATIOS
from .tasks import find_task


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


@torch.no_grad()
def example_divergences(
    model: nn.Module, base: nn.Module, examples: Sequence[Example], tokenizer: Any, *, loss: str, batch_size: int
) -> list[dict[str, Any]]:
    """For each example the KL divergence of the model from the base, KL(base || model), as `example_losses` has nats.

    Args:
        model, base: on one device; left in the mode they came in.
        examples, tokenizer, loss, batch_size: as of `example_losses`.
    """
    collate = Collator(pad_id(tokenizer), loss)
    device = next(model.parameters()).device
    records = []
    with evaluation_mode(model), evaluation_mode(base):
        for i in tqdm(range(0, len(examples), batch_size), desc="divergence", unit="batch", leave=False):
            batch = examples[i : i + batch_size]
            inputs = {k: v.to(device) for k, v in collate(batch).items()}
            learned_BS = inputs.pop("labels")[:, 1:] != -100
            was_BSV, is_BSV = (m(**inputs).logits for m in (base, model))
            places = places_of(learned_BS, was_BSV)
            kl_L = torch.cat([_divergence_of(was_BSV[at], is_BSV[at]) for at in places])
            kl_BS = kl_L.new_zeros(learned_BS.shape).masked_scatter(learned_BS, kl_L).double()
            for example, nats, tokens in zip(batch, kl_BS.sum(-1).tolist(), learned_BS.sum(-1).tolist(), strict=True):
                records.append({"id": example.id, "nats": nats, "tokens": tokens})
    return records


def _divergence_of(was_LV: Tensor, is_LV: Tensor) -> Tensor:
    """KL(was || is) `[L]`, of logits."""
    was_LV, is_LV = (F.log_softmax(logits.float(), -1) for logits in (was_LV, is_LV))
    return F.kl_div(is_LV, was_LV, reduction="none", log_target=True).sum(-1)


def nats_per_token(records: Sequence[dict[str, Any]]) -> float:
    """Mean over all scored tokens."""
    return sum(r["nats"] for r in records) / max(1, sum(r["tokens"] for r in records))


# -- the recipe's target and probes -----------------------------------------------------------------------------------


def score(
    model: nn.Module, tokenizer: Any, recipe: Recipe, sets: dict[str, ScoredSet], base: nn.Module | None = None
) -> dict[str, Any]:
    """Scores of every set, with a record for every example.

    Args:
        model: what is scored.
        tokenizer: of the base.
        recipe: for batch size, length and how many examples the divergence is measured on.
        sets: what is scored, by name.
        base: the untouched base; where it is given, its divergence from the model is a set "KL NAME" of its own for
            every target set and text probe.

    Returns:
        `{name: {"role", "task", "metrics", "records"}}`; shares from 0 to 1, losses and divergences in nats per token.
    """
    scores = {name: score_set(model, tokenizer, recipe, name, scored) for name, scored in sets.items()}
    if base is not None:
        for name, scored in sets.items():
            kind = find_task(scored.task).KIND
            if kind == "text" or (scored.role == "target" and kind != "harness"):
                scores[f"KL {name}"] = _divergence(model, base, tokenizer, recipe, name, scored)
    return scores


def score_set(model: nn.Module, tokenizer: Any, recipe: Recipe, name: str, scored: ScoredSet) -> dict[str, Any]:
    """Score of one set."""
    print(f"smf: scoring {name}: {len(scored.items):,} items", file=sys.stderr)
    records = _records(model, tokenizer, recipe, name, scored)
    words = sum(page.words for page in scored.pages)
    metrics = {m: mean_of(records, m) for m in find_task(scored.task).METRICS if m != "word_perplexity"}
    if words:
        size = recipe.eval_batch_size
        pages = example_losses(model, scored.pages, tokenizer, loss="answer", batch_size=size, title=f"{name}, pages")
        metrics["word_perplexity"] = _perplexity(sum(record["nats"] for record in pages) / words)
    return _described(scored, scored.role, scored.task, metrics, records)


def _records(model: nn.Module, tokenizer: Any, recipe: Recipe, name: str, scored: ScoredSet) -> list[dict[str, Any]]:
    """A record for each example of a set."""
    task, items = find_task(scored.task), scored.items
    options: dict[str, Any] = {"batch_size": recipe.eval_batch_size}
    if task.KIND in ("text", "response"):
        return example_losses(model, items, tokenizer, loss="answer", title=name, **options)
    if task.KIND == "harness":
        return task_records(model, tokenizer, items[0], folder=recipe.lm_eval_tasks, **options)
    options["max_length"] = recipe.train.max_length
    if task.KIND == "choice":
        return choice_records(model, tokenizer, items, **options)
    return answer_records(model, tokenizer, items, stop=task.STOP, marks=task.marks, **options)


def _divergence(
    model: nn.Module, base: nn.Module, tokenizer: Any, recipe: Recipe, name: str, scored: ScoredSet
) -> dict[str, Any]:
    """KL(base || model) in nats per token: of a text all its tokens, of a question those of its right answer."""
    length = recipe.train.max_length
    chosen = scored.items[: recipe.divergence]
    examples = [item if isinstance(item, Example) else _answered(item, tokenizer, length) for item in chosen]
    print(f"smf: scoring KL {name}: {len(examples):,} items", file=sys.stderr)
    records = example_divergences(model, base, examples, tokenizer, loss="answer", batch_size=recipe.eval_batch_size)
    return _described(scored, "divergence", "divergence", {"nats": nats_per_token(records)}, records)


def _answered(item: dict[str, Any], tokenizer: Any, length: int) -> Example:
    response = item["choices"][item["answer"]] if "choices" in item else f" {item['answers'][0].strip()}"
    return encode(tokenizer, item["id"], item["prompt"], response, length, end=False)


def _described(
    scored: ScoredSet, role: str, task: str, metrics: dict[str, float], records: list[dict[str, Any]]
) -> dict[str, Any]:
    if scored.cluster:
        records = [record | {"cluster": record["id"].split(scored.cluster)[0]} for record in records]
    return {"role": role, "task": task, "metrics": metrics, "records": records}


def mean_of(records: Sequence[dict[str, Any]], metric: str) -> float:
    """A metric over all examples; losses weigh tokens equally."""
    if metric in RATIOS:
        return nats_per_token(records)
    if metric == "perplexity":
        return _perplexity(nats_per_token(records))
    return sum(record[metric] for record in records) / len(records)


def _perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))
