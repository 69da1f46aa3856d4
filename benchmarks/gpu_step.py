"""The part `step` of benchmarks/gpu.py: a training step of Qwen2.5-0.5B's shape, against LoRA and full finetuning."""

from __future__ import annotations

import argparse
import copy
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import qwen_shape
import smf
from gpu_events import spread
from smf import methods
from smf.methods import Prepared

PHASES = ("forward", "backward", "step")
SIDES = ("smf", "smf, kernels", "lora", "lora in bfloat16", "full")


def timed_step(prepared: Prepared, ids_BS: Tensor) -> tuple[list[torch.cuda.Event], float]:
    """One optimizer step with marks around its phases, and its loss."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    marks[0].record()
    loss = prepared.model(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), labels=ids_BS).loss
    marks[1].record()
    loss.backward()
    marks[2].record()
    assert prepared.optimizer is not None
    if prepared.max_grad_norm:
        trained = [p for group in prepared.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, prepared.max_grad_norm)
    prepared.optimizer.step()
    prepared.optimizer.zero_grad()
    marks[3].record()
    return marks, loss.item()


def read_batches(setup: qwen_shape.Setup, count: int) -> Tensor:
    """`[count, batch, length]` tokens of the text, or drawn by Zipf's law where the text or tokenizer is not there."""
    numbers = count * setup.batch * setup.length
    if Path(setup.text).exists() and Path(setup.tokenizer).exists():
        ids = qwen_shape.read_tokens(setup, numbers)
    else:
        heap = (1 / torch.arange(1, qwen_shape.QWEN["vocab_size"] + 1, dtype=torch.float64)).cumsum(0)
        ids = torch.searchsorted(heap, torch.rand(numbers, dtype=torch.float64) * heap[-1])
    return ids.to(setup.device).view(count, setup.batch, setup.length)


def lora_in_bfloat16(setup: qwen_shape.Setup, base: Any) -> Prepared:
    """LoRA of the recipe, but its matrices in the base's dtype too, which PEFT does not do by itself: it is faster."""
    recipe = setup.recipe()
    method = recipe.methods["lora"]
    options: dict[str, Any] = {"r": method.r, "lora_alpha": method.alpha, "lora_dropout": method.dropout}
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return methods.dense(get_peft_model(base, config, autocast_adapter_dtype=False), method, recipe)


def prepare_sides(setup: qwen_shape.Setup, documents: list[dict[str, Tensor]]) -> dict[str, tuple[Prepared, int]]:
    """Each side and the bytes that it holds before its first step."""
    base = qwen_shape.make_base(setup)
    sides = {}
    for name in SIDES:
        before = torch.cuda.memory_allocated()
        if name == "lora in bfloat16":
            prepared = lora_in_bfloat16(setup, copy.deepcopy(base))
        else:
            prepared = qwen_shape.prepare(name.partition(",")[0], setup, copy.deepcopy(base), documents)[0]
        if name.startswith("smf"):
            smf.use_kernels(prepared.model, name == "smf, kernels")
        prepared.model.train()
        sides[name] = (prepared, torch.cuda.memory_allocated() - before)
    return sides


def step_part(given: argparse.Namespace, copy_gbs: float) -> dict[str, Any]:
    """The sides take turns of some steps; the first steps of a turn are not timed."""
    same = ("batch", "length", "tiny", "tokenizer", "text", "warm_up", "steps", "turns")
    setup = qwen_shape.Setup(device="cuda", dtype="bfloat16", **{name: getattr(given, name) for name in same})
    batches = read_batches(setup, 16)
    if given.tiny:
        batches = batches % 512
    documents = [{"input_ids": ids} for ids in batches[0, : setup.documents].split(4)]
    sides = prepare_sides(setup, documents)
    held = {name: own for name, (_, own) in sides.items()}
    taken: dict[str, list[list[float]]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    peaks = dict.fromkeys(sides, 0)
    for turn in range(setup.turns):
        for name, (prepared, _) in sides.items():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            first = turn * (setup.warm_up + setup.steps)
            for i in range(setup.warm_up + setup.steps):
                marks, loss = timed_step(prepared, batches[(first + i) % len(batches)])
                losses[name].append(loss)
                if i >= setup.warm_up:
                    taken[name].append([a.elapsed_time(b) for a, b in pairwise(marks)])
            peaks[name] = max(peaks[name], held[name] + torch.cuda.max_memory_allocated() - before)
            held[name] += torch.cuda.memory_allocated() - before  # states of the optimizer, made in its first step
    results: dict[str, Any] = {}
    totals = {name: statistics.median(sum(phases) for phases in each) for name, each in taken.items()}
    print(f"{'':16}   step, ms   forward  backward      step   of LoRA's   of its peak   peak MiB")
    for name, each in taken.items():
        phases = {phase: statistics.median(v) for phase, v in zip(PHASES, zip(*each, strict=True), strict=True)}
        others = [other for other in SIDES if other.startswith("lora")]
        results[name] = {
            "milliseconds": spread([sum(phases) for phases in each]),
            "phases": phases,
            "peak MiB": peaks[name] / 2**20,
            "times": {other: totals[name] / totals[other] for other in others},
            "times peak": {other: peaks[name] / peaks[other] for other in others},
            "losses": losses[name],
        }
        print(
            f"{name:>16} {totals[name]:>10.2f} {'  '.join(f'{ms:>8.2f}' for ms in phases.values())} "
            f"{results[name]['times']['lora']:>11.3f} {results[name]['times peak']['lora']:>13.3f} "
            f"{peaks[name] / 2**20:>10.0f}",
            flush=True,
        )
    profiles = {name: profile(sides[name][0], batches[1]) for name in SIDES[:3]} if given.profile else {}
    return {"setup": vars(setup), "sides": results, "profiles": profiles}


def profile(prepared: Prepared, ids_BS: Tensor, steps: int = 3) -> dict[str, Any]:
    """Milliseconds a step of the operators that take most of the device, and calls that make the host wait for it."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            timed_step(prepared, ids_BS)
        torch.cuda.synchronize()
    events = profiler.key_averages()
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    waits = {e.key: e.count / steps for e in events if "Synchronize" in e.key or "cudaMemcpyAsync" in e.key}
    launches = sum(e.count for e in events if "LaunchKernel" in e.key) / steps
    return {
        "device ms": sum(e.self_device_time_total for e in kernels) / steps / 1000,
        "launches": launches,
        "waits": waits,
        "kernels": [
            [e.key[:90], round(e.self_device_time_total / steps / 1000, 3), e.count / steps] for e in kernels[:40]
        ],
    }
