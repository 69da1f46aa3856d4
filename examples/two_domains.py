"""Two targets, taught apart and merged, one after the other, and together; then a third: what is left of the first?

    python examples/two_domains.py                    # three seeds; goes on where it was killed

Writes runs/two_domains/table.md and result.json. The committed ones: docs/results/two_domains.md.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import tyro
from targets import TARGETS, Scores, Targets, changes, load_targets, markdown, metric_of, scores_of, teach

import smf
from smf.files import write_atomically, write_json
from smf.stats import Estimate, changes_of, difference

PLAIN, SPARING = "in sequence", "in sequence, sparing earlier rows"


def models_of(targets: Targets, steps: int) -> dict[str, list[smf.Patch]]:
    """For each row of the table the patches that make its model, trained where they are not there yet."""
    first, second, third = (targets.lessons[target] for target in TARGETS)
    a = teach(targets, "first", first, steps=steps)
    b = teach(targets, "second", second, steps=steps)
    both = teach(targets, "together", first + second, steps=2 * steps)
    models = {"base": [], "first alone": [a], "second alone": [b], "together": [both]}
    for policy in ("sum", "weighted", "last"):
        models[f"apart, merged: {policy}"] = [a.merge(b, policy=policy)]
    for label, spare in ((PLAIN, False), (SPARING, True)):
        name = "spared" if spare else "plain"
        then = teach(targets, f"second {name}", second, after=[a], spared=[a] if spare else [], steps=steps)
        models[f"{label}: two"] = [a, then]
        last = teach(targets, f"third {name}", third, after=[a, then], spared=[a, then] if spare else [], steps=steps)
        models[f"{label}: three"] = [a, then, last]
    return models


def overlaps(models: dict[str, list[smf.Patch]]) -> dict[str, dict[str, int]]:
    """Of each model with several patches, how many rows the last one wrote, and how many of them earlier ones had."""
    found = {"apart": _rows(models["first alone"][0], models["second alone"])}
    for label, patches in models.items():
        if len(patches) > 1:
            found[label] = _rows(patches[-1], patches[:-1])
    return found


def _rows(last: smf.Patch, earlier: list[smf.Patch]) -> dict[str, int]:
    shared = 0
    for layer, rows in last.rows.items():
        before = {int(row) for patch in earlier for row in patch.rows[layer]}
        shared += sum(int(row) in before for row in rows)
    return {"rows": sum(map(len, last.rows.values())), "shared": shared}


def forgetting(by_label: dict[str, list[Scores]], base: Scores) -> dict[str, Estimate]:
    """What later trainings took from the held-out score of the first target, plain and sparing, and the difference."""
    records = {label: [s["first"]["records"] for s in by_label[label]] for label in by_label}
    changed = {
        label: changes_of(after, base["first"]["records"], metric_of(base["first"])) for label, after in records.items()
    }
    before, found = changed["first alone"], {}
    for count in ("two", "three"):
        plain, spared = (changed[f"{how}: {count}"] for how in (PLAIN, SPARING))
        found[f"{count}, plain"] = difference(plain, before)
        found[f"{count}, sparing"] = difference(spared, before)
        found[f"{count}, sparing against plain"] = difference(spared, plain)
    return found


def main(output: Path = Path("runs/two_domains"), seeds: int = 3, steps: int = 70, limit: int = 0) -> None:
    """Train, score and compare.

    Args:
        output: folder of patches, scores and the table.
        seeds: of initial values and data order.
        steps: of 32 examples for each target; "together" takes twice as many.
        limit: first so many questions of each set, for a trial; 0: all.
    """
    by_label: dict[str, list[Scores]] = {}
    shared: dict[str, list[dict[str, int]]] = {}
    for seed in range(seeds):
        targets = load_targets(output, seed, limit)
        models = models_of(targets, steps)
        for label, patches in models.items():
            by_label.setdefault(label, []).append(scores_of(targets, label.replace(":", ","), patches))
        for label, rows in overlaps(models).items():
            shared.setdefault(label, []).append(rows)
    base = by_label["base"][0]
    rows = {label: changes(scores, base) for label, scores in by_label.items()}
    means = {
        label: {key: sum(each[key] for each in every) / seeds for key in every[0]} for label, every in shared.items()
    }
    lines = [f"{label}: {mean['shared']:,.0f} of {mean['rows']:,.0f}" for label, mean in means.items()]
    text = markdown(rows) + "\n\nRows of the last training that an earlier one wrote too: " + "; ".join(lines) + ".\n"
    lost = forgetting(by_label, base)
    text += "\nThe first target's held-out score against that of the first patch alone, in points:\n\n"
    text += "| | change | 95 % interval |\n| --- | ---: | ---: |\n"
    for label, each in lost.items():
        text += f"| {label} | {each.value * 100:+.1f} | [{each.low * 100:+.1f}, {each.high * 100:+.1f}] |\n"
    result = {"seeds": seeds, "steps": steps, "rows": rows, "shared": shared}
    write_json(output / "result.json", result | {"first": {label: asdict(each) for label, each in lost.items()}})
    write_atomically(output / "table.md", text)
    print(text)


if __name__ == "__main__":
    tyro.cli(main)
