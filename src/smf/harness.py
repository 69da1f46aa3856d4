"""What a model picks and what it says, scored by lm-evaluation-harness on the model object."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .data import prefix_id
from .errors import ConfigError, DataError
from .memory import evaluation_mode
from .tasks.harness_task import HarnessTask

LONGEST_ANSWER = 32  # tokens
ANSWER = 256  # tokens that the harness lets a model say where its task does not


def choice_records(
    model: nn.Module, tokenizer: Any, items: Sequence[dict[str, Any]], *, batch_size: int, max_length: int
) -> list[dict[str, Any]]:
    """For each question the choices' log-probabilities, the pick and whether it is right.

    `acc` picks by the summed log-probability, `answer_norm` by the mean over the choice's tokens (arXiv 2605.03229),
    `letter`, where items have "letters", by theirs alone; `nats` and `tokens` are those of the right choice.
    """
    task = {
        "output_type": "multiple_choice",
        "metric_list": [{"metric": "acc"}],
        "doc_to_choice": lambda doc: [*doc["choices"], *(doc.get("letters") or [])],
        "doc_to_target": lambda doc: doc["answer"],
    }
    samples = _samples(task, model, tokenizer, items, batch_size, max_length)
    return [_choice_record(item, sample, tokenizer) for item, sample in zip(items, samples, strict=True)]


def _choice_record(item: dict[str, Any], sample: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    prompt, choices, right = item["prompt"], item["choices"], item["answer"]
    scores = [float(response[0]) for response in sample["filtered_resps"]]
    sums, letters = scores[: len(choices)], scores[len(choices) :]
    start = len(tokenizer(prompt.rstrip())["input_ids"])  # the harness scores a prompt's last blanks with the choice
    tokens = [max(1, len(tokenizer(prompt + choice)["input_ids"]) - start) for choice in choices]
    means = [total / count for total, count in zip(sums, tokens, strict=True)]
    pick, pick_norm = _largest(sums), _largest(means)
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
    } | ({"letter": int(_largest(letters) == right)} if letters else {})


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def answer_records(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[dict[str, Any]],
    *,
    batch_size: int,
    max_length: int,
    stop: Sequence[str],
    marks: Callable[[str, Sequence[str]], dict[str, float]],
) -> list[dict[str, Any]]:
    """For each question what the model says, greedily, with its marks.

    Args:
        model, tokenizer, items, batch_size, max_length: as everywhere.
        stop: texts that an answer ends before; it has `LONGEST_ANSWER` tokens at most.
        marks: scores of what was said, given it and the right answers.
    """
    task = {
        "output_type": "generate_until",
        "generation_kwargs": {"until": list(stop), "max_gen_toks": LONGEST_ANSWER, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "doc_to_target": lambda doc: doc["answers"][0],
    }
    samples = _samples(task, model, tokenizer, items, batch_size, max_length + LONGEST_ANSWER)
    records = []
    for item, sample in zip(items, samples, strict=True):
        said = sample["filtered_resps"][0].strip()
        texts = {"question": item["prompt"], "right": " | ".join(item["answers"]), "said": said}
        records.append({"id": item["id"]} | texts | marks(said, item["answers"]))
    return records


def _samples(
    task: dict[str, Any],
    model: Any,
    tokenizer: Any,
    items: Sequence[dict[str, Any]],
    batch_size: int,
    max_length: int,
) -> list[dict[str, Any]]:
    """The harness's record of every item, in the order given."""
    import datasets
    from lm_eval.tasks import TaskManager

    documents = datasets.Dataset.from_list(list(items))
    whole = {
        "task": "smf",
        "custom_dataset": lambda **_: {"validation": documents},
        "validation_split": "validation",
        "doc_to_text": lambda doc: doc["prompt"],
        "target_delimiter": "",
    }
    with evaluation_mode(model), _quiet("lm_eval"):
        loaded = TaskManager(include_defaults=False).load([whole | task])
        results = _run(loaded, model, tokenizer, batch_size, max_length)
    return sorted(results["samples"]["smf"], key=lambda sample: sample["doc_id"])


def task_records(
    model: nn.Module,
    tokenizer: Any,
    task: HarnessTask,
    *,
    folder: str,
    batch_size: int,
) -> list[dict[str, Any]]:
    """For each document of one of the harness's tasks its score, or its negative where lower is better.

    The task has the model's own window: few-shot prompts and answers are longer than what is trained.

    Args:
        model, tokenizer, batch_size: as everywhere.
        task: what to run.
        folder: with tasks of one's own; "": none.

    Raises:
        DataError: where the task has no such score for a document.
    """
    loaded = load_task(task.name, folder)
    with evaluation_mode(model):
        samples = _run(loaded, model, tokenizer, batch_size, None, task.limit)["samples"]
    records = []
    for name in sorted(samples):
        metric = _metric_of(task, loaded["tasks"][name])
        filtered = [sample for sample in samples[name] if sample["filter"] == metric.filter]
        for sample in sorted(filtered, key=lambda s: s["doc_id"]):
            score = sample.get(metric.name)
            if isinstance(score, bool) or not isinstance(score, (int, float)):
                raise DataError(
                    f"lm_eval task {name!r} has no number {metric.name!r} for a document; it has "
                    f"{list(sample['metrics'])}; choose one with lm_eval:NAME:METRIC"
                )
            texts = {"question": str(sample["arguments"][0][0]), "right": str(sample["target"])}
            said = str(sample["filtered_resps"][0]) if len(sample["filtered_resps"]) == 1 else ""
            score = score if metric.higher_is_better else 0 - score  # so that losing some is forgetting
            record = {"id": f"{name}.{sample['doc_id']}", **texts, "said": said, "score": score}
            records.append(record | _choices_of(sample, metric, loaded["tasks"][name]))
    return records


def _choices_of(sample: dict[str, Any], metric: Metric, task: Any) -> dict[str, int]:
    """Among how many choices a score of 0 or 1 picks, where it does: what guessing gives, then, is known."""
    if task.OUTPUT_TYPE != "multiple_choice" or metric.name not in ("acc", "acc_norm"):
        return {}
    twice = "acc_mutual_info" in sample["metrics"]  # there every choice is scored without its prompt, too
    return {"choices": len(sample["filtered_resps"]) // (2 if twice else 1)}


def load_task(name: str, folder: str) -> Any:
    """One of the harness's tasks, groups or tags with its documents.

    Raises:
        ConfigError: for a name that it does not know.
        DataError: for a data set that neither this machine nor the hub has.
    """
    check_name(HarnessTask(name, ""), folder)
    try:
        with _quiet("lm_eval"):
            return _manager(folder).load([name])
    except Exception as error:  # no network, no such data set, split or column: many classes
        path = _task_file(name, folder).get("dataset_path")  # of a group nothing: the error names it
        raise DataError(
            f"lm_eval task {name!r}: its data set{f' {path}' if path else ''} cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


def check_name(asked: HarnessTask, folder: str) -> None:
    """Refuse a task, metric or filter that the harness's task files do not name, without loading any documents.

    Raises:
        ConfigError: with names that are near.
    """
    manager = _manager(folder)
    if asked.name not in manager.all_tasks:
        near = difflib.get_close_matches(asked.name, manager.all_tasks, n=3)
        raise ConfigError(f"lm-evaluation-harness has no task {asked.name!r}{f'; near: {near}' if near else ''}")
    config = _task_file(asked.name, folder)
    metrics = [each["metric"] for each in config.get("metric_list") or []]
    filters = [each["name"] for each in config.get("filter_list") or []]
    _check_words(asked, asked.name, config.get("output_type"), metrics, filters)


def _task_file(name: str, folder: str) -> dict[str, Any]:
    """What the file of a task says; of groups, and of tasks in Python, it is little."""
    from lm_eval.tasks._yaml_loader import load_yaml

    file = _manager(folder).task_index[name].yaml_path
    return load_yaml(file, resolve_func=False) if file else {}


def check_task(asked: HarnessTask, folder: str, window: int) -> dict[str, str]:
    """Refuse what cannot be scored, before hours of work; returns the data sets on the hub, with their revisions.

    Args:
        asked: a task, a group or a tag of the harness.
        folder: with tasks of one's own; "": none.
        window: tokens that the base reads at most.

    Raises:
        ConfigError: for a name, metric or filter that the harness does not have, for a metric that is no mean over
            documents, and where the window has no room for answers.
        DataError: where its data set cannot be loaded.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    found = {}
    for name, task in load_task(asked.name, folder)["tasks"].items():
        _metric_of(asked, task)
        if task.OUTPUT_TYPE == "generate_until":
            room = normalize_gen_kwargs(dict(task.config.generation_kwargs or {})).get("max_gen_toks", ANSWER)
            if room >= window:
                raise ConfigError(
                    f"lm_eval task {name!r} lets a model say {room} tokens, and the base reads {window} at most, "
                    "prompt and answer; give it a smaller max_gen_toks in a task file of your own (lm_eval_tasks)"
                )
        path = task.config.dataset_path or ""
        if "/" in path and not Path(path).exists():  # else a reader of files, as "json"
            found[path] = (task.config.dataset_kwargs or {}).get("revision") or "main"
    return found


class Metric(NamedTuple):
    """The score of a task of the harness: a metric, after which filter of answers, and whether more is better."""

    name: str
    filter: str
    higher_is_better: bool


def _metric_of(asked: HarnessTask, task: Any) -> Metric:
    """The metric that is asked for, else the first; ConfigError where it is no mean over documents, or is not there."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    names = {function: name for name, function in AGGREGATION_REGISTRY.items()}
    known = {metric: names.get(function, "mean") for metric, function in task.aggregation().items()}
    means = [metric for metric, name in known.items() if name in ("mean", "nanmean")]
    filters = [each["name"] for each in task.config.filter_list or []] or ["none"]  # the harness's word for no filter
    _check_words(asked, task.config.task, task.OUTPUT_TYPE, list(known), filters)
    if not means or (asked.metric and asked.metric not in means):
        raise ConfigError(
            f"lm_eval task {task.config.task!r}: {asked.metric or list(known)} is no mean over documents, which "
            f"intervals need; those that are: {means}"
        )
    metric = asked.metric or means[0]
    return Metric(metric, asked.filter or filters[0], task.higher_is_better().get(metric) is not False)


def _check_words(asked: HarnessTask, name: str, output: Any, metrics: list[str], filters: list[str]) -> None:
    """Refuse what no task of these metrics and filters can be asked for; empty lists are not known."""
    if output == "loglikelihood_rolling":
        raise ConfigError(
            f'lm_eval task {name!r} scores whole texts at once; use task = "wikitext" or "perplexity" of smf, with a '
            "source of text"
        )
    for what, wanted, known in (("metric", asked.metric, metrics), ("filter", asked.filter, filters)):
        if wanted and known and wanted not in known:
            raise ConfigError(f"lm_eval task {name!r} has no {what} {wanted!r}; it has {known}")


@functools.cache
def _manager(folder: str) -> Any:
    """Looking through the harness's thousands of task files takes seconds; a run scores several times."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder or None)


def _run(loaded: Any, model: Any, tokenizer: Any, batch_size: int, max_length: int | None, limit: int = 0) -> Any:
    """Results of loaded tasks, with every document's sample; without a length, in the model's own window."""
    import lm_eval

    from .shared_prompts import SharedPromptLM

    if max_length is not None:
        max_length = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
    with _quiet("lm_eval"):
        lm = SharedPromptLM(
            pretrained=model,
            tokenizer=_completed(tokenizer, model),
            batch_size=batch_size,
            max_length=max_length,
            prefix_token_id=prefix_id(tokenizer),
            add_bos_token=bool(tokenizer("")["input_ids"]),  # as in training
        )
    # prompts that are cut are said, but where a recipe's own length cuts them, which loading has looked at
    with _quiet("lm_eval", logging.ERROR if max_length else logging.WARNING):
        # not simple_evaluate: it also collects the environment, seconds a call, and seeds every generator
        return lm_eval.evaluate(lm, loaded, log_samples=True, bootstrap_iters=0, limit=limit or None)


def _completed(tokenizer: Any, model: Any) -> Any:
    """The tokenizer with what the harness needs of one: a pad token, and the token that the model's generation ends at.

    Left to itself, the harness would add a pad token to the caller's, one that the base may have no embedding of. Pads
    are masked, so any token is one; where a sequence has ended, they follow its end and are cut off with it.
    """
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    end = ends[0] if isinstance(ends, list) else ends
    end = end if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if tokenizer.pad_token_id is not None and end == tokenizer.eos_token_id:
        return tokenizer
    completed = copy.deepcopy(tokenizer)
    completed.eos_token_id = end
    if completed.pad_token_id is None:
        completed.pad_token_id = 0 if end is None else end
    return completed


@contextlib.contextmanager
def _quiet(name: str, level: int = logging.ERROR) -> Iterator[None]:
    loggers = [logging.getLogger(n) for n in [name, *logging.root.manager.loggerDict] if n.split(".")[0] == name]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
