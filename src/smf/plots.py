"""The report's drawings: what the points and logs of a summary show, as inline SVG in the page's own colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .fingerprint import json_hash
from .stats import Estimate
from .study import Measure, Point, measures, pareto
from .summary import Summary
from .table import digits_of

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
STYLE |= {"font.sans-serif": ["DejaVu Sans"]}  # that of the page comes from its style sheet
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)))  # of families


def number_text(value: float, digits: int, sign: str = "") -> str:
    """With a real minus sign, zero without one, and short where a perplexity is astronomical."""
    if math.isnan(value):
        return "n/a"
    if not abs(value) < 1e9:
        return f"{value:{sign}.3g}".replace("-", "−")
    text = f"{value:{sign},.{digits}f}"
    return text.replace("-", "−") if text.strip("+-0.,") else text.lstrip("+-")


def start() -> None:
    """Forget any matplotlibrc, which the page must not depend on, and set the page's style."""
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)


# -- what is drawn ----------------------------------------------------------------------------------------------------


def numbers_of_methods(summary: Summary) -> dict[str, int]:
    """A method's number decides its colour and shape everywhere on the page, and what its switch hides."""
    return {name: number for number, name in enumerate(dict.fromkeys(point.method for point in summary.rows))}


def drawn_measures(summary: Summary) -> list[Measure]:
    """The first target's gain, then forgetting, over all probes first; empty without a base."""
    if summary.base is None or not summary.rows:
        return []
    metrics = list(dict.fromkeys(column.metric for column in summary.columns if column.role == "target"))
    found = measures(summary.base.runs[0], metrics)
    losses = [measure for measure in found if measure.role == "forgetting"]
    losses.sort(key=lambda measure: len(measure.parts) == 1)
    return [*[measure for measure in found if measure.role == "gain"][:1], *losses]


def value_of(point: Point, base: Point, measure: Measure) -> float:
    """A measure of a point, from its scores."""
    parts = [(weight, point.mean(n, m) - base.mean(n, m)) for n, m, weight in measure.parts]
    return measure.scale * sum(weight * change for weight, change in parts)


def estimate_of(summary: Summary, place: int, measure: Measure) -> Estimate:
    """A measure of the row at `place`, with the interval that the table has."""
    if len(measure.parts) > 1:
        return summary.overall[place]
    name, metric, weight = next(iter(measure.parts))
    column = next(c for c in summary.columns if (c.scored, c.metric) == (name, metric))
    found, factor = summary.changes[place, column], weight * measure.scale
    low, high = sorted((factor * found.low, factor * found.high))
    return Estimate(factor * found.value, low, high)


@dataclass(frozen=True)
class Cloud:
    """What one method learned and forgot: at all of its points, at those of them that no other one beats (`front`,
    places ascending by gain), and gain and loss of its rows in the table (`chosen`)."""

    number: int
    name: str
    gains: list[float]
    losses: list[float]
    front: list[int]
    chosen: list[tuple[Estimate, Estimate]]


@dataclass(frozen=True)
class Line:
    """One method's values over an axis; `chosen` is the place of the one that is in the table, where one was chosen."""

    number: int
    name: str
    x: list[float]
    y: list[float]
    chosen: int | None = None


@dataclass(frozen=True)
class Family:
    """Methods whose options differ in one key alone.

    Args:
        name: what their names have in common.
        members: value of the option, number and name of the method, and its measure; ascending by the value.
    """

    name: str
    members: list[tuple[Any, int, str, Estimate]]


def clouds(summary: Summary, gain: Measure, loss: Measure) -> list[Cloud]:
    """All points of every method, for the plot of one measure against the other; what is not a number is left out."""
    assert summary.base is not None
    found = []
    for name, number in numbers_of_methods(summary).items():
        points = [point for point in summary.points if point.method == name]
        pairs = [(value_of(p, summary.base, gain), value_of(p, summary.base, loss)) for p in points]
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        gains, losses = ([pair[side] for pair in pairs] for side in (0, 1))
        front = pareto(np.array(gains), np.array(losses)).tolist() if pairs else []
        places = [place for place, row in enumerate(summary.rows) if row.method == name]
        chosen = [(estimate_of(summary, i, gain), estimate_of(summary, i, loss)) for i in places]
        found.append(Cloud(number, name, gains, losses, front, chosen))
    return found


def lines_over_steps(summary: Summary, measure: Measure) -> list[Line]:
    """Every row that was scored on the way, over its steps."""
    assert summary.base is not None
    numbers, found = numbers_of_methods(summary), []
    for row in summary.rows:
        own = sorted(_like(summary.points, row, without=()), key=lambda point: point.share)
        if len(own) > 1:
            y = [value_of(point, summary.base, measure) for point in own]
            chosen = [point.share for point in own].index(row.share)
            found.append(Line(numbers[row.method], row.method, [p.runs[0]["steps"] for p in own], y, chosen))
    return found


def lines_over_rates(summary: Summary, measure: Measure) -> list[Line]:
    """Every method that was run at several learning rates, over these, at the end of each run."""
    assert summary.base is not None
    found = []
    for name, number in numbers_of_methods(summary).items():
        rows = [row for row in summary.rows if row.method == name]
        own = [point for point in _like(summary.points, rows[0], without=("lr",)) if point.share == 1 and point.lr > 0]
        own.sort(key=lambda point: point.lr)
        if len({point.lr for point in own}) > 1:
            y = [value_of(point, summary.base, measure) for point in own]
            rates = [point.lr for point in own]
            chosen = rates.index(rows[0].lr) if len(rows) == 1 and rows[0].lr in rates else None
            found.append(Line(number, name, rates, y, chosen))
    return found


def _like(points: Sequence[Point], row: Point, without: Sequence[str]) -> list[Point]:
    """Points of the row's method with its options, but for some keys."""
    own = [point for point in points if point.method == row.method]
    return [point for point in own if _options(point, without) == _options(row, without)]


def _options(point: Point, without: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in point.runs[0].get("options", {}).items() if key not in without}


def families(summary: Summary, measure: Measure, key: str) -> list[Family]:
    """Methods that differ in nothing but the learning rate and the option `key`, over the values of that option."""
    numbers, groups = numbers_of_methods(summary), {}
    for place, row in enumerate(summary.rows):
        value = _layers(row.runs[0]) if key == "layers" else row.runs[0].get("options", {}).get(key)
        if value is not None and sum(other.method == row.method for other in summary.rows) == 1:
            group = groups.setdefault(json_hash(_options(row, ("lr", "axes", key))), [])
            group.append((value, numbers[row.method], row.method, estimate_of(summary, place, measure)))
    found = []
    for members in groups.values():
        members.sort(key=lambda member: _order(member[0]))
        if len({str(value) for value, *_ in members}) > 1:
            found.append(Family(_common([name for _, _, name, _ in members]), members))
    return found


def _layers(run: dict[str, Any]) -> list[int] | str | None:
    """Of a method that names none: of an adapter all, of a memory those whose rows changed; None: it is not known."""
    given = run.get("options", {}).get("layers")
    if given is not None or run["kind"] in ("lora", "oft", "osf", "shira"):
        return "all" if given is None else given
    return sorted(int(layer) for layer in run.get("rows_by_layer", {}) if layer.isdecimal()) or None


def _order(value: Any) -> tuple[float, list[Any]]:
    """Numbers by size; lists of layers by their length, then by their layers; all layers last."""
    if isinstance(value, str):
        return math.inf, []
    return (len(value), value) if isinstance(value, list) else (value, [])


def _common(names: Sequence[str]) -> str:
    """What names such as smf-kl-t=64 and smf-kl-t=512 have in common, by the parts between hyphens."""
    first, *others = [re.split("[- ]", name) for name in names]
    return "-".join(part for part in first if all(part in other for other in others)) or names[0]


# -- drawing ----------------------------------------------------------------------------------------------------------


def svg_of(figure: Figure, name: str, label: str, tips: Mapping[int, str]) -> Markup:
    """The figure as inline SVG; what a method drew carries its number and the text that a pointer shows on it."""
    matplotlib.rcParams["svg.hashsalt"] = name  # another one for each figure, so that ids are unique in the page
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[A-Za-z0-9.]+_\d+"', "<g", svg)  # figure_1, axes_1, ...: the same in every figure
    # hundredths of a point, and paths without line breaks
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]).replace(" \n", ""), svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    svg = re.sub(r'(<g clip-path="[^"]*")>\n((?:<use [^>]*/>\n)+)', _with_one_style, svg)
    svg = re.sub(rf"{TONE}0([0-9])", r"var(--tone-\1)", svg).replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    svg = re.sub(r'(<g id="([a-z]+)-\d+-family-(\d+)[a-z]*")>', r'\1 data-family="\2-\3">', svg)
    svg = re.sub(
        r'(<g id="[a-z]+-\d+-(\d+)-[A-Za-z0-9-]*")>',
        lambda match: f'{match[1]} data-method="{match[2]}"><title>{escape(tips[int(match[2])])}</title>',
        svg,
    )
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def _with_one_style(marks: re.Match[str]) -> str:
    """A group of marks that look alike, with their look said once, which takes half the room."""
    style = re.search(r' style="[^"]*"', marks[2])
    if style is None or marks[2].count(style[0]) != marks[2].count("<use "):
        return marks[0]
    return f"{marks[1]}{style[0]}>\n{marks[2].replace(style[0], '')}"


def look(number: int, name: str, plot: str, panel: int, part: int | str = "") -> dict[str, Any]:
    """Colour and gid of what a method draws; `svg_of` reads the method's number from the gid."""
    slug = re.sub("[^A-Za-z0-9]+", "-", f"{name}-{part}").strip("-")
    return {"color": f"{TONE}{number % TONES:02}", "gid": f"{plot}-{panel}-{number}-{slug}"}


def shape(number: int) -> str:
    """Of a method's marks."""
    return SHAPES[number % len(SHAPES)]


def limits(values: Sequence[float], kept: Sequence[float]) -> tuple[float, float]:
    """Of an axis: all values, but those that are far from the kept ones (a rate at which training diverged)."""
    values, kept = ([v for v in each if math.isfinite(v)] for each in (values, kept))
    low, high = min([0.0, *kept]), max([0.0, *kept])
    if low < high:
        room = 1.5 * (high - low)
        values = [min(max(value, low - room), high + room) for value in values]
    low, high = min([low, *values]), max([high, *values])
    pad = 0.07 * (high - low) or 1.0
    return low - pad, high + pad


def draw_front(
    found: Sequence[Cloud], gain: Measure, loss: Measure, panel: int, small: bool = True
) -> tuple[Markup, int]:
    """Forgetting against gain, and how many points lie beyond the frame; `small`: with a mark for each point."""
    figure = Figure(figsize=(5.8, 4.5))
    axes = figure.add_subplot(xlabel=f"learned, {gain.unit}", ylabel=f"forgotten, {loss.unit}")
    axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    axes.axvline(0, color=INK, linewidth=0.8, alpha=0.5)
    for cloud in found:
        _draw_cloud(axes, cloud, panel, small)
    axes.plot([0], [0], "o", color=PAPER, markeredgecolor=INK, markersize=6, zorder=2)
    axes.annotate("base", (0, 0), (5, -13), textcoords="offset points", fontsize=10)
    chosen = [pair for cloud in found for pair in cloud.chosen]
    crosses = [[end for pair in chosen for end in (pair[i].value, pair[i].low, pair[i].high)] for i in (0, 1)]
    x_low, x_high = limits([x for cloud in found for x in cloud.gains], crosses[0])
    y_low, y_high = limits([y for cloud in found for y in cloud.losses], crosses[1])
    axes.set_xlim(x_low, x_high)
    axes.set_ylim(y_low - 0.06 * (y_high - y_low), y_high)  # room for the arrow below the points
    pairs = [pair for cloud in found for pair in zip(cloud.gains, cloud.losses, strict=True)]
    outside = sum(not (x_low <= x <= x_high and y_low <= y <= y_high) for x, y in pairs)
    arrow = {"arrowstyle": "->", "color": INK, "linewidth": 0.9}
    axes.annotate("better ", (0.99, 0.01), (0.93, 0.07), "axes fraction", ha="right", style="italic", arrowprops=arrow)
    tips = {cloud.number: _cloud_tip(cloud, gain, loss) for cloud in found}
    label = f"Forgetting ({loss.name}) against learning of {gain.name}; the table has the chosen points' numbers"
    return svg_of(figure, f"front-{panel}", label, tips), outside


def _draw_cloud(axes: Axes, cloud: Cloud, panel: int, small: bool) -> None:
    number, name = cloud.number, cloud.name
    if len(cloud.gains) > len(cloud.chosen):  # more than what the large marks show
        front = [[values[place] for place in cloud.front] for values in (cloud.gains, cloud.losses)]
        axes.plot(*front, linewidth=1.1, alpha=0.55, **look(number, name, "front", panel, "front"))
        if small:
            faint = {"markersize": 4, "markeredgewidth": 0, "alpha": 0.5, "linestyle": "none"}
            axes.plot(cloud.gains, cloud.losses, shape(number), **faint, **look(number, name, "front", panel, "points"))
    for part, (x, y) in enumerate(cloud.chosen):
        cross = [x.low, x.high, math.nan, x.value, x.value], [y.value, y.value, math.nan, y.low, y.high]
        axes.plot(*cross, linewidth=1, alpha=0.65, **look(number, name, "front", panel, f"cross{part}"))
        mark = look(number, name, "front", panel, f"chosen{part}")
        axes.plot([x.value], [y.value], shape(number), markersize=9.5, zorder=3, **mark)


def _cloud_tip(cloud: Cloud, gain: Measure, loss: Measure) -> str:
    texts = [
        f"learned {_told_measure(x, gain)}, forgot {_told_measure(y, loss)} ({loss.name})" for x, y in cloud.chosen
    ]
    return f"{cloud.name}: {'; '.join(texts)}"


def _told_measure(e: Estimate, measure: Measure) -> str:
    return f"{number_text(e.value, digits_of(measure))} {measure.unit}"


def _panel(measure: Measure, xlabel: str) -> tuple[Figure, Axes]:
    """An empty panel of small multiples, with a line at the base."""
    figure = Figure(figsize=(5.2, 3.5))
    did = "learned" if measure.role == "gain" else "forgotten"
    axes = figure.add_subplot(xlabel=xlabel, ylabel=f"{did}, {measure.unit}")
    axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    return figure, axes


def draw_lines(found: Sequence[Line], measure: Measure, plot: str, panel: int, xlabel: str) -> Markup:
    """A measure over steps or learning rates (`plot` is "steps" or "rates"), with the chosen points as large marks."""
    figure, axes = _panel(measure, xlabel)
    for part, line in enumerate(found):
        own = look(line.number, line.name, plot, panel, part)
        axes.plot(line.x, line.y, marker=shape(line.number), markersize=4.5, markeredgewidth=0.4, **own)
        if line.chosen is not None:
            x, y = line.x[line.chosen], line.y[line.chosen]
            mark = look(line.number, line.name, plot, panel, f"{part}-chosen")
            axes.plot([x], [y], shape(line.number), markersize=9, zorder=3, **mark)
    if plot == "rates":
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    chosen = [line.y[line.chosen] for line in found if line.chosen is not None]
    values = [y for line in found for y in line.y]
    axes.set_ylim(*limits(values, chosen))
    tips = {line.number: line.name for line in found}
    return svg_of(figure, f"{plot}-{panel}", f"{measure.name} ({measure.role}) over the {xlabel}", tips)


def draw_families(found: Sequence[Family], measure: Measure, plot: str, panel: int, xlabel: str) -> Markup:
    """A measure over the values of an option; a number has its place on a logarithmic axis, a list one beside it."""
    figure, axes = _panel(measure, xlabel)
    values = {str(value): value for family in found for value, *_ in family.members}
    ordered = sorted(values.values(), key=_order)
    numeric = all(isinstance(value, int) and value > 0 for value in ordered)
    places = {str(value): float(value) if numeric else float(i) for i, value in enumerate(ordered)}
    tips = {}
    for number, family in enumerate(found):
        aside = number - (len(found) - 1) / 2  # of each other, so that no interval hides another one
        x = [
            places[str(value)] * 2 ** (0.08 * aside) if numeric else places[str(value)] + 0.06 * aside
            for value, *_ in family.members
        ]
        own = {"color": INK, "alpha": 0.5, "linestyle": DASHES[number % len(DASHES)], "label": family.name}
        axes.plot(x, [e.value for *_, e in family.members], **own, gid=f"{plot}-{panel}-family-{number}")
        for i, (value, method, name, e) in zip(x, family.members, strict=True):
            axes.plot([i, i], [e.low, e.high], linewidth=1.1, **look(method, name, plot, panel, "interval"))
            axes.plot([i], [e.value], shape(method), markersize=8, zorder=3, **look(method, name, plot, panel))
            tips[method] = f"{name}: {_told_measure(e, measure)} at {_told(value)}"
    legend = axes.legend(frameon=False, fontsize=10)
    for number, parts in enumerate(zip(legend.get_lines(), legend.get_texts(), strict=True)):
        for name, part in zip(("line", "text"), parts, strict=True):
            part.set_gid(f"{plot}-{panel}-family-{number}{name}")
    if numeric:
        axes.set_xscale("log", base=2)
    axes.set_xticks(list(places.values()), [_told(value) for value in ordered], fontsize=10)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08)
    return svg_of(figure, f"{plot}-{panel}", f"{measure.name} ({measure.role}) over {xlabel}", tips)


def _told(value: Any) -> str:
    if isinstance(value, str):
        return value
    return " + ".join(map(str, value)) if isinstance(value, list) else f"{value:,}"


def draw_logs(found: Mapping[str, Sequence[Line]], plot: str, panel: int, label: str) -> Markup:
    """Lines over steps, in one panel for each quantity, below each other."""
    figure = Figure(figsize=(5.2, 3.8 if len(found) == 1 else 2.3 * len(found)))
    for place, (title, lines) in enumerate(found.items()):
        last = place == len(found) - 1
        axes = figure.add_subplot(len(found), 1, place + 1, xlabel="step" if last else "", ylabel=title)
        for part, line in enumerate(lines):
            marks = (0.04 + 0.02 * (line.number % 6), 0.2)  # of the diagonal; each method begins elsewhere
            own = look(line.number, line.name, plot, 10 * panel + place, part)
            axes.plot(line.x, line.y, marker=shape(line.number), markersize=5.5, markevery=marks, **own)
        if len(found) > 1:
            axes.set_ylim(0, 1.1 * axes.dataLim.y1 or 1)
        axes.tick_params(labelbottom=last)
    return svg_of(
        figure, f"{plot}-{panel}", label, {line.number: line.name for lines in found.values() for line in lines}
    )
