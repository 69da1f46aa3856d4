"""What a step costs on Qwen2.5-0.5B's shape: rows of a memory, LoRA and full finetuning, each with its peak memory.

    python benchmarks/qwen_shape.py                                                         # a CPU, 1 x 128
    python benchmarks/qwen_shape.py --device cuda --dtype bfloat16 --batch 16 --length 512 --warm-up 10 --steps 40

Both were run (benchmarks/results/qwen_shape_cpu.json, qwen_shape_cuda.json), before "our loss" was there. The weights
are random (`--base` takes a folder's or the hub's), the tokens are real text, read again from its start where it ends;
memory, learning rates (constant here), clipping and optimizers are those of `medmcqa.toml`: "smf" has its memories
around the middle, at layers 10, 12 and 14, "smf-adjacent" the same at 11, 12 and 13, "late-rows" at the last layer (the
latter two came after those files). With `--dtype bfloat16` the methods are
what they are in runs of a recipe with that `dtype`: base and full finetuning in bfloat16, the memory's table and LoRA's
matrices in float32.

These three take the loss that `smf compare` gives to all methods (smf.loss.MeanTokenLoss), which makes logits
for some positions at a time; "lora" and "full" take the model's own, as who trains them without smf does, and "lora,
our loss" and "full, our loss" show what they gain by ours.

Each side runs in a process of its own, so that its peak memory is its own; the sides take turns, and each turn gives a
ratio to LoRA and to full finetuning. The first steps of a turn are not timed. Seconds on a GPU are those of CUDA
events, its peak memory is torch.cuda.max_memory_allocated; on a CPU they are wall seconds, and the peak of the resident
memory (Linux). Seconds of the processor stand beside them: with one thread (OMP_NUM_THREADS=1) other processes hardly
change them. Losses are those of the first and the last step of the text, for each side the same steps in the same
order.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import smf
from memory_growth import machine, resident, versions
from smf import methods
from smf.compare import quiet_known_warnings
from smf.data import Loaded
from smf.loss import MeanTokenLoss
from smf.recipe import MemoryOptions, Recipe
from smf.recipe_file import load_recipe

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"
OUR_LOSS = ", our loss"
SIDES = ("smf", "smf-adjacent", "late-rows", "lora", "full", f"lora{OUR_LOSS}", f"full{OUR_LOSS}")
COMPARED = SIDES[2:]  # what each side's figures are ratios to
QWEN = {  # the configuration of Qwen2.5-0.5B
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
TINY = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


@dataclass(frozen=True)
class Setup:
    """What every turn shares."""

    base: str = ""
    tiny: bool = False
    tokenizer: str = str(SHARED / "tokenizers" / "qwen1.5")
    text: str = str(SHARED / "data" / "wikitext2" / "validation.jsonl.gz")
    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 1
    length: int = 128
    documents: int = 8
    warm_up: int = 1
    steps: int = 3
    turns: int = 3
    lora_dropout: float = -1.0

    def recipe(self) -> Recipe:
        """`medmcqa.toml`, whose methods the sides are; of a tiny base with a memory that fits it."""
        recipe = load_recipe("medmcqa.toml")
        adjacent = replace(recipe.methods["smf"], layers=[0, 1, 2] if self.tiny else [11, 12, 13])
        recipe = replace(recipe, methods=recipe.methods | {"smf-adjacent": adjacent})
        if self.lora_dropout >= 0:
            lora = replace(recipe.methods["lora"], dropout=self.lora_dropout)
            recipe = replace(recipe, methods=recipe.methods | {"lora": lora})
        return replace(recipe, memory=MemoryOptions([1], 16, 2, 4, 16)) if self.tiny else recipe


@dataclass(frozen=True)
class Turn:
    """What one process measured; seconds, bytes, and nats per token."""

    parameters: int
    trained: int
    attach: float
    background: float  # reading all documents; of the memories alone
    steps: list[float]
    processor: list[float]  # seconds of the processor for each of the steps, which other processes hardly touch
    loaded: int  # memory with the base alone
    peak: int  # memory in the steps
    first_loss: float
    last_loss: float


def make_base(setup: Setup) -> Any:
    """The base in evaluation mode: random, the same in every process, or what `--base` names."""
    dtype = getattr(torch, setup.dtype)
    if setup.base:
        return AutoModelForCausalLM.from_pretrained(setup.base, dtype=dtype).to(setup.device).eval()
    torch.manual_seed(0)
    config = Qwen2Config(**(QWEN | (TINY if setup.tiny else {})))
    return AutoModelForCausalLM.from_config(config).to(setup.device, dtype).eval()


def read_tokens(setup: Setup, count: int) -> torch.Tensor:
    """`count` tokens of the text, from its start; where it ends it begins anew. Random ones, where there is no text."""
    if not setup.text:
        vocabulary: Any = (TINY if setup.tiny else QWEN)["vocab_size"]
        return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0))
    opened = gzip.open if setup.text.endswith(".gz") else open
    with opened(setup.text, "rt", encoding="utf-8") as file:
        text = "\n\n".join(line for row in file if (line := json.loads(row)["text"].strip()))
    ids = AutoTokenizer.from_pretrained(setup.base or setup.tokenizer)(text)["input_ids"]
    return torch.tensor(ids * (1 + count // len(ids)))[:count]


def seconds_of(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds that work took, and what it returned."""
    if device == "cpu":
        started = time.perf_counter()
        found = work()
        return time.perf_counter() - started, found
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    found = work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000, found


def memory_now(device: str) -> int:
    """Bytes that are held."""
    return resident("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()


def peak_memory(device: str) -> int:
    """Bytes held at most since `forget_peak`."""
    return resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def forget_peak(device: str) -> None:
    """Let the peak begin anew."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def prepare(side: str, setup: Setup, base: Any, documents: list[dict[str, torch.Tensor]]) -> tuple[Any, float, float]:
    """The side's model and optimizer, and the seconds of attaching and of reading the background."""
    recipe = setup.recipe()
    method = recipe.methods[side.removesuffix(OUR_LOSS)]
    if method.kind != "smf":
        nothing = Loaded(None, [], {}, [], [], [])
        seconds, prepared = seconds_of(
            lambda: methods.find_method(method.kind)(base, method, recipe, nothing), setup.device
        )
        return prepared, seconds, 0.0
    attach, model = seconds_of(lambda: methods.attach(base, method, recipe), setup.device)
    reading, background = seconds_of(lambda: smf.read_background(model, documents), setup.device)
    optimizer = smf.SparseMemoryOptimizer(
        model,
        background,
        lr=method.lr,
        betas=(method.betas[0], method.betas[1]),
        rows_per_step=method.rows_per_step,
        rule=method.rule,
        reads=method.reads,
    )
    return methods.Prepared(model, optimizer, 0.0, model.get_nb_trainable_parameters()[0], dict), attach, reading


def step(prepared: methods.Prepared, loss_of: MeanTokenLoss | None, ids_BS: torch.Tensor) -> float:
    """One optimizer step; returns its loss."""
    inputs = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    if loss_of is None:
        loss = prepared.model(**inputs, labels=ids_BS).loss
    else:
        loss = loss_of(prepared.model(**inputs), ids_BS)
    loss.backward()
    if prepared.max_grad_norm:
        trained = [p for group in prepared.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, prepared.max_grad_norm)
    prepared.optimizer.step()
    prepared.optimizer.zero_grad()
    return loss.detach().item()


def measure(side: str, setup: Setup) -> Turn:
    """One turn of one side."""
    count = setup.warm_up + setup.steps
    general = setup.documents * setup.length
    ids = read_tokens(setup, general + count * setup.batch * setup.length).to(setup.device)
    documents = [{"input_ids": each} for each in ids[:general].view(-1, setup.length).split(8)]
    batches = ids[general:].view(count, setup.batch, setup.length)
    base = make_base(setup)
    parameters, loaded = sum(p.numel() for p in base.parameters()), memory_now(setup.device)
    prepared, attach, reading = prepare(side, setup, base, documents)
    prepared.model.train()
    forget_peak(setup.device)
    timed, processor = [], []
    loss_of = None if side in ("lora", "full") else MeanTokenLoss(prepared.model)
    with loss_of or contextlib.nullcontext():
        for ids_BS in batches:
            started = time.process_time()
            timed.append(seconds_of(functools.partial(step, prepared, loss_of, ids_BS), setup.device))
            processor.append(time.process_time() - started)
    return Turn(
        parameters=parameters,
        trained=prepared.trained,
        attach=attach,
        background=reading,
        steps=[seconds for seconds, _ in timed[setup.warm_up :]],
        processor=processor[setup.warm_up :],
        loaded=loaded,
        peak=peak_memory(setup.device),
        first_loss=timed[0][1],
        last_loss=timed[-1][1],
    )


def measure_alone(side: str, setup: Setup) -> Turn:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--side", side, "--setup", json.dumps(asdict(setup))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Turn(**json.loads(done.stdout.splitlines()[-1]))


def figures(turns: list[Turn], others: dict[str, list[Turn]], tokens: int) -> dict[str, Any]:
    """Medians and spread of a side's turns, and of their ratios to LoRA's and full finetuning's, turn by turn."""
    steps = [statistics.median(turn.steps) for turn in turns]
    measured = {
        "seconds a step": steps,
        "tokens a second": [tokens / seconds for seconds in steps],
        "attach, seconds": [turn.attach for turn in turns],
        "background, seconds": [turn.background for turn in turns],
        "peak memory, MiB": [turn.peak / 2**20 for turn in turns],
        "base alone, MiB": [turn.loaded / 2**20 for turn in turns],
        "first loss": [turn.first_loss for turn in turns],
        "last loss": [turn.last_loss for turn in turns],
    }
    for name, other in others.items():
        pairs = list(zip(turns, other, strict=True))
        measured |= {
            f"times {name}'s seconds": [statistics.median(a.steps) / statistics.median(b.steps) for a, b in pairs],
            f"times {name}'s processor seconds": [
                statistics.median(a.processor) / statistics.median(b.processor) for a, b in pairs
            ],
            f"times {name}'s peak": [a.peak / b.peak for a, b in pairs],
        }
    spread = {key: {"median": statistics.median(v), "least": min(v), "most": max(v)} for key, v in measured.items()}
    return {"parameters": turns[0].parameters, "trained": turns[0].trained} | spread


def report(setup: Setup, turns: dict[str, list[Turn]], busy: float) -> dict[str, Any]:
    """What the result file holds."""
    recipe = setup.recipe()
    device = {"gpu": torch.cuda.get_device_name()} if setup.device != "cpu" else {}
    tokens = setup.batch * setup.length
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine() | device | {"load average at the start": busy},
        "versions": versions(),
        "setup": asdict(setup) | ({} if setup.text else {"tokenizer": ""}),  # random tokens need none
        "methods": {side: asdict(recipe.methods[side.removesuffix(OUR_LOSS)]) for side in SIDES}
        | {"memory": asdict(recipe.memory)},
        "results": {side: figures(turns[side], {n: turns[n] for n in COMPARED}, tokens) for side in SIDES},
        "turns": {side: [asdict(turn) for turn in turns[side]] for side in SIDES},
    }


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = Setup()
    parser.add_argument("--base", default=given.base, help="weights in place of random ones: a folder or hub name")
    parser.add_argument("--tiny", action="store_true", help="a base of three layers of width 32, to try this script")
    parser.add_argument("--tokenizer", default=given.tokenizer, help="folder or hub name; --base has its own")
    parser.add_argument("--text", default=given.text, help='JSON lines with a text each; "": random tokens')
    parser.add_argument("--device", choices=("cpu", "cuda"), default=given.device)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=given.dtype)
    parser.add_argument("--batch", type=int, default=given.batch, help="sequences of a step")
    parser.add_argument("--length", type=int, default=given.length, help="tokens of a sequence")
    parser.add_argument("--documents", type=int, default=given.documents, help="sequences of the background")
    parser.add_argument("--warm-up", type=int, default=given.warm_up, help="steps of a turn that are not timed")
    parser.add_argument("--steps", type=int, default=given.steps, help="steps of a turn that are timed")
    parser.add_argument("--turns", type=int, default=given.turns, help="turns of each side")
    parser.add_argument("--lora-dropout", type=float, default=given.lora_dropout, help="none: the recipe's")
    parser.add_argument("--output", type=Path, help="none: benchmarks/results/qwen_shape_DEVICE.json")
    parser.add_argument("--side", choices=SIDES, help="measure one turn in this process and print it as JSON")
    parser.add_argument("--setup", help="of that turn, as JSON")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the result."""
    given = arguments()
    if given.side:
        quiet_known_warnings()
        transformers.logging.set_verbosity_error()  # the whole text is longer than the base reads, its pieces are not
        print(json.dumps(asdict(measure(given.side, Setup(**json.loads(given.setup))))))
        return
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here; leave --device out to measure on the CPU")
    setup = Setup(**{field.name: getattr(given, field.name) for field in fields(Setup)})
    busy = os.getloadavg()[0]
    turns: dict[str, list[Turn]] = {side: [] for side in SIDES}
    print("          side   step s  tokens/s  peak MiB  attach s background s first and last loss")
    for _ in range(setup.turns):
        for side in SIDES:
            turn = measure_alone(side, setup)
            turns[side].append(turn)
            seconds = statistics.median(turn.steps)
            print(
                f"{side:>14} {seconds:>8.3f} {setup.batch * setup.length / seconds:>9.0f} {turn.peak / 2**20:>9.0f} "
                f"{turn.attach:>9.2f} {turn.background:>12.2f} {turn.first_loss:>7.3f} {turn.last_loss:>7.3f}",
                flush=True,
            )
    output = given.output or HERE / "results" / f"qwen_shape_{setup.device}.json"
    output.write_text(json.dumps(report(setup, turns, busy), indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
