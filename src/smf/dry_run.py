"""What a recipe would load, train and measure, before anything is downloaded or trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import methods
from .base import base_config, check_models, load_tokenizer, naming_layers, on_this_machine
from .costs import Passes, costs_of, model_of, skeleton
from .data import Example, ScoredSet, encode
from .doubts import warmup_doubts
from .epoch_cache import disk_bytes
from .errors import HubError, SmfError
from .harness import check_name
from .loop import training_steps
from .loss import positions_at_once
from .memory import memory_layers
from .prepare import (
    check_output,
    check_target,
    document_length,
    heals,
    load_documents,
    load_set,
    load_text,
    load_training,
    refuse_scored,
    refuse_shared_validation,
    refuse_trained,
    replays,
    scored_rows,
    training_rows,
)
from .recipe import UNTRAINED, Asked, Method, Recipe, asked, sources
from .sources import CACHE, load_texts, place
from .tasks import find_task, harness_task

LOGITS = 2 * 4  # bytes of a logit of scoring, beside the logits themselves: in float32, and its softmax
LONG = 1000  # steps of a training, where nobody knows them


@dataclass
class Plan:
    """What a dry run found.

    Args:
        base: what there is to say of the base.
        sets: of each set that is read: table of the recipe, file or data set, rows, tokens, and what it is scored by.
        methods: of each method: kind, learning rate, trained numbers, steps, memory in GiB.
        doubts: what speaks against it, though it would run.
        problems: what would stop the run.
        unchecked: what could not be looked at, and why.
    """

    base: dict[str, str] = field(default_factory=dict)
    sets: list[tuple[str, str, str, str, str]] = field(default_factory=list)
    methods: list[tuple[str, str, str, str, str, str]] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def verdict(self) -> str:
        """Whether something would stop the run, in words."""
        if not self.problems:
            return "Nothing here would stop this run" + (", but what is not checked may" if self.unchecked else "")
        several = len(self.problems) > 1
        return f"{len(self.problems)} problem{'s' * several} would stop this run; {'they are' if several else 'it is'}"


def dry_run(recipe: Recipe) -> Plan:
    """Look at everything that lies on this machine, and at nothing on the hub but its cache."""
    plan, tokenizer, config = Plan(), None, None
    _try(plan, lambda: check_output(Path(recipe.output), make=False))
    _try(plan, lambda: check_target(recipe))
    here = _try(plan, lambda: on_this_machine(recipe))
    if here:
        _try(plan, lambda: check_models(recipe))
        tokenizer, config = _try(plan, lambda: load_tokenizer(recipe)), _try(plan, lambda: base_config(recipe))
    elif here is not None:
        plan.unchecked.append(f"the base {recipe.base} is on the hub and not in its cache: its layers, sizes, tokens")
    plan.base = _about_base(recipe, config, tokenizer)
    found = _look_at_data(plan, recipe, tokenizer)
    examples, longest = _amounts(recipe, found)
    _look_at_disk(plan, recipe, config, found.get("target.train"))
    steps = _try(plan, lambda: _steps(recipe, examples))
    if steps is not None:
        plan.doubts += warmup_doubts(recipe.train.warmup_steps, steps)
    counted: dict[str, Passes] = {}
    for name, method in recipe.methods.items():
        trained = None if config is None else _try(plan, lambda name=name: _trained(recipe, name, config))
        about = _about_method(recipe, method, config, steps, longest, trained, counted)
        plan.methods.append((name, method.kind, *about))
    return plan


def examples_here(recipe: Recipe) -> int | None:
    """How many examples a recipe trains on; None where its data, or its base's tokenizer, is not on this machine."""
    try:
        own = replace(recipe, data=CACHE) if recipe.data == "hub" else recipe
        return len(load_training(own, load_tokenizer(recipe))) if on_this_machine(recipe) else None
    except SmfError:
        return None


def _try(plan: Plan, look: Callable[[], Any]) -> Any:
    try:
        return look()
    except HubError:
        raise
    except SmfError as error:
        if not any(str(error) in known or known in str(error) for known in plan.problems):
            plan.problems.append(str(error))
        return None


def _about_base(recipe: Recipe, config: Any, tokenizer: Any) -> dict[str, str]:
    about = {"base": recipe.base, "revision": recipe.revision, "loaded as": recipe.dtype}
    if config is None:
        return about
    model = skeleton(recipe, config)
    size = sum(p.numel() for p in model.parameters())
    about |= {"architecture": type(model).__name__, "parameters": f"{size:,}"}
    if tokenizer is None:
        return about
    return about | {"answers end with": tokenizer.eos_token or "nothing: the tokenizer has no end-of-sequence token"}


# -- what is read -----------------------------------------------------------------------------------------------------


def _look_at_data(plan: Plan, recipe: Recipe, tokenizer: Any) -> dict[str, Any]:
    """Note every set with its rows and tokens; returns what could be loaded, by its table of the recipe."""
    scores = {each.table: each for each in asked(recipe).values()}
    loaders = _loaders(replace(recipe, data=CACHE) if recipe.data == "hub" else recipe, tokenizer)
    found: dict[str, Any] = {}
    for table, source in sources(recipe).items():
        where = place(source, recipe.data)
        try:
            found[table] = _try(plan, loaders[table])
            if tokenizer is None and table != "background.source":
                plan.unchecked.append(f"[{table}] {where}: its tokens, for want of the base's tokenizer")
        except HubError:
            plan.unchecked.append(f"[{table}] {where}, revision {source.revision}: it is on the hub, not in its cache")
        shown = ", ".join(find_task(scores[table].task).METRICS) if table in scores else ""
        plan.sets.append((table, where, *_size(found.get(table)), shown))
    for each in scores.values():
        if each.table not in sources(recipe):
            _look_at_task(plan, recipe, each)
    if tokenizer is not None:
        _look_for_overlaps(plan, recipe, found)
    else:
        plan.unchecked.append("whether rows are both trained and scored, for want of the base's tokenizer")
    return found


def _amounts(recipe: Recipe, found: dict[str, Any]) -> tuple[int | None, int]:
    """The number of training examples, None where it is unknown, and the tokens of the longest scored sequence."""
    train, sets = found.get("target.train"), [each for each in found.values() if isinstance(each, ScoredSet)]
    lengths = [len(item.ids) for each in sets for item in (*each.items, *each.pages) if isinstance(item, Example)]
    return None if train is None else len(train), max([recipe.train.max_length, *lengths])


def _look_at_disk(plan: Plan, recipe: Recipe, config: Any, train: list[Example] | None) -> None:
    """Whether the disk has room for what `epoch_cache` keeps of the training examples, for the runs at a time."""
    if not recipe.train.epoch_cache or config is None or train is None:
        return
    width, dtype = config.get_text_config().hidden_size, getattr(torch, recipe.dtype)
    needed = disk_bytes((example.ids for example in train), width, dtype) * recipe.jobs
    output = Path(recipe.output).absolute()
    free = shutil.disk_usage(next(place for place in (output, *output.parents) if place.exists())).free
    plan.base["epoch cache"] = f"at most {needed / 2**30:,.2f} GiB of disk, of {free / 2**30:,.2f} GiB free"
    if needed > free:
        plan.problems.append(
            f"epoch_cache = true takes up to {needed / 2**30:,.2f} GiB of disk in {recipe.output}, which has "
            f"{free / 2**30:,.2f} GiB free; make room, or leave it out"
        )


def _loaders(recipe: Recipe, tokenizer: Any) -> dict[str, Callable[[], Any]]:
    """What reads and checks each source, by table; without a tokenizer, its rows alone."""
    scores, own = {each.table: each for each in asked(recipe).values()}, sources(recipe)
    if tokenizer is None:
        loaders: dict[str, Callable[[], Any]] = {"target.train": lambda: training_rows(recipe)}
        loaders |= {table: lambda each=each: scored_rows(recipe, each) for table, each in scores.items()}
    else:
        loaders = {"target.train": lambda: load_training(recipe, tokenizer)}
        loaders |= {table: lambda each=each: load_set(recipe, each, tokenizer) for table, each in scores.items()}
    if recipe.background is not None:
        loaders["background.source"] = lambda: _documents(recipe, tokenizer)
    for table in ("heal.source", "replay.source"):
        if tokenizer is None:
            loaders[table] = lambda table=table: load_texts(own[table], recipe.data, recipe.parts, table)
        else:
            loaders[table] = lambda table=table: load_text(recipe, own[table], tokenizer)
    return loaders


def _documents(recipe: Recipe, tokenizer: Any) -> list[Any]:
    """The background's documents, as tokens where there is a tokenizer."""
    assert recipe.background is not None
    texts = load_documents(recipe, recipe.background.source)
    if tokenizer is None:
        return texts
    length = document_length(recipe)
    return [encode(tokenizer, "", "", text, length, end=False) for text in texts]


def _look_at_task(plan: Plan, recipe: Recipe, each: Asked) -> None:
    """Note a task of lm-evaluation-harness, whose documents it loads by itself."""
    task = harness_task.parse(each.task)
    _try(plan, lambda: check_name(task, recipe.lm_eval_tasks))
    plan.sets.append((each.table, each.task, "?", "?", task.metric or "its first metric"))
    plan.unchecked.append(f"[{each.table}] task {each.task}: lm-evaluation-harness loads its documents")


def _look_for_overlaps(plan: Plan, recipe: Recipe, found: dict[str, Any]) -> None:
    """The refusals of loading that look at several sets, of those that are here."""
    scored = {name: found[each.table] for name, each in asked(recipe).items() if found.get(each.table)}
    _try(plan, lambda: refuse_shared_validation(scored))
    _try(plan, lambda: refuse_trained(recipe, found.get("target.train") or [], scored))
    for what, used in (("heal", heals(recipe)), ("replay", replays(recipe))):
        if used:
            _try(plan, lambda what=what: refuse_scored(what, found.get(f"{what}.source") or [], scored))


def _size(found: Any) -> tuple[str, str]:
    """Number of examples and, where they are tokens, how many these are."""
    if found is None:
        return "?", "?"
    items = found.items if isinstance(found, ScoredSet) else found
    tokens = [len(item.ids) for item in items if isinstance(item, Example)]
    return f"{len(items):,}", f"{sum(tokens):,}, at most {max(tokens):,} each" if tokens else ""


# -- what trains ------------------------------------------------------------------------------------------------------


def _about_method(
    recipe: Recipe,
    method: Method,
    config: Any,
    steps: int | None,
    longest: int,
    trained: Trained | None,
    counted: dict[str, Passes],
) -> tuple[str, str, str, str]:
    """Learning rate, steps, numbers that train and, of a memory, rows a step, and gigabytes of memory, roughly."""
    rate = f"{method.lr:g}" if method.lr else ""
    text = "?" if steps is None else f"{steps:,}"
    if method.kind in UNTRAINED:
        rate, text = "", "0"
    if trained is None:
        return rate, text, "?", "?"
    what = f"{trained.numbers:,}" + (f" ({trained.rows})" if trained.rows else "")
    return rate, text, what, f"{_gigabytes(recipe, method, config, steps or LONG, longest, counted):.1f}"


def _steps(recipe: Recipe, examples: int | None) -> int | None:
    """Of every training; None where nobody knows how many examples there are."""
    known = examples or recipe.train.examples or recipe.train.steps  # whose number does not matter where steps decide
    return training_steps(recipe.train, known) if known else None


class Trained(NamedTuple):
    """Numbers that train, and of a memory which rows."""

    numbers: int
    rows: str = ""


def _trained(recipe: Recipe, name: str, config: Any) -> Trained | None:
    """What a method trains; None where nobody can say before it is made."""
    method = recipe.methods[name]
    with naming_layers(recipe, name):
        model = model_of(recipe, method, config)
    if model is None:
        return None
    trained = {id(p): p.numel() for n, p in model.named_parameters() if p.requires_grad}
    if method.kind not in methods.WITH_MEMORY:
        return Trained(sum(trained.values()))
    memories = memory_layers(model)
    shape = next(iter(memories.values())).shape
    shape.check_room(len(memories))
    numbers = 0 if method.kind == "attached" else model.get_nb_trainable_parameters()[0]
    t = "all" if method.rule == "all" else f"{method.rows_per_step:,}"
    layers = f"{len(memories)} layer{'s' * (len(memories) > 1)}"
    rows = f"{t} of {shape.n_rows:,} rows, {layers}" if method.kind == "smf" else ""
    return Trained(numbers, rows)


def _gigabytes(
    recipe: Recipe, method: Method, config: Any, steps: int, longest: int, counted: dict[str, Passes]
) -> float:
    """What the most of training, healing and scoring holds at a time, without the process itself."""
    costs = costs_of(recipe, method, config, steps, counted)
    assert costs is not None  # what nobody can count has no Trained
    numbers = recipe.eval_batch_size * longest * config.vocab_size
    logits = numbers * (4 if recipe.dtype == "float32" else 2)
    wide = positions_at_once(config.vocab_size, "cuda" if torch.cuda.is_available() else "cpu") * config.vocab_size
    held = [logits + LOGITS * min(numbers, wide) + costs.states]  # of scoring
    if recipe.divergence:
        base = costs_of(recipe, Method(kind="base"), config, steps, counted)
        held[0] += logits + (base.weights if base is not None else 0)  # beside the base
    if method.kind not in UNTRAINED:
        held.append(costs.states + costs.passes)
    healed = costs
    if method.heal:
        healed = costs_of(recipe, replace(method, kind="healed"), config, _healing_steps(recipe), counted)
    if healed is not None and (method.heal or method.kind == "healed"):
        held.append(healed.states + healed.passes)
    return (costs.weights + max(held)) / 2**30


def _healing_steps(recipe: Recipe) -> int:
    return (recipe.heal.steps if recipe.heal else 0) or LONG
