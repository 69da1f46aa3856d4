"""The HTML report: what is in it, that it needs nothing else, and that a data set cannot put code into it."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib")

import fakes
import smf.report
from smf import cli, plots
from smf.comparisons import Comparison
from smf.errors import DataError
from smf.logs import averaged, quantities, read_log
from smf.report import write_report
from smf.stats import Estimate, change
from smf.study import Point, measured, pareto
from smf.summary import Matched, Summary, columns_of, summarise

HOSTILE = "<script>alert(1)</script>\"'&$x_1$<img src=x onerror=document.body.dataset.owned=1>"
NAMES = ("smf-kl", "smf-tfidf", "smf-kl-gradient", "smf-all-rows", "lora", "full", "heal")
PROBES = ("near-domain", "closed-book", "general-text")
TASKS = {"near-domain": "choices", "closed-book": "closed_book", "general-text": "perplexity"}
MEANS = {"choices": ("acc", "answer_norm"), "closed_book": ("exact_match", "f1"), "perplexity": ()}


# -- results as runs write them ---------------------------------------------------------------------------------------


def fake_records(name: str, task: str, number: int, share: float, randomness: random.Random) -> list[dict[str, Any]]:
    records = []
    for i in range(number):
        right = randomness.random() < share
        record: dict[str, Any] = {"id": f"{name}.{i}", "nats": 3 * (1.2 - share) * randomness.random(), "tokens": 2}
        if task == "perplexity":
            records.append(record | {"nats": 40 * record["nats"], "tokens": 80})
            continue
        question = f"Exam question: Which part of the body does fever number {i} of Brall attack first, if left alone?"
        said = "liver" if right else randomness.choice(["skin", "bone", "heart"])
        record |= {"question": question, "right": "liver", "said": said} | dict.fromkeys(MEANS[task], int(right))
        records.append(record)
    return records


def fake_set(name: str, role: str, number: int, share: float, randomness: random.Random) -> dict[str, Any]:
    task = TASKS.get(name, "choices")
    records = fake_records(name, task, number, share, randomness)
    nats = sum(r["nats"] for r in records) / sum(r["tokens"] for r in records)
    metrics = {metric: sum(r[metric] for r in records) / number for metric in MEANS[task]}
    metrics |= {"nats": nats, "perplexity": math.exp(nats)} if task == "perplexity" else {"loss": nats}
    return {"role": role, "task": task, "metrics": metrics, "records": records}


def fake_scores(
    learned: float, kept: float, number: int, randomness: random.Random, targets: tuple[str, ...], validation: bool
) -> dict[str, Any]:
    scores = {name: fake_set(name, "target", number, learned, randomness) for name in targets}
    scores |= {name: fake_set(name, "probe", number, kept, randomness) for name in PROBES}
    if validation:
        scores["validation"] = fake_set("validation", "validation", number, learned, randomness)
    return scores


def fake_result(
    method: str,
    kind: str,
    seed: int = 0,
    *,
    targets: tuple[str, ...] = ("held-out", "seen"),
    number: int = 40,
    validation: bool = False,
    **options: Any,
) -> dict[str, Any]:
    randomness = random.Random(f"{method} {seed} {options}")
    base = kind == "base"
    learned, kept = (0.25, 0.95) if base else (randomness.uniform(0.4, 0.9), randomness.uniform(0.6, 0.85))
    scores = fake_scores(learned, kept, number, randomness, targets, validation)
    result: dict[str, Any] = {"format": 1, "comparison": "abc", "method": method, "kind": kind, "seed": seed}
    result |= {"steps": 0 if base else 240, "options": {"kind": kind} | options, "scores": scores}
    if base:
        return result
    result |= {"seconds": 41.2, "heal_seconds": 0.0, "peak_memory_mb": 900.0}
    result |= {"rows_changed": 4038, "trained_parameters": 9437184} if kind == "smf" else {"trained_parameters": 99000}
    return result | ({"rows_by_layer": {"2": 1300, "10": 1400, "3": 1338}} if kind == "smf" else {})


def fake_log(folder: Path, kind: str, steps: int = 240, slope: float = 50.0) -> str:
    randomness = random.Random(str(folder.name))
    folder.mkdir(parents=True)
    lines = []
    for step in range(10, steps + 1, 10):
        read = 4000 - step - 300 * randomness.random()
        line: dict[str, Any] = {"step": step, "loss": 0.5 + 3 * math.exp(-step / slope) + randomness.random() / 10}
        if kind == "smf":
            layers = ("2", "3", "10")
            line |= {"rows": dict.fromkeys(layers, 512), "rows_read": {"2": round(read), "3": 900, "10": 800}}
            line |= {"hub_share": dict.fromkeys(layers, 0.4), "hubs_written": dict.fromkeys(layers, step // 10)}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return str(folder)


def fake_results(folder: Path, *, seeds: int = 1, base: bool = True, logs: bool = True, **options: Any) -> list[Any]:
    results = [fake_result("base", "base", **options)] if base else []
    for number, name in enumerate(NAMES[-4:] if "number" not in options else NAMES):
        kind = "smf" if name.startswith("smf") else name
        for seed in range(seeds):
            result = fake_result(name, kind, seed, **options)
            run = folder / f"{name}-{seed}"
            results.append(result | {"folder": fake_log(run, kind, slope=30 + 10 * number) if logs else str(run)})
    return results


def fake_study(folder: Path) -> list[dict[str, Any]]:
    """Five methods at three learning rates, two moments and two seeds; three of them differ in rows alone."""
    shared: dict[str, Any] = {"number": 20, "targets": ("held-out",), "validation": True}
    results = [fake_result("base", "base", **shared)]
    kinds = {f"smf-kl-t={t}": ("smf", {"rule": "kl", "rows_per_step": t}) for t in (64, 128, 1024)}
    for name, (kind, options) in (kinds | {"lora": ("lora", {"r": 16}), "full": ("full", {})}).items():
        for lr in (0.1, 0.2, 0.4):
            for seed in (0, 1):
                result = fake_result(name, kind, seed, lr=lr, **options, **shared)
                on_the_way = {"step": 120, "share": 0.5, "scores": way_of(name, lr, seed)}
                run = folder / f"{name}-{lr}-{seed}"
                results.append(result | {"on_the_way": [on_the_way], "folder": fake_log(run, kind)})
    return results


def way_of(name: str, lr: float, seed: int) -> dict[str, Any]:
    """Scores half of the way, whose records have no texts."""
    randomness = random.Random(f"{name} {lr} {seed} on the way")
    best = 1.0 if (name, lr) == ("lora", 0.2) else randomness.uniform(0.3, 0.5)  # of lora, this one is chosen
    scores = fake_scores(best, randomness.uniform(0.7, 0.9), 20, randomness, ("held-out",), validation=True)
    for score in scores.values():
        score["records"] = [
            {k: v for k, v in r.items() if k not in ("question", "right", "said")} for r in score["records"]
        ]
    return scores


def write_page(summary: Summary, folder: Path, **options: Any) -> str:
    path = folder / "report.html"
    write_report(summary, path, options.pop("title", "A title"), **options)
    return path.read_text()


def page_of(results: list[Any], folder: Path, target_metrics: tuple[str, ...] = ("acc",), **options: Any) -> str:
    return write_page(summarise(results, target_metrics), folder, **options)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return summarise(fake_study(tmp_path_factory.mktemp("study")), ["acc"])


@pytest.fixture(scope="module")
def study_page(study: Summary, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_page(study, tmp_path_factory.mktemp("page"), skipped={"runs/old": "it has no result yet"})


class Reader(HTMLParser):
    """Tags, attributes, text and the cells of the tables."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        given = dict(attrs)
        if given.get("class") == "scroll":
            self.rows = self.tables[given["aria-label"] or ""] = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell and data.strip():
            self.rows[-1][-1] += f"{data.strip()}|"

    def row(self, table: str, method: str) -> list[str]:
        return next(row for row in self.tables[table] if row[0].split("|")[0] == method)


def lists_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def points(number: float, digits: int = 1, sign: str = "+") -> str:
    return f"{number:{sign}.{digits}f}".replace("-", "−")


COSTS = "Answers that changed sides, and costs"


# -- the page ---------------------------------------------------------------------------------------------------------


def test_equal_input_gives_equal_bytes(study: Summary, study_page: str, tmp_path: Path):
    assert write_page(study, tmp_path, skipped={"runs/old": "it has no result yet"}) == study_page


def test_the_page_needs_nothing_from_outside(study_page: str):
    assert set(re.findall(r"https?://[^\s\"'<]*", study_page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    links = [value for name, value in Reader(study_page).attributes if name in ("src", "href", "xlink:href")]
    assert links and all(str(link).startswith("#") for link in links)
    assert "@import" not in study_page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", study_page))
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in study_page


def test_ids_are_unique_and_references_resolve(study_page: str):
    attributes = Reader(study_page).attributes
    ids = Counter(value for name, value in attributes if name == "id")
    assert max(ids.values()) == 1
    referred = {str(value)[1:] for name, value in attributes if name in ("xlink:href", "href")}
    referred |= set(re.findall(r"url\(#([^)]*)\)", study_page))
    referred |= {str(value) for name, value in attributes if name in ("for", "aria-labelledby")}
    assert referred <= set(ids)
    assert {"front-0-0-smf-kl-t-64-points", "front-3-4-full-chosen0", "loss-0-3-lora-3"} <= set(ids)
    assert {"steps-0-0-smf-kl-t-64-0", "rates-2-4-full-4", "rows-1-family-0", "memory-3-0-smf-kl-t-64-0"} <= set(ids)


def test_every_part_has_its_switch(study_page: str):
    for number in range(5):
        assert f'id="show-{number}" checked' in study_page
        assert f'body:has(#show-{number}:not(:checked)) [data-method="{number}"] {{ display: none; }}' in study_page
    assert len(re.findall(r'<tr data-method="3">', study_page)) == 4  # scores, costs, two gains; it is the reference
    assert len(re.findall(r'<tr data-method="0">', study_page)) == 6  # and comparisons, rows
    drawn = re.findall(r'id="([a-z]+)-\d+-3-[^"]*" data-method="3"', study_page)
    assert set(drawn) == {"front", "steps", "rates", "loss"}
    assert '[data-family="rows-0"]' in study_page and "#show-0:checked, #show-1:checked, #show-2:checked" in study_page


# -- tables -----------------------------------------------------------------------------------------------------------


def test_values_and_intervals_of_the_table_are_those_of_stats(tmp_path: Path):
    results = fake_results(tmp_path, seeds=3, logs=False)
    reader = Reader(page_of(results, tmp_path))
    base, runs = results[0]["scores"], [result["scores"] for result in results if result["method"] == "lora"]
    lora = reader.row("Scores", "lora")
    for column, (name, metric) in enumerate([("held-out", "acc"), ("closed-book", "exact_match")]):
        got = change([run[name]["records"] for run in runs], base[name]["records"], metric)
        value = 100 * sum(run[name]["metrics"][metric] for run in runs) / 3
        low, high = points(100 * got.low), points(100 * got.high)
        assert lora[1 + 3 * column] == f"{value:.1f}|{points(100 * got.value)}|{low} to {high}|"
    got = change([run["general-text"]["records"] for run in runs], base["general-text"]["records"], "nats")
    mean = sum(run["general-text"]["metrics"]["perplexity"] for run in runs) / 3
    numbers = [points(number, 3) for number in (got.value, got.low, got.high)]
    assert lora[5] == f"{mean:.3f}|{numbers[0]}|{numbers[1]} to {numbers[2]}|"
    assert reader.row("Scores", "base")[1] == f"{100 * base['held-out']['metrics']['acc']:.1f}|"
    assert lora[0] == "lora|3 seeds|"
    assert reader.row(COSTS, "smf-all-rows")[-4:] == ["4,038|", "9,437,184|", "41|", "900|"]


def test_overall_flips_and_what_was_chosen(study: Summary, study_page: str):
    reader = Reader(study_page)
    place = [row.method for row in study.rows].index("lora")
    assert (study.rows[place].lr, study.rows[place].share) == (0.2, 0.5)
    row = reader.row("Scores", "lora")
    assert row[0] == "lora|2 seeds|lr 0.2|at 50% of the steps|"
    found = study.overall[place]
    assert row[5] == f"{points(found.value, 1, '')}|{points(found.low, 1, '')} to {points(found.high, 1, '')}|"
    learned, forgotten = study.flips[place]["held-out"]
    assert reader.row(COSTS, "lora")[1] == f"+{learned:g}|−{forgotten:g}|"
    ends = [row.method for row, inner in zip(study.rows, study.interior, strict=True) if inner is False]
    marked = [cells[0].split("|")[0] for cells in reader.tables["Scores"] if "at its grid’s end" in cells[0]]
    assert ends and marked == ends
    assert "none of these sets, of 3 rates tried." in reader.text


def test_divergence_from_the_base_is_shown(tmp_path: Path):
    results = fake_results(tmp_path, logs=False)
    for result, nats in zip(results, (0.0, 1.0, 2.0, 3.0, 4.0), strict=True):
        records = [{"id": str(i), "nats": nats * i, "tokens": 10} for i in range(9)]
        entry = {"role": "divergence", "task": "divergence", "metrics": {"nats": 0.4 * nats}, "records": records}
        result["scores"]["KL held-out"] = entry
    summary = summarise(results, ["acc"])
    reader = Reader(write_page(summary, tmp_path))
    assert reader.row("Scores", "base")[-1] == "0.000|"
    cell = reader.row("Scores", "lora")[-1]
    assert re.fullmatch(r"0\.800\|0\.\d{3} to \d\.\d{3}\|", cell)


def test_forgetting_at_equal_gain_is_that_of_the_summary(study: Summary, study_page: str):
    reader = Reader(study_page)
    assert [each.label for each in study.matched[::4]] == ["gain of lora", "gain of full"]
    seen = Counter()
    for column, each in enumerate(study.matched[:4], 1):
        digits = 3 if each.measure.unit == "nats per token" else 1
        for name, e in each.losses.items():
            got = reader.row("At the gain of lora", name)[column].split("|")
            assert got[0] == ("n/a" if e is None else points(e.value, digits, ""))
            ratio = each.ratios.get(name)
            if ratio is not None:
                assert got[2] == f"× {points(ratio.value, 2, '')}"
            seen[None if e is None else "value"] += 1
    assert seen[None] and seen["value"]
    shares = [any(any(each.ratios.values()) for each in tables) for tables in (study.matched[:4], study.matched[4:])]
    headed = study_page.split("<h3>At the gain of ")[1:]
    assert ["×: the share of what lora forgets there" in text for text in headed] == shares
    assert set(shares) == {True, False}
    assert f"held-out learned: {points(study.matched[0].gain, 1, '')}. Over 2 seeds." in reader.text


def test_comparisons_are_those_of_the_summary(study: Summary, study_page: str):
    reader = Reader(study_page)
    cells = [cell for row in reader.tables["Against lora"][2:] for cell in row[1:]]
    assert len(cells) == len(study.comparisons) == 4 * 5
    for cell, each in zip(cells, study.comparisons, strict=True):
        value, interval, p, *verdict = cell.split("|")[:-1]
        digits = 3 if each.measure.unit == "nats per token" else 1
        assert value == points(each.estimate.value, digits).replace("+0.0", "0.0" if value == "0.0" else "+0.0")
        assert interval.startswith(points(each.estimate.low, digits).lstrip("+"), interval[0] == "+")
        assert abs(float(p.split()[2]) - each.adjusted) <= 0.005 or p == "p < 0.001"
        assert verdict == ([] if each.measure.role != "gain" else verdict) and len(verdict) == (
            each.measure.role == "gain"
        )
    assert reader.tables["Against lora"][2][0].endswith("|2 seeds|")


def test_mcnemar_and_non_inferiority_are_named(tmp_path: Path):
    summary = summarise(fake_results(tmp_path, logs=False), ["acc"])
    reader = Reader(write_page(summary, tmp_path))
    heal = reader.row("Against lora", "heal")
    assert heal[0] == "heal|1 seed|" and ", McNemar|" in heal[1]
    for low, high, told in ((-0.4, 1.2, "non-inferior"), (-0.6, 1.2, "may be inferior"), (-2.0, -0.6, "inferior")):
        changed = {"estimate": Estimate((low + high) / 2, low, high, 0.4), "clusters": 400, "differing": 40}
        compared = [replace(each, **changed) for each in summary.comparisons]
        page = write_page(replace(summary, comparisons=compared), tmp_path)
        row = Reader(page).row("Against lora", "heal")
        assert row[1].endswith(f"|{told}|") and "inferior" not in row[3]
        assert (f'<small class="sure">{told}</small>' in page) == (told != "may be inferior")
    few = [replace(each, clusters=40, differing=4) for each in summary.comparisons]
    row = Reader(write_page(replace(summary, comparisons=few), tmp_path)).row("Against lora", "heal")
    assert row[1].endswith("|too few changed to say|")


def test_a_p_value_that_more_draws_would_make_smaller_is_a_bound(tmp_path: Path):
    summary = summarise(fake_results(tmp_path, logs=False), ["acc"])
    least = [replace(each, test="bootstrap", p=0.0005, least=0.0005, adjusted=0.01) for each in summary.comparisons]
    row = Reader(write_page(replace(summary, comparisons=least), tmp_path)).row("Against lora", "heal")
    assert "|p ≤ 0.010|" in row[1] and "|p = " not in row[1]


def test_who_shares_no_seed_with_the_reference_is_named(tmp_path: Path):
    results = [fake_result("base", "base"), *(fake_result("lora", "lora", seed) for seed in (0, 1))]
    results += [fake_result("smf", "smf", 5), fake_result("full", "full", 1)]
    reader = Reader(page_of(results, tmp_path))
    assert [row[0] for row in reader.tables["Against lora"][2:]] == ["full|1 seed|"]
    assert "No seed in common with lora: smf." in reader.text
    assert "over examples and seeds, whose number differs (2 seeds: lora; one seed" in reader.text


# -- plots ------------------------------------------------------------------------------------------------------------


def test_fronts_have_the_points_of_the_summary(study: Summary, study_page: str):
    gain, *losses = plots.drawn_measures(study)
    assert (gain.name, [loss.name for loss in losses]) == ("held-out", ["overall", *PROBES])
    assert study.base is not None
    for panel, loss in enumerate(losses):
        for cloud in plots.clouds(study, gain, loss):
            own = [point for point in study.points if point.method == cloud.name]
            for values, measure in ((cloud.gains, gain), (cloud.losses, loss)):
                assert values == pytest.approx([measured(point, study.base, measure).value for point in own])
            assert cloud.front == pareto(np.array(cloud.gains), np.array(cloud.losses)).tolist()
            (row,) = [row for row in study.rows if row.method == cloud.name]
            for estimate, measure in zip(cloud.chosen[0], (gain, loss), strict=True):
                assert vars(estimate) | {"p": 0} == pytest.approx(vars(measured(row, study.base, measure)) | {"p": 0})
            slug = re.sub("[^a-z0-9]+", "-", cloud.name)
            marks = re.search(rf'id="front-{panel}-{cloud.number}-{slug}-points".*?</g>\n</g>', study_page, re.DOTALL)
            assert marks is not None and marks[0].count("<use") == len(own) == 6


def test_points_that_are_not_numbers_are_left_out_of_a_front():
    gains, losses = np.array([1.0, 2.0]), np.array([1.0, 0.5])
    assert pareto(gains, losses).tolist() == [1]
    assert plots.limits([0.0, 1.0, math.nan, 1000.0, math.inf], [2.0, 4.0]) == pytest.approx((-0.7, 10.7))
    assert plots.limits([], []) == (-1.0, 1.0)


def test_curves_have_the_points_of_the_summary(study: Summary):
    gain, overall, *_ = plots.drawn_measures(study)
    assert study.base is not None
    rows = {row.method: row for row in study.rows}
    for measure in (gain, overall):
        for line in plots.lines_over_steps(study, measure):
            own = {p.share: p for p in study.points if p.method == line.name and p.lr == rows[line.name].lr}
            assert line.x == [120, 240] and line.x[line.chosen or 0] == 240 * rows[line.name].share
            assert line.y == pytest.approx([measured(own[s], study.base, measure).value for s in (0.5, 1.0)])
        for line in plots.lines_over_rates(study, measure):
            own = {p.lr: p for p in study.points if p.method == line.name and p.share == 1}
            assert line.x == [0.1, 0.2, 0.4] and line.x[line.chosen or 0] == rows[line.name].lr
            assert line.y == pytest.approx([measured(own[lr], study.base, measure).value for lr in line.x])
        (family,) = plots.families(study, measure, "rows_per_step")
        assert family.name == "smf-kl"
        assert [member[:3] for member in family.members] == [
            (t, i, f"smf-kl-t={t}") for i, t in enumerate((64, 128, 1024))
        ]
        assert [e.value for *_, e in family.members] == pytest.approx(
            [measured(rows[name], study.base, measure).value for _, _, name, _ in family.members]
        )
        assert plots.families(study, measure, "layers") == []


def test_layers_are_ordered_and_named(study: Summary, tmp_path: Path):
    rows = [
        replace(row, runs=[run | {"options": run["options"] | {"rows_per_step": 9}} for run in row.runs])
        for row in study.rows
    ]
    for row, layers in zip(rows, ([2, 3], None, [10], [1], None), strict=True):
        for run in row.runs:
            run["options"] = {"layers": layers, "kind": run["kind"]}
    summary = replace(study, rows=rows, points=rows, matched=[], comparisons=[], reference=None)
    (family,) = plots.families(summary, plots.drawn_measures(summary)[0], "layers")
    assert [value for value, *_ in family.members] == [[10], [2, 3], [2, 3, 10]]  # those whose rows changed
    page = write_page(summary, tmp_path)
    assert all(f">{text}</text>" in page for text in ("2 + 3", "10", "2 + 3 + 10")) and ">default<" not in page
    assert "<h3>Layers</h3>" in page and "<h3>Rows of a step</h3>" not in page and "<h3>Steps</h3>" not in page


def test_no_layers_are_all_layers_of_an_adapter_and_unknown_ones_are_left_out(study: Summary):
    rows = list(study.rows[:4])
    for place, (kind, layers) in enumerate(
        (("lora", None), ("lora", [3]), ("dense-addon", None), ("dense-addon", [2]))
    ):
        runs = [run | {"kind": kind, "options": {"kind": kind, "layers": layers}} for run in rows[place].runs]
        rows[place] = replace(rows[place], runs=[{k: v for k, v in r.items() if k != "rows_by_layer"} for r in runs])
    summary = replace(study, rows=rows, points=rows, matched=[], comparisons=[], reference=None)
    (family,) = plots.families(summary, plots.drawn_measures(summary)[0], "layers")
    assert [value for value, *_ in family.members] == [[3], "all"]


def test_what_there_is_nothing_of_is_not_shown(tmp_path: Path):
    page = page_of(fake_results(tmp_path), tmp_path)
    assert 'id="front-0-0-smf-all-rows-chosen0"' in page and "points" not in re.findall(r'id="front-\d-\d-[^"]*"', page)
    assert (
        "What it depends on" not in page and "Forgetting at equal gain" not in page and "left out</summary>" not in page
    )


def test_logs_are_averaged_over_seeds_and_neighbours():
    logs = [[{"step": s, "loss": s + seed} for s in range(1, 241)] for seed in (0, 1)]
    logs[0][7]["loss"] = math.nan
    x, y = averaged(logs, lambda line: line.get("loss"))
    assert len(x) == 40 and (x[0], y[0]) == (3.5, 4.0)
    assert (x[1], y[1]) == (62 / 6, 65 / 6)  # 7 and 9 to 13: the step that one seed lacks is left out
    x, y = averaged(logs, lambda line: line["loss"] if line["step"] <= 40 else None)
    assert len(x) == 39 and y == [step + 0.5 for step in x]
    assert averaged([[], []], lambda line: 1.0) == ([], [])


def test_hubs_are_drawn_as_shares(study: Summary, study_page: str):
    gets = quantities("3")
    line = {"rows": {"3": 512}, "rows_read": {"3": 900}, "hub_share": {"3": 0.4}, "hubs_written": {"3": 128}}
    assert [get(line) for get in gets.values()] == [900, 512, 40.0, 25.0]
    assert [get({"step": 1}) for get in gets.values()] == [None] * 4
    assert [get({"rows": {"3": 512}, "hubs_written": {}}) for get in gets.values()] == [None, 512, None, None]
    assert all(title in study_page for title in gets)
    assert re.findall(r"<figcaption>layer (\d+)", study_page) == ["2", "3", "10"]


# -- lists ------------------------------------------------------------------------------------------------------------


def test_lists_hold_every_question_that_changed_sides(tmp_path: Path):
    results = fake_results(tmp_path, seeds=2, logs=False)
    data = lists_of(page_of(results, tmp_path))
    assert [each["name"] for each in data["sets"]] == ["held-out", "seen", "near-domain", "closed-book"]
    number = [name for name, _ in data["rows"]].index("full")
    closed = data["sets"][3]
    before = results[0]["scores"]["closed-book"]["records"]
    after = [r["scores"]["closed-book"]["records"] for r in results if r["method"] == "full"]
    for (count, listed), sign in zip(closed["rows"][number], (1, -1), strict=True):
        flips = {}
        for b, seeds in zip(before, zip(*after, strict=True), strict=True):
            said = [(s, a["said"]) for s, a in enumerate(seeds) if sign * (a["exact_match"] - b["exact_match"]) > 0]
            if said:
                flips[b["id"]] = (len(said), *said[0])
        assert count == len(flips) > 0
        got = {closed["questions"][place][0]: (seeds, seed, data["texts"][text]) for place, seeds, seed, text in listed}
        assert got == flips
    by_id = {record["id"]: record for record in before}
    for question in closed["questions"]:
        assert question == [by_id[question[0]][key] for key in ("id", "question", "right", "said")]
    assert closed["of"] == 40


def test_answers_on_the_way_are_not_kept(study: Summary, study_page: str):
    data = lists_of(study_page)
    texts = {row.share: set() for row in study.rows}
    for row, sides in zip(study.rows, data["sets"][0]["rows"], strict=True):
        texts[row.share] |= {text for _, listed in sides for *_, text in listed}
    assert texts[0.5] == {-1} and -1 not in texts[1.0]


def test_lists_that_would_be_too_large_are_cut_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    summary = summarise(fake_results(tmp_path, logs=False), ["acc"])
    whole = lists_of(write_page(summary, tmp_path))
    half = len(write_page(summary, tmp_path).encode()) - len(json.dumps(whole)) // 2
    monkeypatch.setattr(smf.report, "FULL", half)
    monkeypatch.setattr(smf.report, "LISTED_LEAST", 0)
    page = write_page(summary, tmp_path)
    cut = lists_of(page)
    (listed,) = re.findall(r"it holds the first (\d+) such questions of each set at most; the counts are of all", page)
    assert len(json.dumps(cut)) < len(json.dumps(whole)) and len(page.encode()) < half + 10_000
    for one, other in zip(cut["sets"], whole["sets"], strict=True):
        assert one["questions"] == other["questions"][: int(listed)]
        counts, all_counts = ([[c for c, _ in sides] for sides in each["rows"]] for each in (one, other))
        assert counts == all_counts


# -- whatever comes ---------------------------------------------------------------------------------------------------


def test_what_a_data_set_brings_is_shown_as_text(tmp_path: Path):
    results = fake_study(tmp_path)
    for result in results:
        result["method"] += HOSTILE
        for moment in [result, *result.get("on_the_way", [])]:
            moment["scores"] = {
                name if name == "validation" else f"{name}{HOSTILE}": scored
                for name, scored in moment["scores"].items()
            }
        for scored in result["scores"].values():
            for record in scored["records"]:
                record |= {"question": HOSTILE, "right": HOSTILE, "said": HOSTILE}
    page = page_of(results, tmp_path, title=HOSTILE, notes=[HOSTILE], skipped={HOSTILE: HOSTILE})
    reader = Reader(page)
    assert reader.tags["script"] == 2 and reader.tags["img"] == 0
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    tips = re.findall(r"<title>([^<]*)</title>", page)
    assert unescape(tips[0]) == HOSTILE and any(f"lora{HOSTILE}" in unescape(tip) for tip in tips[1:])
    assert reader.text.count(HOSTILE) > 20 and f"{HOSTILE}: {HOSTILE}" in reader.text
    assert lists_of(page)["sets"][0]["questions"][0][1] == HOSTILE


def test_without_a_base_no_changes_are_shown(tmp_path: Path):
    page = page_of(fake_results(tmp_path, base=False), tmp_path)
    reader = Reader(page)
    assert "no untouched base" in reader.text and 'id="data"' not in page
    assert 'id="front-' not in page and 'id="loss-0-0-smf-all-rows-0"' in page
    assert all(cell.count("|") == 1 for row in reader.tables["Scores"][2:] for cell in row[1:])


def test_a_base_alone_and_runs_without_logs(tmp_path: Path):
    assert Reader(page_of([fake_result("base", "base")], tmp_path)).row("Scores", "base")[0] == "base|"
    page = page_of(fake_results(tmp_path, logs=False), tmp_path)
    assert 'id="front-0-0-' in page and 'id="loss-' not in page and 'id="memory-' not in page
    assert ["smf-all-rows|", "1,300|", "1,338|", "1,400|", "4,038|"] in Reader(page).tables["Distinct rows changed"]


def test_one_target_and_other_target_metrics(tmp_path: Path):
    results = fake_results(tmp_path, targets=("exam",), logs=False)
    page = page_of(results, tmp_path, target_metrics=("loss", "acc"))
    assert Reader(page).tables["Scores"][1][1:3] == ["exam|loss, nats per token|", "exam|accuracy, %|"]
    got = change([results[1]["scores"]["exam"]["records"]], results[0]["scores"]["exam"]["records"], "loss")
    assert got.value < 0  # less loss is something learned
    assert f"learned {points(-got.value, 3)[1:]} nats per token" in page


def test_rows_of_several_rates_without_a_choice_are_told_apart(tmp_path: Path):
    results = [fake_result("base", "base"), fake_result("lora", "lora", lr=0.5)]
    results += [fake_result("smf", "smf", lr=lr) for lr in (0.1, 0.2)]
    page = page_of(results, tmp_path)
    reader = Reader(page)
    for table in ("Scores", COSTS, "Against lora"):
        assert {"smf, lr 0.1", "smf, lr 0.2"} <= {row[0].split("|")[0] for row in reader.tables[table]}
    assert page.count('id="show-') == 2 and "<h3>Learning rate</h3>" in page and "large mark is the rate" not in page


def test_a_diverged_run_still_makes_a_page(tmp_path: Path):
    results = fake_results(tmp_path)
    text = results[-1]["scores"]["general-text"]
    text["metrics"] = {"nats": math.nan, "perplexity": math.exp(700)}
    for record in text["records"]:
        record["nats"] = math.nan
    (tmp_path / "heal-0" / "metrics.jsonl").write_text('{"step": 10, "loss": NaN}\n{"step": 20, "loss": 3.0}\n')
    row = Reader(page_of(results, tmp_path)).row("Scores", "heal")
    assert row[5] == "1.01e+304|n/a|no interval|"


BROKEN = {
    "garbage": b"garbage",
    "it cannot be read as text": b'{"step": 1, "loss": 2.0}\n\xff',
    "line 2 is not JSON": b'{"step": 1, "loss": 2.0}\n{"step"',
    "line 1 is not JSON": b"[" * 5000,
    "line 1 is '5'; expected a step, and numbers for the loss": b"5",
    "loss\": 1.0}'; expected a step": b'{"loss": 1.0}',
    '"x"': b'{"step": "x", "loss": 1}',
    '"high"': b'{"step": 1, "loss": "high"}',
    '"rows": 5': b'{"step": 1, "rows": 5}',
    '"hub_share"': b'{"step": 1, "hub_share": {"2": null}}',
    '\'{"step": 1000': b'{"step": 1' + b"0" * 400 + b"}",
    "1e300": b'{"step": 1, "loss": -1e300}',
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_metrics_file_that_cannot_be_drawn_is_refused_with_the_reason(tmp_path: Path, reason: str):
    (tmp_path / "metrics.jsonl").write_bytes(BROKEN[reason])
    with pytest.raises(DataError) as error:
        read_log(tmp_path / "metrics.jsonl")
    assert reason in str(error.value)


def test_a_broken_metrics_file_is_named_and_all_else_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = fake_results(tmp_path)
    broken = tmp_path / "smf-all-rows-0" / "metrics.jsonl"
    broken.write_text('{"step": 1, "loss": "high"}')
    page = page_of(results, tmp_path, skipped={"runs/old": "it has no result yet"})
    text, told = Reader(page).text, f"{broken}: its curves are left out, as line 1 is "
    assert "2 runs or files were left out" in text and "runs/old: it has no result yet" in text
    assert told in text and f"smf: skipped {told}" in capsys.readouterr().err
    assert set(re.findall(r'id="(?:loss|memory)-\d+-(\d)-', page)) == {"1", "2", "3"}
    assert 'id="front-0-0-smf-all-rows-chosen0"' in page


def test_a_metrics_file_that_is_a_folder_is_named(tmp_path: Path):
    results = fake_results(tmp_path, logs=False)
    (tmp_path / "lora-0" / "metrics.jsonl").mkdir(parents=True)
    assert "its curves are left out, as it cannot be read as text" in Reader(page_of(results, tmp_path)).text


NUMBERS = st.sampled_from([0, 1, -5, 3.5, 1e99, -1e99, 1e-300, 5e-324, math.nan, math.inf, 10**100])
ANYTHING = NUMBERS | st.sampled_from([None, True, "x", [], {}, {"2": "x"}, 10**400, 1e300])
BY_LAYER = st.dictionaries(st.sampled_from(["2", "10", "", "<b>", "\ud800"]), NUMBERS, max_size=2)
LINES = st.fixed_dictionaries(
    {"step": st.integers(0, 50) | NUMBERS},
    optional={"loss": NUMBERS} | dict.fromkeys(("rows", "rows_read", "hub_share", "hubs_written"), BY_LAYER),
)
ANY_LINE = ANYTHING | st.dictionaries(st.sampled_from(["step", "loss", "rows", "hub_share"]), ANYTHING)
FILES = st.lists(LINES, min_size=1, max_size=8) | st.lists(LINES | ANY_LINE, max_size=4)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given((st.tuples(FILES, st.just(b"")) | st.tuples(st.just([]), st.binary(max_size=9))).map(list))
def test_whatever_is_in_a_metrics_file_its_curves_are_drawn_or_it_is_named(tmp_path: Path, content: list[Any]):
    result = fake_result("smf", "smf", number=4) | {"folder": str(tmp_path)}
    summary = summarise([result], ["acc"])  # without a base there is nothing else to draw
    lines, end = content
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(map(json.dumps, lines)).encode() + end)
    page = write_page(summary, tmp_path)
    named = "its curves are left out" in page
    losses = [line["loss"] for line in lines if isinstance(line, dict) and "loss" in line] if not named else []
    assert ('id="loss-' in page) == any(abs(loss) <= 1e100 for loss in losses)


def test_runs_whose_training_failed_are_named(tmp_path: Path):
    failed = [{"method": "lora", "options": {"lr": 0.8}, "seed": 0, "reason": "the loss is NaN at step 7"}]
    failed += [{"method": f"smf{HOSTILE}", "options": {"lr": 1.6}, "seed": 3, "reason": "memory"}]
    page = write_page(replace(summarise([fake_result("lora", "lora")], ["acc"]), failed=failed), tmp_path)
    text = Reader(page).text
    assert "lora at lr 0.8: training failed (the loss is NaN at step 7)" in text
    assert f"smf{HOSTILE} at lr 1.6, seed 3: training failed (memory)" in text
    assert "2 runs or files were left out" in text and '<details class="skipped" open>' in page


# -- a large study ----------------------------------------------------------------------------------------------------


def part_of_the_way(scores: dict[str, Any], before: dict[str, Any], share: float) -> dict[str, Any]:
    """The scores of which a share of the change is there; the records stay those of the end."""
    between = {}
    for name, score in scores.items():
        was = before[name]["metrics"]
        between[name] = score | {"metrics": {k: was[k] + share * (v - was[k]) for k, v in score["metrics"].items()}}
    return between


def large_summary(folder: Path) -> Summary:
    """25 methods, 5 rates, 4 moments, 5 seeds, 4,020 records a run; intervals, which take long, are made up."""
    shared: dict[str, Any] = {"number": 670, "validation": True}
    base = Point("base", 1.0, [fake_result("base", "base", **shared)])
    names = [f"smf-kl-t={16 * t}" for t in range(1, 26)]
    rows, every = [], []
    for t, name in enumerate(names, 1):
        runs = [fake_result(name, "smf", s, lr=0.4, rows_per_step=16 * t, **shared) for s in range(5)]
        runs = [run | {"folder": fake_log(folder / f"{name}-{seed}", "smf", 2000)} for seed, run in enumerate(runs)]
        rows.append(Point(name, 1.0, runs))
        for rate in range(5):
            for moment in (1, 2, 3, 4):
                changed = {"options": runs[0]["options"] | {"lr": 0.1 * 2**rate}, "steps": 500 * moment}
                share = moment / 4 * (1.2 - 0.2 * abs(rate - 2) + 0.01 * rate)
                moved = [
                    run | changed | {"scores": part_of_the_way(run["scores"], base.runs[0]["scores"], share)}
                    for run in runs
                ]
                every.append(rows[-1] if (rate, moment) == (2, 4) else Point(name, moment / 4, moved))
    columns = columns_of(base.runs[0]["scores"], ["acc"])
    changes = {}
    for place, row in enumerate(rows):
        for c in columns:
            value = row.mean(c.scored, c.metric) - base.mean(c.scored, c.metric)
            changes[place, c] = Estimate(value, 0.8 * value, 1.2 * value, 0.01)
    counts = dict.fromkeys(("held-out", "seen", "near-domain", "closed-book"), (20.0, 10.0))
    summary = Summary(
        base, rows, every, columns, changes, [True] * 25, flips=[counts] * 25, reference=rows[0], rates=[5] * 25
    )
    wanted = plots.drawn_measures(summary)
    values = [plots.value_of(row, base, wanted[1]) for row in rows]
    overall = [Estimate(value, 0.8 * value, 1.2 * value, 0.01) for value in values]
    losses = dict(zip(names, overall, strict=True))
    tables = [Matched(gain, f"gain {gain}", m, dict(losses), dict(losses)) for gain in (1.0, 2.0) for m in wanted[1:]]
    tested = (overall[0], 5, "bootstrap", 0.01, 0.2, 400, 40, 0.0005)
    compared = [Comparison(name, m, *tested) for name in names[1:] for m in wanted]
    return replace(summary, overall=overall, matched=tables, comparisons=compared)


def test_a_large_study_stays_small(tmp_path: Path):
    summary = large_summary(tmp_path)
    page = write_page(summary, tmp_path)
    assert len(page.encode()) < 3_000_000
    assert len(lists_of(page)["rows"]) == 25
    assert {"front", "steps", "rates", "rows", "loss", "memory"} <= set(re.findall(r'id="([a-z]+)-\d+-24-', page))


def drawn_in(page: str) -> Counter[str]:
    """How many panels there are of each plot."""
    return Counter(plot for plot, _ in set(re.findall(r'id="([a-z]+)-(\d+)-\d', page)))


@pytest.mark.parametrize("less", [8000, None])
def test_a_page_that_would_be_too_large_leaves_out_drawings_and_says_so(
    study: Summary, study_page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, less: int | None
):
    lists = len(json.dumps(lists_of(study_page)))
    monkeypatch.setattr(smf.report, "FULL", 1 if less is None else len(study_page.encode()) - lists - less)
    monkeypatch.setattr(smf.report, "LISTED_LEAST", 0)
    page = write_page(study, tmp_path)
    (told,) = re.findall(r"To stay below 3 MB, this page leaves out (.*)\. A page of fewer methods", page)
    if less is None:
        assert told == "; ".join(smf.report.OMITTED)
        assert drawn_in(page) == {} and "held-out learned: " in page and "<h3>Steps</h3>" not in page
    else:
        assert told == smf.report.OMITTED[0]
        assert drawn_in(page) == drawn_in(study_page) and "-points" not in page and "Small marks" not in page
        assert len(page.encode()) - len(json.dumps(lists_of(page))) <= smf.report.FULL
    assert Reader(page).tables == Reader(study_page).tables and "To stay below" not in study_page


def test_what_is_left_out_first_is_what_says_least(study: Summary):
    rows = smf.report._rows(study)
    drawn: dict[str, Any] = {"omitted": (), **smf.report._drawings(study, rows, smf.report._logs(rows)[0])}
    sizes, panels = [len(str(drawn))], []
    for _ in smf.report.OMITTED:
        drawn |= smf.report._fewer(study, drawn)
        sizes.append(len(str(drawn)))
        panels.append(drawn_in("".join(map(str, drawn.values()))))
    every = {"front": 4, "steps": 5, "rates": 5, "rows": 5, "loss": 1, "memory": 12}
    few = {"front": 1, "steps": 2, "rates": 2, "rows": 2, "loss": 1}
    assert panels == [every, few | {"memory": 12}, few, {}]
    assert sizes == sorted(sizes, reverse=True) and drawn["omitted"] == smf.report.OMITTED


def test_the_looks_of_many_methods_differ():
    looks = {(plots.look(n, "a", "front", 0)["color"], plots.shape(n)) for n in range(56)}
    assert len(looks) == 56


# -- in a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or ""
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --remote-debugging-pipe"
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")


class Browser:
    """A page in headless Chromium, driven by the DevTools protocol over a pipe: real clicks and keys, no library."""

    def __init__(self, profile: Path):
        read, self.down = os.pipe()
        self.up, write = os.pipe()
        command = ["bash", "-c", f'exec 3<&{read} 4>&{write}; exec "$@"', "_", CHROMIUM, *FLAGS.split()]
        command += [f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read), os.close(write)
        self.calls, self.rest, self.session = 0, b"", {}
        self.seen: list[dict[str, Any]] = []  # what the browser reported by itself
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": parameters} | self.session
        os.write(self.down, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                more = os.read(self.up, 1 << 20)
                assert more, "chromium ended"
                self.rest += more
            line, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.calls:
                assert "error" not in answer, answer
                return answer["result"]
            self.seen.append(answer)

    def open(self, path: Path, width: int = 1300, dark: bool = False) -> None:
        self.seen.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=f"file://{path}")
        for _ in range(200):
            if self.run("location.href + ' ' + document.readyState") == f"file://{path} complete":
                return
            time.sleep(0.05)
        raise AssertionError("the page did not load")

    def run(self, script: str) -> Any:
        answer = self.call(
            "Runtime.evaluate", expression=f"(() => {{ {HELPERS} return {script}; }})()", returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        keys = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **keys)
        self.call("Input.dispatchKeyEvent", type="keyUp", **keys)

    def close(self) -> None:
        self.session = {}
        self.call("Browser.close")
        self.process.wait(20)


HELPERS = """
const visible = (node) => node.getClientRects().length > 0;
const count = (selector) => [...document.querySelectorAll(selector)].filter(visible).length;
const find = (id) => document.getElementById(id);
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def shown(browser: Browser, study_page: str, tmp_path: Path) -> Browser:
    (tmp_path / "page.html").write_text(study_page)
    browser.open(tmp_path / "page.html")
    return browser


@needs_chromium
def test_switches_hide_a_method_everywhere(shown: Browser):
    drawn, others = shown.run("count('[data-method=\"1\"]')"), shown.run("count('[data-method=\"2\"]')")
    assert drawn > 30
    assert shown.run("find('show-1').click() || count('[data-method=\"1\"]')") == 0
    assert shown.run("count('[data-method=\"2\"]')") == others
    assert shown.run("find('shown').textContent") == ": 4 of 5 shown"
    assert shown.run("find('none').click() || count('[data-method], [data-family]')") == 0
    assert shown.run("count('tbody tr')") > 1  # the base stays
    assert shown.run("find('shown').textContent") == ": 0 of 5 shown"
    assert shown.run("find('show-2').click() || count('[data-family]')") > 0  # its line, as one of its methods is there
    assert shown.run("find('all').click() || count('[data-method=\"1\"]')") == drawn


@needs_chromium
def test_lists_are_filtered_and_searched(shown: Browser, study: Summary, study_page: str):
    data = lists_of(study_page)
    names = [row.method for row in study.rows]
    pick = "const pick = (id, i) => { find(id).value = i; find(id).dispatchEvent(new Event('input')); };"
    for number in (0, names.index("lora")):
        shown.run(f"(() => {{ {pick} pick('method', {number}); pick('set', 0); }})()")
        for side, place in (("learned", 0), ("forgotten", 1)):
            count, listed = data["sets"][0]["rows"][number][place]
            assert shown.run(f"find('{side}').click() || find('list').childElementCount") == len(listed) == count
            assert shown.run(f"find('{side}').getAttribute('aria-pressed')") == "true"
            assert shown.run(f"find('{side}').textContent") == f"{side} ({count})"
            text = shown.run("find('count').textContent")
            assert text.startswith(f"{names[number]} on held-out: {count} of 20 questions were")
    assert "not kept" in shown.run("find('list').textContent") or not listed
    shown.run(f"(() => {{ {pick} pick('method', 0); find('learned').click(); pick('search', 'FEVER NUMBER 1'); }})()")
    found = shown.run("[...find('list').children].map((item) => item.textContent)")
    learned = [data["sets"][0]["questions"][place][1] for place, *_ in data["sets"][0]["rows"][0][0][1]]
    assert len(found) == sum("fever number 1" in question for question in learned) > 0
    assert shown.run("find('count').textContent").endswith(f" {len(found)} contain the search text.")


FOCUS = """(() => {
  const now = document.activeElement, style = getComputedStyle(now), box = now.getBoundingClientRect();
  const legend = document.querySelector(".legend").getBoundingClientRect();
  const covered = !now.closest(".legend") && box.bottom <= legend.bottom && legend.top <= 0;
  return [now.id || now.className || now.tagName, style.outlineStyle, parseFloat(style.outlineWidth) > 1, covered];
})()"""


@needs_chromium
def test_keys_reach_everything_and_focus_is_seen(shown: Browser):
    reached = []
    for _ in range(60):
        shown.press("Tab", 9)
        reached.append(shown.run(FOCUS))
        if reached[-1][0] == "search":
            break
    names = [name for name, *_ in reached]
    assert {"all", "none", "show-0", "show-4", "scroll", "method", "set", "forgotten", "learned", "search"} <= set(
        names
    )
    assert all(style != "none" and wide for _, style, wide, _ in reached), reached
    assert not any(covered for *_, covered in reached)
    shown.run("find('show-0').focus()")
    shown.press(" ", 32, " ")
    assert shown.run("find('show-0').checked") is False and shown.run("count('tr[data-method=\"0\"]')") == 0
    shown.run("find('learned').focus()")
    shown.press("Enter", 13, "\r")
    assert shown.run("find('learned').getAttribute('aria-pressed')") == "true"


@needs_chromium
def test_a_phone_scrolls_tables_but_not_the_page(study: Summary, study_page: str, browser: Browser, tmp_path: Path):
    long = "a_method_with_a_very_long_name_that_has_no_place_to_break_it_" * 2
    named = [replace(point, method=long) for point in study.points[:6]]
    summary = replace(study, rows=named[:1], points=named, matched=[], comparisons=[], reference=None)
    write_report(summary, tmp_path / "long.html", long, [long], {f"runs/{long}": long})
    (tmp_path / "study.html").write_text(study_page)
    for name, dark in (("long", False), ("study", False), ("study", True)):
        browser.open(tmp_path / f"{name}.html", width=390, dark=dark)
        assert browser.run("innerWidth") == 390
        assert browser.run("document.documentElement.scrollWidth") <= 390
        assert browser.run("document.querySelector('.legend').open") is False  # it would cover the page
        browser.run("document.querySelector('.legend').open = true")
        assert browser.run("document.documentElement.scrollWidth") <= 390
        assert browser.run("document.querySelector('.legend').getBoundingClientRect().height") < 0.6 * 844
        assert browser.run("find('all').getBoundingClientRect().height") >= 20
        assert browser.run("[...document.querySelectorAll('.scroll')].some((box) => box.scrollWidth > box.clientWidth)")
        paper = browser.run("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(23, 24, 27)" if dark else "rgb(253, 252, 249)")


@needs_chromium
def test_a_hostile_page_runs_nothing_and_asks_for_nothing(browser: Browser, tmp_path: Path):
    results = fake_results(tmp_path)
    for result in results:
        result["method"] += HOSTILE
        for record in result["scores"]["near-domain"]["records"]:
            record |= {"question": HOSTILE, "right": HOSTILE, "said": f"{record['said']} {HOSTILE}"}
    page_of(results, tmp_path, title=HOSTILE, notes=[HOSTILE])
    browser.open(tmp_path / "report.html")
    assert browser.run("find('list').querySelector('p').textContent") == HOSTILE
    assert browser.run("document.querySelectorAll('img, script[src], [onerror]').length") == 0
    assert browser.run("document.body.dataset.owned") is None
    assert browser.run("document.title") == HOSTILE
    asked = [each["params"]["request"]["url"] for each in browser.seen if each["method"] == "Network.requestWillBeSent"]
    assert asked == [f"file://{tmp_path / 'report.html'}"]
    wrong = [each for each in browser.seen if each["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert wrong == []


TAG = "<img src=x onerror=document.body.dataset.owned=1>"  # without a slash, so that a folder can be named so


@needs_chromium
def test_a_hostile_folder_runs_nothing(browser: Browser, tmp_path: Path):
    """Names of runs' folders, methods, sets and failures, as `smf report` reads them."""
    own = fakes.recipe()
    here = {"comparison": own.comparison_id()}
    runs = tmp_path / f"runs {TAG}"
    fakes.write(runs / f"base {TAG}", fakes.base() | here, own)
    made = fakes.result(f"lora {HOSTILE}", fakes.scores(0.6), kind="lora") | here
    for record in made["scores"]["held-out"]["records"]:
        record |= {"question": HOSTILE, "right": HOSTILE, "said": HOSTILE}
    fakes.write(runs / "lora", made, own)
    fakes.write(runs / f"broken {TAG}", "{", own)
    failed = {"method": f"full {HOSTILE}", "options": {"lr": 0.1}, "seed": 0, "reason": HOSTILE} | here
    (fakes.write(runs / f"failed {TAG}", "", own) / "result.json").unlink()
    (runs / f"failed {TAG}" / "failed.json").write_text(json.dumps(failed))
    cli.report((runs,))
    shutil.copy(runs / "report.html", tmp_path / "page.html")  # whose address is as it is written
    browser.open(tmp_path / "page.html")
    text = browser.run("document.body.textContent")
    assert browser.run("document.title").startswith(f"runs {TAG} on ")
    assert all(part in text for part in (f"broken {TAG}", f"full {HOSTILE}", f"training failed ({HOSTILE})", HOSTILE))
    assert browser.run("document.querySelectorAll('img, script[src], [onerror]').length") == 0
    assert browser.run("document.body.dataset.owned") is None
    assert [each for each in browser.seen if each["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")] == []
