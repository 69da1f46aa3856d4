"""Intervals of what changed: bootstrap over seeds and examples, paired by example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import DataError

DRAWS = 2000
RATIOS = ("nats", "loss")  # nats per token: a sum over tokens, and the smaller, the better


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    Args:
        value: of the examples at hand.
        low, high: percentile bootstrap interval.
    """

    value: float
    low: float
    high: float


def change(after: Sequence[Sequence[dict[str, Any]]], before: Sequence[dict[str, Any]], metric: str) -> Estimate:
    """How much a metric changed from `before` to `after`, over the same examples.

    Args:
        after: records of each seed's run.
        before: records of the base.
        metric: a key of the records that is averaged over examples, or "nats" / "loss": nats per token, whose tokens
            weigh equally.

    Each of the bootstrap's draws takes seeds and examples anew, with replacement, independently of each other: the
    same examples are scored under every seed. With one seed, the interval is over examples only.

    Raises:
        DataError: where the runs were not scored on the same examples.
    """
    ids = [record["id"] for record in before]
    for records in after:
        if [record["id"] for record in records] != ids:
            raise DataError("two runs were scored on different examples; they cannot be compared")
    if not ids or not after:
        raise DataError("there is nothing to compare: no example, or no run")
    key = "nats" if metric in RATIOS else metric
    differences_SE = np.array([[r[key] for r in records] for records in after], float) - [r[key] for r in before]
    weights_E = np.array([r["tokens"] if metric in RATIOS else 1.0 for r in before])
    random = np.random.default_rng(0)
    values = np.concatenate([_draws(differences_SE, weights_E, random, DRAWS // 20) for _ in range(20)])
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(float(differences_SE.mean(0).sum() / weights_E.sum()), float(low), float(high))


def _draws(differences_SE: np.ndarray, weights_E: np.ndarray, random: np.random.Generator, draws: int) -> np.ndarray:
    """Some resampled changes `[draws]`; in pieces, so that many examples need little memory."""
    seeds, examples = differences_SE.shape
    chosen_DE = random.integers(examples, size=(draws, examples))
    chosen_DS = random.integers(seeds, size=(draws, seeds))
    sums_SD = np.stack([differences_E[chosen_DE].sum(1) for differences_E in differences_SE])
    return np.take_along_axis(sums_SD.T, chosen_DS, 1).mean(1) / weights_E[chosen_DE].sum(1)


def flips(
    after: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]], metric: str
) -> tuple[list[int], list[int]]:
    """Positions of the examples that went from wrong to right, and of those that went from right to wrong."""
    changes = [a[metric] - b[metric] for a, b in zip(after, before, strict=True)]
    return [i for i, c in enumerate(changes) if c > 0], [i for i, c in enumerate(changes) if c < 0]
