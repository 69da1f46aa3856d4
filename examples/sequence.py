"""Five targets in a row: after each, what is left of the earlier ones and of what the base knew?

    python examples/sequence.py                       # three seeds, all methods; goes on where it was killed
    python examples/sequence.py --methods late-rows lora --seeds 1

The new diseases of the embedded world are five targets of 36. Each method learns one after the other, from where the
one before left it, with an optimizer and a schedule that begin anew. Writes table.md, result.json and sequence.png into
--output. The committed ones: docs/results/sequence.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from peft import PeftModel
from sequence_table import draw, summary, tables
from targets import Scores, Targets, load_targets
from transformers import set_seed

import smf
from smf.base import load_base
from smf.data import with_replay
from smf.errors import ConfigError
from smf.evaluate import score
from smf.files import write_atomically, write_json
from smf.loop import fit
from smf.methods import WITH_MEMORY, Prepared, attach, dense, find_method
from smf.recipe import Recipe, ReplayOptions, Source
from smf.recipe_file import load_recipe
from smf.train import without_questions

TARGETS = ("first", "second", "third", "fourth", "fifth")
LESSONS = "full-replay-lessons"  # half of what it replays are lessons of earlier targets
METHODS = (
    "late-rows",
    "late-rows-gentle",
    "all-rows",
    "lora",
    "lora-gentle",
    "full",
    "full-gentle",
    "full-replay",
    LESSONS,
)


def recipe_of(output: Path) -> Recipe:
    """The study of late rows, with replay, a second rate of its rows, and gentler ones of LoRA and full finetuning."""
    recipe = load_recipe("late_rows.toml", output=str(output))
    given = recipe.methods
    made = {
        "late-rows-gentle": replace(given["late-rows"], lr=0.4),
        "lora-gentle": replace(given["lora"], lr=1e-3),
        "full-gentle": replace(given["full"], lr=2.5e-4),
        "full-replay": replace(given["full"], replay=0.5),
        LESSONS: replace(given["full"], replay=0.5),
    }
    # text that tells of nothing that is scored, nor of what the background counts
    return replace(recipe, methods=given | made, replay=ReplayOptions(source=Source(path="healing")))


# -- one target after the other ---------------------------------------------------------------------------------------


def prepare(targets: Targets, name: str, state: Path | None) -> Prepared:
    """A method at its start or, where there is a state, as the target before left it; its optimizer is new."""
    recipe, loaded = targets.recipe, targets.loaded
    method = recipe.methods[name]
    make = find_method(method.kind)
    if state is not None and method.kind == "full":
        return make(load_base(replace(recipe, base=str(state / "model"))), method, recipe, loaded)
    model = load_base(recipe)
    if (
        method.kind in WITH_MEMORY
    ):  # counts the background anew: below the last layer is the base, so the counts are the same
        model = attach(model, method, recipe) if state is None else _adapter(model, state / "adapter")
    elif state is not None:
        return dense(_adapter(model, state / "model"), method, recipe)
    return make(model, method, recipe, loaded)


def _adapter(model: Any, folder: Path) -> Any:
    return PeftModel.from_pretrained(model, folder, is_trainable=True)


def learn(targets: Targets, name: str, place: int, before: Path | None, steps: int) -> Path:
    """Teach one target and score all of them and the probes; returns the folder, which a finished one just is.

    Args:
        targets: of one seed.
        name: of the method.
        place: of the target, from 0.
        before: folder of the target before.
        steps: of 32 lessons. With replay as many more as leave it the same number of lessons.
    """
    folder = targets.folder / name / str(place + 1)
    if (folder / "scores.json").is_file():
        return folder
    recipe, loaded, share = targets.recipe, targets.loaded, targets.recipe.methods[name].replay
    set_seed(recipe.seed)
    prepared = prepare(targets, name, before / "state" if before else None)
    earlier = [lesson for target in TARGETS[:place] for lesson in targets.lessons[target]] if name == LESSONS else []
    replayed = [*loaded.replay[: len(earlier) or None], *earlier]
    steps = round(steps / (1 - share))
    warm = replace(recipe, train=replace(recipe.train, warmup_steps=steps // 10))  # a tenth, as in the study
    order = recipe.seed * len(TARGETS) + place  # so that each target replays other text
    examples = with_replay(targets.lessons[TARGETS[place]], replayed, share, steps * recipe.train.batch_size, order)
    title = f"{name}, {TARGETS[place]}"
    fitted = fit(
        prepared, examples, warm, folder / "training", loaded.tokenizer, steps=steps, loss=recipe.train.loss, name=title
    )
    prepared.save(folder / "state")
    scores = without_questions(score(prepared.model, loaded.tokenizer, recipe, targets.scored))
    about = {"steps": steps, "seconds": fitted.seconds, "rows": rows_of(folder / "state" / "patch.smf")}
    write_json(folder / "scores.json", about | {"scores": scores})
    for done in [folder / "training", *([before / "state"] if before else [])]:
        shutil.rmtree(done, ignore_errors=True)
    return folder


def rows_of(patch: Path) -> dict[str, int] | None:
    """How many rows a training wrote, and how many of them an earlier one had; None for methods without a memory."""
    if not patch.is_file():
        return None
    old = smf.load_patch(patch).old.values()
    return {"written": sum(map(len, old)), "earlier": sum(int(rows.any(1).sum()) for rows in old)}  # they start at zero


def sequences(output: Path, names: Sequence[str], seeds: int, steps: int, limit: int) -> tuple[Scores, dict[str, Any]]:
    """Scores of the base, and for each method and seed what `learn` wrote of each target in a row."""
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in names}
    base = output / "base.json"
    for seed in range(seeds):
        targets = load_targets(output, seed, limit, TARGETS, recipe_of(output))
        if not base.is_file():
            model = load_base(targets.recipe)
            write_json(base, without_questions(score(model, targets.loaded.tokenizer, targets.recipe, targets.scored)))
        for name in names:
            folders: list[Path] = []
            for place in range(len(TARGETS)):
                folders.append(learn(targets, name, place, folders[-1] if folders else None, steps))
            found[name].append([json.loads((folder / "scores.json").read_text()) for folder in folders])
    return json.loads(base.read_text()), found


def check_settings(output: Path, settings: dict[str, int]) -> None:
    """Refuse to go on in a folder whose stages were made with other settings."""
    file = output / "settings.json"
    if not file.is_file():
        write_json(file, settings)
    if (made := json.loads(file.read_text())) != settings:
        raise ConfigError(
            f"{output} was begun with {made}, not {settings}; give another --output, or the same settings"
        )


def main(
    output: Path = Path("runs/sequence"),
    seeds: int = 3,
    methods: tuple[str, ...] = METHODS,
    steps: int = 40,
    limit: int = 0,
) -> None:
    """Train, score and compare.

    Args:
        output: folder of scores, tables and plot.
        seeds: of initial values and data order.
        methods: to compare; the first is compared with each other one at the end.
        steps: of 32 lessons for each target.
        limit: first so many questions of each set, for a trial; 0: all.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise ConfigError(f"--methods {' '.join(unknown)}: there is no such method; there are {', '.join(METHODS)}")
    check_settings(output, {"steps": steps, "limit": limit})
    base, found = sequences(output, methods, seeds, steps, limit)
    result = summary(TARGETS, base, found)
    write_json(output / "result.json", {"seeds": seeds, "steps": steps} | result)
    text = tables(TARGETS, result)
    write_atomically(output / "table.md", text)
    draw(TARGETS, result, output / "sequence.png")
    print(text)


if __name__ == "__main__":
    tyro.cli(main)
