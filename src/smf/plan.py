"""What a recipe would take here, and larger models and tables: costs that are counted, at speeds that are measured."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from . import methods
from .base import base_config, check_length, load_base, on_this_machine
from .costs import COUNTED, Costs, costs_of
from .data import Loaded
from .dry_run import examples_here
from .errors import ConfigError, refusing
from .loop import training_steps
from .loss import MeanTokenLoss
from .optimizer import SparseMemoryOptimizer
from .recipe import UNTRAINED, MemoryOptions, Method, Recipe
from .shape import available_memory


def _shape(width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}


BACKBONES = {  # shapes of Qwen2.5 (arXiv 2412.15115, table 1)
    "0.5B": _shape(896, 4864, 24, 14, 2, 151936, True),
    "1.5B": _shape(1536, 8960, 28, 12, 2, 151936, True),
    "7B": _shape(3584, 18944, 28, 28, 4, 152064, False),
    "72B": _shape(8192, 29568, 80, 64, 8, 152064, False),
}
STAND_IN = _shape(512, 1536, 8, 8, 2, 16384, True)
TINY = _shape(32, 32, 3, 2, 2, 64, True)
TINY_MEMORY = MemoryOptions(n_keys=16, heads=2, knn=2, k_dim=8)
USUAL_KEYS = 128  # n_keys of a memory that is measured where the recipe's own does not fit
TABLES = (128, 512, 1024)  # n_keys: 16k, 262k and 1M rows
KINDS = ("smf", "lora", "full")  # whose speeds are measured
GIB = 2**30
TOKENS = 128  # of a measured step, at most
STEPS = 2  # that are measured, after one that is not
UNKNOWN = 1000  # steps of a training whose length depends on data that is not here


@dataclass(frozen=True)
class Measured:
    """What a few steps of one method took, in a process of their own.

    Args:
        passes: seconds of a step's forward and backward pass; the least, since whatever else runs only adds.
        step: seconds of its optimizer; the least.
        product: FLOPs a second of a plain matrix product of the model's width.
        before: bytes of the process without the model.
        peak: bytes at most.
        costs: as counted.
    """

    passes: float
    step: float
    product: float
    before: int
    peak: int
    costs: Costs

    @property
    def efficiency(self) -> float:
        """Speed of the passes as a share of the plain product's."""
        return self.costs.flops / self.passes / self.product


@dataclass(frozen=True)
class Prediction:
    """A method on a model.

    Args:
        model: its name.
        method: its name.
        rows: of the memory's table; 0 without one.
        costs: as counted.
        memory: bytes at most, the process itself included.
        seconds: of a step here; None where nothing trains, it does not fit, or nothing was measured.
    """

    model: str
    method: str
    rows: int
    costs: Costs
    memory: int
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Args:
        about: what was measured, and what is extrapolated.
        measured: by kind of method.
        recipe: its methods on its own base; empty where that is not on this machine.
        larger: other models and tables.
    """

    about: list[str]
    measured: dict[str, Measured]
    recipe: list[Prediction]
    larger: list[Prediction]


def plan(recipe: Recipe, larger: bool = False) -> Plan:
    """Count, measure, predict.

    Args:
        recipe: whose methods are looked at.
        larger: count other models and tables too, which takes minutes; done in any case where the base is not here.

    Raises:
        ConfigError: for sizes that nothing can have, and examples longer than the base reads.
    """
    here = on_this_machine(recipe)
    config = base_config(recipe) if here else None
    if here:
        check_length(recipe)
    measured, about = calibrate(short(recipe), config)
    steps = _steps(recipe, about)
    found: list[Prediction] = []
    if here:
        for name, method in recipe.methods.items():
            made = predict(recipe, name, method, config, recipe.base, steps, measured)
            found += made
            about += _unsaid(name, method, made)
    else:
        about.append(f"the base {recipe.base} is not on this machine: its methods are predicted on other shapes only")
    return Plan(about, measured, found, _larger(recipe, steps, measured, about) if larger or not here else [])


def _unsaid(name: str, method: Method, made: Sequence[Prediction]) -> list[str]:
    """Why a method of the recipe has no prediction, or one without seconds."""
    if not made:
        try:
            methods.find_method(method.kind)
        except ConfigError as error:
            return [f"{name} is not counted, and would not run: {error}"]
        return [f"{name} is not counted: what kind {method.kind!r} trains is known once it is made"]
    needed, room = made[0].memory, available_memory()
    if method.kind in UNTRAINED or made[0].seconds is not None:
        return []
    if needed < room:
        return [f"{name}: no seconds, since nothing like it was measured"]
    return [f"{name}: no seconds, since it takes {needed / GIB:,.1f} GiB; this machine has {room / GIB:,.1f} GiB left"]


def _larger(recipe: Recipe, steps: int, measured: dict[str, Measured], about: list[str]) -> list[Prediction]:
    """The recipe's first method of each kind on `BACKBONES`, with tables of each size."""
    found: list[Prediction] = []
    wide = replace(recipe, dtype="bfloat16")
    for shape, sizes in BACKBONES.items():
        config = Qwen2Config(**sizes)
        for name, method in _of_each_kind(recipe).items():
            for n_keys in TABLES if method.kind == "smf" else (0,):
                print(f"smf: counting {name} on {shape}", file=sys.stderr)
                more = replace(method, layers=None, memory=_table(recipe, method, n_keys))
                found += predict(wide, name, more, config, shape, steps, measured)
    about.append(
        f"larger models: shapes of Qwen2.5 in bfloat16, {', '.join(BACKBONES)}, with a memory at three layers; of them "
        "nothing is measured but a matrix product of their width"
    )
    return found


def _steps(recipe: Recipe, about: list[str]) -> int:
    options = recipe.train
    examples = options.steps or examples_here(recipe) or options.examples  # whose number does not matter beside steps
    if not examples:
        about.append(f"the recipe trains for epochs of data that is not on this machine: taken as {UNKNOWN:,} steps")
        return UNKNOWN
    try:
        return training_steps(options, examples)
    except ConfigError as error:  # what it would take can be said all the same
        about.append(f"the recipe would not run: {error}")
        return options.steps or UNKNOWN


def _table(recipe: Recipe, method: Method, n_keys: int) -> MemoryOptions | None:
    options = method.memory or recipe.memory
    return replace(options, layers=None, n_keys=max(n_keys, options.knn)) if n_keys else method.memory


def _of_each_kind(recipe: Recipe) -> dict[str, Method]:
    """The recipe's first method of each of `KINDS`; where it has none, one with usual options."""
    usual = {"smf": Method(), "lora": Method(kind="lora"), "full": Method(kind="full")}
    found = {}
    for kind in KINDS:
        own = [(name, m) for name, m in recipe.methods.items() if m.kind == kind and m.rule != "all"]
        name, method = own[0] if own else (kind, usual[kind])
        found[name] = method
    return found


def predict(
    recipe: Recipe, name: str, method: Method, config: Any, model: str, steps: int, measured: dict[str, Measured]
) -> list[Prediction]:
    """A method on the base of a configuration; nothing where nobody can count it."""
    with refusing(ConfigError, f"[methods.{name}] cannot be counted"):
        costs = costs_of(recipe, method, config, steps)
    if costs is None:
        return []
    memory = method.memory or recipe.memory
    rows = memory.n_keys**2 if costs.table else 0
    like = measured.get(method.kind if method.kind in KINDS else "smf")
    total = costs.memory + (0 if like is None else like.before)
    steps_here = method.kind not in UNTRAINED and total < available_memory()
    width = getattr(config, "hidden_size", 0)
    seconds = None if like is None or not steps_here or not width else seconds_of(costs, like, width, recipe)
    return [Prediction(model, name, rows, costs, total, seconds)]


def seconds_of(costs: Costs, like: Measured, width: int, recipe: Recipe) -> float:
    """Of a step: passes as efficient as the measured ones, at the speed of products of this width; the optimizer by
    the numbers and reads that it looks at."""
    tokens = recipe.train.micro_batch_size * recipe.train.max_length
    passes = costs.flops / (like.efficiency * product_speed(width, min(tokens, 4 * TOKENS), recipe.dtype))
    work, before = (each.numbers + 2 * each.reads for each in (costs, like.costs))
    return passes + like.step * (work / before if before else 0.0)


# -- measuring --------------------------------------------------------------------------------------------------------


def short(recipe: Recipe) -> Recipe:
    """The recipe with steps that take seconds."""
    length = min(recipe.train.max_length, TOKENS)
    rows = max(1, min(recipe.train.micro_batch_size, TOKENS // length))
    return replace(recipe, train=replace(recipe.train, max_length=length, micro_batch_size=rows, batch_size=rows))


def calibrate(recipe: Recipe, config: Any) -> tuple[dict[str, Measured], list[str]]:
    """Some steps of each of `KINDS`, and what was done.

    Measured is what fits: the recipe's first method of a kind on its base, if that is here (`config`), or on a
    stand-in; or else a usual method on the stand-in.
    """
    found, on = {}, dict[str, list[str]]()
    for name, method in _of_each_kind(recipe).items():
        print(f"smf: measuring {name}", file=sys.stderr)
        memory = replace(method.memory or recipe.memory, layers=None)
        anywhere = replace(method, layers=None, memory=memory)  # the stand-in has other layers than the base
        usual = Method(kind=method.kind, memory=MemoryOptions(n_keys=USUAL_KEYS))
        stand_in, own = Qwen2Config(**STAND_IN), f"the recipe's base {recipe.base}"
        other = "a stand-in of 8 layers of width 512"
        if config is not None and _fits(recipe, name, method, config):
            found[method.kind], where = measure_alone(recipe, method, None), own
        elif _fits(recipe, name, anywhere, stand_in):
            found[method.kind], where = measure_alone(recipe, anywhere, stand_in), other
        elif _fits(recipe, name, usual, stand_in):
            what = f"{other} with usual options, since {name} does not fit"
            found[method.kind], where = measure_alone(recipe, usual, stand_in), what
        else:
            continue
        on.setdefault(where, []).append(method.kind)
    what = "; ".join(f"{', '.join(kinds)} on {where}" for where, kinds in on.items()) or "nothing, for want of memory"
    tokens = recipe.train.micro_batch_size * recipe.train.max_length
    about = [
        f"measured: {STEPS} steps each of {what}; of {tokens} random tokens, rows by rule "
        f"tf, with {torch.get_num_threads()} threads, {'cuda' if torch.cuda.is_available() else 'cpu'}",
        "counted, on tensors without numbers: FLOPs and bytes of passes; known: bytes of states, files, exchange. Every"
        " example is as long as max_length, and every token learned; of rows, the most that can be chosen",
        "extrapolated: seconds, by the counted FLOPs and a matrix product of the model's width, which is measured; of "
        f"micro-batches of more than {COUNTED:,} tokens, passes by those of fewer sequences",
    ]
    return found, about


def _fits(recipe: Recipe, name: str, method: Method, config: Any) -> bool:
    """Whether measuring a method takes no more than half of what is left."""
    with refusing(ConfigError, f"[methods.{name}] cannot be counted"):
        costs = costs_of(recipe, method, config, 1 + STEPS)
    return costs is not None and costs.memory < available_memory() / 2


def measure_alone(recipe: Recipe, method: Method, config: Any, steps: int = STEPS) -> Measured:
    """`measure` in a process of its own, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        return alone.submit(measure, recipe, method, config, steps, torch.get_num_threads()).result()


def measure(recipe: Recipe, method: Method, config: Any, steps: int, threads: int) -> Measured:
    """Steps of a method on random tokens.

    Args:
        recipe: whose base, dtype and sizes of a step count.
        method: of one of `KINDS`.
        config: of random weights; None: the recipe's base.
        steps: that are measured, after one that is not.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    few = replace(recipe, train=replace(recipe.train, micro_batch_size=1, max_length=8))
    _train(few, replace(method, layers=None, memory=TINY_MEMORY), _random(recipe, Qwen2Config(**TINY)), 2)
    before = 0 if device == "cuda" else _resident("VmRSS")  # with all that is loaded when it is first used
    base = load_base(recipe) if config is None else _random(recipe, config)
    config = base_config(recipe) if config is None else config
    _forget_peak(device)
    times = _train(recipe, method, base, 1 + steps)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")
    costs = costs_of(recipe, method, config, 1 + steps)
    if costs is None:
        raise ConfigError(f"kind = {method.kind!r}: its costs cannot be counted")
    passes, stepping = (min(each) for each in zip(*times[1:], strict=True))
    tokens = recipe.train.micro_batch_size * recipe.train.max_length
    product = product_speed(config.hidden_size, min(tokens, 4 * TOKENS), recipe.dtype)
    return Measured(passes, stepping, product, before, peak, costs)


def _random(recipe: Recipe, config: Any) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.dtype)).to(device)


def _train(recipe: Recipe, method: Method, base: Any, steps: int) -> list[tuple[float, float]]:
    """Seconds of each step's passes and of its optimizer."""
    device = str(base.device.type)
    model, optimizer = _prepared(recipe, method, base)
    model.train()
    shape = (recipe.train.micro_batch_size, recipe.train.max_length)
    times = []
    with MeanTokenLoss(model) as loss_of:
        for _ in range(steps):
            ids_BS = torch.randint(base.config.vocab_size, shape, device=device)
            began = _now(device)
            loss_of(model(input_ids=ids_BS), ids_BS).backward()
            between = _now(device)
            optimizer.step()
            optimizer.zero_grad()
            times.append((between - began, _now(device) - between))
    return times


def _prepared(recipe: Recipe, method: Method, base: Any) -> tuple[Any, torch.optim.Optimizer]:
    """A method, ready to train, without any data: its rows are chosen by the rule tf, which needs no background."""
    if method.kind == "smf":
        model = methods.attach(base, method, recipe)
        options: dict[str, Any] = {"rows_per_step": method.rows_per_step, "reads": method.reads}
        rule = "all" if method.rule == "all" else "tf"
        return model, SparseMemoryOptimizer(model, lr=1e-3, rule=rule, update=method.update, **options)
    made = methods.find_method(method.kind)(base, replace(method, lr=1e-5), recipe, Loaded(None, [], {}, [], [], []))
    if made.optimizer is None:
        raise ConfigError(f"kind = {method.kind!r} trains nothing that could be measured")
    return made.model, made.optimizer


def product_speed(width: int, tokens: int, dtype: str) -> float:
    """FLOPs a second of `[tokens, width] @ [width, 4 width]`; the best of some tries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = min(4 * width, 16384)
    x_TD, w_DW = (
        torch.ones(size, dtype=getattr(torch, dtype), device=device) for size in ((tokens, width), (width, wide))
    )
    best = float("inf")
    for _ in range(4):
        began = _now(device)
        torch.mm(x_TD, w_DW)
        best = min(best, _now(device) - began)
    return 2 * tokens * width * wide / best


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _resident(which: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since `_forget_peak`; 0 where the system does not say (Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
