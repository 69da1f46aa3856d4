"""Everything that a recipe reads, loaded and checked before anything trains."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import methods, world
from .data import Example, Loaded, ScoredSet, encode, keep_answered, load_rows
from .decoder import default_layers, find_decoder
from .errors import ConfigError, DataError
from .recipe import Recipe, Source
from .selection import find_rule
from .tasks import find_task

VALIDATION = "validation"  # name of the set that learning rates are chosen by


def load(recipe: Recipe) -> Loaded:
    """Load and check all that the recipe names, but for the base's weights; raises before hours of work."""
    check_output(Path(recipe.output))
    check_models(recipe)
    tokenizer, scored = load_scored(recipe)
    task = find_task(recipe.target.task)
    explained = recipe.target.explanation and hasattr(task, "EXPLANATION")
    need = (*task.COLUMNS, task.EXPLANATION) if explained else task.COLUMNS
    train = _answered(recipe, tokenizer, task, _rows(recipe, recipe.target.train, task, need), explained)
    asked = [scored_set for scored_set in scored.values() if scored_set.role in ("target", "validation")]
    overlap = {example.id for example in train} & {item["id"] for scored_set in asked for item in scored_set.items}
    if overlap:
        raise DataError(f"{len(overlap)} rows are both trained and scored, such as id {min(overlap)!r}")
    background = [] if recipe.background is None else _texts(recipe, recipe.background.source)
    healing: list[Example] = []
    if recipe.heal is not None and any(m.heal or m.kind == "healed" for m in recipe.methods.values()):
        healing = _text_examples(recipe, recipe.heal.source, tokenizer)
    replay: list[Example] = []
    if recipe.replay is not None and any(method.replay for method in recipe.methods.values()):
        replay = _text_examples(recipe, recipe.replay.source, tokenizer)
    texts = {
        tuple(item.ids)
        for scored_set in scored.values()
        if scored_set.role == "probe"
        for item in scored_set.items
        if isinstance(item, Example)
    }
    for what, examples in (("heal", healing), ("replay", replay)):
        both = [example.id for example in examples if tuple(example.ids) in texts]
        if both:
            raise DataError(f"{len(both)} texts of [{what}] are scored as well, such as number {both[0]}; use [parts]")
    return Loaded(tokenizer, train, scored, background, healing, replay)


def load_scored(recipe: Recipe) -> tuple[Any, dict[str, ScoredSet]]:
    """The tokenizer and what the recipe scores, checked."""
    tokenizer = load_tokenizer(recipe)
    task = find_task(recipe.target.task)
    if not hasattr(task, "response"):
        raise ConfigError(f"task {recipe.target.task!r} can be a probe, but not a target: it has no answers to learn")
    if not recipe.target.eval:
        raise ConfigError("the recipe has no [target.eval.NAME] table: say what the target is scored on")
    unknown = [metric for metric in recipe.target.metrics if metric not in task.METRICS]
    if unknown or not recipe.target.metrics:
        raise ConfigError(
            f"target.metrics = {recipe.target.metrics}; task {recipe.target.task!r} has {list(task.METRICS)}"
        )
    named = [(name, "target", recipe.target.task, source) for name, source in recipe.target.eval.items()]
    if recipe.target.validation is not None:
        named.append((VALIDATION, "validation", recipe.target.task, recipe.target.validation))
    named += [(name, "probe", probe.task, probe.source) for name, probe in recipe.probes.items()]
    sets = {
        name: ScoredSet(role, task, _items(recipe, task, source, tokenizer), source.cluster)
        for name, role, task, source in named
    }
    _refuse_shared_validation(sets)
    return tokenizer, sets


def _refuse_shared_validation(sets: dict[str, ScoredSet]) -> None:
    """What learning rates are chosen by must not be what the methods are compared by."""
    if VALIDATION in sets:
        ids = {item["id"] for item in sets[VALIDATION].items}
        tested = {item["id"] for scored in sets.values() if scored.role == "target" for item in scored.items}
        if ids & tested:
            shared = ids & tested
            raise DataError(f"{len(shared)} validation rows are in target.eval too, such as id {min(shared)!r}")


def _rows(recipe: Recipe, source: Source, task: Any, need: Sequence[str]) -> list[Any]:
    return task.select(load_rows(source, recipe.data, recipe.parts, need), source.path or source.hub)


def _items(recipe: Recipe, name: str, source: Source, tokenizer: Any) -> list[Any]:
    """What a task asks of the rows of a source, none of it cut away."""
    task = find_task(name)
    if task.KIND == "text":
        rows = load_rows(source, recipe.data, recipe.parts, [source.column])
        return task.examples(rows, source.column, tokenizer, recipe.train.max_length)
    rows = _rows(recipe, source, task, task.COLUMNS)
    kept = {example.id for example in _answered(recipe, tokenizer, task, rows, False)}
    items = [item for item in map(task.item, rows) if item["id"] in kept]
    twice = [id for id, count in Counter(item["id"] for item in items).items() if count > 1]
    if twice:
        raise DataError(f"{source.path or source.hub}: {len(twice)} ids stand there twice, such as {twice[0]!r}")
    return items


def _answered(recipe: Recipe, tokenizer: Any, task: Any, rows: list[Any], explanation: bool) -> list[Example]:
    length = recipe.train.max_length
    texts = [(str(row["id"]), task.item(row)["prompt"], task.response(row, explanation=explanation)) for row in rows]
    examples = [encode(tokenizer, *text, length, end=True) for text in texts]
    return keep_answered(examples, recipe.train.too_long, length)


def _text_examples(recipe: Recipe, source: Source, tokenizer: Any) -> list[Example]:
    rows = load_rows(source, recipe.data, recipe.parts, [source.column])
    return find_task("perplexity").examples(rows, source.column, tokenizer, recipe.train.max_length)


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
    """Refuse memory options that do not fit the base, looking at its config only, and functions that do not exist."""
    config = _from_base(AutoConfig, recipe)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoder = find_decoder(AutoModelForCausalLM.from_config(config))
    for name, method in recipe.methods.items():
        try:
            methods.find_method(method.kind)
            if method.kind in methods.BESIDE_THE_MLP:
                find_rule(method.rule)
                memory = methods.memory_config(recipe, method)
                layers = memory.layers or default_layers(len(decoder.blocks))
                decoder.mlp_names(layers, replace=memory.mode == "replacement")
        except ConfigError as error:
            raise ConfigError(f"[methods.{name}]: {error}") from error


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
    if recipe.base == "world":
        return loader.from_pretrained(world.BASE, **options)
    looks_like_path = recipe.base.startswith((".", "/", "~")) or recipe.base.count("/") > 1
    if looks_like_path and not Path(recipe.base).is_dir():
        raise ConfigError(f"base = {recipe.base!r}: there is no model folder; give --base a folder or a hub name")
    try:
        return loader.from_pretrained(recipe.base, revision=recipe.revision, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base = {recipe.base!r} cannot be loaded as a causal language model: {error}") from error
