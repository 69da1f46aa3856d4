"""Models that others spread over ranks or devices: the memory stays whole on each of them, or is refused by name."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import Tensor, nn

from .errors import ConfigError
from .fingerprint import is_sharded
from .memory import ProductKeyMemory

REFUSED = {
    "DataParallel": "nn.DataParallel copies the memory to every GPU in every step",
    "FullyShardedDataParallel": "FSDP1 flattens the memory into one parameter with the base",
    "DeepSpeedEngine": "DeepSpeed puts an optimizer of its own in the place of ours",
}
INSTEAD = (
    "Use DDP (torchrun, with Trainer or torch's DistributedDataParallel), which exchanges rows alone; for a base that "
    "does not fit on one GPU FSDP2: fully_shard(module, ignored_params={p for n, p in model.named_parameters() if "
    '"sparse_memory_" in n})'
)


def refuse_deepspeed() -> None:
    """Refuse DeepSpeed where `accelerate launch` or TrainingArguments(deepspeed=...) said that it will be used."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true", "yes"):
        raise ConfigError(f"{REFUSED['DeepSpeedEngine']}. {INSTEAD}")


def refuse_replica(module: nn.Module) -> None:
    """Refuse a copy that nn.DataParallel makes, as Trainer does by itself where it finds several GPUs."""
    if getattr(module, "_is_replica", False):
        raise ConfigError(f"{REFUSED['DataParallel']}. {INSTEAD}. CUDA_VISIBLE_DEVICES=0 gives Trainer one GPU")


def refuse_wrappers(model: nn.Module) -> None:
    """Refuse a model within a wrapper that a memory cannot train in.

    Raises:
        ConfigError: naming it, and what to use instead.
    """
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in REFUSED:
                raise ConfigError(f"{REFUSED[kind.__name__]}. {INSTEAD}")


def refuse_parts(memories: dict[int, ProductKeyMemory], others: Iterable[Tensor]) -> None:
    """Refuse a memory that is not whole on this rank, and whatever trains beside it that is not.

    Raises:
        ConfigError: naming the layer, and how to keep it whole.
    """
    for layer, memory in memories.items():
        tensors = [memory.tensor(kind) for kind in memory.kinds]
        if memory.values.shape != (memory.shape.n_rows, memory.shape.d) or any(map(is_sharded, tensors)):
            raise ConfigError(f"the memory at layer {layer} is split over ranks, but must be whole on each. {INSTEAD}")
    if any(map(is_sharded, others)):
        raise ConfigError(
            "what trains beside the rows is split over ranks, but must be whole on each: add it to ignored_params of "
            "every fully_shard"
        )
