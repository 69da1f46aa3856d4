import random

import numpy as np
import pytest
from scipy.stats import bootstrap

from smf.errors import DataError
from smf.stats import change, flips


def records(values, tokens=None):
    if tokens is None:
        return [{"id": i, "acc": v} for i, v in enumerate(values)]
    return [{"id": i, "nats": v, "tokens": t} for i, (v, t) in enumerate(zip(values, tokens, strict=True))]


def coin(rng: random.Random, share: float, n: int) -> list[int]:
    return [int(rng.random() < share) for _ in range(n)]


def test_one_seed_agrees_with_scipys_paired_bootstrap():
    rng = random.Random(0)
    before, after = coin(rng, 0.8, 300), coin(rng, 0.6, 300)
    ours = change([records(after)], records(before), "acc")
    differences = np.array(after) - np.array(before)
    theirs = bootstrap((differences,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    assert ours.value == differences.mean()
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.01)


def test_losses_weigh_tokens_equally():
    before, after = records([10.0, 1.0], [10, 1]), records([20.0, 1.0], [10, 1])
    assert change([after], before, "nats").value == pytest.approx(10 / 11)
    assert change([after], before, "loss").value == pytest.approx(10 / 11)


def test_no_change_has_no_width():
    same = records(coin(random.Random(1), 0.5, 50))
    estimate = change([same, same], same, "acc")
    assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)


def test_seeds_that_disagree_widen_the_interval():
    rng = random.Random(2)
    before = records(coin(rng, 0.5, 400))
    alike = [records(coin(random.Random(7), 0.7, 400)) for _ in range(4)]
    apart = [records(coin(rng, share, 400)) for share in (0.5, 0.9, 0.6, 0.8)]
    narrow, wide = change(alike, before, "acc"), change(apart, before, "acc")
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert wide.value == pytest.approx(np.mean([change([run], before, "acc").value for run in apart]))


def test_interval_over_examples_covers_the_truth():
    """Of 200 samples, about 95 % of the intervals hold the true difference of -0.2."""
    held = 0
    for seed in range(200):
        rng = random.Random(seed)
        before, after = coin(rng, 0.8, 150), coin(rng, 0.6, 150)
        estimate = change([records(after)], records(before), "acc")
        held += estimate.low <= -0.2 <= estimate.high
    assert 0.90 <= held / 200 <= 0.99


def test_equal_input_gives_equal_intervals():
    rng = random.Random(3)
    before, after = records(coin(rng, 0.5, 80)), records(coin(rng, 0.5, 80))
    assert change([after], before, "acc") == change([after], before, "acc")


def test_runs_scored_on_other_examples_are_refused():
    with pytest.raises(DataError, match="different examples"):
        change([records([1, 0])], records([1, 0, 1]), "acc")
    with pytest.raises(DataError, match="nothing to compare"):
        change([], [], "acc")
    with pytest.raises(DataError, match="different examples"):
        change([records([1, 0])[::-1]], records([1, 0]), "acc")


def test_flips_name_what_was_learned_and_what_was_forgotten():
    assert flips(records([1, 0, 1, 0]), records([0, 1, 1, 0]), "acc") == ([0], [1])
