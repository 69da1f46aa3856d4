"""Recipes: what is trained on what, and what is measured. `smf.recipe_file` reads and writes them as TOML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from . import world
from .config import SparseMemoryConfig
from .fingerprint import json_hash, source_hash


@dataclass(frozen=True)
class Source:
    """Where rows come from: a file below the data folder, or a data set on the hub; and which of them."""

    path: str = ""
    """File below `data`: .jsonl, .jsonl.gz, .csv or .parquet; of the embedded world, the name of a set."""
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
    where: dict[str, list[Any]] = field(default_factory=dict)
    """Use only the rows whose columns hold one of these values."""
    min_chars: int = 0
    """Use only the rows whose text has so many characters."""
    sample: int = 0
    """Of these rows use so many different ones, drawn by the hash of their text wherever in a file they are; 0: all."""
    limit: int = 0
    """Use the first of these rows only; 0: all."""
    part: str = ""
    """Of the first rows, use those that the hash of their text puts into this part of [parts]."""
    first: int = 0
    """Of what is left, use the first so many; 0: all."""
    task: str = ""
    """In target.eval: score this set with another task than the target's."""
    form: str = ""
    """Of the task `facts`: how to ask, "held-out" or "seen"."""
    cluster: str = ""
    """Rows whose ids agree up to the first such text are about one thing; intervals draw them together."""


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
    max_skipped: int = 3
    """Steps with a loss or gradient that is not finite are skipped; more of them than this end the training."""
    examples: int = 0
    """Train on so many examples, drawn from the seed; 0: all."""
    save_every: int = 100
    """Steps between checkpoints that a killed run goes on from."""
    epoch_cache: bool = False
    """Keep on disk, for later epochs, what the frozen layers below the first that trains make of each example."""
    score_at: list[float] = field(default_factory=list)
    """Shares of the steps after which to score too, besides the end."""


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
    """Rows by which learning rates are chosen; shares no row with `eval`."""
    metrics: list[str] = field(default_factory=lambda: ["acc"])
    """Scores to show; learning rates are chosen by the first."""
    explanation: bool = True
    """Whether the explanation, where there is one, follows the answer in training."""
    recall: bool = False
    """Whether rows that are trained may be scored too, to ask for what was read word by word."""


@dataclass(frozen=True)
class Probe:
    """What must not be forgotten."""

    task: str = "perplexity"
    """Name of a task in smf.tasks."""
    source: Source = field(default_factory=Source)
    """Rows to score on."""
    window: int = 0
    """Tokens of a window of plain text, or of a response with its prompt; 0: max_length of [train]; of `wikitext` and
    `gsm8k_loss`, 1024 or as many as the base reads."""


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
class ReplayOptions:
    """General text that methods with `replay` train on beside the target."""

    source: Source = field(default_factory=Source)
    """Rows with the text; none of it may be scored."""


@dataclass(frozen=True)
class Method:
    """One row of the table: what trains, and how."""

    kind: str = "smf"
    """base: nothing trains; smf: memory rows; attached: a memory that nothing trains; healed: the whole memory, on
    general text alone; dense-addon: a gated MLP beside the same layers; lora, oft, osf, shira: of PEFT, on all linear
    layers; full: every weight; or a function of your own, as "module:function" (docs/methods.md)."""
    lr: float = 0.0
    """Learning rate."""
    replay: float = 0.0
    """Share of the training examples that are general text of [replay], in place of the target's."""
    layers: list[int] | None = None
    """smf, attached, healed, dense-addon: decoder layers, in place of [memory]'s; lora, oft, osf,
    shira: only these, in place of all."""
    lr_other: float = 0.0
    """smf: learning rate of other trainable parameters (scale); 0: lr."""
    rule: str = "kl"
    """smf: kl, tfidf, tf, random or all."""
    reads: Literal["hits", "gradient"] = "hits"
    """smf: what a read counts."""
    update: Literal["adam", "sgd", "masked-adam"] = "adam"
    """smf: the row update."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """smf: of adam: how much of a row's gradient, and of its square, stays from the steps before that chose it."""
    select_every: Literal["step", "micro"] = "step"
    """smf: choose rows once a step, or once a micro-batch."""
    rows_per_step: int = 512
    """smf: rows updated a step and layer."""
    train: Literal["rows", "rows+scale"] = "rows"
    """smf: what trains."""
    provenance: bool = False
    """smf: keep in the patch which examples wrote which rows."""
    heal: bool = False
    """smf: train the whole memory as [heal] says first."""
    memory: MemoryOptions | None = None
    """smf, attached, healed, dense-addon: another memory than the recipe's."""
    r: int = 16
    """lora: rank; shira: r of PEFT's config."""
    alpha: float = 32.0
    """lora: scaling."""
    dropout: float = 0.0
    """lora: dropout."""
    options: dict[str, Any] = field(default_factory=dict)
    """lora, oft, osf, shira: more keys of PEFT's config; a function of your own: whatever it reads."""
    axes: dict[str, list[Any]] = field(default_factory=dict)
    """Keys of this method with several values each: one method is made of every combination."""

    def code(self) -> str | None:
        """Hash of the module of a function of one's own; None for kinds of ours."""
        module, own, _ = self.kind.partition(":")
        return source_hash(module) if own else None


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
    match: list[str] = field(default_factory=list)
    """Methods that learn as much as they can; every other one stands at its lowest learning rate that learns as much as
    the best of these. None: all at the rates that learn most."""
    jobs: int = 1
    """Methods that run at a time, with an equal share of the processor's cores each."""
    eval_batch_size: int = 16
    """Sequences of a forward pass when scoring."""
    lm_eval_tasks: str = ""
    """Folder with task files of your own for lm-evaluation-harness, beside its own tasks."""
    divergence: int = 0
    """Examples of each target set and text probe on which to measure how far the model moved from the base (KL)."""
    parts: dict[str, float] = field(default_factory=dict)
    """Shares of a text collection by hash of the text; the parts of one collection are disjoint."""
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    target: Target = field(default_factory=Target)
    background: BackgroundOptions | None = None
    heal: HealOptions | None = None
    replay: ReplayOptions | None = None
    probes: dict[str, Probe] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)

    def run_id(self, method: str) -> str:
        """Name of the folder of one method's run: it changes with every key that can change its result.

        What files hold is not looked at, but for the module of a method of one's own: another model or data under the
        same name needs another output folder.
        """
        own = dataclasses.asdict(self.methods[method])
        own = {key: value for key, value in own.items() if key not in LATER or value != LATER[key]}
        keys = self._shared() | {"seed": self.seed, "method": own}
        code = self.methods[method].code()
        if code is not None:
            keys["source"] = code
        return f"{method}-{json_hash(keys)[:10]}"

    def healing_id(self, method: Method) -> str:
        """Hash of all that decides how a method's memory is healed."""
        keys = dataclasses.asdict(self)
        kept = ("base", "revision", "dtype", "data", "parts", "heal", "train", "seed")
        memory = dataclasses.asdict(method.memory or self.memory) | ({"layers": method.layers} if method.layers else {})
        return json_hash([world.HASH, memory, _without_later({key: keys[key] for key in kept})])[:10]

    def comparison_id(self) -> str:
        """Hash of all that runs must share to stand in one table: everything but method and seed."""
        return json_hash(self._shared())[:10]

    def _shared(self) -> dict[str, Any]:
        keys = dataclasses.asdict(self)
        for key in ("methods", "seed", "about", "output", "jobs", "match"):
            keys.pop(key)
        keys["target"].pop("metrics")  # which of the scores are shown
        if "world" in (self.base, self.data):
            keys["world"] = world.HASH
        return _without_later(keys)


LATER = {
    "where": {},
    "min_chars": 0,
    "sample": 0,
    "first": 0,
    "task": "",
    "form": "",
    "window": 0,
    "max_skipped": 3,
    "examples": 0,
    "recall": False,
    "lm_eval_tasks": "",
    "provenance": False,
    "betas": [0.9, 0.999],
    "epoch_cache": False,
}  # keys that recipes did not always have, and what they are where a recipe leaves them out


def _without_later(keys: dict[str, Any]) -> dict[str, Any]:
    """Without keys that were added later and are left out, so that runs of before keep their names."""
    return {
        key: _without_later(value) if isinstance(value, dict) else value
        for key, value in keys.items()
        if key not in LATER or value != LATER[key]
    }


VALIDATION = "validation"  # name of the set that learning rates are chosen by


@dataclass(frozen=True)
class Asked:
    """A set that a recipe scores.

    Args:
        table: of the recipe.
        role: "target", "validation" or "probe".
        task: name of its task.
        source: its rows.
        window: tokens of a window of plain text, or of a response with its prompt; 0: the task's own.
    """

    table: str
    role: str
    task: str
    source: Source
    window: int = 0


def asked(recipe: Recipe) -> dict[str, Asked]:
    """All that a recipe scores, by the names that tables show."""
    target = recipe.target
    found = {n: Asked(f"target.eval.{n}", "target", s.task or target.task, s) for n, s in target.eval.items()}
    if target.validation is not None:
        found[VALIDATION] = Asked("target.validation", "validation", target.task, target.validation)
    for name, probe in recipe.probes.items():
        found[name] = Asked(f"probes.{name}.source", "probe", probe.task, probe.source, probe.window)
    return found


UNTRAINED = ("base", "attached", "healed")  # kinds that train nothing on the target, and so have no rate


def sources(recipe: Recipe) -> dict[str, Source]:
    """All rows that a recipe reads, by its tables; what lm-evaluation-harness loads by itself is not among them."""
    found = {"target.train": recipe.target.train}
    found |= {each.table: each.source for each in asked(recipe).values() if not each.task.startswith("lm_eval:")}
    for name, table in (("background", recipe.background), ("heal", recipe.heal), ("replay", recipe.replay)):
        if table is not None:
            found[f"{name}.source"] = table.source
    return found


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with every training cut to so many steps at most (where epochs decide: to exactly so many)."""
    train, heal = recipe.train, recipe.heal
    few = min(steps, train.steps or steps)
    train = replace(train, steps=few, warmup_steps=min(train.warmup_steps, few // 2))
    return replace(recipe, train=train, heal=heal and replace(heal, steps=min(steps, heal.steps or steps)))


def limited(recipe: Recipe, rows: int) -> Recipe:
    """The recipe with every scored set cut to its first rows; 0: with all of them, whatever its limits."""

    def cut(source: Source) -> Source:
        return replace(source, first=rows) if rows else replace(source, first=0, limit=0)

    target, probes = recipe.target, recipe.probes
    target = replace(
        target,
        eval={name: cut(source) for name, source in target.eval.items()},
        validation=target.validation and cut(target.validation),
    )
    return replace(
        recipe, target=target, probes={name: replace(probe, source=cut(probe.source)) for name, probe in probes.items()}
    )
