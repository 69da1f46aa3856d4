"""Trains tiny models alone or as one of several ranks; `torchrun` runs it, and tests call it for one rank."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

import smf
from conftest import batch, tiny_model, trainer_arguments

STEPS = 3


def even(step: int, rank: int, world: int, accumulation: int) -> list[dict[str, Tensor]]:
    """This rank's share of each micro-batch of a step; the last example of one is the first of the next."""
    micros = range(step * accumulation, (step + 1) * accumulation)
    shares = [{k: v.chunk(world)[rank] for k, v in batch(4, 16, seed=number).items()} for number in micros]
    for number, share in enumerate(shares):
        share["example_ids"] = (step + number) * 3 + torch.arange(4).chunk(world)[rank]
    return shares


def uneven(step: int, rank: int, world: int, accumulation: int) -> list[dict[str, Tensor]]:
    """Eleven examples in six micro-batches, which ranks take in turn: some have more of them, and larger ones."""
    rows = batch(11, 16, seed=step)
    cuts = [slice(0, 3), slice(3, 5), slice(5, 7), slice(7, 8), slice(8, 10), slice(10, 11)]
    return [{k: v[cut] for k, v in rows.items()} for cut in cuts[rank::world]]


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    """The base split over ranks layer by layer, the memory whole on each."""
    whole = {parameter for name, parameter in model.named_parameters() if "sparse_memory_" in name}
    for layer in [*model.base_model.model.model.layers, model]:
        fully_shard(layer, ignored_params=whole)
    return model


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def unwrapped(model: nn.Module) -> nn.Module:
    return model


LOOPS: dict[str, dict[str, Any]] = {
    "hits": {"rule": "kl", "reads": "hits"},
    "gradient": {"rule": "tfidf", "reads": "gradient", "train": "rows+scale", "accumulation": 2},
    "micro": {"rule": "random", "select_every": "micro", "update": "sgd", "accumulation": 2},
    "masked": {"rule": "tf", "update": "masked-adam", "train": "rows+scale", "weight_decay": 0.1},
    "healing": {"rule": "all", "train": "memory", "init": "paper", "accumulation": 2},
    "provenance": {"rule": "tf", "provenance": True, "accumulation": 2},
    "uneven": {"rule": "kl", "reads": "gradient", "train": "rows+scale", "batches": uneven},
    "fsdp2": {"rule": "kl", "train": "rows+scale", "wrap": fsdp2},
    "fsdp2+checkpointing": {"rule": "tf", "reads": "gradient", "wrap": fsdp2, "checkpointing": True},
    "alone": {"rule": "tf", "train": "rows+scale", "wrap": unwrapped},
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
    patch: Path,
    *,
    rule: str,
    train: str = "rows",
    init: str = "zero",
    accumulation: int = 1,
    dtype: torch.dtype = torch.float64,
    batches: Callable[[int, int, int, int], list[dict[str, Tensor]]] = even,
    wrap: Callable[[nn.Module], nn.Module] = ddp,
    checkpointing: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """Each rank takes its share of every batch, and of the loss, which is a mean over the tokens of all of them."""
    model = tiny_model(train=train, init=init).to(dtype)
    background = smf.read_background(model, [batch(8, 16, seed=99)]) if rule in ("kl", "tfidf") else None
    if checkpointing:
        model.base_model.model.gradient_checkpointing_enable()
    wrapped = wrap(model) if world > 1 else model
    options = {"lr": 1e-2, "rows_per_step": 8} | options
    optimizer = smf.SparseMemoryOptimizer(wrapped, background, rule=rule, **options)
    wrapped.train()
    steps = []
    for step in range(STEPS):
        mine = batches(step, rank, world, accumulation)
        labels = sum(len(share["labels"]) for r in range(world) for share in batches(step, r, world, accumulation))
        for number, share in enumerate(mine):
            if not options.get("provenance"):
                share.pop("example_ids", None)
            shared = world * len(share["labels"]) / labels  # the ranks' gradients are averaged
            last = number == len(mine) - 1
            with contextlib.nullcontext() if last or not hasattr(wrapped, "no_sync") else wrapped.no_sync():
                (wrapped(**share).loss * shared).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(optimizer.last_step)
    smf.save_patch(model, patch)
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


def train_with_trainer(
    world: int, folder: Path, checkpoint: str | None = None, examples: list[dict[str, Tensor]] | None = None
) -> dict[str, Tensor]:
    """HF Trainer, 4 examples a micro-batch over all ranks, 2 micro-batches a step, a checkpoint after 2 of 4 steps."""
    model = tiny_model(train="rows+scale").double()
    optimizer = smf.SparseMemoryOptimizer(model, lr=1e-2, rule="tf", reads="gradient", rows_per_step=8)
    steps: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(optimizer.last_step))
    optimizer.register_step_pre_hook(lambda *_: die(after=len(steps)))
    args = trainer_arguments(
        folder,
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=2,
        ddp_backend="gloo" if world > 1 else None,
    )
    data = ragged_examples() if examples is None else examples
    sealing = [smf.SealCheckpoints()]
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=sealing)
    trainer.train(resume_from_checkpoint=checkpoint)
    return outcome(model, steps)


def die(after: int) -> None:
    """In its first start a job that is to be killed loses rank 1 in its fourth step."""
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT"), os.environ.get("RANK")
    if sys.argv[2:] == ["killed"] and start == ("0", "1") and after == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def refusals() -> dict[str, str]:
    """What is said of memories, and of what trains beside them, that are not whole on each rank."""
    said = {}
    for name, (wrap, first) in {
        "fsdp2, then the optimizer": (lambda model: fully_shard(model), False),
        "the optimizer, then fsdp2": (lambda model: fully_shard(model), True),
        "the optimizer, then fsdp1": (lambda model: fsdp1(model), True),
        "all but the memory": (fsdp2, False),
    }.items():
        model = tiny_model()
        if name == "all but the memory":
            model.base_model.model.model.norm.requires_grad_(True)
        wrapped = model if first else wrap(model)
        try:
            optimizer = smf.SparseMemoryOptimizer(wrapped, rule="tf", lr=1e-2)
            wrapped = wrap(model) if first else wrapped
            wrapped.train()
            wrapped(**batch(4, 16)).loss.backward()
            optimizer.step()
        except smf.SmfError as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def everything(rank: int, world: int, folder: Path, others: Path) -> dict[str, dict[str, Tensor]]:
    """What every loop leaves behind, by its name.

    Args:
        rank: of this process.
        world: ranks.
        folder: for checkpoints and patches.
        others: checkpoint of a training on another number of ranks, where there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = {n: train_in_a_loop(rank, world, folder / f"{n}.{rank}.smf", **options) for n, options in LOOPS.items()}
    results["trainer"] = train_with_trainer(world, folder)
    results["refused"] = refusals() if world > 1 else {}
    results["resumed"] = train_with_trainer(world, folder / "again", str(folder / "checkpoint-2"))
    odd = ragged_examples()[:13]
    results["odd"] = train_with_trainer(world, folder / "odd", examples=odd if world > 1 else odd + odd[:3])
    if others.is_dir():
        results["other ranks"] = train_with_trainer(world, folder / "others", str(others))
    return results


def main() -> None:
    folder, others = map(Path, sys.argv[1].split(os.pathsep))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if sys.argv[2:] == ["killed"]:  # as a script of one's own, which goes on by itself
        folder.mkdir(parents=True, exist_ok=True)
        results = {"trainer": train_with_trainer(world, folder, smf.newest_checkpoint(folder))}
    else:
        dist.init_process_group("gloo")
        results = everything(rank, world, folder, others)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
