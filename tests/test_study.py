"""Points, the choice among them, Pareto points and what is read off them, comparisons: properties of small studies."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import N, answers, base, choices, curve, result, scores
from smf.comparisons import against
from smf.errors import ConfigError, DataError
from smf.matched import Drawn, at_equal_gain, finite, front, matched, matched_ratio, read_crosswise, read_off
from smf.stats import holm, mcnemar, ratio
from smf.study import (
    Measure,
    Point,
    best_stage,
    change_of,
    chosen,
    common_seeds,
    limits,
    measured,
    measures,
    pareto,
    points_of,
    signed,
)

quick = settings(deadline=None, max_examples=150)
few = settings(deadline=None, max_examples=10)
QUANTILE = NormalDist().inv_cdf
whole = st.integers(-3, 3).map(float)  # so that ties and equal points are common
clouds = st.lists(st.tuples(whole, whole), min_size=1, max_size=7)


def arrays(pairs) -> tuple[np.ndarray, np.ndarray]:
    return np.array([g for g, _ in pairs]), np.array([loss for _, loss in pairs])


def on_front(gains, losses, gain) -> np.ndarray:
    return read_off(gains, losses, front(gains, losses), gain)


# -- Pareto points ----------------------------------------------------------------------------------------------------


@quick
@given(clouds)
def test_pareto_points_are_those_that_no_other_point_beats(pairs):
    front = [pairs[place] for place in pareto(*arrays(pairs))]
    best = {p for p in pairs if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in pairs)}
    assert len(front) == len(set(front)) and set(front) == best  # of equal points one
    assert front == sorted(front) and [loss for _, loss in front] == sorted({loss for _, loss in front})


@quick
@given(clouds, st.integers(-28, 28).map(lambda number: number / 7))
def test_the_read_off_line_joins_the_pareto_points_and_ends_with_them(pairs, gain):
    gains, losses = arrays(pairs)
    best = pareto(gains, losses)
    got = float(on_front(gains, losses, gain))
    if not gains[best].min() <= gain <= gains[best].max():
        assert math.isnan(got)
    else:
        assert got == pytest.approx(np.interp(gain, gains[best], losses[best]))
    assert sorted(map(tuple, zip(gains[front(gains, losses)], losses[front(gains, losses)], strict=True))) == [
        pairs[place] for place in best
    ]


@quick
@given(clouds, whole, st.randoms(use_true_random=False))
def test_order_beaten_and_repeated_points_do_not_matter(pairs, gain, rng):
    """Nor do runs that diverged: a point far below all others does not stretch the range."""
    before = on_front(*arrays(pairs), gain)
    worse = [(g - rng.randint(0, 2), loss + rng.randint(0, 2)) for g, loss in pairs]
    mixed = [*pairs, *worse, rng.choice(pairs), (-25.0, 90.0)]
    rng.shuffle(mixed)
    assert on_front(*arrays(mixed), gain) == pytest.approx(before, nan_ok=True)


@quick
@given(st.lists(clouds.filter(lambda pairs: len(pairs) >= 3), min_size=1, max_size=5), st.lists(whole, min_size=5))
def test_draws_are_read_one_by_one(drawn, levels):
    gains_PD = np.array([[g for g, _ in pairs[:3]] for pairs in drawn]).T
    losses_PD = np.array([[loss for _, loss in pairs[:3]] for pairs in drawn]).T
    level_D = np.array(levels[: len(drawn)])
    one_by_one = [on_front(*arrays(pairs[:3]), level) for pairs, level in zip(drawn, level_D, strict=True)]
    assert on_front(gains_PD, losses_PD, level_D) == pytest.approx(np.array(one_by_one), nan_ok=True)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_a_points_own_gain_is_within_its_range_whatever_the_rounding(scale):
    gains, losses = scale * np.array([0.1, 0.3]), np.array([1.0, 2.0])
    for rounding in (1 - 1e-15, 1, 1 + 1e-15):
        assert on_front(gains, losses, scale * 0.3 * rounding) == pytest.approx(2.0)
        assert on_front(gains, losses, scale * 0.1 * rounding) == pytest.approx(1.0)
        assert on_front(gains[:1], losses[:1], scale * 0.1 * rounding) == pytest.approx(1.0)
    assert math.isnan(on_front(gains, losses, scale * 0.301)) and math.isnan(on_front(gains, losses, scale * 0.099))


def test_points_that_turn_back_are_not_joined():
    """More training gained less and forgot more: the line goes past those points."""
    gains, losses = np.array([1.0, 2.0, 1.5, 3.0]), np.array([1.0, 2.0, 5.0, 3.0])
    assert on_front(gains, losses, 1.5) == 1.5
    losses = np.array([4.0, 3.0, 2.0, 1.0])  # the last beats all others, and is all there is
    assert on_front(gains, losses, 3.0) == 1.0 and math.isnan(on_front(gains, losses, 1.5))


def test_halves_say_which_points_the_others_line_joins():
    gains_HP = np.array([[1.0, 2.0, 3.0, 5.0], [1.0, 2.0, 3.0, 5.0]])
    losses_HP = np.array([[1.0, 1.5, 9.0, 5.0], [1.0, 9.0, 1.5, 5.0]])
    kept_HP = np.stack([front(*half) for half in zip(gains_HP, losses_HP, strict=True)])
    assert kept_HP.tolist() == [[True, True, False, True], [True, False, True, True]]
    for gain, first, second in ((3.0, 9.0, 23 / 3), (2.0, 5.0, 9.0), (4.0, 7.0, 19 / 3)):
        got = read_crosswise(gains_HP, losses_HP, kept_HP, np.full(2, gain))
        assert got == pytest.approx((first + second) / 2)
    twice = [np.stack([each] * 2, -1) for each in (gains_HP, losses_HP)]
    assert read_crosswise(*twice, kept_HP, np.array([[3.0, 2.0]] * 2)) == pytest.approx([(9 + 23 / 3) / 2, 7.0])
    gains_HP[1] += 4  # the second half's line does not reach 3
    assert math.isnan(read_crosswise(gains_HP, losses_HP, kept_HP, np.full(2, 3.0)))


# -- points -----------------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_the_seed_alone_are_one_point_at_each_moment():
    runs = [curve("lora", [0.3, 0.5], [0.9, 0.8], lr=lr, seed=seed) for lr in (0.1, 0.2) for seed in (2, 0, 1)]
    points = points_of(runs)
    assert [(p.lr, p.share, p.seeds) for p in points] == [
        (lr, share, (0, 1, 2)) for lr in (0.1, 0.2) for share in (0.5, 1.0)
    ]
    assert points[0].runs[0]["steps"] == 50 and points[0].mean("held-out", "acc") == pytest.approx(0.3)


def test_a_moment_that_one_seed_lacks_is_no_point():
    points = points_of([curve("lora", [0.3, 0.5], [0.9, 0.8]), result("lora", scores(0.5), seed=1)])
    assert [(p.share, p.seeds) for p in points] == [(1.0, (0, 1))]


def test_methods_of_one_name_with_other_options_are_told_apart():
    small = result("smf", scores(0.4), rows_per_step=64, memory={"n_keys": 8})
    large = result("smf", scores(0.5), rows_per_step=512, memory={"n_keys": 16})
    faster = result("smf", scores(0.6), rows_per_step=512, memory={"n_keys": 16}, lr=0.5)
    names = ["smf (rows_per_step=64, memory.n_keys=8)", "smf (rows_per_step=512, memory.n_keys=16)"]
    points = points_of([small, large, result("lora"), faster])
    assert [p.method for p in points] == [names[0], names[1], names[1], "lora"]
    assert [p.method for p in chosen(points, "acc")] == [*names, "lora"]


def test_runs_of_an_own_function_with_other_code_are_told_apart():
    old, new = result("own") | {"code": "a" * 64}, result("own", seed=1) | {"code": "b" * 64}
    assert {p.method: p.seeds for p in points_of([old, new])} == {"own (code=aaaaaa)": (0,), "own (code=bbbbbb)": (1,)}


def test_options_that_an_older_run_does_not_know_tell_it_apart():
    old, new = result("smf"), result("smf", spread=None)
    assert {p.method for p in points_of([old, new])} == {"smf (spread=-)", "smf (spread=null)"}


# -- the choice -------------------------------------------------------------------------------------------------------


def rate(lr: float, validation: float, *, seed: int = 0, **options: Any) -> dict[str, Any]:
    return result("lora", scores(0.5, validation=validation, **options), lr=lr, seed=seed)


def test_the_best_validation_score_wins_and_not_the_best_target():
    runs = [curve("lora", [0.9, 0.3], [1, 1], lr=0.1), curve("lora", [0.2, 0.5], [1, 1], lr=0.2)]
    for run, share in ((runs[0], 0.6), (runs[1], 0.1)):
        run["scores"]["validation"] = choices("validation", answers(share), ids="val")
    best = chosen(points_of(runs), "acc")
    assert [(p.lr, p.share) for p in best] == [(0.1, 0.5)]  # its validation score is .9 there, and nowhere better


def test_of_equal_points_the_smallest_rate_and_the_earliest_moment():
    runs = [curve("lora", [0.5, 0.5], [1, 1], lr=lr) for lr in (0.4, 0.1, 0.2)]
    assert [(p.lr, p.share) for p in chosen(points_of(runs), "acc")] == [(0.1, 0.5)]
    assert best_stage(runs[0], "acc").share == 0.5


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", ["acc", "loss"])
def test_what_is_not_a_number_is_never_chosen(broken, metric):
    runs = [rate(0.1, 0.4, loss=2.0), rate(0.2, 0.3, loss=3.0), rate(0.05, 0.5, loss=1.0)]
    runs[2]["scores"]["validation"]["metrics"][metric] = broken
    assert [p.lr for p in chosen(points_of(runs), metric)] == [0.1]
    assert signed(broken, metric) < signed(1e9, metric) and signed(broken, metric) < signed(-1e9, metric)


def test_where_everything_diverged_there_is_still_a_row():
    runs = [rate(0.2, 0.4), rate(0.1, 0.4)]
    for run in runs:
        run["scores"]["validation"]["metrics"]["acc"] = math.nan
    assert [p.lr for p in chosen(points_of(runs), "acc")] == [0.1]


def test_of_losses_the_smaller_is_chosen():
    runs = [rate(lr, 0.5, loss=loss) for lr, loss in ((0.1, 3.0), (0.2, 1.0), (0.4, 2.0))]
    for run in runs:
        run["scores"]["validation"]["metrics"]["loss"] = run["scores"]["held-out"]["metrics"]["loss"]
    assert [p.lr for p in chosen(points_of(runs), "loss")] == [0.2]
    assert (
        best_stage(runs[0] | {"on_the_way": [{"step": 1, "share": 0.1, "scores": runs[1]["scores"]}]}, "loss").step == 1
    )


def test_without_a_validation_set_nothing_is_chosen_and_ends_are_shown():
    runs = [curve("lora", [0.9, 0.5], [1, 1], lr=lr) for lr in (0.1, 0.2)]
    for run in runs:
        for each in (run["scores"], run["on_the_way"][0]["scores"]):
            del each["validation"]
    assert [(p.lr, p.share) for p in chosen(points_of(runs), "acc")] == [(0.1, 1.0), (0.2, 1.0)]
    assert best_stage(runs[0], "acc").share == 1.0


def test_rates_are_compared_at_the_seeds_that_all_have():
    """The chosen rate has five seeds, four of them lucky: they do not count against rates with one."""
    runs = [rate(0.1, 0.5), rate(0.2, 0.4), *(rate(0.2, 0.9, seed=seed) for seed in (1, 2, 3, 4))]
    assert [(p.lr, p.seeds) for p in chosen(points_of(runs), "acc")] == [(0.1, (0,))]
    runs[0] = rate(0.1, 0.3)
    assert [(p.lr, p.seeds) for p in chosen(points_of(runs), "acc")] == [(0.2, (0, 1, 2, 3, 4))]


def test_without_a_common_seed_the_most_frequent_one_is_compared():
    runs = [rate(0.1, 0.9, seed=7), rate(0.2, 0.4, seed=3), rate(0.4, 0.5, seed=3)]
    assert [(p.lr, p.seeds) for p in chosen(points_of(runs), "acc")] == [(0.4, (3,))]
    assert common_seeds(points_of(runs)) == (3,)
    assert common_seeds(points_of(runs[:2])) == (3,)  # of equally frequent ones the smallest


@few
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.4]), st.integers(0, 3), st.integers(0, 4)), min_size=1))
def test_there_is_a_choice_whatever_seeds_and_rates_were_run(found):
    runs = {(lr, seed): rate(lr, share / 4, seed=seed) for lr, seed, share in found}
    (best,) = chosen(points_of(list(runs.values())), "acc")
    assert best.lr in {lr for lr, _ in runs}


# -- measures ---------------------------------------------------------------------------------------------------------


def test_gains_are_positive_where_the_target_got_better_and_losses_where_a_probe_got_worse():
    before = base(near=0.8, loss=3.0)
    (old,), (new,) = points_of([before]), points_of([result("lora", scores(0.5, 0.6, 2.5, loss=1.0))])
    found = measures(before, ["acc", "loss"])
    assert [(m.name, m.role, m.unit) for m in found] == [
        ("held-out", "gain", "points"),
        ("held-out loss", "gain", "nats per token"),
        ("near-domain", "forgetting", "points"),
        ("general-text", "forgetting", "nats per token"),
        ("overall", "forgetting", "%"),
    ]
    values = [measured(new, old, m).value for m in found]
    assert values == pytest.approx([25.0, 2.0, 20.0, 0.5, (25.0 + 50.0) / 2])


def test_a_probe_that_the_base_cannot_do_is_no_part_of_overall():
    before = base(near=0.0)
    assert [m.name for m in measures(before, ["acc"])] == ["held-out", "near-domain", "general-text"]


@pytest.mark.parametrize("learned", [(0.3, 0.9), (0.0, 1.0), (0.26, 0.25)])
def test_intervals_hold_no_value_that_a_share_or_nats_cannot_have(learned: tuple[float, float]):
    """Of two seeds that disagree the t distribution has intervals beyond all bounds."""
    runs = [result("lora", scores(held, 1 - held, seed), seed=seed) for seed, held in enumerate(learned)]
    before, point = points_of([base(near=0.5), *runs])
    wanted = measures(before.runs[0], ["acc"])
    bounds = [(-25, 75), (-50, 50), (-2, math.inf), (-(100 + 200) / 2, math.inf)]  # overall: the mean of the two probes
    for measure, (least, most) in zip(wanted, bounds, strict=True):
        assert limits(before, measure) == pytest.approx((least, most))
        found = measured(point, before, measure)
        low, high = limits(before, measure)
        assert low <= found.low <= found.value <= found.high <= high


def test_other_numbers_of_the_harness_have_no_bounds():
    before = base()
    before["scores"]["near-domain"]["metrics"]["score"] = 17.0
    (point,) = points_of([before])
    assert limits(point, Measure("bleu", "points", 100.0, (("near-domain", "score", 1.0),), "gain")) == (
        -math.inf,
        math.inf,
    )


# -- forgetting at equal gain -----------------------------------------------------------------------------------------

BEFORE = base()
WANTED = measures(BEFORE, ["acc"])
GAIN, NEAR = WANTED[0], WANTED[1]


def fronts(*runs: dict[str, Any]) -> tuple[Point, list[list[Point]], Drawn]:
    """The base, the points of each method, and draws of all of them."""
    old, *points = points_of([BEFORE, *runs])
    methods = [[p for p in points if p.method == name] for name in dict.fromkeys(p.method for p in points)]
    return old, methods, Drawn(points, old, WANTED, common_seeds(points))


LORA = curve("lora", [0.3, 0.5, 0.75], [0.95, 0.9, 0.5])
SMF = curve("smf", [0.3, 0.5, 0.9], [1.0, 0.95, 0.9], turn=5)


def test_between_points_the_loss_is_on_the_line_between_them():
    _, (lora,), drawn = fronts(LORA)
    for gain, loss in ((15.0, 7.5), (20.0, 8.75), (25.0, 10.0)):
        there = matched(drawn, lora, GAIN, NEAR, gain)
        assert there is not None and there.value == pytest.approx(loss, abs=5) and there.low <= loss <= there.high


@pytest.mark.parametrize("gain", [-100.0, 4.9, 50.1, 1e9, math.nan, math.inf])
def test_beyond_the_points_there_is_nothing(gain):
    _, (lora, smf), drawn = fronts(LORA, SMF)
    assert matched(drawn, lora, GAIN, NEAR, gain) is None
    assert matched_ratio(drawn, smf, lora, GAIN, NEAR, gain) is None and matched(drawn, [], GAIN, NEAR, 5.0) is None
    assert matched_ratio(drawn, [], lora, GAIN, NEAR, 15.0) is None


def test_a_points_own_loss_is_read_at_its_own_gain_with_its_interval():
    old, (lora,), drawn = fronts(LORA)
    for point in lora[1:]:  # in some draws the second beats the first, which then is no Pareto point
        there, alone = matched(drawn, lora, GAIN, NEAR, point), measured(point, old, NEAR)
        assert there is not None and there.value == pytest.approx(alone.value, abs=3)
        assert there.low <= alone.value <= there.high and there.high - there.low > 0
    alone = matched(drawn, lora[-1:], GAIN, NEAR, lora[-1])
    assert alone is not None and vars(alone) == pytest.approx(vars(measured(lora[-1], old, NEAR)), abs=1)


def test_a_level_at_the_points_end_has_no_interval():
    """In half of the draws the points do not reach it."""
    _, (lora,), drawn = fronts(LORA)
    end = matched(drawn, lora, GAIN, NEAR, 50.0)
    assert end is not None and end.value == pytest.approx(50.0, abs=5) and math.isnan(end.low) and math.isnan(end.high)


def test_a_method_forgets_as_much_as_itself():
    _, (lora, twin), drawn = fronts(LORA, LORA | {"method": "twin"})
    same = matched_ratio(drawn, twin, lora, GAIN, NEAR, lora[-1])
    assert same is not None and (same.value, same.low, same.high, same.p) == (1.0, 1.0, 1.0, 1.0)


def test_ratios_are_shares_of_what_the_other_forgets():
    _, (lora, smf), drawn = fronts(LORA, SMF)
    share = matched_ratio(drawn, smf, lora, GAIN, NEAR, 25.0)
    assert share is not None and share.value == pytest.approx(0.5, abs=0.1)
    back = matched_ratio(drawn, lora, smf, GAIN, NEAR, 25.0)
    assert back is not None and back.value == pytest.approx(1 / share.value)


@pytest.mark.parametrize("kept", [1.0, 1.2])
def test_there_is_no_share_of_nothing(kept):
    before, nothing = base(near=0.8), curve("none", [0.3, 0.6], [0.8 * kept, 0.8 * kept])
    old, *points = points_of([before, nothing, curve("lora", [0.3, 0.6], [0.7, 0.6])])
    drawn = Drawn(points, old, WANTED, (0,))
    assert matched_ratio(drawn, points[2:], points[:2], GAIN, NEAR, 10.0) is None


def test_a_share_of_what_may_be_nothing_has_no_interval():
    little, lora = curve("little", [0.3, 0.7], [0.82, 0.77]), curve("lora", [0.3, 0.7], [0.8, 0.4])
    old, *points = points_of([base(near=0.8), little, lora])
    drawn = Drawn(points, old, WANTED, (0,))
    alone = matched(drawn, points[:2], GAIN, NEAR, 25.0)
    assert alone is not None and alone.low < 0 < alone.value
    share = matched_ratio(drawn, points[2:], points[:2], GAIN, NEAR, 25.0)
    assert share is not None and share.value > 1 and math.isnan(share.low) and math.isnan(share.high)


@pytest.mark.parametrize("lost", [11, 12, 30])
def test_where_gains_are_equal_ratios_are_those_of_the_losses(lost):
    """The other may seem to have forgotten nothing in up to one draw of forty."""
    right = [1] * 90 + [0] * 30
    runs = []
    for name, gone in (("base", 0), ("much", 60), ("little", lost)):
        found = scores(0.25 if name == "base" else 0.5)
        near = [0] * gone + right[gone:-3] + [int(gone > 0)] * 3
        runs.append(result(name, found | {"near-domain": choices("probe", near, ids="near")}, kind=name))
    old, much, little = points_of(runs)
    got = matched_ratio(Drawn([much, little], old, WANTED, (0,)), [much], [little], GAIN, NEAR, little)
    want = ratio(*(change_of(point, old, "near-domain", "acc") for point in (much, little)))
    assert got is not None and want is not None
    assert (got.value, got.low, got.p) == pytest.approx((want.value, want.low, want.p), rel=0.02)
    assert got.high > want.value


def test_results_do_not_depend_on_the_order_of_points_and_runs():
    runs = [LORA, SMF, curve("lora", [0.4, 0.6], [0.9, 0.7], lr=0.2, turn=9)]
    values = []
    for order in (runs, runs[::-1]):
        _, methods, drawn = fronts(*order)
        own = {each[0].method: each for each in methods}
        level = next(p for p in own["lora"] if p.lr == 0.1 and p.share > 0.5 and p.share < 1)
        values.append(matched_ratio(drawn, own["smf"], own["lora"], GAIN, NEAR, level))
    assert values[0] is not None and vars(values[0]) == pytest.approx(vars(values[1]))


def test_a_seed_more_of_the_reference_reads_its_points_again_over_all_of_its_seeds():
    runs = [curve("lora", [0.3, 0.5 + seed / 40, 0.7], [0.95, 0.9, 0.5], seed=seed, kind="lora") for seed in range(3)]
    runs += [curve("smf", [0.3, 0.5, 0.7], [1.0, 0.95, 0.9], seed=seed) for seed in range(3)]
    runs += [curve(name, [0.2, 0.4, 0.6], [1.0, 0.95, 0.9], lr=0.05) for name in ("smf", "other")]
    runs += [curve("lora", [0.2, 0.4, 0.6], [1.0, 0.95, 0.9], lr=0.05, kind="lora")]
    old, *points = points_of([BEFORE, *runs])
    rows = chosen(points, "acc")
    found = at_equal_gain(rows, points, old, WANTED, rows[0], ())
    by_label = {(each.label, each.measure.name): each for each in found}
    assert {(label, each.seeds) for (label, _), each in by_label.items()} == {
        ("gain of lora, one seed of all points", (0,)),
        ("gain of lora, the points with 3 seeds", (0, 1, 2)),
    }
    assert by_label["gain of lora, one seed of all points", "near-domain"].losses["other"] is None  # it gains less
    all_seeds = by_label["gain of lora, the points with 3 seeds", "near-domain"]
    assert all_seeds.losses["other"] is None and all_seeds.losses["smf"] is not None
    assert list(all_seeds.ratios) == ["smf", "other"] and all_seeds.gain == pytest.approx(45.0)


def test_gains_can_be_given_and_methods_without_a_common_seed_have_none():
    old, *points = points_of([BEFORE, LORA, curve("smf", [0.3, 0.9], [1.0, 0.9], seed=4)])
    found = at_equal_gain(chosen(points, "acc"), points, old, WANTED, None, [10, 25.5])
    assert [(each.label, each.gain) for each in found[::3]] == [("gain 10", 10.0), ("gain 25.5", 25.5)]
    assert all(each.losses["lora"] is not None and each.losses["smf"] is None and not each.ratios for each in found)


def test_where_there_is_no_value_it_is_said_how_much_the_points_gain():
    old, *points = points_of([BEFORE, curve("low", [0.3, 0.4], [1.0, 0.9]), curve("high", [0.65, 0.75], [0.9, 0.5])])
    lower, upper = (at_equal_gain(chosen(points, "acc"), points, old, WANTED, None, [gain])[0] for gain in (10, 45.0))
    assert lower.losses["low"] is not None and lower.beyond("low") == ""
    assert lower.losses["high"] is None and lower.beyond("high") == "gains 40 and more"
    assert upper.losses["low"] is None and upper.beyond("low") == "gains 15 at most"
    assert lower.beyond("absent") == "" and upper.beyond("high") == ""
    assert lower.ranges["low"] == pytest.approx((5.0, 15.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_points_with_an_example_that_is_no_number_are_left_out(value):
    bad = result("lora", scores(0.5), lr=0.2)
    bad["scores"]["general-text"]["records"][3]["nats"] = value
    old, good, broken = points_of([BEFORE, result("lora", scores(0.5)), bad])
    assert finite([good, broken], old, WANTED) == [good] and finite([good, broken], old, [GAIN, NEAR]) == [good, broken]


def test_diverged_points_and_a_diverged_reference_are_left_out():
    wild = curve("lora", [0.4, 0.9], [0.9, 0.1], lr=9.0)
    for record in wild["scores"]["general-text"]["records"]:
        record["nats"] = math.nan
    old, *points = points_of([BEFORE, LORA, wild, SMF])
    end = next(p for p in points if p.lr == 9.0 and p.share == 1)
    rows = [end, points[-1]]
    assert at_equal_gain(rows, points, old, WANTED, end, ()) == []
    (first, *_) = at_equal_gain(rows, points, old, WANTED, end, [20])
    assert first.losses["lora"] is not None and first.losses["lora"].value == pytest.approx(8.75, abs=2)


def test_one_point_of_each_method_is_nothing_to_read_between():
    old, *points = points_of([BEFORE, result("lora", scores(0.5)), result("smf", scores(0.6))])
    assert at_equal_gain(points, points, old, WANTED, points[0], [10]) == []


def simulated(
    method: str, rng: np.random.Generator, learned: Sequence[float], kept: Sequence[float], *, alike: bool = False
) -> dict[str, Any]:
    """A run whose moments ask the same questions; alike: what is right once stays so as long as more is learned.

    Else half of what decides whether a question is right is the moment's own.
    """
    moments = []
    held, near = rng.standard_normal((2, 5 * N))
    for p, q in zip(learned, kept, strict=True):
        own = np.zeros((2, 5 * N)) if alike else rng.standard_normal((2, 5 * N))
        (held_now, near_now), scale = np.stack([held, near]) + own, 1.0 if alike else math.sqrt(2)
        right = {"held-out": held_now < scale * QUANTILE(p), "near-domain": near_now < scale * QUANTILE(q)}
        roles = {"held-out": ("target", "held"), "near-domain": ("probe", "near")}
        moments.append({n: choices(roles[n][0], [int(x) for x in r], ids=roles[n][1]) for n, r in right.items()})
    way = {(i + 1) / len(moments): moment for i, moment in enumerate(moments[:-1])}
    return result(method, moments[-1], on_the_way=way)


@pytest.mark.parametrize(
    "true_points",
    [
        pytest.param(([0.35, 0.5, 0.7, 0.9], [0.99, 0.95, 0.9, 0.8]), id="four, far apart"),
        pytest.param((np.linspace(0.2, 0.9, 20), 0.98 - 0.3 * np.linspace(0.2, 0.9, 20) ** 2), id="twenty on a curve"),
        pytest.param((np.linspace(0.2, 0.9, 20), np.linspace(0.9, 0.8, 20)), id="twenty that lose alike"),
    ],
)
def test_intervals_hold_the_loss_of_the_true_points(true_points):
    """Studies of one seed, read at a gain and at that of a point; the true points are known.

    Intervals around Pareto points read off the examples they were chosen by hold the truth of the third in three of
    four.
    """
    learned, kept = map(np.array, true_points)
    before = simulated("base", np.random.default_rng(0), [1e-9], [1 - 1e-9], alike=True)["scores"]
    other = ([0.3, 0.45, 0.6, 0.7], [0.98, 0.95, 0.88, 0.78])
    rng, held = np.random.default_rng(3), []
    for _ in range(80):
        runs = [result("base", before, kind="base"), simulated("lora", rng, *other, alike=True)]
        old, *points = points_of([*runs, simulated("smf", rng, learned, kept)])
        drawn = Drawn(points, old, [GAIN, NEAR], (0,), count=399)
        for level, gain in ((60.0, 60.0), (points[2], 60.0)):
            got = matched(drawn, points[4:], GAIN, NEAR, level)
            truth = on_front(100 * learned, 100 - 100 * kept, gain)
            held += [] if got is None or math.isnan(got.low) else [got.low <= truth <= got.high]
    assert len(held) > 140 and 0.92 <= np.mean(held) <= 0.99


# -- one method against another ---------------------------------------------------------------------------------------


def compared(*runs: dict[str, Any], before: dict[str, Any] = BEFORE, metrics=("acc",)):
    old, *points = points_of([before, *runs])
    return against(points[1:], points[0], old, measures(before, metrics)), points


def test_a_difference_is_the_methods_minus_the_references():
    found, _ = compared(result("lora", scores(0.5, 0.8, 2.5)), result("smf", scores(0.6, 0.9, 2.1)))
    overall = (10 + 10) / 2 - (20 + 50) / 2  # per cent of right answers; a tenth of a nat is ten per cent
    assert [each.estimate.value for each in found] == pytest.approx([10.0, -10.0, -0.4, overall])
    assert all(each.estimate.low <= each.estimate.value <= each.estimate.high for each in found)


def test_holm_is_over_all_methods_and_measures_together():
    found, _ = compared(*(result(f"m{i}", scores(0.3 + i / 20, 0.9 - i / 20, turn=i)) for i in range(4)))
    assert len(found) == 3 * 4 and [each.adjusted for each in found] == holm([each.p for each in found])
    smallest = min(found, key=lambda each: each.p)
    assert smallest.adjusted == pytest.approx(12 * smallest.p)


def test_many_comparisons_leave_room_for_a_small_p():
    """Adjusted for 120 comparisons, the smallest p of 3,999 draws would be 0.06."""
    runs = [result(f"m{i}", scores(0.5, 0.5, 3.0, cluster=4)) for i in range(30)]
    found, _ = compared(result("lora", scores(0.5, 1.0, 2.0, cluster=4)), *runs, before=base(cluster=4))
    assert len(found) == 120 and {each.test for each in found} == {"bootstrap"}
    assert max(each.adjusted for each in found if each.measure.role == "forgetting") <= 0.011


def test_two_single_runs_of_independent_questions_are_compared_exactly():
    runs = [result("lora", scores(0.5, 0.8)), result("smf", scores(0.7, 0.9, turn=3))]
    found, points = compared(*runs)
    tests = {each.measure.name: each.test for each in found}
    assert tests == {
        "held-out": "McNemar",
        "near-domain": "McNemar",
        "general-text": "bootstrap",
        "overall": "bootstrap",
    }
    mine, theirs = (p.runs[0]["scores"]["held-out"]["records"] for p in (points[1], points[0]))
    assert found[0].p == mcnemar(mine, theirs, "acc")


@pytest.mark.parametrize("why", ["clusters", "seeds", "no yes or no", "not a number"])
def test_what_is_not_two_single_runs_of_independent_questions_is_not(why):
    cluster = 4 if why == "clusters" else 0
    seeds = (0, 1) if why == "seeds" else (0,)
    runs = [result(m, scores(0.5, turn=s, cluster=cluster), seed=s) for m in ("lora", "smf") for s in seeds]
    if why in ("no yes or no", "not a number"):
        for run in runs:
            run["scores"]["held-out"]["records"][0]["acc"] = 0.5 if why == "no yes or no" else math.nan
    found, _ = compared(*runs, before=base(cluster=cluster))
    assert found[0].test == "bootstrap" and 0 <= found[0].p <= 1
    if why == "not a number":
        assert math.isnan(found[0].estimate.low) and found[0].p == found[0].adjusted == 1.0


def test_only_common_seeds_are_compared_and_methods_without_any_are_left_out():
    runs = [result("lora", scores(0.5, turn=s), seed=s) for s in range(5)]
    runs += [result("smf", scores(0.6, turn=s), seed=s) for s in (3, 4, 5)]
    runs += [result("one", scores(0.6), seed=2), result("none", scores(0.6), seed=9)]
    found, _ = compared(*runs)
    assert {(each.method, each.seeds) for each in found} == {("smf", 2), ("one", 1)}


def test_runs_of_one_seed_twice_are_refused_and_so_are_other_examples():
    with pytest.raises(ConfigError, match="seed of its own"):
        compared(result("lora"), result("smf"), result("smf"))
    other = scores(0.5)
    other["held-out"]["records"].pop()
    with pytest.raises(DataError, match="different examples"):
        compared(result("lora"), result("smf", other))


@few
@given(st.integers(0, 10**6))
def test_comparing_the_other_way_round_turns_the_sign(number):
    rng = random.Random(number)
    a, b = (result(m, scores(rng.random(), rng.random(), 1 + rng.random(), turn=rng.randrange(9))) for m in ("a", "b"))
    (one, _), (other, _) = compared(a, b), compared(b, a)
    for x, y in zip(one, other, strict=True):
        assert x.estimate.value == pytest.approx(-y.estimate.value)
        assert x.estimate.low == pytest.approx(-y.estimate.high) and x.p == pytest.approx(y.p)
