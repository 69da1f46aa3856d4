"""Any task that lm-evaluation-harness knows, by its name: "lm_eval:arc_easy", or "lm_eval:arc_easy:acc_norm"."""

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
    limit: int = 0  # first documents of each subtask; 0: all


def parse(task: str, limit: int) -> HarnessTask:
    """What "lm_eval:NAME:METRIC" asks for."""
    name, _, metric = task.removeprefix(PREFIX).partition(":")
    return HarnessTask(name, metric, limit)
