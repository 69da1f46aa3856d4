"""What reverting the rows that some examples wrote takes from the model, beside reverting equally many random rows.

    python examples/who_wrote_what.py                 # three seeds; goes on where it was killed

The first target of the world is taught with provenance. Its diseases are put into groups of six; the examples of each
group in turn are forgotten, and questions on these diseases and on others are asked. Writes
runs/who_wrote_what/table.md and result.json. The committed ones: docs/results/who_wrote_what.md.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import tyro
from targets import Targets, disease, fresh, load_targets, teach

import smf
from smf.data import ScoredSet
from smf.evaluate import score_set
from smf.files import write_atomically, write_json
from smf.shape import seeded
from smf.stats import Estimate, change

GROUP = 6  # diseases whose examples are forgotten together
SHARES = (1.0, 0.5, 0.25)  # of the way that a row moved, at least so much must be theirs
Records = list[dict[str, Any]]


def random_rows(patch: smf.Patch, like: smf.Patch, seed: int, group: int) -> smf.Patch:
    """Of a patch as many random rows of each layer as another part of it has."""
    which = {}
    for layer, rows in patch.rows.items():
        chosen = torch.randperm(len(rows), generator=seeded("random rows", seed, group, layer))[: len(like.rows[layer])]
        which[layer] = torch.zeros(len(rows), dtype=torch.bool).index_fill_(0, chosen, True)
    return patch.take(which)


def asked(targets: Targets) -> ScoredSet:
    """All questions on the first target's diseases that are scored: held-out and seen forms."""
    taught = {disease(lesson.id) for lesson in targets.lessons["first"]}
    seen = [item for item in targets.loaded.scored["seen"].items if disease(item["id"]) in taught]
    held_out = targets.scored["first"]
    return ScoredSet(held_out.role, held_out.task, [*held_out.items, *seen], held_out.cluster)


def records_of(targets: Targets, questions: ScoredSet, name: str, model: Any) -> Records:
    """A record for each question; finished ones are read."""
    file = targets.folder / f"{name}.json"
    if not file.is_file():
        write_json(file, score_set(model, targets.loaded.tokenizer, targets.recipe, name, questions)["records"])
    return json.loads(file.read_text())


def outcomes(targets: Targets, steps: int, limit: int) -> tuple[dict[str, Records], dict[str, float], int]:
    """Of one seed: records by what was reverted and who is asked about, mean rows reverted, and rows of the patch."""
    patch = teach(targets, "known", targets.lessons["first"], steps=steps, provenance=True)
    questions = asked(targets)
    if limit:
        questions = ScoredSet(questions.role, questions.task, questions.items[:limit], questions.cluster)
    assert patch.provenance is not None
    known = patch.provenance.names  # of a short training not all lessons
    model, names = fresh(targets, [patch]), sorted({disease(item["id"]) for item in questions.items})
    group_of = {name: place // GROUP for place, name in enumerate(names)}
    groups = max(group_of.values()) + 1
    after: dict[str, list[Records]] = {}
    rows: dict[str, list[int]] = {}
    for group in range(groups):
        lessons = [name for name in known if group_of.get(disease(name)) == group]
        for share in SHARES:
            theirs = patch.written_by(lessons, share)
            parts = {"theirs": theirs, "random": random_rows(patch, theirs, targets.recipe.seed, group)}
            for which, part in parts.items():
                label = f"{which}, share {share:g}"
                part.revert(model)
                after.setdefault(label, []).append(records_of(targets, questions, f"{label}, group {group}", model))
                part.apply(model)
                rows.setdefault(label, []).append(sum(map(len, part.rows.values())))
    taught = records_of(targets, questions, "taught", model)
    found = {"base": records_of(targets, questions, "base", fresh(targets)), "taught": taught}
    for label, by_group in after.items():
        place = [group_of[disease(record["id"])] for record in taught]
        found[f"{label}: own"] = [by_group[own][i] for i, own in enumerate(place)]
        found[f"{label}: others"] = [by_group[(own + 1) % groups][i] for i, own in enumerate(place)]
    return (
        found,
        {label: sum(counts) / len(counts) for label, counts in rows.items()},
        sum(map(len, patch.rows.values())),
    )


def main(output: Path = Path("runs/who_wrote_what"), seeds: int = 3, steps: int = 70, limit: int = 0) -> None:
    """Teach, forget and ask.

    Args:
        output: folder of patches, records and the table.
        seeds: of initial values, data order and random rows.
        steps: of 32 examples.
        limit: first so many questions, for a trial; 0: all.
    """
    by_seed = []
    for seed in range(seeds):
        by_seed.append(outcomes(load_targets(output, seed, 0), steps, limit))
    changes: dict[str, dict[str, Estimate]] = {}
    for label in by_seed[0][0]:
        # each seed against its own taught model: as one set of questions, seed after seed
        pairs = [_joined([found[key] for found, _, _ in by_seed]) for key in (label, "taught")]
        changes[label] = {metric: change([pairs[0]], pairs[1], metric) for metric in ("acc", "loss")}
    taught = _joined([found["taught"] for found, _, _ in by_seed])
    right = sum(record["acc"] for record in taught) / len(taught)
    rows = {label: sum(counts[label] for _, counts, _ in by_seed) / seeds for label in by_seed[0][1]}
    whole = sum(count for _, _, count in by_seed) / seeds
    lines = [
        "| reverted | rows | asked about | accuracy, change in points | loss, change in nats |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    lines += [f"| everything | {whole:,.0f} | all | {_shown(changes['base'])} |"]
    for label, count in rows.items():
        lines += [
            f"| {label} | {count:,.1f} | {who} | {_shown(changes[f'{label}: {who}'])} |" for who in ("own", "others")
        ]
    text = "\n".join(lines) + f"\n\nTaught: {right:.1%} right.\n"
    found = {label: {metric: asdict(each) for metric, each in by.items()} for label, by in changes.items()}
    write_json(output / "result.json", {"seeds": seeds, "steps": steps, "right": right, "rows": rows, "changes": found})
    write_atomically(output / "table.md", text)
    print(text)


def _joined(by_seed: list[Records]) -> Records:
    return [r | {"id": f"{seed} {r['id']}"} for seed, records in enumerate(by_seed) for r in records]


def _shown(change: dict[str, Estimate]) -> str:
    acc, loss = change["acc"], change["loss"]
    return (
        f"{acc.value * 100:+.1f} [{acc.low * 100:+.1f}, {acc.high * 100:+.1f}] | "
        f"{loss.value:+.3f} [{loss.low:+.3f}, {loss.high:+.3f}]"
    )


if __name__ == "__main__":
    tyro.cli(main)
