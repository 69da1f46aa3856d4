"""The report: one HTML file, without any network, that shows what each method learned and what it forgot.

The template lays out the page and its tables; here is what they are made of.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from . import plots
from .comparisons import Comparison
from .errors import DataError
from .files import write_atomically
from .logs import Get, Log, averaged, quantities, read_log
from .plots import Line, number_text
from .recipe import VALIDATION
from .stats import Estimate, flips
from .study import Measure, Point
from .summary import MARGIN, Column, Summary, verdict
from .table import COSTS, digits_of, label_of, mean_cost, methods_at_a_time, over_what
from .tasks import find_task

FULL = 2_900_000  # bytes that a page holds at most,
LISTED_LEAST = 300_000  # of these for questions and answers, for whose sake drawings leave out some of
OMITTED = (  # in this order
    "the small marks of points that are not in the table",
    "the panels of single probes",
    "the curves of the memory’s layers",
    "all other drawings",
)


def write_report(
    summary: Summary, path: Path, title: str, notes: Sequence[str] = (), skipped: Mapping[str, str] = {}
) -> None:
    """Write a self-contained page that compares methods; equal input gives equal bytes.

    Of very many methods the page leaves out some of `OMITTED`, and says so.

    Args:
        summary: what the page shows. Training is drawn from the metrics files in the runs' folders, where they are;
            a broken one is named on the page and on stderr.
        path: of the HTML file.
        title: of the page.
        notes: plain sentences below the title, such as the command that made the page.
        skipped: runs that could not be used, and why, by path.
    """
    rows = _rows(summary)
    logs, broken = _logs(rows)
    for file, reason in broken.items():
        print(f"smf: skipped {file}: {reason}", file=sys.stderr)
    left_out = [*_failed(summary), *(f"{each}: {reason}" for each, reason in (*skipped.items(), *broken.items()))]
    shown = _shown(summary, rows) | {"title": title, "notes": notes, "left_out": left_out, "omitted": ()}
    template = _template()
    with matplotlib.rc_context():
        plots.start()
        shown |= _drawings(summary, rows, logs)
        while (room := FULL - len(_encoded(template.render(shown, answers=None)))) < LISTED_LEAST:
            if shown["omitted"] == OMITTED:
                break
            shown |= _fewer(summary, shown)
    page = template.render(shown, **_answers(summary, rows, room))
    write_atomically(path, _encoded(page))


def _encoded(page: str) -> bytes:
    return page.encode("utf-8", "replace")  # half a surrogate pair in the data is no reason to fail


def _template() -> jinja2.Template:
    options: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    options |= {"trim_blocks": True, "lstrip_blocks": True, "loader": jinja2.FileSystemLoader(Path(__file__).parent)}
    environment = jinja2.Environment(**options)
    environment.globals |= {"number": number_text, "span": span, "sure": sure, "digits_of": digits_of}
    environment.globals |= {"score": _score, "p_text": p_text, "count": count_text, "verdict_of": verdict}
    return environment.get_template("report.html.jinja")


def _shown(summary: Summary, rows: Sequence[Row]) -> dict[str, Any]:
    """For the template: all but drawings and lists of questions."""
    by_point = {row.point: row for row in rows}
    labels = dict.fromkeys(each.label for each in summary.matched)
    matched = [[each for each in summary.matched if each.label == label] for label in labels]
    seeds = {row.label: len(row.point.runs) for row in rows if row.place >= 0}
    tried = {n for n, row in zip(summary.rates, summary.rows, strict=False) if row.lr}
    return {
        "summary": summary,
        "rows": rows,
        "target": next((measure.name for measure in plots.drawn_measures(summary)), ""),
        "numbers": plots.numbers_of_methods(summary),
        "seeds": max((len(row.point.runs) for row in rows), default=1),
        "over": over_what(seeds) if summary.rows else "",
        "tried": " or ".join(map(str, sorted(tried))),
        "compared": [(by_point[point], found) for point, found in summary.compared() if found],
        "matched": [(tables, any(share for each in tables for share in each.ratios.values())) for tables in matched],
        "margin": MARGIN,
        "at_a_time": methods_at_a_time([run for row in rows for run in row.point.runs]),
        "chosen": _was_chosen(summary),
    }


def _failed(summary: Summary) -> list[str]:
    """The runs whose training failed."""
    found = []
    for run in summary.failed:
        rate, seed = run["options"].get("lr", 0.0), run["seed"]
        which = f"{run['method']}{f' at lr {rate:g}' if rate else ''}{f', seed {seed}' if seed else ''}"
        found.append(f"{which}: training failed ({run['reason']})")
    return found


# -- rows and cells of the tables -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the tables.

    Args:
        place: among the summary's rows; -1: the base.
        number: of the method, which its switch hides; -1: the base, which has none.
        point: what the row is about.
        label: its name.
        seeds: how many, in words; empty for one.
        choice: learning rate and moment, where there was a choice.
        costs: what it took; None where a run does not say.
        by_layer: how many distinct rows of each memory layer changed; empty without a memory.
    """

    place: int
    number: int
    point: Point
    label: str
    seeds: str
    choice: list[str]
    costs: list[float | None]
    by_layer: dict[str, float]


def _rows(summary: Summary) -> list[Row]:
    """The base, then every row of the summary."""
    numbers = plots.numbers_of_methods(summary)
    points = [] if summary.base is None else [(-1, summary.base)]
    return [
        Row(
            place=place,
            number=numbers[point.method] if place >= 0 else -1,
            point=point,
            label=label_of(summary, point),
            seeds=f"{len(point.runs)} seeds" if len(point.runs) > 1 else "",
            choice=_choice(summary, place, point),
            costs=[mean_cost(point.runs, title) for title in COSTS],
            by_layer=_by_layer(point),
        )
        for place, point in [*points, *enumerate(summary.rows)]
    ]


def _was_chosen(summary: Summary) -> bool:
    """Whether there was a choice of rates or moments, and a validation set to choose by."""
    by_validation = any(VALIDATION in run["scores"] for row in summary.rows for run in row.runs)
    return by_validation and len(summary.points) > len(summary.rows)


def _choice(summary: Summary, place: int, point: Point) -> list[str]:
    if place < 0 or not point.lr or not _was_chosen(summary):
        return []
    moment = [] if point.share == 1 else [f"at {point.share:.0%} of the steps"]
    at_end = bool(summary.interior) and summary.interior[place] is False
    return [f"lr {point.lr:g}", *moment, *(["at its grid’s end"] if at_end else [])]


def _by_layer(point: Point) -> dict[str, float]:
    runs = [run["rows_by_layer"] for run in point.runs if run.get("rows_by_layer")]
    layers = sorted({layer for run in runs for layer in run}, key=_layer_order)
    return {layer: sum(run.get(layer, 0) for run in runs) / len(runs) for layer in layers}


def _layer_order(name: str) -> tuple[int, str]:
    return len(name), name  # numbers, as text


def _score(point: Point, column: Column) -> str:
    """A score as the table shows it."""
    if column.metric == "nats" and column.role != "divergence":
        return number_text(point.mean(column.scored, "perplexity"), 3)  # as in the terminal
    return number_text(column.scale * point.mean(column.scored, column.metric), column.digits)


def span(e: Estimate, digits: int, scale: float = 1.0, sign: str = "+") -> str:
    """The interval of an estimate."""
    if math.isnan(e.low):
        return "no interval"
    return f"{number_text(scale * e.low, digits, sign)} to {number_text(scale * e.high, digits, sign)}"


def sure(e: Estimate, null: float = 0.0, digits: int = 12, scale: float = 1.0) -> bool:
    """Whether the interval leaves out "no change", and the value does not look like it with so many digits."""
    return (e.low > null or e.high < null) and round(scale * e.value, digits) != null


def p_text(c: Comparison) -> str:
    """The adjusted p-value; a bound, where it would be smaller with more draws of the bootstrap."""
    sign, digits = "≤" if c.p <= c.least else "=", 3 if c.adjusted < 0.1 else 2
    return "p < 0.001" if c.adjusted < 0.001 else f"p {sign} {c.adjusted:.{digits}f}"


def count_text(value: float) -> str:
    """A number of questions, on average over seeds."""
    return f"{value:,.0f}" if value == round(value) or value >= 100 else f"{value:.1f}"


# -- questions and answers --------------------------------------------------------------------------------------------


def _answers(summary: Summary, rows: Sequence[Row], room: int) -> dict[str, Any]:
    """For the page's script, as JSON: which questions changed sides; `answers` is None where nothing can be compared.

    Where all would take more than `room` bytes, `listed` is how many of each set's are there; None: all.
    """
    sets = [_changed(summary, name) for name in dict.fromkeys(name for counts in summary.flips for name in counts)]
    if not sets:
        return {"answers": None, "listed": None}
    listed: int | None = None
    while len(found := htmlsafe_json_dumps(_packed(rows, sets, listed))) > room and listed != 1:
        listed = max(1, (listed or max(len(each["places"]) for each in sets)) * 4 // 5)
    return {"answers": found, "listed": listed}


def _changed(summary: Summary, name: str) -> dict[str, Any]:
    """Of one set, the places of the questions that changed sides under any method, and by row and side where and how.

    A side maps places to `[number of seeds, seed, said under that seed]`; what is said on the way is not kept.
    """
    assert summary.base is not None
    scored = summary.base.runs[0]["scores"][name]
    before, metric = scored["records"], find_task(scored["task"]).METRICS[0]
    rows = []
    for row in summary.rows:
        sides: tuple[dict[int, list[Any]], ...] = ({}, {})
        for run in row.runs:
            records = run["scores"][name]["records"]
            for side, places in zip(sides, flips(records, before, metric), strict=True):
                for place in places:
                    side.setdefault(place, [0, run.get("seed", 0), records[place].get("said")])[0] += 1
        rows.append(sides)
    places = sorted({place for sides in rows for side in sides for place in side})
    return {"name": name, "role": scored["role"], "before": before, "places": places, "rows": rows}


def _packed(rows: Sequence[Row], sets: Sequence[dict[str, Any]], listed: int | None) -> dict[str, Any]:
    """Questions once, answers once: a question that changed sides is `[place of the question, seeds, seed, answer]`."""
    texts: dict[str, int] = {}
    packed = []
    for each in sets:
        number = {place: i for i, place in enumerate(each["places"][:listed])}
        fields = [[each["before"][place].get(key) for key in ("id", "question", "right", "said")] for place in number]
        flipped = [
            [
                [len(side), [_flip(number[place], side[place], texts) for place in sorted(side) if place in number]]
                for side in sides
            ]
            for sides in each["rows"]
        ]
        questions = [["–" if text is None else str(text) for text in row] for row in fields]
        packed.append({"name": each["name"], "role": each["role"], "of": len(each["before"])})
        packed[-1] |= {"questions": questions, "rows": flipped}
    labels = [[row.label, len(row.point.runs)] for row in rows if row.place >= 0]
    return {"rows": labels, "sets": packed, "texts": list(texts)}


def _flip(question: int, how: tuple[int, int, Any], texts: dict[str, int]) -> tuple[int, int, int, int]:
    seeds, seed, said = how
    return question, seeds, seed, -1 if said is None else texts.setdefault(str(said), len(texts))


# -- plots ------------------------------------------------------------------------------------------------------------


def _drawings(summary: Summary, rows: Sequence[Row], logs: Mapping[int, Sequence[Log]]) -> dict[str, Any]:
    """All drawings."""
    drawn = {"fronts": _fronts(summary), "curves": _curves(summary), "families": _families(summary)}
    return drawn | {"loss": _loss(rows, logs), "layers": _layers(rows, logs)}


def _fewer(summary: Summary, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The drawings that are others once the next of `OMITTED` is left out too."""
    omitted = OMITTED[: len(drawn["omitted"]) + 1]
    if len(omitted) == 1:
        fewer = {"fronts": _fronts(summary, small=False)}
    elif len(omitted) == 2:
        fewer = _of_measures(drawn, plots.drawn_measures(summary)[:2])
    elif len(omitted) == 3:
        fewer = {"layers": []}
    else:
        fewer = _of_measures(drawn, []) | {"loss": None}
    return fewer | {"omitted": omitted}


def _of_measures(drawn: Mapping[str, Any], kept: Sequence[Measure]) -> dict[str, Any]:
    """The panels of some measures alone."""

    def of(found: Sequence[tuple[Measure, Markup]]) -> list[tuple[Measure, Markup]]:
        return [(measure, svg) for measure, svg in found if measure in kept]

    families = drawn["families"].items() if kept else []
    return {
        "fronts": drawn["fronts"] | {"plots": of(drawn["fronts"]["plots"])},
        "curves": {plot: of(found) for plot, found in drawn["curves"].items() if kept},
        "families": {plot: found | {"plots": of(found["plots"])} for plot, found in families},
    }


def _fronts(summary: Summary, small: bool = True) -> dict[str, Any]:
    """For each probe and over all, forgetting against learning of the first target set."""
    measures = plots.drawn_measures(summary)
    found: dict[str, Any] = {"plots": [], "outside": 0, "small": small}
    if measures and measures[0].role == "gain":
        for panel, loss in enumerate(measures[1:]):
            clouds = plots.clouds(summary, measures[0], loss)
            svg, outside = plots.draw_front(clouds, measures[0], loss, panel, small)
            found["plots"].append((loss, svg))
            found["outside"] = max(found["outside"], outside)
    return found


def _curves(summary: Summary) -> dict[str, list[Any]]:
    """What was learned and forgotten over the steps and over the learning rates."""
    kinds = {"steps": (plots.lines_over_steps, "step"), "rates": (plots.lines_over_rates, "learning rate")}
    found: dict[str, list[Any]] = {}
    for plot, (lines_of, xlabel) in kinds.items():
        for panel, measure in enumerate(plots.drawn_measures(summary)):
            if lines := lines_of(summary, measure):
                svg = plots.draw_lines(lines, measure, plot, panel, xlabel)
                found.setdefault(plot, []).append((measure, svg))
    return found


def _families(summary: Summary) -> dict[str, Any]:
    """What was learned and forgotten over the rows of a step and over the layers, and which methods a line joins."""
    kinds = {"rows": ("rows_per_step", "rows updated a step and layer"), "layers": ("layers", "layers")}
    found: dict[str, Any] = {}
    for plot, (key, xlabel) in kinds.items():
        for panel, measure in enumerate(plots.drawn_measures(summary)):
            if families := plots.families(summary, measure, key):
                members = [[number for _, number, *_ in family.members] for family in families]
                svg = plots.draw_families(families, measure, plot, panel, xlabel)
                found.setdefault(plot, {"plots": [], "members": members})["plots"].append((measure, svg))
    return found


# -- training ---------------------------------------------------------------------------------------------------------


def _logs(rows: Sequence[Row]) -> tuple[dict[int, list[Log]], dict[str, str]]:
    """What the runs of each row logged, by its place, and which files are broken and why; a run need not have one."""
    logs: dict[int, list[Log]] = {}
    broken: dict[str, str] = {}
    for row in rows:
        for run in row.point.runs if row.place >= 0 else []:
            path = Path(run.get("folder") or "") / "metrics.jsonl"
            if run.get("folder") and path.exists():
                try:
                    logs.setdefault(row.place, []).append(read_log(path))
                except DataError as error:
                    broken[str(path)] = f"its curves are left out, as {error}"
    return logs, broken


def _loss(rows: Sequence[Row], logs: Mapping[int, Sequence[Log]]) -> Markup | None:
    gets: dict[str, Get] = {"training loss, nats per token": lambda line: line.get("loss")}
    return _drawn(rows, logs, gets, "loss", 0, "Training loss over the steps")


def _layers(rows: Sequence[Row], logs: Mapping[int, Sequence[Log]]) -> list[tuple[str, Markup]]:
    """For each memory layer, what a step read and wrote."""
    layers = {layer for each in logs.values() for log in each for line in log for layer in line.get("rows", {})}
    found = []
    for panel, layer in enumerate(sorted(layers, key=_layer_order)):
        label = f"Rows of layer {layer} that a step read and wrote, and the share of hubs in both"
        if svg := _drawn(rows, logs, quantities(layer), "memory", panel, label):
            found.append((layer, svg))
    return found


def _drawn(
    rows: Sequence[Row], logs: Mapping[int, Sequence[Log]], gets: Mapping[str, Get], plot: str, panel: int, label: str
) -> Markup | None:
    """The quantities that were logged, over the steps; None where none was."""
    found: dict[str, list[Line]] = {}
    for title, get in gets.items():
        for row in rows:
            x, y = averaged(logs.get(row.place, []), get)
            if x:
                found.setdefault(title, []).append(Line(row.number, row.label, x, y))
    return plots.draw_logs(found, plot, panel, label) if found else None
