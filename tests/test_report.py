"""The HTML report: what is in it, that it needs nothing else, and that a data set cannot put code into it."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from smf.errors import DataError
from smf.report import write_report
from smf.stats import change

HOSTILE = "<script>alert(1)</script>\"'&$x_1$<img src=x onerror=document.body.dataset.owned=1>"
NAMES = ("smf-kl", "smf-tfidf", "smf-kl-gradient", "smf-all-rows", "lora", "full", "heal")
PROBES = ("near-domain", "closed-book", "general-text")
TASKS = {"near-domain": "choices", "closed-book": "closed_book", "general-text": "perplexity"}
MEANS = {"choices": ("acc", "answer_norm"), "closed_book": ("exact_match", "f1"), "perplexity": ()}


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


def fake_result(
    method: str, kind: str, seed: int = 0, *, targets: tuple[str, ...] = ("held-out", "seen"), number: int = 40
) -> dict[str, Any]:
    randomness = random.Random(f"{method} {seed}")
    base = kind == "base"
    learned, kept = (0.25, 0.95) if base else (randomness.uniform(0.4, 0.9), randomness.uniform(0.6, 0.85))
    scores = {name: fake_set(name, "target", number, learned, randomness) for name in targets}
    scores |= {name: fake_set(name, "probe", number, kept, randomness) for name in PROBES}
    result: dict[str, Any] = {"method": method, "kind": kind, "scores": scores}
    if base:
        return result
    result |= {"seed": seed, "steps": 240, "seconds": 41.2, "heal_seconds": 0.0, "peak_memory_mb": 900.0}
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
            line |= {"rows": dict.fromkeys(("2", "3", "10"), 512), "rows_read": {"2": round(read), "3": 900, "10": 800}}
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


def page_of(results: list[Any], folder: Path, **options: Any) -> str:
    path = folder / "report.html"
    write_report(results, path, options.pop("title", "A title"), options.pop("notes", ()), **options)
    return path.read_text()


class Reader(HTMLParser):
    """Tags, attributes, text and the cells of the tables."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
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


def lists_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def points(number: float, digits: int = 1) -> str:
    return f"{number:+.{digits}f}".replace("-", "−")


def test_equal_input_gives_equal_bytes(tmp_path: Path):
    results = fake_results(tmp_path, seeds=2)
    assert page_of(results, tmp_path) == page_of(results, tmp_path)


def test_the_page_needs_nothing_from_outside(tmp_path: Path):
    page = page_of(fake_results(tmp_path), tmp_path)
    assert set(re.findall(r"https?://[^\s\"'<]*", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    links = [value for name, value in Reader(page).attributes if name in ("src", "href", "xlink:href")]
    assert links and all(str(link).startswith("#") for link in links)
    assert "@import" not in page and all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", page))


def test_ids_are_unique_and_references_resolve(tmp_path: Path):
    page = page_of(fake_results(tmp_path, seeds=2), tmp_path)
    reader = Reader(page)
    ids = Counter(value for name, value in reader.attributes if name == "id")
    assert max(ids.values()) == 1
    referred = {str(value)[1:] for name, value in reader.attributes if name == "xlink:href"}
    referred |= set(re.findall(r"url\(#([^)]*)\)", page))
    assert referred <= set(ids)
    assert {"front-0-0-smf-all-rows", "loss-0-1-lora-0", "rowsread-2-0-smf-all-rows-1"} <= set(ids)


def test_values_and_intervals_of_the_table_are_those_of_stats(tmp_path: Path):
    results = fake_results(tmp_path, seeds=3)
    rows = {row[0].split("|")[0]: row for row in Reader(page_of(results, tmp_path)).rows if len(row) == 10}
    base, runs = results[0]["scores"], [result["scores"] for result in results if result["method"] == "lora"]
    for column, (name, metric) in enumerate([("held-out", "acc"), ("closed-book", "exact_match")]):
        got = change([run[name]["records"] for run in runs], base[name]["records"], metric)
        value = 100 * sum(run[name]["metrics"][metric] for run in runs) / 3
        low, high = points(100 * got.low), points(100 * got.high)
        assert rows["lora"][1 + 3 * column] == f"{value:.1f}|{points(100 * got.value)}|{low} to {high}|"
    got = change([run["general-text"]["records"] for run in runs], base["general-text"]["records"], "nats")
    mean = sum(run["general-text"]["metrics"]["perplexity"] for run in runs) / 3
    numbers = [points(number, 3) for number in (got.value, got.low, got.high)]
    assert rows["lora"][5] == f"{mean:.2f}|{numbers[0]}|{numbers[1]} to {numbers[2]}|"
    assert rows["base"][1] == f"{100 * base['held-out']['metrics']['acc']:.1f}|"
    assert rows["lora"][0] == "lora|3 seeds|" and rows["smf-all-rows"][6:8] == ["4,038|", "9,437,184|"]


def test_lists_hold_every_question_that_changed_sides(tmp_path: Path):
    results = fake_results(tmp_path, seeds=2)
    data = lists_of(page_of(results, tmp_path))
    assert [each["name"] for each in data["sets"]] == ["held-out", "seen", "near-domain", "closed-book"]
    number = [name for name, _ in data["methods"]].index("full")
    closed = data["sets"][3]
    before = results[0]["scores"]["closed-book"]["records"]
    after = [r["scores"]["closed-book"]["records"] for r in results if r["method"] == "full"]
    for side, sign in (("forgotten", -1), ("learned", 1)):
        flips = {
            i: [[s, a["said"]] for s, a in enumerate(seeds) if sign * (a["exact_match"] - b["exact_match"]) > 0]
            for i, (b, seeds) in enumerate(zip(before, zip(*after, strict=True), strict=True))
        }
        assert closed["lists"][number][side] == [[i, said] for i, said in flips.items() if said]
    assert closed["questions"][5] == [before[5][key] for key in ("id", "question", "right", "said")]


def test_what_a_data_set_brings_is_shown_as_text(tmp_path: Path):
    results = fake_results(tmp_path)
    for result in results:
        result["method"] += HOSTILE
        result["scores"] = {f"{name}{HOSTILE}": scored for name, scored in result["scores"].items()}
        for scored in result["scores"].values():
            for record in scored["records"]:
                record |= {"question": HOSTILE, "right": HOSTILE, "said": HOSTILE, "id": record["id"] + HOSTILE}
    page = page_of(results, tmp_path, title=HOSTILE, notes=[HOSTILE])
    reader = Reader(page)
    assert reader.tags["script"] == 2 and reader.tags["img"] == 0
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    tips = re.findall(r"<title>([^<]*)</title>", page)
    assert unescape(tips[0]) == HOSTILE and any(f"lora{HOSTILE}" in unescape(tip) for tip in tips[1:])
    assert reader.text.count(HOSTILE) > 20
    assert lists_of(page)["sets"][0]["questions"][0][1] == HOSTILE


def test_without_a_base_no_changes_are_shown(tmp_path: Path):
    page = page_of(fake_results(tmp_path, base=False), tmp_path)
    reader = Reader(page)
    assert "no untouched base" in reader.text and 'id="data"' not in page
    assert 'id="front-' not in page and 'id="loss-0-0-smf-all-rows-0"' in page
    assert all(cell.count("|") == 1 for row in reader.rows[2:6] for cell in row[1:6])


def test_a_base_alone_and_runs_without_logs(tmp_path: Path):
    assert Reader(page_of([fake_result("base", "base")], tmp_path)).rows[2][0] == "base|"
    page = page_of(fake_results(tmp_path, logs=False), tmp_path)
    assert 'id="front-0-0-' in page and 'id="loss-' not in page and 'id="rows-' not in page
    assert ["smf-all-rows|", "1,300|", "1,338|", "1,400|", "4,038|"] in Reader(page).rows  # layers by number


def test_one_target_and_other_target_metrics(tmp_path: Path):
    results = fake_results(tmp_path, targets=("exam",))
    page = page_of(results, tmp_path, target_metrics=("loss", "acc"))
    assert Reader(page).rows[1][1:3] == ["exam|loss, nats per token|", "exam|accuracy, %|"]
    got = change([results[1]["scores"]["exam"]["records"]], results[0]["scores"]["exam"]["records"], "loss")
    assert got.value < 0  # less loss is something learned
    assert f"learned {points(-got.value, 3)[1:]} nats per token" in page


def test_a_diverged_run_still_makes_a_page(tmp_path: Path):
    results = fake_results(tmp_path)
    text = results[-1]["scores"]["general-text"]
    text["metrics"] = {"nats": math.inf, "perplexity": math.exp(700)}
    for record in text["records"]:
        record["nats"] = math.nan
    (tmp_path / "heal-0" / "metrics.jsonl").write_text('{"step": 10, "loss": NaN}\n{"step": 20, "loss": 3.0}\n')
    rows = Reader(page_of(results, tmp_path)).rows
    assert [row[5] for row in rows if row and row[0] == "heal|"] == ["1.01e+304|nan|nan to nan|"]


def test_results_that_do_not_belong_together_are_refused(tmp_path: Path):
    results = fake_results(tmp_path)
    with pytest.raises(DataError, match="no results"):
        page_of([], tmp_path)
    with pytest.raises(DataError, match="different examples"):
        page_of([*results[:-1], fake_result("full", "full", number=39)], tmp_path)
    with pytest.raises(DataError, match="cannot be in one report"):
        page_of([*results, fake_result("other", "full", targets=("seen",))], tmp_path)
    (tmp_path / "lora-0" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step"')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        page_of(results, tmp_path)


def test_a_large_comparison_stays_small(tmp_path: Path):
    page = page_of(fake_results(tmp_path, number=480), tmp_path)  # five sets: 2,400 records for each of 7 methods
    assert len(page.encode()) < 3_000_000
    assert len(lists_of(page)["methods"]) == len(NAMES)


# -- in a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or ""
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --virtual-time-budget=3000 --window-size=500,900 --dump-dom"
DRIVER = """
const shown = (node) => getComputedStyle(node).display !== "none";
const seen = { listed: list.childElementCount, first: list.querySelector("p").textContent, count: count.textContent };
seen.wide = document.documentElement.scrollWidth > innerWidth;
seen.foreign = document.querySelectorAll("img, script[src], [onerror]").length;
seen.drawn = [...document.querySelectorAll('[data-method="1"]')].filter(shown).length;
document.getElementById("show-1").click();
seen.hidden = [...document.querySelectorAll('[data-method="1"]')].filter(shown).length;
document.getElementById("learned").click();
seen.learned = list.childElementCount;
search.value = "SKIN"; search.dispatchEvent(new Event("input"));
seen.found = [...list.children].map((item) => item.textContent);
document.body.dataset.seen = JSON.stringify(seen);
"""


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_the_script_fills_lists_searches_and_hides(tmp_path: Path):
    results = fake_results(tmp_path)
    for record in results[0]["scores"]["near-domain"]["records"]:
        record["question"] = HOSTILE
    page = page_of(results, tmp_path)
    lists = lists_of(page)["sets"][2]["lists"][0]
    (tmp_path / "driven.html").write_text(page.replace("</body>", f"<script>{DRIVER}</script></body>"))
    command = [
        CHROMIUM,
        *FLAGS.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        f"file://{tmp_path / 'driven.html'}",
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    seen = json.loads(dict(Reader(dom).attributes)["data-seen"] or "")
    assert (seen["listed"], seen["learned"]) == (len(lists["forgotten"]), len(lists["learned"]))
    assert seen["first"] == HOSTILE and seen["foreign"] == 0 and "data-owned" not in dom
    assert seen["count"].startswith(f"{NAMES[-4]} on near-domain: {seen['listed']} of 40 questions were right before")
    assert seen["drawn"] > 10 and seen["hidden"] == 0 and not seen["wide"]
    skins = [
        place
        for place, _ in lists["learned"]
        if results[0]["scores"]["near-domain"]["records"][place]["said"] == "skin"
    ]
    assert len(seen["found"]) == len(skins) and all("skin" in text for text in seen["found"])
