"""A summary as tables: in the terminal, and as Markdown."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .matched import Matched
from .stats import RATIOS, Estimate
from .study import Measure, Point
from .summary import MARGIN, Column, Summary, verdict

# The last columns, what it took: keys of the result that are added up.
COSTS = {
    "rows changed": ("rows_changed",),
    "trained params": ("trained_parameters",),
    "seconds": ("seconds", "heal_seconds"),
    "peak MB": ("peak_memory_mb",),
}
TITLES = {"loss": "loss", "acc": "%", "answer_norm": "% by mean", "letter": "% by letter", "exact_match": "%"}
TITLES |= {"f1": "F1 %", "alias": "alias %", "score": "%", "nats": "ppl"}
NOTHING = "n/a"


# -- cells ------------------------------------------------------------------------------------------------------------


def one_line(text: str) -> str:
    """A name on one line, without characters that do not print; names come from recipes and files."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def title_of(column: Column) -> str:
    """Of a column: the set and what is shown of it."""
    return one_line(column.scored if column.role == "divergence" else f"{column.scored} {TITLES[column.metric]}")


def score_text(point: Point, column: Column) -> str:
    """A score as tables show it: shares in percent, nats per token of a text as perplexity."""
    as_perplexity = column.metric == "nats" and column.role != "divergence"
    value = point.mean(column.scored, "perplexity" if as_perplexity else column.metric)
    if math.isnan(value):
        return NOTHING
    return f"{value:.3f}" if column.metric in RATIOS else f"{100 * value:.1f}"


def estimate_text(
    estimate: Estimate | None, digits: int, scale: float = 1.0, between: str = "\n", sign: str = "+"
) -> str:
    """A value and its interval."""
    if estimate is None or math.isnan(estimate.value):
        return NOTHING
    values = (estimate.value, estimate.low, estimate.high)
    value, low, high = (f"{round(scale * each, digits) + 0.0:{sign}.{digits}f}" for each in values)  # -0.0 is 0.0
    return f"{value}{between}[{NOTHING}]" if math.isnan(estimate.low) else f"{value}{between}[{low}, {high}]"


def digits_of(measure: Measure) -> int:
    """Behind the point."""
    return 3 if measure.unit == "nats per token" else 1


def mean_cost(runs: Sequence[dict[str, Any]], title: str) -> float | None:
    """One of `COSTS`, averaged over seeds; None where a run does not say."""
    costs = [[run.get(key) for key in COSTS[title]] for run in runs]
    if any(cost[0] is None for cost in costs):
        return None
    return sum(sum(filter(None, cost)) for cost in costs) / len(costs)


def label_of(summary: Summary, point: Point) -> str:
    """The method's name, with the learning rate where one name stands for several rows."""
    several = sum(other.method == point.method for other in summary.rows) > 1
    return one_line(f"{point.method}, lr {point.lr:g}" if several else point.method)


def marked(summary: Summary, point: Point) -> str:
    """The label and, where methods have unequally many seeds, how many this one has."""
    counts = {len(row.runs) for row in summary.rows}
    if len(counts) == 1 or point is summary.base:
        return label_of(summary, point)
    return label_of(summary, point) + ("\n(one seed)" if len(point.runs) == 1 else f"\n({len(point.runs)} seeds)")


# -- tables -----------------------------------------------------------------------------------------------------------

Cells = tuple[list[str], list[list[str]]]  # header and rows


def scores_table(summary: Summary) -> Cells:
    """Every score and its change against the base with a 95 % interval, then what it took."""
    searched = any(interior is not None for interior in summary.interior) or any(row.share < 1 for row in summary.rows)
    header = ["method", *(["lr"] if searched else []), *map(title_of, summary.columns)]
    header += ["overall forgotten %"] if summary.overall else []
    rows = []
    for number, point in numbered(summary):
        cells = [marked(summary, point)]
        if searched:
            cells.append(_rate_text(summary, point, number))
        for column in summary.columns:
            text = score_text(point, column)
            if (number, column) in summary.changes and column.role != "divergence":
                text += "\n" + estimate_text(summary.changes[number, column], column.digits, column.scale)
            elif (number, column) in summary.changes:
                text = estimate_text(summary.changes[number, column], column.digits, sign="")
            cells.append(text)
        if summary.overall:
            cells.append("" if number < 0 else estimate_text(summary.overall[number], 1, sign=""))
        costs = [mean_cost(point.runs, title) for title in COSTS]
        rows.append([*cells, *("-" if cost is None or math.isnan(cost) else f"{cost:,.0f}" for cost in costs)])
    return [*header, *COSTS], rows


def numbered(summary: Summary) -> list[tuple[int, Point]]:
    """The base, as number -1, and the rows."""
    return [*([] if summary.base is None else [(-1, summary.base)]), *enumerate(summary.rows)]


def _rate_text(summary: Summary, point: Point, number: int) -> str:
    if number < 0 or not point.lr:
        return ""
    at = "" if point.share == 1 else f"\nat {point.share:.0%} of the steps"
    return f"{point.lr:g}{at}" + ("\nat its grid's end" if summary.interior[number] is False else "")


def flips_table(summary: Summary) -> Cells:
    """For each set of questions, how many were learned and forgotten: wrong to right / right to wrong."""
    sets = list(dict.fromkeys(name for flips in summary.flips for name in flips))
    rows = [
        [marked(summary, point), *(" / ".join(f"{count:g}" for count in flips[name]) for name in sets)]
        for point, flips in zip(summary.rows, summary.flips, strict=True)
    ]
    return ["method", *map(one_line, sets)], rows


def matched_tables(summary: Summary) -> dict[str, tuple[Cells, str]]:
    """By gain, what each method forgets there and, in a second line, as a share of the reference's; with its note."""
    tables = {}
    for label in dict.fromkeys(each.label for each in summary.matched):
        own = [each for each in summary.matched if each.label == label]
        rows = [[one_line(name), *(_matched_text(each, name) for each in own)] for name in own[0].losses]
        header = ["method", *(one_line(f"{each.measure.name}, {each.measure.unit}") for each in own)]
        over = over_what({"": len(own[0].seeds)})
        note = f"read off each method's points, linear between them, 95 % interval {over}; {NOTHING}: beyond them"
        if summary.reference is not None and any(ratio for each in own for ratio in each.ratios.values()):
            note += f"; x: as a share of what {one_line(summary.reference.method)} forgets"
        tables[one_line(f"Forgotten at the {label} ({own[0].gain:.3g})")] = ((header, rows), note)
    return tables


def _matched_text(each: Matched, name: str) -> str:
    text = estimate_text(each.losses[name], digits_of(each.measure), between=" ", sign="")
    if each.beyond(name):
        text += f"\n({each.beyond(name)})"
    if each.ratios.get(name) is None:
        return text
    return f"{text}\nx {estimate_text(each.ratios[name], 2, between=' ', sign='')}"


def comparisons_table(summary: Summary) -> Cells:
    """Every method minus the reference, with p by Holm over the whole table, and non-inferiority of the gain."""
    measures = list(dict.fromkeys(each.measure for each in summary.comparisons))
    header = ["method", *(one_line(f"{m.name}, {m.role}, {m.unit}") for m in measures)]
    rows = []
    for row, found in summary.compared():
        cells = [marked(summary, row)]
        for each in found:
            sign = "≤" if each.p <= each.least else "="
            text = f"{estimate_text(each.estimate, digits_of(each.measure))}\np {sign} {each.adjusted:.2g}"
            text += " (McNemar)" if each.test == "McNemar" else ""
            cells.append(f"{text}\n{verdict(each)}".rstrip())
        rows.append(cells)
    return header, rows


# -- what stands below them -------------------------------------------------------------------------------------------


def over_what(seeds: Mapping[str, int]) -> str:
    """What intervals are over, from the number of seeds by method."""
    methods: dict[int, list[str]] = {}
    for name, count in seeds.items():
        methods.setdefault(count, []).append(name)
    if len(methods) == 1:
        count = next(iter(methods))
        return f"over {count} seeds and examples" if count > 1 else "over examples only (one seed)"
    parts = []
    for count, names in sorted(methods.items(), reverse=True):
        which = ", ".join(names) if len(names) < 5 else f"{len(names)} methods"
        parts.append(f"{count} seeds: {which}" if count > 1 else f"one seed, so over examples only: {which}")
    return f"over examples and seeds, whose number differs ({'; '.join(parts)})"


def caption(summary: Summary) -> str:
    """What the numbers of the first table mean."""
    parts = []
    if summary.base is None:
        parts.append("the base is not among the runs, so that nothing is compared with it")
    elif summary.rows:
        over = over_what({label_of(summary, row): len(row.runs) for row in summary.rows})
        parts.append(f"below each score: its change against the base, with the 95 % interval {over}")
        parts.append("% in points, ppl and loss in nats per token")
    else:
        parts.append("scores of the base alone")
    if any(column.role == "divergence" for column in summary.columns):
        parts.append("KL: divergence from the base in nats per token")
    if any(interior is not None for interior in summary.interior):
        tried = sorted({count for count, row in zip(summary.rates, summary.rows, strict=True) if row.lr})
        of = f"of {' or '.join(map(str, tried))} that were tried"
        best = f"lr: the best by validation score {of}"
        like = f"; beside {', '.join(summary.match)}, the lowest that learns as much as the best of these"
        parts.append(best + like * bool(summary.match))
    if any(row.share < 1 for row in summary.rows):
        parts.append("rows and seconds: of the whole training, also where scores are of an earlier moment")
    points = [point for point in (summary.base, *summary.rows) if point is not None]
    at_a_time = methods_at_a_time([run for point in points for run in point.runs])
    if at_a_time != "1":
        parts.append(f"seconds: of training, with {at_a_time} methods at a time on the machine")
    versions = {str(run.get("provenance", {}).get("git")) for point in points for run in point.runs}
    if len(versions) > 1:
        parts.append(f"made by {len(versions)} versions of the code")
    broken = [f"{one_line(run['method'])} at lr {run['options']['lr']:g}" for run in summary.failed]
    if broken:
        parts.append(f"training failed: {', '.join(broken)}")
    return "; ".join(parts)


def methods_at_a_time(results: Sequence[dict[str, Any]]) -> str:
    """How many runs shared the machine's cores while these were made."""
    jobs = {result.get("provenance", {}).get("machine", {}).get("jobs", 1) for result in results}
    return " or ".join(map(str, sorted(jobs)))


def comparisons_note(summary: Summary) -> str:
    """What the numbers of `comparisons_table` mean."""
    compared = summary.compared()
    over = over_what({label_of(summary, row): found[0].seeds for row, found in compared})
    note = f"difference, its 95 % interval {over} and p, by Holm over this table; "
    note += f"non-inferior: sure to gain at most {MARGIN} points less; inferior: sure to gain less than that"
    left_out = [row for row in summary.rows if row not in (summary.reference, *(row for row, _ in compared))]
    if left_out:
        note += f"; no seed in common: {', '.join(label_of(summary, row) for row in left_out)}"
    return note


def all_tables(summary: Summary) -> dict[str, tuple[Cells, str]]:
    """Every table that has something to say, by title, with what stands below it."""
    tables: dict[str, tuple[Cells, str]] = {"": (scores_table(summary), caption(summary))}
    if any(summary.flips):
        note = "questions that went from wrong to right / from right to wrong, on average over the seeds"
        tables["Learned and forgotten"] = (flips_table(summary), note)
    tables |= matched_tables(summary)
    if summary.comparisons and summary.reference is not None:
        title = f"Against {label_of(summary, summary.reference)}"
        tables[title] = (comparisons_table(summary), comparisons_note(summary))
    return tables


# -- where they go ----------------------------------------------------------------------------------------------------


def print_tables(summary: Summary, title: str) -> None:
    """All tables, in the terminal; names are shown as they are, whatever markup they look like."""
    plain: Any = {"markup": False, "emoji": False}
    console = Console(**plain)
    if not console.is_terminal:  # a file or a pipe has no width
        console = Console(width=200, **plain)
    for name, ((header, rows), note) in all_tables(summary).items():
        costs = len(header) - len(COSTS) if header[-len(COSTS) :] == list(COSTS) else len(header)
        parts = [list(range(len(header)))]
        if costs < len(header) and console.width < 22 * costs:  # what it took, in a table of its own
            parts = [list(range(costs)), [0, *range(costs, len(header))]]
        for part in parts:
            above, below = name or one_line(title) if part is parts[0] else None, note if part is parts[-1] else None
            table = Table(title=above, caption=below)
            for number in part:
                table.add_column(header[number], justify="left" if number == 0 else "right", no_wrap=number == 0)
            for row in rows:
                table.add_row(*(row[number] for number in part))
            console.print(table)


def print_plain(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of texts, in the terminal."""
    table = Table(title=title)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(one_line(cell) for cell in row))
    console = Console(markup=False, emoji=False)
    (console if console.is_terminal else Console(width=200, markup=False, emoji=False)).print(table)


def markdown(summary: Summary) -> str:
    """All tables, as Markdown."""
    texts = []
    for title, ((header, rows), note) in all_tables(summary).items():
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        table = "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)
        texts.append(f"{f'## {_escaped(title)}{chr(10) * 2}' if title else ''}{table}\n\n{_escaped(note)}.\n")
    return "\n".join(texts)


def _escaped(text: str) -> str:
    """For Markdown: no HTML, no column of its own, no emphasis; underscores within words are none."""
    text = re.sub(r"[\\`*]|\b_|_\b", r"\\\g<0>", html.escape(text, quote=False))
    return text.replace("|", "&#124;").replace("\n", "<br>")
