"""Recipes: one TOML file that says what is trained on what, and what is measured. Every key is checked before work."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from . import world
from .adapter import SparseMemoryConfig
from .errors import ConfigError
from .fingerprint import json_hash

SHIPPED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Source:
    """Where rows come from: a file below the data folder, or a data set on the hub."""

    path: str = ""
    """File below `data`, .jsonl or .jsonl.gz; of the embedded world, the name of a set."""
    hub: str = ""
    """Name on the hub, used where the recipe's `data` is "hub"."""
    config: str = ""
    """The hub data set's configuration."""
    split: str = "train"
    """The hub data set's split."""
    revision: str = "main"
    """The hub data set's revision."""
    column: str = "text"
    """Column with the text, for tasks that read plain text."""
    part: str = ""
    """Use only the rows that the hash of their text puts into this part of [parts]."""
    limit: int = 0
    """Use the first rows only (before the choice of a part); 0: all."""


@dataclass(frozen=True)
class MemoryOptions:
    """How the memory of the smf methods is attached: options of `SparseMemoryConfig`, with its defaults."""

    layers: list[int] | None = SparseMemoryConfig.layers
    n_keys: int = SparseMemoryConfig.n_keys
    heads: int = SparseMemoryConfig.heads
    knn: int = SparseMemoryConfig.knn
    k_dim: int = SparseMemoryConfig.k_dim
    mode: str = SparseMemoryConfig.mode
    init: str = SparseMemoryConfig.init
    table_dtype: str = SparseMemoryConfig.table_dtype


@dataclass(frozen=True)
class TrainOptions:
    """The training that all methods share."""

    steps: int = 0
    """Optimizer steps; 0: `epochs` decides."""
    epochs: float = 1.0
    """Passes over the training examples, where steps is 0."""
    batch_size: int = 16
    """Examples of a step."""
    micro_batch_size: int = 16
    """Examples of a forward pass; the step accumulates over batch_size / micro_batch_size of them."""
    max_length: int = 512
    """Tokens of an example; what is longer is cut."""
    too_long: Literal["error", "drop"] = "error"
    """What to do with an example whose answer is cut away."""
    loss: Literal["answer", "full"] = "answer"
    """Which tokens are learned: those of the answer, or all."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Clipping of the gradient's norm; 0: none."""
    save_every: int = 100
    """Steps between checkpoints."""


@dataclass(frozen=True)
class Target:
    """What is to be learned."""

    task: str = "medmcqa"
    """Name of a task in smf.tasks."""
    train: Source = field(default_factory=Source)
    """Rows to learn from."""
    eval: dict[str, Source] = field(default_factory=dict)
    """Rows to score on, by the name that tables give them."""
    validation: Source | None = None
    """Rows by which `smf tune` chooses learning rates; shares no row with `eval`."""
    metrics: list[str] = field(default_factory=lambda: ["acc"])
    """Scores to show; `smf tune` chooses by the first."""
    explanation: bool = True
    """Whether the explanation, where there is one, follows the answer in training."""


@dataclass(frozen=True)
class Probe:
    """What must not be forgotten."""

    task: str = "perplexity"
    """Name of a task in smf.tasks."""
    source: Source = field(default_factory=Source)
    """Rows to score on."""


@dataclass(frozen=True)
class BackgroundOptions:
    """General text that the rules weigh the step's reads against."""

    source: Source = field(default_factory=Source)
    """Rows with the text."""
    max_length: int = 512
    """Tokens of a document."""


@dataclass(frozen=True)
class HealOptions:
    """Training of the whole memory on general text, before methods with heal = true."""

    source: Source = field(default_factory=Source)
    """Rows with the text."""
    steps: int = 0
    """Optimizer steps; 0: `epochs` decides."""
    epochs: float = 1.0
    """Passes over the text, where steps is 0."""
    lr: float = 5e-4
    """Learning rate of table and all other memory parameters."""


@dataclass(frozen=True)
class Method:
    """One row of the table: what trains, and how."""

    kind: Literal["base", "smf", "lora", "full"] = "smf"
    """base: nothing trains; smf: memory rows; lora: PEFT's LoRA on all linear layers; full: every weight."""
    lr: float = 0.0
    """Learning rate."""
    lr_other: float = 0.0
    """smf: learning rate of other trainable parameters (scale); 0: lr."""
    rule: str = "kl"
    """smf: kl, tfidf, tf, random or all."""
    reads: Literal["hits", "gradient"] = "hits"
    """smf: what a read counts."""
    update: Literal["adam", "sgd", "masked-adam"] = "adam"
    """smf: the row update."""
    select_every: Literal["step", "micro"] = "step"
    """smf: choose rows once a step, or once a micro-batch."""
    rows_per_step: int = 512
    """smf: rows updated a step and layer."""
    train: Literal["rows", "rows+scale"] = "rows"
    """smf: what trains."""
    heal: bool = False
    """smf: train the whole memory as [heal] says first."""
    memory: MemoryOptions | None = None
    """smf: another memory than the recipe's."""
    r: int = 16
    """lora: rank."""
    alpha: float = 32.0
    """lora: scaling."""
    dropout: float = 0.0
    """lora: dropout."""


@dataclass(frozen=True)
class Recipe:
    """A whole comparison."""

    base: str = ""
    """Folder or hub name of the base model, or "world": the one that is shipped."""
    revision: str = "main"
    """The base's revision on the hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the base is loaded as."""
    data: str = "hub"
    """Folder that the sources' paths are below, "hub", or "world": the embedded world (smf.world)."""
    about: list[str] = field(default_factory=list)
    """What the recipe compares and scores, for those who read its report."""
    output: str = "runs"
    """Folder of the runs."""
    seed: int = 0
    """Of data order and all initial values."""
    jobs: int = 1
    """Methods that run at a time, with an equal share of the processor's cores each."""
    eval_batch_size: int = 16
    """Sequences of a forward pass when scoring."""
    parts: dict[str, float] = field(default_factory=dict)
    """Shares of a text collection by hash of the text; the parts of one collection are disjoint."""
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    target: Target = field(default_factory=Target)
    background: BackgroundOptions | None = None
    heal: HealOptions | None = None
    probes: dict[str, Probe] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)

    def run_id(self, method: str) -> str:
        """Name of the folder of one method's run: it changes with every key that can change its result.

        What files hold is not looked at: another model or data under the same name needs another output folder.
        """
        keys = dataclasses.asdict(self)
        keys["methods"] = keys["methods"][method]
        for key in ("about", "output", "jobs"):
            keys.pop(key)
        for key in ("metrics", "validation"):  # what is shown, and what `smf tune` looks at
            keys["target"].pop(key)
        if "world" in (self.base, self.data):
            keys["world"] = world.HASH
        return f"{method}-{json_hash(keys)[:10]}"


def find_recipe(path: str | Path) -> Path:
    """The file at `path`, or the shipped recipe of that file name."""
    candidates = [Path(path)]
    if Path(path).parent in (Path(), Path("recipes")):  # a mistyped folder must not find another file of that name
        candidates += [SHIPPED / Path(path).name, (SHIPPED / Path(path).name).with_suffix(".toml")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = sorted(p.name for p in SHIPPED.glob("*.toml"))
    raise ConfigError(f"no recipe at {path}, and none of that name is shipped; shipped recipes: {names}")


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Read and check a recipe; `overrides` replace its keys where they are not None.

    Raises:
        ConfigError: for a file that is not TOML, an unknown key (with the nearest name), or a value that cannot be.
    """
    file = find_recipe(path)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    table |= {key: value for key, value in overrides.items() if value is not None}
    recipe = _build(Recipe, table, str(file.name))
    _check(recipe, file.name)
    return recipe


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with every training cut to so many steps at most (where epochs decide: to exactly so many)."""
    train, heal = recipe.train, recipe.heal
    few = min(steps, train.steps or steps)
    train = replace(train, steps=few, warmup_steps=min(train.warmup_steps, few // 2))
    return replace(recipe, train=train, heal=heal and replace(heal, steps=min(steps, heal.steps or steps)))


def limited(recipe: Recipe, rows: int) -> Recipe:
    """The recipe with every scored set cut to its first rows; 0: all of them."""

    def cut(source: Source) -> Source:
        return replace(source, limit=rows)

    target, probes = recipe.target, recipe.probes
    target = replace(
        target,
        eval={name: cut(source) for name, source in target.eval.items()},
        validation=target.validation and cut(target.validation),
    )
    return replace(
        recipe, target=target, probes={name: replace(probe, source=cut(probe.source)) for name, probe in probes.items()}
    )


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, every key written out; `load_recipe` reads it back equal."""
    lines: list[str] = []
    _write_table(dataclasses.asdict(recipe), [], lines)
    return "\n".join(lines) + "\n"


def _write_table(table: dict[str, Any], path: list[str], lines: list[str]) -> None:
    if path:
        lines += ["", f"[{'.'.join(path)}]"]
    lines += [f"{k} = {_value(v)}" for k, v in table.items() if v is not None and not isinstance(v, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            _write_table(value, [*path, _key(key)], lines)


def _key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # a TOML basic string: JSON's escapes are a subset of its own, but for \u007f
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)


def _build(cls: type, table: Any, where: str) -> Any:
    """A dataclass from a TOML table; unknown keys and wrong types are refused by name."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table; got {table!r}")
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{where}: unknown key {key!r}; did you mean {near!r}? Keys: {', '.join(hints)}")
    return cls(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in table.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # X | None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} = {value!r}; expected one of {list(arguments)}")
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a table; got {value!r}")
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list; got {value!r}")
        return [_convert(arguments[0], item, where) for item in value]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where} = {value!r}; expected {hint.__name__}, got {type(value).__name__}")
    return value


AT_LEAST_ONE = {
    "batch_size",
    "micro_batch_size",
    "max_length",
    "save_every",
    "jobs",
    "eval_batch_size",
    "rows_per_step",
    "r",
}


def _check_numbers(table: dict[str, Any], where: str) -> None:
    """Every number of a recipe is finite and not negative (but for layer indices, which the model checks)."""
    for key, value in table.items():
        if isinstance(value, dict):
            _check_numbers(value, f"{where}: {key}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            least = 1 if key in AT_LEAST_ONE else 0
            if not least <= value < float("inf"):
                raise ConfigError(f"{where}: {key} = {value}; expected a finite number of at least {least}")


def _check(recipe: Recipe, where: str) -> None:
    train = recipe.train
    _check_numbers(dataclasses.asdict(recipe), where)
    if train.batch_size % train.micro_batch_size:
        raise ConfigError(
            f"{where}: batch_size = {train.batch_size} is not a multiple of micro_batch_size = {train.micro_batch_size}"
        )
    both = set(recipe.target.eval) & set(recipe.probes)
    if both:
        raise ConfigError(f"{where}: {sorted(both)[0]!r} names a set of target.eval and a probe; give them two names")
    if not recipe.methods:
        raise ConfigError(f"{where}: no [methods.NAME] table, so there is nothing to compare")
    if any(share < 0 for share in recipe.parts.values()) or sum(recipe.parts.values()) > 1 + 1e-9:
        raise ConfigError(f"{where}: [parts] must be shares that add up to 1 at most; got {recipe.parts}")
    for name, method in recipe.methods.items():
        if method.kind != "base" and method.lr <= 0:
            raise ConfigError(f"{where}: [methods.{name}] lr = {method.lr}; expected a number above 0")
        if method.heal and recipe.heal is None:
            raise ConfigError(f"{where}: [methods.{name}] heal = true needs a [heal] table that says on what text")
        if method.kind == "smf" and method.rule in ("kl", "tfidf") and recipe.background is None:
            raise ConfigError(f"{where}: [methods.{name}] rule = {method.rule!r} needs a [background] table")
