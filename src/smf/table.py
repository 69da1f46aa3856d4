"""One table of what was learned, what was forgotten and what it took: in the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .stats import RATIOS, Estimate, change
from .tasks import find_task

# The last columns, what it took: keys of the result that are added up.
COSTS = {
    "rows changed": ("rows_changed",),
    "trained params": ("trained_parameters",),
    "seconds": ("seconds", "heal_seconds"),
    "peak MB": ("peak_memory_mb",),
}
TITLES = {"loss": "loss", "acc": "%", "answer_norm": "% by mean", "exact_match": "%", "f1": "F1 %", "nats": "ppl"}


def shown_metrics(scores: dict[str, Any], target_metrics: Sequence[str]) -> list[tuple[str, str]]:
    """Which metric of which set a table shows: the recipe's of each target set, the first of each probe's task."""
    pairs = []
    for name, score in scores.items():
        metrics = target_metrics if score["role"] == "target" else find_task(score["task"]).METRICS[:1]
        pairs += [(name, metric) for metric in metrics]
    return pairs


def grouped(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results by method, one of each seed."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["method"], []).append(result)
    return groups


def mean_score(runs: Sequence[dict[str, Any]], name: str, metric: str) -> float:
    """A score, averaged over seeds."""
    return sum(run["scores"][name]["metrics"][metric] for run in runs) / len(runs)


def change_of(runs: Sequence[dict[str, Any]], base: dict[str, Any], name: str, metric: str) -> Estimate:
    """Its change against the base, with the interval."""
    return change([run["scores"][name]["records"] for run in runs], base["scores"][name]["records"], metric)


def rows_of(results: Sequence[dict[str, Any]], target_metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every score and its change against the base with a 95 % interval, then what it took."""
    base = next((result for result in results if result["kind"] == "base"), None)
    pairs = shown_metrics(results[0]["scores"], target_metrics)
    header = ["method", *[f"{name} {TITLES[metric]}" for name, metric in pairs], *COSTS]
    rows = []
    for method, runs in grouped(results).items():
        cells = [method]
        for name, metric in pairs:
            value = score_text(mean_score(runs, name, metric), metric, runs, name)
            if base is not None and runs[0]["kind"] != "base":
                value += f"\n{change_text(change_of(runs, base, name, metric), metric)}"
            cells.append(value)
        costs = [mean_cost(runs, title) for title in COSTS]
        rows.append([*cells, *("-" if cost is None else f"{cost:,.0f}" for cost in costs)])
    return header, rows


def score_text(value: float, metric: str, runs: Sequence[dict[str, Any]], name: str) -> str:
    """A score as the table shows it: shares in percent, nats per token of a text as perplexity."""
    if metric == "loss":
        return f"{value:.3f}"
    if metric == "nats":
        return f"{mean_score(runs, name, 'perplexity'):.3f}"
    return f"{100 * value:.1f}"


def change_text(estimate: Estimate, metric: str) -> str:
    """A change and its interval: points, or nats per token."""
    if metric in RATIOS:
        return f"{estimate.value:+.3f}\n[{estimate.low:+.3f}, {estimate.high:+.3f}]"
    return f"{100 * estimate.value:+.1f}\n[{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def mean_cost(runs: Sequence[dict[str, Any]], title: str) -> float | None:
    """One of `COSTS`, averaged over seeds; None where a run does not say."""
    costs = [[run.get(key) for key in COSTS[title]] for run in runs]
    if any(cost[0] is None for cost in costs):
        return None
    return sum(sum(filter(None, cost)) for cost in costs) / len(costs)


def caption(results: Sequence[dict[str, Any]]) -> str:
    """What the table's numbers mean."""
    seeds = len({result["seed"] for result in results if result["kind"] != "base" and "seed" in result})
    over = f"over {seeds} seeds and examples" if seeds > 1 else "over examples only (one seed)"
    text = (
        f"below each score: its change against the base, with the 95 % interval {over}; % in points, ppl and loss in "
        "nats per token"
    )
    at_a_time = methods_at_a_time(results)
    return (
        f"{text}; seconds: of training, with {at_a_time} methods at a time on the machine" if at_a_time != "1" else text
    )


def methods_at_a_time(results: Sequence[dict[str, Any]]) -> str:
    """How many runs shared the machine's cores while these were made."""
    jobs = {result.get("provenance", {}).get("machine", {}).get("jobs", 1) for result in results}
    return " or ".join(map(str, sorted(jobs)))


def print_table(results: Sequence[dict[str, Any]], title: str, target_metrics: Sequence[str]) -> None:
    """The table, in the terminal."""
    header, rows = rows_of(results, target_metrics)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width
        console = Console(width=200)
    costs = len(header) - len(COSTS)
    parts = [list(range(len(header)))]
    if console.width < 22 * costs:  # what it took, in a table of its own
        parts = [list(range(costs)), [0, *range(costs, len(header))]]
    for part in parts:
        last = part is parts[-1]
        table = Table(title=title if part is parts[0] else None, caption=caption(results) if last else None)
        for number in part:
            table.add_column(header[number], justify="left" if number == 0 else "right", no_wrap=number == 0)
        for row in rows:
            table.add_row(*(row[number] for number in part))
        console.print(table)


def markdown_table(results: Sequence[dict[str, Any]], target_metrics: Sequence[str]) -> str:
    """The table, as Markdown."""
    header, rows = rows_of(results, target_metrics)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("\n", "<br>") for line in lines) + f"\n\n{caption(results)}.\n"
