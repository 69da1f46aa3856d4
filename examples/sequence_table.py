"""What came of a sequence of targets: numbers with intervals, tables and a plot (sequence.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from targets import PROBES, Scores, changes, markdown, metric_of

from smf.evaluate import mean_of
from smf.stats import Changes, changes_of, difference

SEEN, NEWEST = "targets so far", "newest target"
Names = Sequence[str]
Stages = Sequence[Sequence[dict[str, Any]]]  # of each seed what was written of each target in a row


def view(names: Names, scores: Scores, place: int) -> Scores:
    """What is shown after a target: all targets so far together, the newest, each by itself, and the probes."""
    records = [record for target in names[: place + 1] for record in scores[target]["records"]]
    metric = metric_of(scores[names[0]])
    together = {"task": scores[names[0]]["task"], "metrics": {metric: mean_of(records, metric)}, "records": records}
    return {SEEN: together, NEWEST: scores[names[place]]} | scores


def gains(names: Names, stages: Stages, base: Scores, at: Sequence[int]) -> Changes:
    """Change against the base of the questions on the first targets together, target i asked after stage `at[i]`."""
    asked = list(zip(names, at, strict=False))
    after = [[r for name, place in asked for r in seed[place]["scores"][name]["records"]] for seed in stages]
    before = [record for name, _ in asked for record in base[name]["records"]]
    return changes_of(after, before, metric_of(base[names[0]]))


def keeping(names: Names, stages: Stages, base: Scores) -> dict[str, Any]:
    """What the targets gained when they were taught, and how all but the last changed from then to the end."""
    last = len(names) - 1
    own = list(range(last))
    since = difference(gains(names, stages, base, [last] * last), gains(names, stages, base, own))
    return {"gained": float(gains(names, stages, base, [*own, last]).by_seed.mean()), "since": asdict(since)}


def above(names: Names, found: dict[str, Stages], base: Scores, shown: str) -> dict[str, Any]:
    """At the end, by how much the first method stands above each other one, in one of the sets."""
    last, changed = len(names) - 1, {}
    before = view(names, base, last)[shown]
    for name, stages in found.items():
        after = [view(names, seed[last]["scores"], last)[shown]["records"] for seed in stages]
        changed[name] = changes_of(after, before["records"], metric_of(before))
    first, *others = changed
    return {name: asdict(difference(changed[first], changed[name])) for name in others}


def summary(names: Names, base: Scores, found: dict[str, Stages]) -> dict[str, Any]:
    """Every number: scores after each target with their changes, what was kept, and comparisons at the end.

    Args:
        names: of the targets.
        base: its scores.
        found: by method.
    """
    places, last = range(len(names)), len(names) - 1
    start = view(names, base, last)
    after = {
        method: [
            changes([view(names, seed[at]["scores"], at) for seed in stages], view(names, base, at)) for at in places
        ]
        for method, stages in found.items()
    }
    costs = {
        method: [[{key: each[key] for key in ("steps", "seconds", "rows")} for each in seed] for seed in stages]
        for method, stages in found.items()
    }
    return {
        "base": changes([start], start),
        "after": after,
        "keeping": {method: keeping(names, stages, base) for method, stages in found.items()},
        f"{next(iter(found))} above": {shown: above(names, found, base, shown) for shown in (SEEN, *PROBES)},
        "costs": costs,
    }


def tables(names: Names, result: dict[str, Any]) -> str:
    """Markdown: all methods after the last target, what they kept, and each method after each target."""
    shown = (SEEN, NEWEST, names[0], *PROBES)

    def pick(found: dict[str, Any]) -> dict[str, Any]:
        return {name: found[name] for name in shown}

    end = {"base": pick(result["base"])} | {method: pick(of[-1]) for method, of in result["after"].items()}
    lines = [f"After all {len(names)} targets:", "", markdown(end), ""]
    lines += ["| | gained when taught, points | since then, all but the last, points | 95 % interval |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    for method, kept in result["keeping"].items():
        since = {key: value * 100 for key, value in kept["since"].items()}
        cells = f"{kept['gained'] * 100:+.1f} | {since['value']:+.1f} | [{since['low']:+.1f}, {since['high']:+.1f}]"
        lines += [f"| {method} | {cells} |"]
    for method, of in result["after"].items():
        rows = {f"after {place + 1}": pick(found) for place, found in enumerate(of)}
        lines += ["", f"## {method}", "", markdown(rows)]
    return "\n".join(lines) + "\n"


def draw(names: Names, result: dict[str, Any], file: Path) -> None:
    """A panel for each set, a line for each method over the targets taught so far, with its interval."""
    shown = (SEEN, NEWEST, names[0], *PROBES)
    figure, panels = plt.subplots(2, 3, figsize=(12, 7), sharex=True)
    x = range(1, len(names) + 1)
    for panel, name in zip(panels.flat, shown, strict=True):
        for (method, of), marker in zip(result["after"].items(), "os^vDPX<>", strict=False):
            found = [each[name] for each in of]
            base = [each["score"] - each["change"] for each in found]  # on the same questions, which may change
            (line,) = panel.plot(x, [each["score"] for each in found], marker=marker, markersize=4, label=method)
            low, high = ([b + each[end] for b, each in zip(base, found, strict=True)] for end in ("low", "high"))
            panel.fill_between(x, low, high, color=line.get_color(), alpha=0.12)
        panel.plot(x, base, color="black", linestyle=":", label="base")
        panel.set_title(f"{name}, {'nats per token' if name == 'general-text' else '% right'}", fontsize=10)
        if name != "general-text":
            panel.set_ylim(0, 102)
    panels[1, 1].set_xlabel("targets taught so far")
    panels[1, 2].legend(fontsize=7, loc="upper left")  # over the text, where nothing is drawn
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
