"""Memory that training holds beyond the table, for tables of 16k, 262k and 1M rows: it must not grow with the table.

    python benchmarks/memory_growth.py

Each size runs in a process of its own: one memory layer of width 896, five steps of 512 tokens. A row that was ever
chosen keeps three vectors (two moments and its old value, 10,752 bytes at this width) and its ids; `held` counts them
all, and a larger table has a few more distinct rows chosen. Scores against the sub-keys, which live within a forward
pass only, grow with the square root of the table. Linux only (it reads and resets the peak of the resident memory
through /proc). Writes benchmarks/results/memory_growth.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import peft
import torch
import transformers
from peft import get_peft_model
from torch._subclasses import FakeTensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import smf

RESULT = Path(__file__).parent / "results" / "memory_growth.json"
MB = 2**20


@dataclass
class Setup:
    """One memory layer and what trains it."""

    n_keys: int
    width: int = 896
    heads: int = 4
    knn: int = 16
    k_dim: int = 256
    tokens: int = 512
    rows_per_step: int = 512
    steps: int = 5


@dataclass
class Figures:
    """Bytes, except where the name says otherwise. `held` and `pending` count tensors; they are exact."""

    rows: int
    table: int
    pending: int  # factors between the backward pass and the step
    held: int  # after the last step: moments and journal
    rows_chosen: int
    held_per_row_chosen: float
    peak_rss_growth: int  # of the process during the steps, over the moment before the first
    seconds_a_step: float


def live_bytes() -> int:
    """Bytes of the storages of all tensors that exist."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # torch.compile leaves fake ones, which have no memory
        if issubclass(type(thing), torch.Tensor) and not issubclass(type(thing), FakeTensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident(which: str) -> int:
    """Resident memory of this process: "VmRSS" now, "VmHWM" at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {which}")


def build(setup: Setup, **options: str) -> peft.PeftModel:
    """A one-layer base with a memory whose table is written in full, so that its pages are resident."""
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=128,
            hidden_size=setup.width,
            intermediate_size=setup.width,
            num_hidden_layers=1,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=setup.tokens,
        )
    )
    sizes = {name: getattr(setup, name) for name in ("n_keys", "heads", "knn", "k_dim")}
    return get_peft_model(base, smf.SparseMemoryConfig(layers=[0], **({"init": "paper"} | options), **sizes))


def measure(setup: Setup) -> Figures:
    """Train a few steps and say what they held."""
    model = build(setup).train()
    memory = smf.memory_layers(model)[0]
    choice = {"rule": "tf", "reads": "gradient", "rows_per_step": setup.rows_per_step}
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, **choice)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(128, (1, setup.tokens), generator=generator) for _ in range(setup.steps)]
    before, resident_before = live_bytes(), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    pending, chosen = 0, set()
    started = time.perf_counter()
    for i, ids in enumerate(batches):
        model(input_ids=ids, labels=ids).loss.backward()
        if i == 0:
            pending = live_bytes() - before
        optimizer.step()
        optimizer.zero_grad()
        chosen.update(optimizer.last_step.rows[0].tolist())
    seconds = (time.perf_counter() - started) / setup.steps
    peak = resident("VmHWM")
    optimizer.last_step = None
    held = live_bytes() - before
    return Figures(
        rows=memory.shape.n_rows,
        table=memory.values.nbytes,
        pending=pending,
        held=held,
        rows_chosen=len(chosen),
        held_per_row_chosen=held / len(chosen),
        peak_rss_growth=peak - resident_before,
        seconds_a_step=seconds,
    )


def measure_alone(n_keys: int) -> Figures:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--n-keys", str(n_keys)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def machine() -> dict[str, object]:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    modules = {"torch": torch, "transformers": transformers, "peft": peft, "smf": smf}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in modules.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-keys", type=int, help="measure one size in this process and print it as JSON")
    n_keys = parser.parse_args().n_keys
    if n_keys is not None:
        print(json.dumps(asdict(measure(Setup(n_keys)))))
        return
    print("     rows     table   pending      held    rows  held/row  peak RSS    step")
    print("                MiB       MiB       MiB  chosen     bytes      +MiB       s")
    results = []
    for size in (128, 512, 1024):
        figures = measure_alone(size)
        results.append(asdict(figures))
        print(
            f"{figures.rows:>9,} {figures.table / MB:>9.1f} {figures.pending / MB:>9.2f} {figures.held / MB:>9.2f} "
            f"{figures.rows_chosen:>7,} {figures.held_per_row_chosen:>9.0f} {figures.peak_rss_growth / MB:>9.1f} "
            f"{figures.seconds_a_step:>7.3f}",
            flush=True,
        )
    setup = {k: v for k, v in asdict(Setup(0)).items() if k != "n_keys"}
    command = "python benchmarks/memory_growth.py"
    report = {"command": command, "machine": machine(), "versions": versions(), "setup": setup, "results": results}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
