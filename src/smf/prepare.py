"""Everything that a recipe reads, loaded and checked before anything trains."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import methods
from .data import Example, encode, keep_answered, load_rows
from .decoder import default_layers, find_decoder
from .errors import ConfigError, DataError
from .evaluate import ScoredSets, probe_examples
from .recipe import Recipe, Source
from .selection import find_rule
from .tasks import find_task


@dataclass(frozen=True)
class Loaded:
    """Everything a recipe reads, checked; the base's weights are loaded later."""

    tokenizer: Any
    train: list[Example]
    scored: ScoredSets
    background: list[str]
    healing: list[Example]


def load(recipe: Recipe) -> Loaded:
    """Load and check all that the recipe names, but for the base's weights; raises before hours of work."""
    check_output(Path(recipe.output))
    check_models(recipe)
    tokenizer, scored = load_scored(recipe)
    task = find_task(recipe.target.task)
    need = (*task.COLUMNS, "exp") if recipe.target.explanation else task.COLUMNS
    train = _answered(recipe, tokenizer, _target_rows(recipe, recipe.target.train, need), recipe.target.explanation)
    overlap = {e.id for e in train} & {str(row["id"]) for row in scored.target_rows}
    if overlap:
        raise DataError(f"{len(overlap)} rows are both trained and scored, such as id {min(overlap)!r}")
    background = [] if recipe.background is None else _texts(recipe, recipe.background.source)
    healing: list[Example] = []
    if recipe.heal is not None and any(method.heal for method in recipe.methods.values()):
        source = recipe.heal.source
        rows = load_rows(source, recipe.data, recipe.parts, [source.column])
        healing = find_task("perplexity").examples(rows, source.column, tokenizer, recipe.train.max_length)
    return Loaded(tokenizer, train, scored, background, healing)


def load_scored(recipe: Recipe) -> tuple[Any, ScoredSets]:
    """The tokenizer and what the recipe scores, checked."""
    tokenizer = load_tokenizer(recipe)
    task = find_task(recipe.target.task)
    if not hasattr(task, "response"):
        raise ConfigError(f"task {recipe.target.task!r} can be a probe, but not a target: it has no answers to learn")
    rows = _target_rows(recipe, recipe.target.eval, task.COLUMNS)
    probes = {name: probe_examples(recipe, name, probe, tokenizer) for name, probe in recipe.probes.items()}
    return tokenizer, ScoredSets(_answered(recipe, tokenizer, rows, False), rows, probes)


def _target_rows(recipe: Recipe, source: Source, need: Sequence[str]) -> list[Any]:
    rows = load_rows(source, recipe.data, recipe.parts, need)
    return find_task(recipe.target.task).select(rows, source.path or source.hub)


def _answered(recipe: Recipe, tokenizer: Any, rows: list[Any], explanation: bool) -> list[Example]:
    task, length = find_task(recipe.target.task), recipe.train.max_length
    texts = [(str(row["id"]), task.prompt(row), task.response(row, explanation=explanation)) for row in rows]
    examples = [encode(tokenizer, *text, length, end=True) for text in texts]
    return keep_answered(examples, recipe.train.too_long, length)


def _texts(recipe: Recipe, source: Source) -> list[str]:
    rows = load_rows(source, recipe.data, recipe.parts, [source.column])
    return [row[source.column] for row in rows if row[source.column].strip()]


def check_output(folder: Path) -> None:
    """Refuse an output folder that cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"output = {str(folder)!r} cannot be written: {error}; give another --output") from error


def check_models(recipe: Recipe) -> None:
    """Refuse memory options that do not fit the base, looking at its config only."""
    config = _from_base(AutoConfig, recipe)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        skeleton = AutoModelForCausalLM.from_config(config)
    for name, method in recipe.methods.items():
        if method.kind == "smf":
            try:
                find_rule(method.rule)
            except ConfigError as error:
                raise ConfigError(f"[methods.{name}]: {error}") from error
            memory = methods.memory_config(method.memory or recipe.memory, recipe.seed, method.train)
            decoder = find_decoder(skeleton)
            layers = memory.layers or default_layers(len(decoder.blocks))
            decoder.mlp_names(layers, replace=memory.mode == "replacement")


def load_tokenizer(recipe: Recipe) -> Any:
    """The base's tokenizer."""
    return _from_base(AutoTokenizer, recipe)


def load_base(recipe: Recipe) -> Any:
    """The base in evaluation mode, on the GPU where there is one."""
    model = _from_base(AutoModelForCausalLM, recipe, dtype=getattr(torch, recipe.dtype))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _from_base(loader: Any, recipe: Recipe, **options: Any) -> Any:
    if not recipe.base:
        raise ConfigError("the recipe names no base; give --base a model folder or a hub name")
    looks_like_path = recipe.base.startswith((".", "/", "~")) or recipe.base.count("/") > 1
    if looks_like_path and not Path(recipe.base).is_dir():
        raise ConfigError(f"base = {recipe.base!r}: there is no model folder; give --base a folder or a hub name")
    try:
        return loader.from_pretrained(recipe.base, revision=recipe.revision, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base = {recipe.base!r} cannot be loaded as a causal language model: {error}") from error
