"""Intervals of what changed: a joint bootstrap over examples and seeds, paired by example."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from .errors import ConfigError, DataError

DRAWS = 3999  # a 95 % interval goes from the 100th smallest to the 100th largest draw: (DRAWS + 1) / 40
RATIOS = ("nats", "loss")  # nats per token: a sum over tokens, and the smaller, the better


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    Args:
        value: of the examples and seeds at hand.
        low, high: percentile interval of the bootstrap's draws.
        p: two-sided p-value of "no change"; at most 0.05 exactly where the interval excludes "no change". It is never
            below 2 / (draws + 1), and NaN where nobody computed it.
    """

    value: float
    low: float
    high: float
    p: float = math.nan

    def within(self, least: float, most: float) -> Estimate:
        """Without the part of the interval that no value can have; two seeds can leave one beyond all bounds."""
        low, high = (math.nan if math.isnan(end) else min(max(end, least), most) for end in (self.low, self.high))
        return replace(self, low=low, high=high)


@dataclass(frozen=True, eq=False)
class Changes:
    """By how much one metric changed from the base, for each seed and example; made by `changes_of`.

    Args:
        differences_SE: after minus before; for nats per token, of the examples' sums.
        weights_E: what an example counts, such as its tokens.
        cluster_E: number of the cluster that the example is resampled with, from 0 and without gaps.
        seeds: of the runs.
        key: names the example set; quantities with equal keys are paired by example.
    """

    differences_SE: np.ndarray
    weights_E: np.ndarray
    cluster_E: np.ndarray
    seeds: tuple[int, ...]
    key: str

    @property
    def by_seed(self) -> np.ndarray:
        """The change `[S]` under each seed."""
        return self.differences_SE.sum(1) / self.weights_E.sum()

    def by_cluster(self, values_XE: np.ndarray) -> np.ndarray:
        """Sums `[X, G]` over the examples of each cluster."""
        clusters = int(self.cluster_E.max()) + 1
        return np.stack([np.bincount(self.cluster_E, values_E, clusters) for values_E in values_XE])


def changes_of(
    after: Sequence[Sequence[dict[str, Any]]],
    before: Sequence[dict[str, Any]],
    metric: str,
    seeds: Sequence[int] | None = None,
) -> Changes:
    """How a metric changed from `before` to `after`, over the same examples.

    Args:
        after: records of each seed's run. Examples whose records have an equal "cluster" (questions on one fact) are
            not independent, and are resampled together; without it, each id is its own cluster.
        before: records of the base.
        metric: a key of the records that is averaged over examples, or "nats" / "loss": nats per token, whose tokens
            weigh equally.
        seeds: of the runs, where they are not 0, 1, 2, ...

    Raises:
        DataError: where the runs were not scored on the same examples, or there is nothing to compare.
        ConfigError: where seeds and runs do not match.
    """
    examples = _examples(before)
    if any(_examples(records) != examples for records in after):
        raise DataError("two runs were scored on different examples or clusters; they cannot be compared")
    if not examples or not after:
        raise DataError("there is nothing to compare: no example, or no run")
    seeds = tuple(range(len(after)) if seeds is None else seeds)
    if len(set(seeds)) != len(after) or len(seeds) != len(after):
        raise ConfigError(f"{len(after)} runs have the seeds {seeds}; give each run a seed of its own")
    key = "nats" if metric in RATIOS else metric
    differences_SE = np.array([[r[key] for r in records] for records in after], float) - [r[key] for r in before]
    weights_E = np.array([r["tokens"] if metric in RATIOS else 1.0 for r in before], float)
    if not 0 < weights_E.sum() < math.inf:
        raise DataError("there is nothing to compare: the examples have no tokens, or not a finite number of them")
    numbers: dict[Any, int] = {}
    cluster_E = np.array([numbers.setdefault(cluster, len(numbers)) for _, cluster in examples])
    order = np.argsort(seeds)  # so that two methods' runs are paired by seed, however they were listed
    digest = hashlib.sha256(repr(examples).encode()).hexdigest()
    return Changes(differences_SE[order], weights_E, cluster_E, tuple(sorted(seeds)), digest)


def _examples(records: Sequence[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """Id and cluster of each example; a cluster's name may be the id of an example without one."""
    return [(r["id"], ("cluster", r["cluster"]) if "cluster" in r else ("id", r["id"])) for r in records]


def halves(changes: Changes) -> tuple[Changes, Changes]:
    """The change on two random halves of the clusters; all changes on one example set are halved alike.

    Where a half would have nothing to weigh, both are the whole.
    """
    clusters = int(changes.cluster_E.max()) + 1
    order_G = _random("halves", changes.key).permutation(clusters)
    made = []
    for half, part_G in enumerate((order_G[::2], order_G[1::2])):
        own_E = np.isin(changes.cluster_E, part_G)
        if changes.weights_E[own_E].sum() <= 0:
            return changes, changes
        cluster_E = np.unique(changes.cluster_E[own_E], return_inverse=True)[1]
        key = f"{changes.key}, half {half}"
        own = (changes.differences_SE[:, own_E], changes.weights_E[own_E], cluster_E, changes.seeds, key)
        made.append(Changes(*own))
    return made[0], made[1]


# -- draws ------------------------------------------------------------------------------------------------------------
#
# Of the variance of a mean over S seeds and G clusters, (examples + interaction / S) / G + seeds / S, a bootstrap over
# clusters finds the first term, and the runs' variance / S finds seeds / S + interaction / (S G). The interaction of
# examples and seeds must not count twice. It is taken out of the bootstrap: taken out of the runs' variance, which few
# seeds tell roughly, it left intervals that held the truth in as few as 86 % (2 seeds), 90 % (3) or 93 % (5) of cases.


def draws(changes: Sequence[Changes], count: int = DRAWS) -> np.ndarray:
    """Joint draws `[K, D]` of what K changes could have been with other examples and other seeds.

    Examples: clusters are resampled with replacement; changes on one example set share the resamples, other sets get
    independent ones. Seeds: a multivariate Student t is added, as resampling 5 seeds would hold the truth only about
    84 % of the time. With one seed, the draws are over examples only.

    Raises:
        ConfigError: where the changes are of different seeds.
        DataError: where a difference is not finite.
    """
    if len({c.seeds for c in changes}) != 1:
        given = " and ".join(sorted({str(c.seeds) for c in changes})) or "no run"
        raise ConfigError(f"changes of the seeds {given}: run the seeds that are missing, or leave out the others")
    if not all(np.isfinite(c.differences_SE).all() for c in changes):
        raise DataError("a run's scores are not finite; leave the run out")
    draws_KD = _seed_draws(changes, count)
    for key in dict.fromkeys(c.key for c in changes):
        places = [k for k, c in enumerate(changes) if c.key == key]
        draws_KD[places] += _example_draws([changes[k] for k in places], count)
    return draws_KD


def _seed_draws(changes: Sequence[Changes], count: int) -> np.ndarray:
    """Around 0 `[K, D]`: a multivariate t with S - 1 degrees of freedom and the covariance of the mean over seeds."""
    seeds = len(changes[0].seeds)
    if seeds == 1:
        return np.zeros((len(changes), count))
    random = _random("seeds", *sorted({c.key for c in changes}))
    values_KS = np.stack([c.by_seed for c in changes])
    root_KS = (values_KS - values_KS.mean(1, keepdims=True)) / math.sqrt(seeds * (seeds - 1))
    return root_KS @ random.standard_normal((seeds, count)) * np.sqrt((seeds - 1) / random.chisquare(seeds - 1, count))


def _example_draws(changes: Sequence[Changes], count: int) -> np.ndarray:
    """`[K, D]`, averaged over seeds, of changes on one example set."""
    sums_GX = np.concatenate([c.by_cluster(np.stack([c.differences_SE.mean(0), c.weights_E])) for c in changes]).T
    counts_DG, stretch_D = _resamples(changes[0].key, len(sums_GX), count)
    blocks = [counts_DG[start : start + 256] @ sums_GX for start in range(0, count, 256)]  # as floats, 256 at a time
    sums_KXD = np.concatenate(blocks).T.reshape(len(changes), 2, count)
    values_K1 = np.array([c.by_seed.mean() for c in changes])[:, None]
    empty_KD = sums_KXD[:, 1] <= 0  # only examples without tokens
    drawn_KD = np.where(empty_KD, values_K1, sums_KXD[:, 0] / np.where(empty_KD, 1, sums_KXD[:, 1]))
    return values_K1 + _without_interaction(changes) @ (drawn_KD - values_K1) * stretch_D


@lru_cache(maxsize=16)
def _resamples(key: str, clusters: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each draw takes each cluster `[D, G]` (a byte each), and how much a draw is stretched `[D]`.

    The bootstrap's spread is that of a normal whose variance is known, and is divided by G instead of G - 1; the
    stretch makes it a Student t, which matters for a dozen clusters and not for hundreds.
    """
    random = _random("examples", key)
    counts_DG = np.empty((count, clusters), np.uint8)
    for start in range(0, count, 256):
        rows = min(256, count - start)
        chosen_RG = random.integers(clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        counts_DG[start : start + rows] = np.bincount(chosen_RG.ravel(), minlength=rows * clusters).reshape(rows, -1)
    return counts_DG, np.sqrt(clusters / random.chisquare(max(1, clusters - 1), count))


def _without_interaction(changes: Sequence[Changes]) -> np.ndarray:
    """`[K, K]`, shrinks the bootstrap's deviations on one example set to what the examples alone bring.

    Each cluster's influence on a value is the linear part of the ratio of sums. The influences' covariance over
    clusters is C for the mean seed; seeds that disagree about a cluster contribute N to it. The result M has
    M C M' = C - N, without negative eigenvalues.
    """
    seeds = len(changes[0].seeds)
    if seeds == 1:
        return np.eye(len(changes))
    influences_KSG = np.stack(
        [c.by_cluster(c.differences_SE - c.by_seed[:, None] * c.weights_E) / c.weights_E.sum() for c in changes]
    )
    mean_KG = influences_KSG.mean(1)
    apart_KX = (influences_KSG - mean_KG[:, None]).reshape(len(changes), -1)
    axes_KR, sizes_R, _ = np.linalg.svd(mean_KG, full_matrices=False)  # C = axes sizes^2 axes'
    there = sizes_R > 1e-9 * sizes_R.max()  # not where changes are equal, or depend on each other
    axes_KR, sizes_R = axes_KR[:, there], sizes_R[there]
    apart_RX = (axes_KR / sizes_R).T @ apart_KX
    kept_R, turns_RR = np.linalg.eigh(np.eye(len(sizes_R)) - apart_RX @ apart_RX.T / (seeds * (seeds - 1)))
    shrink_RR = turns_RR * np.sqrt(np.maximum(kept_R, 0)) @ turns_RR.T
    return axes_KR * sizes_R @ shrink_RR @ (axes_KR / sizes_R).T


def _random(*parts: str) -> np.random.Generator:
    """Equal parts give equal numbers; other example sets get others, also where they have the same size."""
    return np.random.default_rng(int(hashlib.sha256("\n".join(parts).encode()).hexdigest(), 16))


# -- estimates --------------------------------------------------------------------------------------------------------


def estimate(value: float, draws_D: np.ndarray, null: float = 0.0) -> Estimate:
    """The percentile interval of draws `[D]`, and the p-value of the true value being `null`."""
    draws_D = np.sort(np.round(draws_D, 12))  # sums that cancel leave 1e-17, which is no change
    rank = max(1, (len(draws_D) + 1) // 40)
    tail = min((draws_D <= null).sum(), (draws_D >= null).sum())
    p = min(1.0, 2 * (1 + int(tail)) / (len(draws_D) + 1))
    return Estimate(float(value), float(draws_D[rank - 1]), float(draws_D[-rank]), p)


def function_of(
    f: Callable[[np.ndarray], np.ndarray], changes: Sequence[Changes], null: float = 0.0, count: int = DRAWS
) -> Estimate:
    """Any function of several changes, such as their mean.

    Args:
        f: takes changes `[K, ...]` and returns `[...]`.
        changes: of the same seeds.
        null: what `f` would be if there were nothing to find.
        count: number of draws.

    Returns:
        value, interval and p-value; without interval (NaN, p = 1) where a run's scores are not finite.
    """
    value = float(f(np.array([[c.by_seed.mean()] for c in changes]))[0])
    if not all(np.isfinite(c.differences_SE).all() for c in changes):
        return Estimate(value, math.nan, math.nan, 1.0)
    return estimate(value, f(draws(changes, count)), null)


def change(after: Sequence[Sequence[dict[str, Any]]], before: Sequence[dict[str, Any]], metric: str) -> Estimate:
    """How much a metric changed from `before` to `after`; arguments and errors of `changes_of`."""
    return function_of(lambda v: v[0], [changes_of(after, before, metric)])


def difference(a: Changes, b: Changes, count: int = DRAWS) -> Estimate:
    """By how much `a` changed more than `b`; paired by seed, and by example where they were scored on the same ones."""
    return function_of(lambda v: v[0] - v[1], [a, b], count=count)


def ratio(numerator: Changes, denominator: Changes, count: int = DRAWS) -> Estimate | None:
    """One change as a share of another, with the p-value of "as large as the other" (a ratio of 1).

    Returns:
        None where the interval of the denominator includes 0: the ratio could then be any number.
    """
    below = function_of(lambda v: v[0], [denominator], count=count)
    if not (below.low > 0 or below.high < 0):
        return None
    sign, smallest = math.copysign(1, below.value), abs(below.value) * 1e-9

    def share(v: np.ndarray) -> np.ndarray:
        """The few draws whose denominator is beyond 0 count as further out than any ratio."""
        return v[0] / (sign * np.maximum(sign * v[1], smallest))

    return function_of(share, [numerator, denominator], null=1.0, count=count)


def non_inferior(estimate: Estimate, margin: float = 0.005) -> bool:
    """Whether at most `margin` was lost, by the lower end of the interval.

    Args:
        estimate: of a difference where higher is better, such as of shares (half a point is 0.005). For losses, which
            are better when lower, take the difference the other way round, and a margin in nats per token.
        margin: the largest loss that is accepted.

    Intervals that rest on fewer than about five changed examples are too short, and one that rests on none has no
    width: where none of n examples changed, up to 3 / n of all examples may still change.
    """
    return estimate.low > -margin


def mcnemar(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], metric: str) -> float:
    """Exact p-value that two single runs are right equally often, where a metric is 0 or 1; examples independent.

    Raises:
        DataError: where the runs were not scored on the same examples, or a value is neither 0 nor 1.
    """
    from scipy.stats import binomtest  # slow to import, and no part of the library without [run]

    if [record["id"] for record in a] != [record["id"] for record in b]:
        raise DataError("two runs were scored on different examples; they cannot be compared")
    if not {record[metric] for record in (*a, *b)} <= {0, 1}:
        raise DataError(f"McNemar's test needs values of 0 or 1, and {metric!r} has others; take `difference`")
    better, worse = flips(a, b, metric)
    changed = len(better) + len(worse)
    return float(binomtest(len(better), changed).pvalue) if changed else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment for the number of tests, in the order given: reject what stays at most 0.05.

    Raises:
        ConfigError: where a value is no probability.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ConfigError(f"p-values are between 0 and 1, not {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def flips(
    after: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]], metric: str
) -> tuple[list[int], list[int]]:
    """Positions of the examples that went from wrong to right, and of those that went from right to wrong."""
    changes = [a[metric] - b[metric] for a, b in zip(after, before, strict=True)]
    return [i for i, c in enumerate(changes) if c > 0], [i for i, c in enumerate(changes) if c < 0]
