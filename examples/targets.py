"""Targets on the embedded world, each a part of its new diseases: teaching them to a memory, and scoring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import set_seed

import smf
from smf.base import load_base
from smf.data import Example, ScoredSet, in_order
from smf.evaluate import score
from smf.files import write_json
from smf.loop import fit
from smf.methods import Prepared, attach
from smf.patch_file import patch_of
from smf.prepare import load
from smf.recipe_file import load_recipe
from smf.stats import change
from smf.tasks import find_task

TARGETS = ("first", "second", "third")
PROBES = {"near-domain": 400, "closed-book": 400, "general-text": 120}  # how many of each are scored
METHOD = "smf-kl-gradient-t=512"  # of the recipe world_study.toml
Scores = dict[str, Any]


@dataclass(frozen=True)
class Targets:
    """What is taught and scored.

    Args:
        recipe: of the study, for one seed.
        loaded: all that it reads.
        lessons: training examples of each target.
        scored: held-out questions of each target, and the probes.
        folder: of patches and scores of this seed.
    """

    recipe: Any
    loaded: Any
    lessons: dict[str, list[Example]]
    scored: dict[str, ScoredSet]
    folder: Path


def disease(id: str) -> str:
    """Of a question's or a lesson's id, such as document.Trarb_gout.sign.1."""
    return id.removeprefix("document.").split(".")[0]


def load_targets(folder: Path, seed: int, limit: int, targets: Sequence[str] = TARGETS, recipe: Any = None) -> Targets:
    """The targets of one seed.

    Args:
        folder: of all seeds.
        seed: of data order and initial values.
        limit: first so many questions of each set; 0: all.
        targets: their names; the new diseases go to them in turn, by name, each with all its lessons and questions.
        recipe: of the methods; None: world_study.toml.
    """
    recipe = replace(recipe or load_recipe("world_study.toml"), seed=seed)
    loaded = load(recipe)
    names = sorted({disease(example.id) for example in loaded.train})
    target_of = {name: targets[place % len(targets)] for place, name in enumerate(names)}
    lessons = {target: [e for e in loaded.train if target_of[disease(e.id)] == target] for target in targets}
    exam, scored = loaded.scored["held-out"], {}
    for target in targets:
        scored[target] = replace(exam, items=[i for i in exam.items if target_of[disease(i["id"])] == target])
    for probe, count in PROBES.items():
        scored[probe] = replace(loaded.scored[probe], items=loaded.scored[probe].items[:count])
    if limit:
        scored = {name: replace(each, items=each.items[:limit]) for name, each in scored.items()}
    (folder / str(seed)).mkdir(parents=True, exist_ok=True)
    return Targets(recipe, loaded, lessons, scored, folder / str(seed))


def fresh(targets: Targets, patches: Sequence[smf.Patch] = ()) -> Any:
    """The base with its memory, and patches applied in order."""
    model = attach(load_base(targets.recipe), targets.recipe.methods[METHOD], targets.recipe)
    for patch in patches:
        patch.apply(model)
    return model


def teach(
    targets: Targets,
    name: str,
    lessons: list[Example],
    *,
    after: Sequence[smf.Patch] = (),
    spared: Sequence[smf.Patch] = (),
    steps: int,
    **options: Any,
) -> smf.Patch:
    """The patch of a training; a finished one is read.

    Args:
        targets: of one seed.
        name: of the training.
        lessons: what is learned.
        after: patches that are in the model before it.
        spared: patches whose rows the background counts as read by general text.
        steps: of 32 examples.
        options: more of the optimizer.
    """
    file = targets.folder / f"{name}.smf"
    if file.is_file():
        return smf.load_patch(file)
    set_seed(targets.recipe.seed)
    model, method, tokenizer = fresh(targets, after), targets.recipe.methods[METHOD], targets.loaded.tokenizer
    background = smf.read_background(model, targets.loaded.background, tokenizer=tokenizer, max_length=128)
    for patch in spared:
        background = background.protecting(patch.rows)
    optimizer = smf.SparseMemoryOptimizer(
        model,
        background,
        lr=method.lr,
        rule=method.rule,
        reads=method.reads,
        rows_per_step=method.rows_per_step,
        seed=targets.recipe.seed,
        **options,
    )
    prepared = Prepared(model, optimizer, 0.0, 0, lambda folder: {})
    places = {lesson.id: number for number, lesson in enumerate(lessons)} if options.get("provenance") else {}
    examples = in_order(lessons, steps * targets.recipe.train.batch_size, targets.recipe.seed)
    fit(
        prepared,
        examples,
        targets.recipe,
        targets.folder / name,
        tokenizer,
        steps=steps,
        loss="answer",
        name=name,
        places=places,
    )
    return smf.save_patch(patch_of(model, examples=list(places) or None), file)


def scores_of(targets: Targets, name: str, patches: Sequence[smf.Patch]) -> Scores:
    """Scores of the base with patches applied in order; finished ones are read."""
    file = targets.folder / f"{name}.json"
    if not file.is_file():
        model = fresh(targets, patches)
        write_json(file, score(model, targets.loaded.tokenizer, targets.recipe, targets.scored))
    return json.loads(file.read_text())


def metric_of(entry: dict[str, Any]) -> str:
    """What is shown of a set: nats of a text, else the share of right answers."""
    return "nats" if entry["task"] == "perplexity" else find_task(entry["task"]).METRICS[0]


def changes(by_seed: Sequence[Scores], base: Scores) -> dict[str, Any]:
    """Score and change against the base of every set, with 95 % intervals; points, of text nats per token."""
    found = {}
    for name, entry in base.items():
        metric = metric_of(entry)
        scale = 1 if metric == "nats" else 100
        by = change([scores[name]["records"] for scores in by_seed], entry["records"], metric)
        mean = sum(scores[name]["metrics"][metric] for scores in by_seed) / len(by_seed)
        found[name] = {
            "score": mean * scale,
            "change": by.value * scale,
            "low": by.low * scale,
            "high": by.high * scale,
        }
    return found


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """One line for each row: the scores, and below each its change against the base."""
    sets = list(next(iter(rows.values())))
    units = ["%" if name != "general-text" else "nats" for name in sets]
    lines = ["| | " + " | ".join(f"{name} {unit}" for name, unit in zip(sets, units, strict=True)) + " |"]
    lines.append("| --- |" + " ---: |" * len(sets))
    for label, found in rows.items():
        cells = []
        for name, unit in zip(sets, units, strict=True):
            each, digits = found[name], 1 if unit == "%" else 3
            text = f"{each['score']:.{digits}f}"
            if label != "base":
                text += f"<br>{each['change']:+.{digits}f}<br>[{each['low']:+.{digits}f}, {each['high']:+.{digits}f}]"
            cells.append(text)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
