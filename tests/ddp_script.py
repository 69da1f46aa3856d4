"""Trains tiny models alone or as one of several ranks; `torchrun` runs it, and test_loops.py calls it for one rank."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

import smf
from conftest import batch, tiny_model, trainer_arguments

STEPS = 3
LOOPS: dict[str, dict[str, Any]] = {
    "hits": {"rule": "kl", "reads": "hits"},
    "gradient": {"rule": "tfidf", "reads": "gradient", "train": "rows+scale", "accumulation": 2},
    "micro": {"rule": "random", "select_every": "micro", "update": "sgd", "accumulation": 2},
    "masked": {"rule": "tf", "update": "masked-adam", "train": "rows+scale", "weight_decay": 0.1},
    "healing": {"rule": "all", "train": "memory", "init": "paper", "accumulation": 2},
    "provenance": {"rule": "tf", "provenance": True, "accumulation": 2},
    "float32": {"rule": "tf", "reads": "gradient", "dtype": torch.float32, "train": "rows+scale"},
}


def outcome(model: PeftModel, steps: list[smf.StepReport]) -> dict[str, Tensor]:
    """Rows chosen, reads and norm of every step, and all memory tensors at the end."""
    out = {n: p.detach().clone() for n, p in model.named_parameters() if "sparse_memory_" in n}
    for report in steps:
        out |= {f"rows.{report.step}.{layer}": rows for layer, rows in report.rows.items()}
        out[f"reads.{report.step}"] = torch.tensor(list(report.reads.values()))
        out[f"norm.{report.step}"] = torch.tensor(report.grad_norm, dtype=torch.float64)
    return out


def train_in_a_loop(
    rank: int,
    world: int,
    *,
    rule: str,
    train: str = "rows",
    init: str = "zero",
    accumulation: int = 1,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, Tensor]:
    """Each rank takes its share of every batch."""
    model = tiny_model(train=train, init=init).to(dtype)
    background = smf.read_background(model, [batch(8, 16, seed=99)]) if rule in ("kl", "tfidf") else None
    wrapped = DistributedDataParallel(model) if world > 1 else model
    options = {"lr": 1e-2, "rows_per_step": 8} | options
    optimizer = smf.SparseMemoryOptimizer(wrapped, background, rule=rule, **options)
    wrapped.train()
    steps = []
    for step in range(STEPS):
        for micro in range(accumulation):
            rows = batch(4, 16, seed=step * accumulation + micro)
            if options.get("provenance"):
                rows["example_ids"] = (step + micro) * 2 + torch.tensor([0, 0, 1, 2])  # 2 again, on another rank
            share = {k: v.chunk(world)[rank] for k, v in rows.items()}
            last = micro == accumulation - 1
            with contextlib.nullcontext() if last or world == 1 else wrapped.no_sync():
                (wrapped(**share).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(optimizer.last_step)
    written = {} if optimizer._writers is None else optimizer._writers.state_dict()
    flat = {f"{part}.{layer}": tensor for layer, parts in written.items() for part, tensor in parts.items()}
    return outcome(model, steps) | flat


def ragged_examples() -> list[dict[str, Tensor]]:
    """Sixteen examples of unequal lengths, right-padded, so that ranks and micro-batches differ in tokens."""
    examples = []
    for i in range(16):
        example = {k: v[0] for k, v in batch(1, 16, seed=i).items()}
        length = 4 + (5 * i) % 13
        example["attention_mask"][length:] = 0
        example["labels"][length:] = -100
        examples.append(example)
    return examples


def train_with_trainer(world: int, folder: Path, checkpoint: str | None = None) -> dict[str, Tensor]:
    """HF Trainer, 4 examples a micro-batch over all ranks, 2 micro-batches a step, a checkpoint after 2 of 4 steps."""
    model = tiny_model(train="rows+scale").double()
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", reads="gradient", rows_per_step=8)
    steps: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(optimizer.last_step))
    args = trainer_arguments(
        folder,
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=2,
        ddp_backend="gloo" if world > 1 else None,
    )
    trainer = Trainer(model, args, train_dataset=ragged_examples(), optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=checkpoint)
    return outcome(model, steps)


def everything(rank: int, world: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    """What every loop leaves behind, by its name."""
    results = {name: train_in_a_loop(rank, world, **options) for name, options in LOOPS.items()}
    results["trainer"] = train_with_trainer(world, folder)
    results["resumed"] = train_with_trainer(world, folder / "again", str(folder / "checkpoint-2"))
    return results


def main() -> None:
    dist.init_process_group("gloo")
    rank, world, folder = dist.get_rank(), dist.get_world_size(), Path(sys.argv[1])
    torch.save(everything(rank, world, folder / "trainer"), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
