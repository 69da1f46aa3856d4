"""Intervals: simulated studies, whose truth is known, say how often they hold it; the rest are properties."""

import math
import random
from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap, t

from smf.errors import ConfigError, DataError
from smf.stats import (
    Changes,
    Estimate,
    change,
    changes_of,
    difference,
    draws,
    estimate,
    flips,
    function_of,
    holm,
    mcnemar,
    non_inferior,
    ratio,
)

STUDIES = 1000  # a coverage of 95 % has a standard error of 0.7 points
COUNT = 999  # draws of a simulated study
SHARE = NormalDist().cdf


def records(values, tokens=None, clusters=None):
    if tokens is None:
        made = [{"id": i, "acc": v} for i, v in enumerate(values)]
    else:
        made = [{"id": i, "nats": v, "tokens": t} for i, (v, t) in enumerate(zip(values, tokens, strict=True))]
    return made if clusters is None else [r | {"cluster": c} for r, c in zip(made, clusters, strict=True)]


def coin(rng: random.Random, share: float, n: int) -> list[int]:
    return [int(rng.random() < share) for _ in range(n)]


def made(differences_SE, key="examples", weights_E=None, cluster_E=None) -> Changes:
    """Changes without the records, of which a thousand studies would take minutes."""
    seeds, examples = np.shape(differences_SE)
    weights_E = np.ones(examples) if weights_E is None else weights_E
    cluster_E = np.arange(examples) if cluster_E is None else cluster_E
    return Changes(np.asarray(differences_SE, float), weights_E, cluster_E, tuple(range(seeds)), key)


def first(v_KX):
    return v_KX[0]


# -- coverage ---------------------------------------------------------------------------------------------------------


def held(truths, estimates) -> float:
    """Share of the intervals that hold the truth."""
    return float(np.mean([e.low <= truth <= e.high for truth, e in zip(truths, estimates, strict=True)]))


def normals(seeds, examples, interaction, *, S, E, studies=STUDIES, seed=0):
    """Differences `[N, S, E]` around 0, with these standard deviations of the effects."""
    rng = np.random.default_rng([seed, S, E])
    shapes = [(studies, S, 1), (studies, 1, E), (studies, S, E)]
    return sum(
        sd * rng.standard_normal(shape) for sd, shape in zip((seeds, examples, interaction), shapes, strict=True)
    )


def answers(*, S, E, cluster=1, seeds=0.0, examples=1.0, known=1.0, studies=STUDIES):
    """0/1 answers: right where seed, example (or its cluster) and chance together are above 0.

    The base shares the examples' effects, `known` times as large.

    Returns:
        differences `[N, S, E]` to the base, and the truth `[N]`; that is conditional on the seed where there is one.
    """
    rng = np.random.default_rng([S, E, cluster])
    effects_NS1 = seeds * rng.standard_normal((studies, S, 1))
    effects_N1E = np.repeat(examples * rng.standard_normal((studies, 1, E // cluster)), cluster, 2)
    after_NSE = 0.2 + effects_NS1 + effects_N1E + rng.standard_normal((studies, S, E)) > 0
    before_N1E = 0.8 + known * effects_N1E + rng.standard_normal((studies, 1, E)) > 0
    before = SHARE(0.8 / math.hypot(1, known * examples))
    if S == 1:
        truth_N = [SHARE((0.2 + effect) / math.hypot(1, examples)) - before for effect in effects_NS1[:, 0, 0]]
    else:
        truth_N = [SHARE(0.2 / math.hypot(1, examples, seeds)) - before] * studies
    return after_NSE.astype(float) - before_N1E, truth_N


def estimates_of(differences_NSE, **options):
    """The 8 keys give 8 sets of draws, so that luck of one does not decide."""
    return [
        function_of(first, [made(differences_SE, f"set {n % 8}", **options)], count=COUNT)
        for n, differences_SE in enumerate(differences_NSE)
    ]


NOISE = 150**-0.5  # an interaction of 1 moves the mean of 150 examples by that much


@pytest.mark.parametrize(
    ("seeds", "effects", "most"),
    [
        (5, (0.3, 0, 0.1), 0.97),  # the seeds dominate
        (5, (NOISE / 10, 1, 0.3), 0.97),  # the examples dominate
        (5, (0, 0, 1), 0.97),  # each run is right about other examples
        (5, (2 * NOISE, 0, 1), 0.97),  # the same, and seeds differ: hard to tell apart
        (5, (NOISE, 1, 1), 0.97),
        (3, (0.3, 0.1, 0.1), 0.97),
        (3, (2 * NOISE, 0, 1), 0.97),
        (3, (2 * NOISE, 1, 1), 0.985),  # a t beside a normal of its size: a little too wide, as known (Behrens, Fisher)
        (2, (2 * NOISE, 0, 1), 0.97),
        (2, (2 * NOISE, 1, 1), 0.99),
        (1, (0, 1, 0), 0.97),
    ],
)
def test_intervals_hold_the_truth_whatever_differs(seeds, effects, most):
    share = held([0] * STUDIES, estimates_of(normals(*effects, S=seeds, E=150)))
    assert 0.93 <= share <= most


@pytest.mark.parametrize(("seeds", "most"), [(5, 0.97), (3, 0.985), (1, 0.97)])
def test_intervals_of_answers_hold_the_truth(seeds, most):
    """Seeds, examples and interaction are all there; of one seed, the truth is that seed's."""
    differences_NSE, truth_N = answers(S=seeds, E=200, seeds=0.2, examples=2)
    assert 0.93 <= held(truth_N, estimates_of(differences_NSE)) <= most


def test_questions_on_one_fact_are_resampled_together():
    differences_NSE, truth_N = answers(
        S=5, E=300, cluster=6, seeds=0.05, examples=3, known=0.0
    )  # facts are learned as a whole
    clusters_E = np.arange(300) // 6
    assert 0.93 <= held(truth_N, estimates_of(differences_NSE, cluster_E=clusters_E)) <= 0.97
    assert held(truth_N, estimates_of(differences_NSE)) < 0.85


def test_a_dozen_clusters_are_enough():
    assert 0.93 <= held([0] * STUDIES, estimates_of(normals(0, 1, 0, S=1, E=12))) <= 0.97


def test_intervals_of_nats_per_token_hold_the_truth():
    """Long examples change less per token, so that the ratio of sums is not the mean of ratios.

    The change is large beside its noise: influences must be taken around it, or examples of other lengths look like
    examples that changed otherwise.
    """
    tokens_NE = np.random.default_rng(5).choice([5.0, 20.0, 60.0, 200.0], size=(STUDIES, 200))
    per_token_NSE = 1 + normals(0, 0.03, 0.3, S=5, E=200)
    differences_NSE = per_token_NSE * tokens_NE[:, None] + 3
    estimates = [
        function_of(first, [made(d_SE, f"set {n % 8}", weights_E=w_E)], count=COUNT)
        for n, (d_SE, w_E) in enumerate(zip(differences_NSE, tokens_NE, strict=True))
    ]
    assert 0.93 <= held([1 + 3 / 71.25] * STUDIES, estimates) <= 0.97


def two_sets(*, seeds=5, shared=0.9):
    """Changes of -0.1 and -0.3 on two sets `[N, S, E]`, whose seed effects have this correlation."""
    rng = np.random.default_rng(6)
    both_NS1 = rng.standard_normal((STUDIES, seeds, 1))
    own_NS1 = rng.standard_normal((STUDIES, seeds, 1))
    mixed_NS1 = shared * both_NS1 + math.sqrt(1 - shared**2) * own_NS1
    first_NSE = -0.1 + 0.03 * both_NS1 + normals(0, 0.3, 0.3, S=seeds, E=150, seed=1)
    return first_NSE, -0.3 + 0.06 * mixed_NS1 + normals(0, 0.4, 0.3, S=seeds, E=150, seed=2)


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_ratios_of_two_sets_hold_the_truth(shared):
    pairs = zip(*two_sets(shared=shared), strict=True)
    estimates = [ratio(made(a, f"a{n % 6}"), made(b, f"b{n % 6}"), count=COUNT) for n, (a, b) in enumerate(pairs)]
    sure = [e for e in estimates if e is not None]
    assert len(sure) > 0.99 * STUDIES
    assert 0.93 <= held([1 / 3] * len(sure), sure) <= 0.97


@pytest.mark.parametrize("seeds", [5, 3])
def test_differences_of_methods_on_one_set_hold_the_truth(seeds):
    """Both methods change most examples alike; what is left of them is mostly interaction."""
    alike_NSE = normals(0.05, 1, 0.2, S=seeds, E=150, seed=1)
    a_NSE = alike_NSE + normals(0.03, 0.05, 0.5, S=seeds, E=150, seed=2)
    b_NSE = alike_NSE + normals(0.03, 0.05, 0.3, S=seeds, E=150, seed=3)
    keys = [f"set {n % 8}" for n in range(STUDIES)]
    pairs = [(made(a, key), made(b, key)) for a, b, key in zip(a_NSE, b_NSE, keys, strict=True)]
    paired = [difference(a, b, count=COUNT) for a, b in pairs]
    assert 0.93 <= held([0] * STUDIES, paired) <= 0.97
    assert 0.03 <= np.mean([e.p <= 0.05 for e in paired]) <= 0.07
    apart = [difference(a, made(b.differences_SE, "another"), count=COUNT) for a, b in pairs[:50]]
    widths = [np.mean([e.high - e.low for e in each]) for each in (paired[:50], apart)]
    assert 1.3 * widths[0] < widths[1]


# -- properties -------------------------------------------------------------------------------------------------------


def test_one_seed_agrees_with_scipys_paired_bootstrap():
    rng = random.Random(0)
    before, after = coin(rng, 0.8, 300), coin(rng, 0.6, 300)
    ours = change([records(after)], records(before), "acc")
    differences = np.array(after) - np.array(before)
    theirs = bootstrap((differences,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    assert ours.value == pytest.approx(differences.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.01)


def test_losses_weigh_tokens_equally():
    before, after = records([10.0, 1.0], [10, 1]), records([20.0, 1.0], [10, 1])
    assert change([after], before, "nats").value == pytest.approx(10 / 11)
    assert change([after], before, "loss").value == pytest.approx(10 / 11)


def test_examples_without_tokens_do_not_matter_and_need_company():
    before, after = records([1.0, 0.0], [3, 0]), records([2.5, 0.0], [3, 0])
    assert change([after, after], before, "nats") == Estimate(0.5, 0.5, 0.5, 2 / 4000)
    with pytest.raises(DataError, match="no tokens"):
        change([records([0.0], [0])], records([0.0], [0]), "nats")
    for broken in (math.nan, math.inf):
        found = records([1.0, 0.0], [3, broken])
        with pytest.raises(DataError, match="not a finite number of them"):
            change([found, found], found, "nats")


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_no_change_has_no_width(seeds):
    same = records(coin(random.Random(1), 0.5, 50))
    assert change([same] * seeds, same, "acc") == Estimate(0, 0, 0, 1.0)
    a = changes_of([records(coin(random.Random(i), 0.5, 50)) for i in range(seeds)], same, "acc")
    assert difference(a, a) == Estimate(0, 0, 0, 1.0)
    assert ratio(a, changes_of([same] * seeds, same, "acc")) is None


def test_seeds_that_disagree_widen_the_interval():
    rng = random.Random(2)
    before = records(coin(rng, 0.5, 400))
    alike = [records(coin(random.Random(7), 0.7, 400)) for _ in range(4)]
    apart = [records(coin(rng, share, 400)) for share in (0.5, 0.9, 0.6, 0.8)]
    narrow, wide = change(alike, before, "acc"), change(apart, before, "acc")
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert wide.value == pytest.approx(np.mean([change([run], before, "acc").value for run in apart]))


def test_equal_input_gives_equal_bytes_and_other_sets_other_draws():
    differences_SE = normals(0.1, 1, 1, S=3, E=80, studies=1)[0]
    a, b = made(differences_SE, "a"), made(differences_SE, "b")
    assert draws([a]).tobytes() == draws([made(differences_SE, "a")]).tobytes()
    joint_KD = draws([a, b, made(-differences_SE, "a")])
    assert (joint_KD[0] == pytest.approx(-joint_KD[2])) and (joint_KD[0] != pytest.approx(joint_KD[1]))
    alone_KD = draws([made(differences_SE[:1], "a"), made(differences_SE[:1], "b")])
    assert np.corrcoef(alone_KD)[0, 1] == pytest.approx(0, abs=0.06)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_seeds_alone_give_students_interval(seeds):
    by_seed_S1 = np.arange(seeds)[:, None] ** 2 * np.ones((seeds, 2))
    got = function_of(first, [made(by_seed_S1)], count=99999)
    want = t.interval(0.95, seeds - 1, by_seed_S1[:, 0].mean(), by_seed_S1[:, 0].std(ddof=1) / math.sqrt(seeds))
    assert (got.low, got.high) == pytest.approx(want, rel=0.05)


def test_draws_have_the_covariance_of_both_levels():
    """Of many seeds and examples, so that stretches do not matter; the two metrics share examples, and seeds."""
    S, E = 400, 400
    rng = np.random.default_rng(0)
    seed_S1, example_E, other_E = rng.standard_normal((S, 1)), rng.standard_normal(E), rng.standard_normal(E)
    a_SE = 0.05 * seed_S1 + example_E + 3 * rng.standard_normal((S, E))
    b_SE = 1000 * (0.05 * seed_S1 - 0.5 * example_E + 0.5 * other_E + 3 * rng.standard_normal((S, E)))
    got = np.cov(draws([made(a_SE), made(b_SE)], 8000)) / np.outer([1, 1000], [1, 1000])
    seeds, interaction = 0.05**2 / S, 9 / (S * E)
    want = [
        [1 / E + seeds + interaction, -0.5 / E + seeds],
        [-0.5 / E + seeds, 0.5 / E + seeds + interaction],
    ]
    assert got == pytest.approx(np.array(want), rel=0.15)


@pytest.mark.parametrize("metric", ["acc", "nats"])
def test_order_of_examples_and_of_seeds_does_not_matter(metric):
    rng = np.random.default_rng(4)
    tokens = rng.integers(1, 30, 120).tolist()
    runs = [records(row, tokens if metric == "nats" else None) for row in normals(0.1, 1, 1, S=5, E=120, studies=1)[0]]
    before = records([0.0] * 120, tokens if metric == "nats" else None)
    places = rng.permutation(120)
    plain = change(runs, before, metric)
    turned = change([[run[i] for i in places] for run in runs], [before[i] for i in places], metric)
    assert turned.value == pytest.approx(plain.value)
    assert (turned.low, turned.high) == pytest.approx((plain.low, plain.high), abs=0.1 * (plain.high - plain.low))
    backwards = changes_of(runs[::-1], before, metric, seeds=[4, 3, 2, 1, 0])
    assert function_of(first, [backwards]) == plain
    assert difference(backwards, changes_of(runs, before, metric)) == Estimate(0, 0, 0, 1.0)


def test_differences_are_paired_by_seed_and_have_two_sides():
    rng = np.random.default_rng(8)
    seed_S1 = rng.standard_normal((5, 1))
    a = made(seed_S1 + 0.1 * rng.standard_normal((5, 90)), "a")
    b = made(seed_S1 + 0.3 + 0.1 * rng.standard_normal((5, 90)), "b")
    one, other = difference(a, b), difference(b, a)
    assert (one.low, one.high, one.p) == pytest.approx((-other.high, -other.low, other.p))
    assert one.high < -0.2 and one.low > -0.4
    unpaired = difference(a, made(b.differences_SE[::-1], "b"))
    assert unpaired.low < 0 < unpaired.high


def test_means_and_ratios_of_changes():
    a = made(normals(0.01, 0.1, 0.1, S=3, E=90, studies=1)[0] - 0.2, "a")
    b = made(normals(0.01, 0.1, 0.1, S=3, E=90, studies=1, seed=1)[0] - 0.4, "b")
    mean = function_of(lambda v: v.mean(0), [a, b])
    assert mean.value == pytest.approx((a.by_seed.mean() + b.by_seed.mean()) / 2) and mean.low < mean.value < mean.high
    half = ratio(a, b)
    assert half is not None
    assert half.value == pytest.approx(a.by_seed.mean() / b.by_seed.mean())
    assert half.low < 0.5 < half.high < 1 and half.p < 0.05
    same = ratio(a, a)
    assert same is not None and same == Estimate(1, 1, 1, 1.0)
    assert ratio(a, made(normals(0.1, 1, 1, S=3, E=90, studies=1)[0], "b")) is None


@pytest.mark.parametrize("sign", [1, -1])
def test_ratios_with_a_barely_sure_denominator_are_fiellers(sign):
    """At an end of the interval, the draws of numerator - end x denominator are just not sure to differ from 0."""
    examples_E = np.arange(100) / 100 - 0.495
    a, b = made([sign * (0.4 + examples_E[::-1])], "a"), made([sign * (0.065 + examples_E)], "b")
    a_D, b_D = sign * draws([a, b])
    assert 0.01 < np.mean(b_D <= 0) < 0.025
    got = ratio(a, b)
    assert got is not None and got.low < got.value < got.high
    assert np.mean(a_D - got.low * b_D < 0) == pytest.approx(0.025, abs=0.0005)
    assert np.mean(a_D - got.high * b_D > 0) == pytest.approx(0.025, abs=0.0005)
    five = made([[-1.0] * 5 + [0.0] * 95])  # some draws hold none of them: 0 / 0
    assert ratio(five, five) == Estimate(1, 1, 1, 1.0)


def test_seeds_that_cancel_leave_nothing_of_the_examples():
    """The interaction may look larger than examples and interaction together; less than nothing is not left."""
    turns_SE = np.array([[1.0], [-1.0]]) * (-1) ** np.arange(60)
    got = function_of(first, [made(turns_SE + 0.01 * np.random.default_rng(0).standard_normal(60))])
    assert got.high - got.low < 1e-9


@given(st.integers(0, 2**32), st.sampled_from([999, 3999]), st.data())
def test_p_values_and_intervals_agree(seed, count, data):
    draws_D = np.round(np.random.default_rng(seed).standard_normal(count), 9)
    place = data.draw(st.integers(0, (count + 1) // 20) | st.integers(0, count - 1))
    null = np.sort(draws_D)[place] + data.draw(st.sampled_from([0, 1e-10, -1e-10]))
    got, mirrored = estimate(0.0, draws_D, null), estimate(0.0, -draws_D, -null)
    assert (got.p <= 0.05) == (not got.low <= null <= got.high)
    assert 0 < got.p <= 1
    assert (got.low, got.high, got.p) == (-mirrored.high, -mirrored.low, mirrored.p)


def test_p_values_of_no_change_are_uniform():
    p_N = np.array([e.p for e in estimates_of(normals(0.1, 1, 0.3, S=5, E=100, studies=600))])
    for level in (0.05, 0.2, 0.5):
        assert np.mean(p_N <= level) == pytest.approx(level, abs=0.07)


def test_runs_that_broke_have_no_interval():
    before = records([1.0, 2.0], [2, 2])
    got = change([records([math.nan, 2.0], [2, 2]), before], before, "nats")
    assert math.isnan(got.value) and math.isnan(got.low) and math.isnan(got.high) and got.p == 1
    assert not non_inferior(got)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_runs_scored_on_other_examples_are_refused():
    with pytest.raises(DataError, match="different examples"):
        change([records([1, 0])], records([1, 0, 1]), "acc")
    with pytest.raises(DataError, match="nothing to compare"):
        change([], [], "acc")
    with pytest.raises(DataError, match="nothing to compare"):
        change([], records([1, 0]), "acc")
    with pytest.raises(DataError, match="different examples"):
        change([records([1, 0])[::-1]], records([1, 0]), "acc")
    with pytest.raises(DataError, match="different examples or clusters"):
        change([records([1, 0])], records([1, 0], clusters=["a", "a"]), "acc")


def test_other_seeds_are_refused():
    a = changes_of([records([1, 0])] * 2, records([0, 0]), "acc", seeds=[1, 0])
    b = changes_of([records([1, 0])] * 2, records([0, 0]), "acc", seeds=[1, 2])
    assert a.seeds == (0, 1)
    with pytest.raises(ConfigError, match=r"\(0, 1\) and \(1, 2\): run the seeds"):
        difference(a, b)
    for seeds in ([0], [1, 1], [0, 1, 2]):
        with pytest.raises(ConfigError, match="seed of its own"):
            changes_of([records([1, 0])] * 2, records([0, 0]), "acc", seeds=seeds)


def test_keys_name_ids_and_clusters():
    keys = {
        changes_of([made_records], made_records, "acc").key
        for made_records in (records([0, 1]), records([0, 1])[::-1], records([0, 1], clusters=["a", "a"]))
    }
    assert len(keys) == 3
    assert changes_of([records([1, 1])], records([0, 1]), "acc").key in keys
    mixed = [{"id": "x", "acc": 1}, {"id": 1, "acc": 1, "cluster": "x"}, {"id": 2, "acc": 0, "cluster": "x"}]
    assert changes_of([mixed], mixed, "acc").cluster_E.tolist() == [0, 1, 1]


# -- tests ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_mcnemar_is_the_binomial_of_what_changed(pairs):
    a, b = records([x for x, _ in pairs]), records([y for _, y in pairs])
    gained, lost = sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)
    chances = [math.comb(gained + lost, k) / 2 ** (gained + lost) for k in range(gained + lost + 1)]
    want = sum(chance for chance in chances if chance <= chances[gained] * (1 + 1e-9))
    assert mcnemar(a, b, "acc") == pytest.approx(want)
    assert mcnemar(b, a, "acc") == pytest.approx(want)


def test_mcnemar_refuses_what_it_cannot_test():
    with pytest.raises(DataError, match="different examples"):
        mcnemar(records([1, 0]), records([1, 0])[::-1], "acc")
    with pytest.raises(DataError, match="0 or 1"):
        mcnemar(records([0.5, 0]), records([1, 0]), "acc")


def test_holm_of_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]
    for broken in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            holm([0.5, broken])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_holm_keeps_order_lies_below_bonferroni_and_rejects_step_by_step(p_values, rng):
    adjusted = holm(p_values)
    assert all(p <= q <= min(1, len(p_values) * p) + 1e-12 for p, q in zip(p_values, adjusted, strict=True))
    ranked = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert all(adjusted[i] <= adjusted[j] for i, j in pairwise(ranked))
    for level in (0.05, 0.3):
        rejected: set[int] = set()
        for rank, i in enumerate(ranked):
            if (len(ranked) - rank) * p_values[i] > level:
                break
            rejected.add(i)
        assert rejected == {i for i, q in enumerate(adjusted) if q <= level}
    places = rng.sample(range(len(p_values)), len(p_values))
    assert holm([p_values[i] for i in places]) == [adjusted[i] for i in places]


@pytest.mark.parametrize(
    ("low", "margin", "want"), [(-0.004, 0.005, True), (-0.006, 0.005, False), (-0.006, 0.01, True), (0.0, 0.0, False)]
)
def test_non_inferior_looks_at_the_lower_end(low: float, margin: float, want: bool):
    check: Callable[..., bool] = non_inferior
    assert check(Estimate(0.001, low, 0.1), margin) is want
    if margin == 0.005:
        assert check(Estimate(0.001, low, 0.1)) is want


def test_flips_name_what_was_learned_and_what_was_forgotten():
    assert flips(records([1, 0, 1, 0]), records([0, 1, 1, 0]), "acc") == ([0], [1])
