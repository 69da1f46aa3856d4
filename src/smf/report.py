"""The report: one HTML file, without any network, that shows what each method learned and what it forgot."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .errors import DataError
from .files import write_atomically
from .stats import RATIOS, Estimate, flips
from .table import COSTS, change_of, grouped, mean_cost, mean_score, shown_metrics
from .tasks import find_task

# What matplotlib draws in these colours takes the page's instead, so that one drawing serves light and dark.
INK, PAPER, TONE = "#1a2b3c", "#3c2b1a", "#c0de"
TONES = 8  # --tone-0 to --tone-7 in the template
SHAPES = "os^Dv>X"  # seven, so that pairs of shape and colour repeat after 56; the template has them as SVG paths
STYLE: dict[Any, Any] = dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "grid.color"], INK)
STYLE |= {"xtick.color": INK, "ytick.color": INK, "figure.facecolor": "none", "axes.facecolor": "none"}
STYLE |= {"svg.fonttype": "none", "text.parse_math": False}  # text stays text, a dollar sign too
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}
STYLE |= {"axes.grid": True, "axes.axisbelow": True, "grid.linewidth": 0.5, "grid.alpha": 0.15}
STYLE |= {"lines.linewidth": 1.4, "lines.markeredgecolor": PAPER, "lines.markeredgewidth": 0.7, "font.size": 11.0}


@dataclass(frozen=True)
class Method:
    """All seeds' runs of one method; its number decides colour and shape (the base has -1 and neither)."""

    number: int
    name: str
    runs: list[dict[str, Any]]
    logs: list[list[dict[str, Any]]]  # of each run, the lines of metrics.jsonl


@dataclass(frozen=True)
class Column:
    """One metric of one scored set, and how its changes are written."""

    scored: str
    role: str
    metric: str
    unit: str
    digits: int
    scale: int


Estimates = dict[tuple[str, Column], Estimate]  # by method's name


def write_report(
    results: Sequence[dict[str, Any]],
    path: Path,
    title: str,
    notes: Sequence[str] = (),
    target_metrics: Sequence[str] = ("acc",),
) -> None:
    """Write a self-contained page that compares methods; equal input gives equal bytes.

    Args:
        results: one for each method and seed, with scores and records, in the order of the table. The first of kind
            "base" is what the others are compared with; without one, no changes are shown.
        path: of the HTML file.
        title: of the page.
        notes: plain sentences below the title, such as the command that made the page.
        target_metrics: shown for each target set; the first is the learning that the plots show.

    Raises:
        DataError: where the results were not scored on the same sets and examples, or a metrics file is broken.
    """
    _check(results)
    scores = results[0]["scores"]
    columns = [_column(name, scores[name]["role"], metric) for name, metric in shown_metrics(scores, target_metrics)]
    columns.sort(key=lambda column: column.role != "target")
    base = next((Method(-1, r["method"], [r], []) for r in results if r["kind"] == "base"), None)
    groups = grouped([result for result in results if result["kind"] != "base"]).items()
    methods = [Method(i, name, runs, [_log(r.get("folder")) for r in runs]) for i, (name, runs) in enumerate(groups)]
    estimates: Estimates = {}
    if base is not None:
        pairs = [(method, column) for method in methods for column in columns]
        estimates = {(m.name, c): change_of(m.runs, base.runs[0], c.scored, c.metric) for m, c in pairs}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the page must not depend on a matplotlibrc
        matplotlib.rcParams.update(STYLE)
        plots = {"fronts": _fronts(methods, columns, estimates), "loss": _loss(methods), "layers": _layers(methods)}
    options: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    options |= {"trim_blocks": True, "lstrip_blocks": True, "loader": jinja2.FileSystemLoader(Path(__file__).parent)}
    page = (
        jinja2.Environment(**options)
        .get_template("report.html.jinja")
        .render(
            title=title,
            notes=list(notes),
            base=base,
            methods=methods,
            columns=columns,
            table=[_row(m, columns, estimates) for m in ([base] if base else []) + methods],
            layer_rows=_layer_rows(methods),
            answers=_answers(base, methods),
            **plots,
        )
    )
    write_atomically(path, page.encode("utf-8", "replace"))  # half a surrogate pair in the data is no reason to fail


# -- what there is to show --------------------------------------------------------------------------------------------


def _check(results: Sequence[dict[str, Any]]) -> None:
    if not results:
        raise DataError("there are no results to report; run `smf compare` first")
    sets = list(results[0]["scores"])
    for result in results:
        if set(result["scores"]) != set(sets):
            raise DataError(
                f"{results[0]['method']!r} was scored on {sets}, {result['method']!r} on {list(result['scores'])}; "
                "they cannot be in one report"
            )


def _column(name: str, role: str, metric: str) -> Column:
    return Column(name, role, metric, *(("nats per token", 3, 1) if metric in RATIOS else ("points", 1, 100)))


def _log(folder: str | None) -> list[dict[str, Any]]:
    """The lines of a run's metrics file; none where there is no such file."""
    path = Path(folder or "") / "metrics.jsonl"
    if not folder or not path.is_file():
        return []
    lines = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as cause:
            raise DataError(f"{path}, line {number} is not JSON: {line[:80]!r}") from cause
    return lines


# -- tables and lists -------------------------------------------------------------------------------------------------


def _row(method: Method, columns: Sequence[Column], estimates: Estimates) -> dict[str, Any]:
    means = [mean_cost(method.runs, title) for title in COSTS]
    return {
        "method": method,
        "cells": [_cell(method, column, estimates.get((method.name, column))) for column in columns],
        "costs": ["–" if mean is None else _number(mean, 0) for mean in means],
    }


def _cell(method: Method, column: Column, estimate: Estimate | None) -> dict[str, Any]:
    if column.metric == "nats":
        return {"value": _number(mean_score(method.runs, column.scored, "perplexity"), 2)} | _change(estimate, column)
    value = column.scale * mean_score(method.runs, column.scored, column.metric)
    return {"value": _number(value, column.digits)} | _change(estimate, column)


def _change(estimate: Estimate | None, column: Column) -> dict[str, Any]:
    if estimate is None:
        return {"change": None}
    numbers = (estimate.value, estimate.low, estimate.high)
    change, low, high = (_number(column.scale * number, column.digits, "+") for number in numbers)
    sure = (estimate.low > 0 or estimate.high < 0) and change.strip("+−0.") != ""
    return {"change": change, "low": low, "high": high, "sure": sure}


def _number(value: float, digits: int, sign: str = "") -> str:
    """With a real minus sign, zero without one, and short where a perplexity is astronomical."""
    if not abs(value) < 1e9:
        return f"{value:{sign if math.isfinite(value) else ''}.3g}"
    text = f"{value:{sign},.{digits}f}"
    return text.replace("-", "−") if text.strip("+-0.") else text.lstrip("+-")


def _layer_names(methods: Sequence[Method]) -> list[str]:
    logged = [line["rows"] for method in methods for log in method.logs for line in log if "rows" in line]
    changed = [run.get("rows_by_layer") or {} for method in methods for run in method.runs]
    names = {layer for layers in (*logged, *changed) for layer in layers}
    return sorted(names, key=lambda name: (len(name), name))  # numbers, as text


def _layer_rows(methods: Sequence[Method]) -> dict[str, Any]:
    """Distinct rows changed by layer, of the methods that have rows."""
    layers = _layer_names(methods)
    rows = []
    for method in methods:
        per_run = [run["rows_by_layer"] for run in method.runs if run.get("rows_by_layer")]
        if per_run:
            counts = [sum(run.get(layer, 0) for run in per_run) / len(per_run) for layer in layers]
            rows.append({"method": method, "counts": [_number(count, 0) for count in (*counts, sum(counts))]})
    return {"layers": layers, "rows": rows}


def _answers(base: Method | None, methods: Sequence[Method]) -> dict[str, Any] | None:
    """For the page's script: which questions changed sides, by set and method; None where nothing can be compared.

    A set's questions `[id, question, right, said before]` are listed once; a flip is `[place of the question, [[seed,
    said after], ...]]`, with the seeds under which the question changed sides.
    """
    sets = []
    for name, scored in base.runs[0]["scores"].items() if base and methods else ():
        metric, before = find_task(scored["task"]).METRICS[0], scored["records"]
        if metric in RATIOS:
            continue
        fields = [[record.get(key) for key in ("id", "question", "right", "said")] for record in before]
        questions = [["–" if field is None else str(field) for field in row] for row in fields]
        lists = [_flips(method, name, before, metric) for method in methods]
        sets.append({"name": name, "role": scored["role"], "questions": questions, "lists": lists})
    return {"methods": [[m.name, len(m.runs)] for m in methods], "sets": sets} if sets else None


def _flips(method: Method, name: str, before: Sequence[dict[str, Any]], metric: str) -> dict[str, list[Any]]:
    sides: dict[str, dict[int, list[Any]]] = {"learned": {}, "forgotten": {}}
    for run in method.runs:
        records = run["scores"][name]["records"]
        for side, places in zip(sides.values(), flips(records, before, metric), strict=True):
            for place in places:
                side.setdefault(place, []).append([run.get("seed", 0), str(records[place].get("said", "–"))])
    return {key: [[place, side[place]] for place in sorted(side)] for key, side in sides.items()}


# -- plots ------------------------------------------------------------------------------------------------------------


def _svg(figure: Figure, name: str, label: str, tips: dict[int, str]) -> Markup:
    """The figure as inline SVG; what a method drew carries its number and the text that a pointer shows on it."""
    matplotlib.rcParams["svg.hashsalt"] = name  # another one for each figure, so that ids are unique in the page
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[A-Za-z0-9.]+_\d+"', "<g", svg)  # figure_1, axes_1, ...: the same in every figure
    svg = re.sub(rf"{TONE}0([0-9])", r"var(--tone-\1)", svg).replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    svg = re.sub(
        r'(<g id="[a-z]+-\d+-(\d+)-[A-Za-z0-9-]*")>',
        lambda match: f'{match[1]} data-method="{match[2]}"><title>{escape(tips[int(match[2])])}</title>',
        svg,
    )
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def _look(method: Method, plot: str, panel: int, part: int | str = "") -> dict[str, Any]:
    """Colour and gid of a method's line; `_svg` reads the method's number from the gid."""
    slug = re.sub("[^A-Za-z0-9]+", "-", f"{method.name}-{part}").strip("-")
    return {"color": f"{TONE}{method.number % TONES:02}", "gid": f"{plot}-{panel}-{method.number}-{slug}"}


def _fronts(methods: Sequence[Method], columns: Sequence[Column], estimates: Estimates) -> list[dict[str, Any]]:
    """For each probe, forgetting against learning of the first target set."""
    probes = [column for column in columns if column.role != "target"]
    if not estimates or len(probes) == len(columns):
        return []
    figures = [_front(methods, columns[0], probe, estimates, panel) for panel, probe in enumerate(probes)]
    return [{"probe": probe, "target": columns[0], "svg": svg} for probe, svg in zip(probes, figures, strict=True)]


def _front(methods: Sequence[Method], target: Column, probe: Column, estimates: Estimates, panel: int) -> Markup:
    figure = Figure(figsize=(5.2, 4))
    axes = figure.add_subplot()
    axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    axes.axvline(0, color=INK, linewidth=0.8, alpha=0.5)
    axes.plot([0], [0], "o", color=PAPER, markeredgecolor=INK, markersize=6)
    axes.annotate("base", (0, 0), (5, 4), textcoords="offset points", fontsize=10)
    tips = {}
    for m in methods:
        x = _turned(estimates[m.name, target], target, 1)
        y = _turned(estimates[m.name, probe], probe, -1)
        axes.plot([x.low, x.high], [y.value] * 2, **_look(m, "front", panel, "x"))
        axes.plot([x.value] * 2, [y.low, y.high], **_look(m, "front", panel, "y"))
        axes.plot([x.value], [y.value], SHAPES[m.number % 7], markersize=10, zorder=3, **_look(m, "front", panel))
        learned, forgot = _number(x.value, target.digits), _number(y.value, probe.digits)
        tips[m.number] = f"{m.name}: learned {learned} {target.unit}, forgot {forgot} {probe.unit} of {probe.scored}"
    axes.margins(0.1, 0.16)  # room for the arrow below the points
    arrow = {"arrowstyle": "->", "color": INK, "linewidth": 0.9}
    axes.annotate("better ", (0.99, 0.01), (0.93, 0.07), "axes fraction", ha="right", style="italic", arrowprops=arrow)
    axes.set_xlabel(f"learned, {target.unit}")
    axes.set_ylabel(f"forgotten, {probe.unit}")
    label = f"Forgetting of {probe.scored} against learning of {target.scored}; the table has the numbers"
    return _svg(figure, f"front-{panel}", label, tips)


def _turned(estimate: Estimate, column: Column, sign: int) -> Estimate:
    """In the column's unit; positive for what got better where the sign is 1, for what got worse where it is -1."""
    factor = sign * column.scale * (-1 if column.metric in RATIOS else 1)
    low, high = sorted((factor * estimate.low, factor * estimate.high))
    return Estimate(factor * estimate.value, low, high)


def _curves(axes: Axes, methods: Sequence[Method], plot: str, panel: int, key: str, layer: str | None = None) -> bool:
    """A line over steps for each run, with a few markers, as colour alone must not tell the methods apart."""
    for method in methods:
        for part, log in enumerate(method.logs):
            values = [line.get(key) if layer is None else line.get(key, {}).get(layer) for line in log]
            points = [(line["step"], y) for line, y in zip(log, values, strict=True) if y is not None]
            points = [point for point in points if math.isfinite(point[1])]
            marks = (0.04 + 0.02 * (method.number % 6), 0.2)  # of the diagonal; each method begins elsewhere
            shape, look = SHAPES[method.number % 7], _look(method, plot, panel, part)
            if points:
                axes.plot(*zip(*points, strict=True), marker=shape, markersize=7.5, markevery=marks, **look)
    return len(axes.lines) > 0


def _loss(methods: Sequence[Method]) -> Markup | None:
    """Training loss; None where nothing was logged."""
    figure = Figure(figsize=(5.2, 3.8))
    axes = figure.add_subplot(xlabel="step", ylabel="training loss, nats per token")
    drawn = _curves(axes, methods, "loss", 0, "loss")
    tips = {method.number: method.name for method in methods}
    return _svg(figure, "loss", "Training loss over the steps", tips) if drawn else None


def _layers(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """For each memory layer, the distinct rows that a step read and those that it wrote."""
    panels = []
    tips = {method.number: method.name for method in methods}
    for panel, layer in enumerate(_layer_names(methods)):
        figure = Figure(figsize=(5.2, 4.6))
        drawn = False
        for place, (key, title) in enumerate({"rows_read": "rows read", "rows": "rows written"}.items(), 1):
            axes = figure.add_subplot(2, 1, place, xlabel="step" if place == 2 else "", ylabel=title)
            drawn |= _curves(axes, methods, key.replace("_", ""), panel, key, layer)
            axes.set_ylim(0, max(1, 1.1 * axes.dataLim.y1))
            axes.tick_params(labelbottom=place == 2)
        if drawn:
            svg = _svg(figure, f"rows-{panel}", f"Rows of layer {layer} that a step read and wrote", tips)
            panels.append({"layer": layer, "svg": svg})
    return panels
