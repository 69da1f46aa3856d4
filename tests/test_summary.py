"""What tables, CSV and JSON say of a study: everything that was measured, nothing that was not, whatever its names."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import N, answers, base, choices, curve, result, scores, text
from smf.errors import ConfigError, DataError
from smf.export import as_csv, as_json
from smf.summary import Summary, summarise, verdict
from smf.table import all_tables, caption, label_of, markdown, one_line, print_tables

NASTY = "a|b\n## [red]x[/red] [link=file:///]:smile: <script>*`_\\ \x1b[31m\u202e\r\ud800"


def study(*runs: dict[str, Any], **options: Any) -> Summary:
    return summarise([base(), *runs], ["acc"], **options)


def tuned(method: str, kind: str = "smf", rates: int = 3, best: int = 1, seeds: int = 1) -> list[dict[str, Any]]:
    """Runs at several rates, of which the best was run under some seeds."""
    runs = []
    for i in range(rates):
        learned = [0.3, 0.7 - abs(i - best) / 10]
        for seed in range(seeds if i == best else 1):
            kept = [0.95 - i / 50, 0.9 - i / 20]
            runs.append(curve(method, learned, kept, lr=0.1 * 2**i, kind=kind, seed=seed, turn=seed))
    return runs


def table_of(summary: Summary, start: str) -> tuple[list[str], list[list[str]], str]:
    """Header, rows and note of the first table whose title starts like this."""
    title = next(title for title in all_tables(summary) if title.startswith(start))
    (header, rows), note = all_tables(summary)[title]
    return header, rows, note


def parsed(page: str) -> list[list[list[str]]]:
    """The cells of every table of a Markdown page, as a reader that knows nothing else would split them."""
    tables: list[list[list[str]]] = [[]]
    for line in page.splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in line[1:-1].split("|")])
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


# -- what there is to say ---------------------------------------------------------------------------------------------


def test_nothing_to_report_and_foreign_results_are_refused():
    with pytest.raises(DataError, match="no results"):
        summarise([], ["acc"])
    other = result("smf", scores(0.5, chosen_by=False))
    with pytest.raises(DataError, match="they cannot be in one table"):
        study(other)
    partly = curve("smf", [0.3, 0.5], [1, 1])
    del partly["on_the_way"][0]["scores"]["near-domain"]
    with pytest.raises(DataError, match="cannot be in one table"):
        study(partly)


@pytest.mark.parametrize("metrics", [[], ["f1"], ["acc", "none"]])
def test_a_metric_that_the_target_does_not_have_is_refused(metrics):
    with pytest.raises(ConfigError, match=r"metric|no score"):
        summarise([base(), result("smf")], metrics)


@pytest.mark.parametrize("gain", [math.nan, math.inf])
def test_a_gain_that_is_no_number_is_refused(gain):
    with pytest.raises(ConfigError, match="gains that are numbers"):
        study(*tuned("lora"), gains=[10.0, gain])


def test_a_reference_that_is_not_there_is_refused_with_the_names_that_are():
    with pytest.raises(ConfigError, match=r"'loar'.*\['lora', 'smf'\]"):
        study(result("lora"), result("smf"), reference="loar")
    with pytest.raises(ConfigError, match="'base'"):
        study(result("lora"), result("smf"), reference="base")


@pytest.mark.parametrize(
    ("methods", "reference"),
    [
        ((("full", "full"), ("lora-a", "lora"), ("lora-b", "lora")), "lora-a"),
        ((("smf", "smf"), ("full", "full")), "full"),
        ((("smf", "smf"), ("own", "mine:method")), None),
        ((("lora", "lora"),), None),
    ],
)
def test_the_reference_is_the_first_lora_else_full_and_nothing_is_compared_with_itself(methods, reference):
    summary = study(*(result(name, scores(0.5), kind=kind) for name, kind in methods))
    assert (summary.reference and summary.reference.method) == reference
    assert {each.method for each in summary.comparisons} == {name for name, _ in methods if reference} - {reference}
    assert ("Against" in markdown(summary)) == (reference is not None)


def test_without_a_base_scores_are_shown_and_nothing_is_compared():
    summary = summarise([*tuned("lora", "lora"), *tuned("smf")], ["acc"])
    assert summary.base is None and not summary.changes and not summary.matched and not summary.comparisons
    assert list(all_tables(summary)) == [""] and "nothing is compared" in caption(summary)
    assert [row.lr for row in summary.rows] == [0.2, 0.2] and summary.interior == [True, True]
    assert "seed" not in caption(summary)
    assert (
        as_json(summary)["base"] is None
        and len(as_json(summary)["points"]) == 12
        and [line["what"] for line in csv_lines(summary)].count("score") == 8
    )


def test_the_base_alone_is_a_table():
    summary = summarise([base()], ["acc"])
    header, rows, note = table_of(summary, "")
    assert [row[0] for row in rows] == ["base"] and len(header) == len(rows[0])
    assert "alone" in note and "interval" not in note and list(all_tables(summary)) == [""]
    assert as_json(summary)["methods"] == [] and markdown(summary).startswith("| method |")


def test_what_was_scored_without_a_run_is_shown():
    """As `smf eval` does: no seed, no options, no steps."""
    results = [
        {"method": m, "kind": k, "scores": scores(h)} for m, k, h in (("base", "base", 0.25), ("p", "patch", 0.5))
    ]
    summary = summarise(results, ["acc"])
    header, rows, _ = table_of(summary, "")
    assert rows[1][header.index("held-out %")].startswith("50.0\n+25.0\n[") and rows[1][-1] == "-"
    json.dumps(as_json(summary), allow_nan=False)


def test_a_second_base_is_no_method():
    summary = study(result("lora", kind="lora"), base() | {"seed": 3}, base() | {"method": "again"})
    assert [row.method for row in summary.rows] == ["lora"] and summary.reference is None


def test_flips_are_counted_a_run_and_columns_have_their_units():
    runs = [result("smf", scores(0.3 + seed / 20, 0.9), seed=seed) for seed in range(5)]
    summary = study(*runs)
    assert summary.flips == [{"held-out": (0.15 * N, 0), "near-domain": (0, 0.1 * N)}]
    assert table_of(summary, "Learned")[1] == [["smf", "18 / 0", "0 / 12"]]
    header, rows, _ = table_of(summary, "")
    cells = dict(zip(header, rows[1], strict=True))
    assert cells["held-out %"].startswith("40.0\n+15.0\n[+") and cells["near-domain %"].startswith("90.0\n-10.0\n[-")
    assert (
        cells["general-text ppl"] == "7.389\n+0.000\n[+0.000, +0.000]"
        and cells["KL general-text"] == "0.000\n[0.000, 0.000]"
    )
    assert cells["overall forgotten %"].startswith("5.0\n[") and cells["seconds"] == "2"


def test_the_overall_number_needs_two_probes():
    runs = [base(), result("smf", scores(0.5))]
    for run in runs:
        run["scores"] = {name: score for name, score in run["scores"].items() if "general" not in name}
    assert summarise(runs, ["acc"]).overall == [] and "overall" not in markdown(summarise(runs, ["acc"]))


def test_a_probe_may_be_called_overall():
    runs = [base(), result("smf", scores(0.5, 0.8, 2.0))]
    for run in runs:
        run["scores"]["overall"] = run["scores"].pop("near-domain")
    assert [each.value for each in summarise(runs, ["acc"]).overall] == [pytest.approx(10.0)]


# -- choice and seeds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("best", "interior"), [(0, False), (1, True), (2, False)])
def test_a_rate_at_its_grids_end_is_marked(best, interior):
    summary = study(*tuned("lora", "lora"), *tuned("smf", best=best))
    assert summary.interior == [True, interior] and summary.rates == [3, 3]
    header, rows, note = table_of(summary, "")
    assert ("grid's end" in rows[2][header.index("lr")]) != interior and "grid's end" not in rows[1][1]
    assert "of 3 that were tried" in note


@pytest.mark.parametrize(
    ("goal", "rate", "interior"), [(0.35, 0.1, False), (0.45, 0.2, True), (0.65, 0.8, True), (0.95, 0.8, True)]
)
def test_matched_methods_stand_at_the_lowest_rate_that_learns_as_much(goal: float, rate: float, interior: bool):
    """The rates 0.1 to 1.6 reach .4, .5, .6, .7 and .6 of the validation questions."""
    runs = [*tuned("smf", rates=5, best=3), curve("lora", [0.3, goal], [0.9, 0.8], lr=0.1, kind="lora")]
    summary = study(*runs, match=["lora"])
    chosen = {row.method: (row.lr, sure) for row, sure in zip(summary.rows, summary.interior, strict=True)}
    assert chosen == {"smf": (pytest.approx(rate), interior), "lora": (0.1, None)}
    assert "beside lora, the lowest that learns as much as the best of these" in caption(summary)
    assert [row.lr for row in study(*runs, match=["absent"]).rows] == [row.lr for row in study(*runs).rows]
    assert study(*runs).rows[0].lr == pytest.approx(0.8) and "beside" not in caption(study(*runs))


def test_what_is_matched_counts_at_the_seeds_that_it_is_chosen_at():
    """LoRA's best rate has two more seeds, which learned less: its grid is of seed 0 alone."""
    lora = [curve("lora", [0.3, learned], [0.9, 0.8], lr=lr, kind="lora") for lr, learned in ((0.1, 0.4), (0.2, 0.55))]
    lora += [curve("lora", [0.3, 0.3], [0.9, 0.8], lr=0.2, kind="lora", seed=seed, turn=seed) for seed in (1, 2)]
    summary = study(*tuned("smf", rates=5, best=3), *lora, match=["lora"])
    assert {row.method: row.lr for row in summary.rows} == {"smf": pytest.approx(0.4), "lora": pytest.approx(0.2)}


def test_one_rate_is_no_choice_but_grids_of_other_sizes_are_said():
    assert study(*tuned("lora", "lora", rates=1, best=0)).interior == [None]
    assert "lr" not in table_of(study(result("lora")), "")[0]
    summary = study(*tuned("lora", "lora"), *tuned("smf", rates=5), *tuned("one", rates=1, best=0))
    assert "of 1 or 3 or 5 that were tried" in caption(summary)


@pytest.mark.parametrize(
    ("seeds", "said"), [((1, 1), "over examples only (one seed)"), ((3, 3), "over 3 seeds and examples")]
)
def test_tables_say_what_their_intervals_are_over(seeds, said):
    summary = study(*tuned("lora", "lora", seeds=seeds[0]), *tuned("smf", seeds=seeds[1]))
    assert said in caption(summary) and said in table_of(summary, "Against")[2]
    for title, (_, note) in all_tables(summary).items():
        if title.startswith("Forgotten"):
            assert ("over 3 seeds and examples" if "3 seeds" in title else "over examples only (one seed)") in note


def test_tables_say_which_methods_have_fewer_seeds():
    summary = study(*tuned("lora", "lora", seeds=3), *tuned("smf", seeds=2), *tuned("once"), *tuned("twice", seeds=2))
    said = "number differs (3 seeds: lora; 2 seeds: smf, twice; one seed, so over examples only: once)"
    assert said in caption(summary)
    assert "(2 seeds: smf, twice; one seed, so over examples only: once)" in table_of(summary, "Against")[2]


def test_many_methods_with_a_number_of_seeds_are_counted():
    runs = [result(f"m{i}", scores(0.5)) for i in range(6)] + [result("m0", scores(0.6), seed=1)]
    assert "(2 seeds: m0; one seed, so over examples only: 5 methods)" in caption(study(*runs))


def test_a_method_without_a_common_seed_is_named():
    summary = study(result("lora", kind="lora"), result("smf", seed=4), result("tf"))
    _, rows, note = table_of(summary, "Against")
    assert [row[0] for row in rows] == ["tf"] and "no seed in common: smf" in note
    assert [(row.method, len(found)) for row, found in summary.compared()] == [("tf", 4)]
    alone = study(result("lora", kind="lora"), result("smf", seed=4))
    assert not alone.comparisons and alone.compared() == [] and "Against" not in markdown(alone)


def test_rows_of_one_method_have_their_rates_beside_their_names():
    """Without a validation set nothing is chosen."""
    runs = [result("lora", scores(0.5, chosen_by=False), kind="lora")]
    runs += [result("smf", scores(share, 0.9, chosen_by=False), lr=lr) for lr, share in ((0.1, 0.5), (0.2, 0.6))]
    summary = summarise([base(chosen_by=False), *runs], ["acc"])
    assert [label_of(summary, row) for row in summary.rows] == ["lora", "smf, lr 0.1", "smf, lr 0.2"]
    assert [row[0] for row in table_of(summary, "Against")[1]] == ["smf, lr 0.1", "smf, lr 0.2"]
    assert [each["lr"] for each in as_json(summary)["comparisons"]] == [0.1] * 4 + [0.2] * 4
    for (header, rows), _ in all_tables(summary).values():
        assert {len(row) for row in rows} == {len(header)}


# -- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "said"), [(0.9, "non-inferior"), (0.5, "may be inferior"), (0.1, "inferior")])
def test_a_method_is_non_inferior_where_it_is_sure_to_gain_nearly_as_much(share, said):
    summary = study(result("lora", scores(0.5, 0.9), kind="lora"), result("smf", scores(share, 0.9, turn=60)))
    verdicts = {each.measure.name: verdict(each) for each in summary.comparisons}
    assert verdicts == {"held-out": said, "near-domain": "", "general-text": "", "overall": ""}
    assert table_of(summary, "Against")[1][0][1].endswith(f"\n{said}")


def test_nothing_is_said_from_a_hundred_questions_of_which_hardly_any_differs():
    summary = study(result("lora", scores(0.5), kind="lora"), result("smf", scores(0.5)))
    first = summary.comparisons[0]
    assert (first.estimate.value, first.adjusted, first.differing, first.clusters) == (0.0, 1.0, 0, N)
    assert table_of(summary, "Against")[1][0][1] == "+0.0\n[+0.0, +0.0]\np = 1 (McNemar)\ntoo few changed to say"
    many = {"held-out": choices("target", answers(0.5, n=700))}
    runs = [result("base", many, kind="base"), result("lora", many, kind="lora"), result("smf", many)]
    summary = summarise(runs, ["acc"])
    assert verdict(summary.comparisons[0]) == "non-inferior"  # of 700 at most 3 may differ: less than half a point


def test_what_failed_is_named_and_counts_as_tried():
    runs = [result("smf", scores(0.5), lr=0.1), result("smf", scores(0.6), lr=0.2)]
    broken = [{"method": "smf", "options": {"lr": 0.4}, "seed": 0, "reason": "a gradient is not finite"}]
    for failed, interior, rates in (((), False, 2), (broken, True, 3)):
        summary = summarise([base(), *runs], ["acc"], failed=failed)
        assert summary.interior == [interior] and summary.rates == [rates]
        assert ("training failed: smf at lr 0.4" in all_tables(summary)[""][1]) == bool(failed)
        assert as_json(summary)["failed"] == list(failed)


def test_a_moment_before_the_end_is_said_even_of_a_single_rate():
    early = {0.5: scores(0.6, validation=0.6)}
    summary = study(result("lora", scores(0.5, validation=0.5), on_the_way=early))
    header, rows, _ = table_of(summary, "")
    assert header[1] == "lr" and rows[1][1].endswith("at 50% of the steps")


def test_the_smallest_p_that_a_bootstrap_can_give_is_an_upper_bound():
    summary = study(result("lora", scores(0.5, 0.9, 2.0), kind="lora"), result("smf", scores(0.5, 0.9, 9.0)))
    cells = table_of(summary, "Against")[1][0]
    assert "p ≤ 0.0" in cells[3] and "(McNemar)" in cells[1] and "p = " in cells[1]


def test_runs_of_several_versions_of_the_code_say_so():
    runs = [result("a", scores(0.5)) | {"provenance": {"git": version}} for version in ("one", "two")]
    summary = study(runs[0], runs[1] | {"method": "b"})
    assert "made by 3 versions of the code" in caption(summary)


def test_forgetting_at_equal_gain_is_shown_with_its_share_or_as_not_available():
    lora = curve("lora", [0.35, 0.6, 0.65], [0.95, 0.8, 0.7], kind="lora")
    summary = study(lora, curve("smf", [0.35, 0.5, 0.9], [1, 0.95, 0.9]), curve("weak", [0.3, 0.35], [1, 1]))
    header, rows, note = table_of(summary, "Forgotten at the gain of lora (40)")
    assert header == ["method", "near-domain, points", "general-text, nats per token", "overall, %"]
    assert re.fullmatch(r"30\.0 \[\d+\.\d, \d+\.\d\]", rows[0][1])
    assert rows[2][1:] == ["n/a\n(gains 10 at most)"] * 3
    assert re.fullmatch(r"6\.9 \[\d+\.\d, \d+\.\d\]\nx 0\.23 \[0\.\d+, 0\.\d+\]", rows[1][1])
    assert "x: as a share of what lora forgets" in note and "n/a: beyond them" in note
    given = summarise([base(), lora], ["acc"], gains=[10.0, 35])
    assert [title for title in all_tables(given) if "Forgotten" in title] == [
        "Forgotten at the gain 10 (10)",
        "Forgotten at the gain 35 (35)",
    ]
    assert "share" not in table_of(given, "Forgotten")[2]


# -- losses as targets ------------------------------------------------------------------------------------------------


def test_a_loss_as_target_is_better_when_lower():
    runs = []
    for lr, loss in ((0.1, 3.0), (0.2, 1.0), (0.4, 2.0)):
        moments = [scores(0.5, 1 - lr / 2, loss=each) for each in (4.0, loss)]
        for moment in moments:
            moment["validation"] = choices("validation", [0, 1], moment["held-out"]["metrics"]["loss"])
        runs.append(result("lora", moments[1], lr=lr, kind="lora", on_the_way={0.5: moments[0]}))
    before = scores(loss=5.0)
    before["validation"] = choices("validation", [0, 1])
    summary = summarise([result("base", before, kind="base"), *runs], ["loss", "acc"])
    assert [(row.lr, row.share) for row in summary.rows] == [(0.2, 1.0)] and summary.interior == [True]
    header, rows, _ = table_of(summary, "")
    assert header[2:4] == ["held-out loss", "held-out %"] and rows[1][2] == "1.000\n-4.000\n[-4.000, -4.000]"
    (first, *_) = summarise([result("base", before, kind="base"), *runs], ["loss"], gains=[3]).matched
    assert first.losses["lora"] is not None and first.losses["lora"].value == pytest.approx(7.5)


@pytest.mark.parametrize(("early", "late", "share"), [(0.7, 0.6, 0.5), (0.6, 0.7, 1.0)])
def test_scores_of_an_earlier_moment_stand_beside_costs_that_are_said_to_be_of_the_end(early, late, share):
    way = {0.5: scores(early, validation=early)}
    summary = study(result("lora", scores(late, validation=late), kind="lora", on_the_way=way))
    assert [row.share for row in summary.rows] == [share]
    assert ("rows and seconds: of the whole training" in caption(summary)) == (share < 1)


# -- numbers that are none --------------------------------------------------------------------------------------------


def diverged(method: str, kind: str = "smf", **options: Any) -> dict[str, Any]:
    run = result(method, scores(0.5), kind=kind, **options)
    for name, metric, value in (("held-out", "loss", math.nan), ("general-text", "nats", math.inf)):
        run["scores"][name]["metrics"][metric] = value
        for record in run["scores"][name]["records"]:
            record["nats"] = value
    run["scores"]["general-text"]["metrics"]["perplexity"] = math.inf
    run["scores"]["KL general-text"] = text(math.nan, "divergence")
    return run | {"seconds": math.nan}


def csv_lines(summary: Summary) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(as_csv(summary), newline="")))


@pytest.mark.parametrize("which", ["a method", "the reference", "all", "one rate", "one seed"])
def test_diverged_runs_are_shown_and_break_nothing(which):
    runs = [*tuned("lora", "lora"), *tuned("smf")]
    more = {"one rate": [diverged("smf", lr=9.0)], "one seed": [diverged("smf", lr=0.2, seed=1)]}
    runs += more.get(which, [])
    if which in ("the reference", "all"):
        runs = [run for run in runs if run["method"] != "lora"] + [diverged("lora", "lora")]
    if which in ("a method", "all"):
        runs = [run for run in runs if run["method"] != "smf"] + [diverged("smf")]
    summary = study(*runs)
    text_json = json.dumps(as_json(summary), allow_nan=False)
    assert {row["method"] for row in json.loads(text_json)["methods"]} == {"lora", "smf"}
    assert [line["what"] for line in csv_lines(summary)].count("score") == 3 * 4
    tables = parsed(markdown(summary))
    assert all(len({len(row) for row in table}) == 1 for table in tables)
    assert "nan" not in markdown(summary) and ("n/a" in markdown(summary) or which in ("one rate", "one seed"))


def test_a_grid_without_a_number_stays_a_row():
    runs = [diverged("smf", lr=lr) for lr in (0.4, 0.2)]
    for run in runs:
        run["scores"]["validation"]["metrics"]["acc"] = math.nan
    assert [row.lr for row in study(*runs).rows] == [0.2]


# -- files ------------------------------------------------------------------------------------------------------------


def rich_study() -> Summary:
    runs = [*tuned("lora", "lora", seeds=2), *tuned("smf", seeds=2), *tuned("full", "full", best=2)]
    return study(*runs, diverged("broken"))


def test_json_is_strict_and_complete():
    summary = rich_study()
    found = json.loads(json.dumps(as_json(summary), allow_nan=False))
    assert [row["method"] for row in found["methods"]] == ["lora", "smf", "full", "broken"]
    assert len(found["points"]) == len(summary.points) == 3 * 6 + 1
    assert found["methods"][0]["changes"]["held-out acc"]["value"] == pytest.approx(0.45)
    assert set(found["methods"][0]["scores_by_seed"]) == {"0", "1"} and "records" not in json.dumps(found)
    assert found["methods"][2]["interior"] is False and found["methods"][2]["rates"] == 3
    assert found["methods"][3]["changes"]["general-text nats"]["low"] is None and found["reference"] == "lora"
    assert {tuple(each["seeds"]) for each in found["matched"]} == {(0,), (0, 1)}
    assert found["comparisons"][0]["p"] <= found["comparisons"][0]["adjusted"]
    assert json.dumps(as_json(rich_study())) == json.dumps(as_json(summary)) and markdown(rich_study()) == markdown(
        summary
    )


def test_a_gain_that_nothing_can_be_read_off_at_is_refused():
    with pytest.raises(ConfigError, match="read off between points of a method, but none has two"):
        study(result("lora", scores(0.5), kind="lora"), gains=[10.0])
    assert study(curve("lora", [0.3, 0.5], [1, 0.9], kind="lora"), gains=[10.0]).matched


def test_csv_parses_back_to_the_numbers():
    summary = rich_study()
    lines = [line for line in csv_lines(summary) if line["what"] == "score"]
    assert len(lines) == 5 * 4 and [line["method"] for line in lines[::4]] == ["base", "lora", "smf", "full", "broken"]
    for line in lines[4:]:
        row, place = next((row, i) for i, row in enumerate(summary.rows) if row.method == line["method"])
        column = next(c for c in summary.columns if (c.scored, c.metric) == (line["set"], line["metric"]))
        found = summary.changes[place, column]
        assert float(line["score"]) == pytest.approx(row.mean(column.scored, column.metric), nan_ok=True)
        numbers = [float(line[key]) for key in ("change", "low", "high", "p")]
        assert numbers == pytest.approx([found.value, found.low, found.high, found.p], nan_ok=True)
        assert (float(line["lr"]), int(line["seeds"])) == (row.lr, len(row.runs))


def test_csv_has_the_comparisons_and_forgetting_at_equal_gain_too():
    summary = rich_study()
    lines = csv_lines(summary)
    differences = [line for line in lines if line["what"] == "difference"]
    assert len(differences) == len(summary.comparisons) > 0
    for line, each in zip(differences, summary.comparisons, strict=True):
        assert (line["method"], line["set"], line["unit"]) == (each.method, each.measure.name, each.measure.unit)
        assert line["against"] == "lora" and float(line["change"]) == pytest.approx(each.estimate.value, nan_ok=True)
        assert float(line["p"]) == pytest.approx(each.adjusted)
    there = [lost for table in summary.matched for lost in table.losses.values() if lost is not None]
    equal = [line for line in lines if line["what"] == "equal gain"]
    assert [float(line["change"]) for line in equal] == pytest.approx([lost.value for lost in there]) and there
    assert {line["against"] for line in equal} == {table.label for table in summary.matched}
    assert sum(line["what"] == "overall" for line in lines) == len(summary.rows)
    assert {line["verdict"] for line in differences} == {verdict(each) for each in summary.comparisons}
    ratios = [ratio for table in summary.matched for ratio in table.ratios.values() if ratio is not None]
    shares = [line for line in lines if line["what"] == "equal gain, ratio"]
    assert [float(line["change"]) for line in shares] == pytest.approx(
        [r.value for r in ratios], nan_ok=True
    ) and ratios
    for what, place in (("learned", 0), ("forgotten", 1)):
        found = [float(line["score"]) for line in lines if line["what"] == what]
        assert found == [counts[place] for flips in summary.flips for counts in flips.values()] and any(found)


def test_rows_say_their_seeds_where_these_differ():
    runs = [
        base(),
        *(result("smf", scores(0.5), seed=seed) for seed in range(3)),
        result("lora", scores(0.4), kind="lora"),
    ]
    for (_, rows), _ in all_tables(summarise(runs, ["acc"])).values():
        names = [row[0] for row in rows]
        assert not any(name.startswith("smf") and name != "smf\n(3 seeds)" for name in names), names
        assert not any(name.startswith("lora") and name != "lora\n(one seed)" for name in names), names
    (_, rows), _ = all_tables(summarise(runs[:4], ["acc"]))[""]
    assert [row[0] for row in rows] == ["base", "smf"]


# -- names ------------------------------------------------------------------------------------------------------------


def named(name: str, scored: str = "held-out") -> Summary:
    """Methods and a set with such names."""
    runs = [base(), *tuned(name, "lora"), *tuned(f"{name}2"), result("smf", scores(0.5))]
    for run in runs:
        for each in (run, *run.get("on_the_way", [])):
            each["scores"] = {scored if key == "held-out" else key: score for key, score in each["scores"].items()}
    return summarise(runs, ["acc"])


def test_names_break_no_table():
    summary = named(NASTY, NASTY + "set")
    page = markdown(summary)
    tables = parsed(page)
    assert len(tables) == len(all_tables(summary)) and all(len({len(row) for row in table}) == 1 for table in tables)
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    assert len(re.findall("^## ", page, re.M)) == len(tables) - 1
    shown = html.unescape(re.sub(r"\\([\\`*_])", r"\1", tables[0][3][0]))
    assert shown == one_line(NASTY) and shown.startswith("a|b ## [red]x[/red]")
    page.encode()
    lines = list(csv.reader(io.StringIO(as_csv(summary), newline="")))
    assert {len(line) for line in lines} == {16} and one_line(NASTY) in {line[1] for line in lines}
    assert json.loads(json.dumps(as_json(summary), allow_nan=False))["methods"][0]["method"] == NASTY


def test_the_terminal_shows_names_as_they_are(capsys):
    print_tables(named("[red]x[/red] [n/a] :smile:", "[b]"), "runs/[bold]")
    shown = capsys.readouterr().out
    assert "[red]x[/red] [n/a] :smile:" in shown and "[b] %" in shown and "runs/[bold]" in shown and "\x1b" not in shown


def test_the_terminal_shows_intervals_that_are_not_available(capsys):
    lora = curve("lora", [0.35, 0.5], [0.95, 0.8], kind="lora")
    print_tables(study(lora, curve("smf", [0.3, 0.5], [1, 0.9], turn=50)), "title")
    assert "[n/a]" in capsys.readouterr().out


@settings(deadline=None, max_examples=15)
@given(st.text(st.characters(codec=None), min_size=1, max_size=12))
def test_any_name_is_one_cell_and_one_line(name):
    runs = [base(), result(name, scores(0.5), kind="lora")]
    summary = summarise(runs, ["acc"])
    tables = parsed(markdown(summary))
    assert [len(row) for table in tables for row in table] == [len(tables[0][0])] * 4 + [len(tables[1][0])] * 3
    lines = [line for line in csv_lines(summary) if line["what"] in ("score", "overall")]
    assert [line["method"] for line in lines] == ["base"] * 4 + [one_line(name)] * 5
    markdown(summary).encode()
