"""Any task that lm-evaluation-harness knows: "lm_eval:arc_easy", "lm_eval:arc_easy:acc_norm" for a metric of it, and
"lm_eval:gsm8k:exact_match,flexible-extract" for a metric after one of its filters, as the harness writes them."""

from __future__ import annotations

from typing import NamedTuple

PREFIX = "lm_eval:"
KIND = "harness"
COLUMNS = ()
METRICS = ("score",)  # the metric that the name asks for, else the task's first


class HarnessTask(NamedTuple):
    """What to run."""

    name: str
    metric: str  # "": the task's first
    filter: str = ""  # "": the task's first
    limit: int = 0  # first documents of each subtask; 0: all


def parse(task: str, *limits: int) -> HarnessTask:
    """What "lm_eval:NAME:METRIC,FILTER" asks for, of as many documents as the smallest limit above 0 says."""
    name, _, score = task.removeprefix(PREFIX).partition(":")
    metric, _, chosen = score.partition(",")
    return HarnessTask(name, metric, chosen, min(filter(None, limits), default=0))
