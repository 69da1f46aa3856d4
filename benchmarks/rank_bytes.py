"""What ranks exchange in a step, and what it costs: rows of a memory against LoRA and full finetuning under DDP.

    python benchmarks/rank_bytes.py                      # two gloo ranks on this machine
    python benchmarks/rank_bytes.py --turns 0            # bytes alone, which no load of the machine changes

Two ranks train, side after side: `smf` (512 rows in each of three layers of 16,384), `smf+scale`, `lora`
(rank 16 on all linear layers) and `full`. Bytes are counted twice: what a rank hands to collectives in a step (DDP's
buckets by a communication hook, ours around torch.distributed) and what it wrote to sockets (`wchar` of
/proc/self/io). Weights are random, in the shape of Qwen2.5-0.5B (bfloat16, as recipes have it; memory and LoRA are of
float32) and in a small one of float32, where turns are timed too: sides interleaved, a step's seconds as a ratio to
full finetuning's in the same turn. `exchange` is the time in our collectives, entered together, as a share of the
memory's own step. The rows that a step reads, and with them the bytes of reads, grow with its tokens up to all rows:
`reads_at_most` is what the collectives hold then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config, Qwen2ForCausalLM

import smf
from memory_growth import machine, versions

RESULT = Path(__file__).parent / "results" / "rank_bytes.json"
SIDES = ("smf", "smf+scale", "lora", "full")
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"sizes": SMALL | {"vocab_size": 6144}, "dtype": torch.float32, "batch": 4, "length": 128},
    "qwen2.5-0.5b": {"sizes": QWEN | {"vocab_size": 151_936}, "dtype": torch.bfloat16, "batch": 1, "length": 128},
}
ROWS = 512


class Exchange:
    """Counts what this rank hands to collectives, and the time in those of ours."""

    def __init__(self) -> None:
        self.bytes, self.seconds = 0, 0.0
        self.timed = False
        for name in ("all_reduce", "all_gather"):
            setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(first: Any, *rest: Any, **options: Any) -> Any:
            tensor = first if isinstance(first, Tensor) else rest[0]
            self.bytes += tensor.nbytes
            if self.timed:
                dist.barrier()
            began = time.perf_counter()
            result = real(first, *rest, **options)
            self.seconds += time.perf_counter() - began
            return result

        return counted

    def hook(self, state, bucket):  # type: ignore[no-untyped-def]  # DDP does not know annotations that are strings
        """DDP's own averaging, counted."""
        self.bytes += bucket.buffer().nbytes
        averaged = bucket.buffer().div_(dist.get_world_size())
        work = dist.distributed_c10d._get_default_group().allreduce([averaged])
        return work.get_future().then(lambda future: future.value()[0])


def written() -> int:
    """Bytes that this process has given to write() and its like, sockets included."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["wchar"])


class Side:
    """A method's model under DDP with its optimizer."""

    def __init__(self, name: str, shape: dict[str, Any], exchange: Exchange):
        torch.manual_seed(0)
        config = Qwen2Config(**shape["sizes"], num_key_value_heads=2, tie_word_embeddings=True, use_cache=False)
        model: Any = Qwen2ForCausalLM(config).to(shape["dtype"])
        if name.startswith("smf"):
            train = "rows" if name == "smf" else "rows+scale"
            model = get_peft_model(model, smf.SparseMemoryConfig(train=train))
            optimizer = smf.SparseMemoryOptimizer(model, lr=0.1, rule="tf", reads="gradient", rows_per_step=ROWS)
            self.trained = ROWS * config.hidden_size * 3
        else:
            if name == "lora":
                model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained) if name == "lora" else torch.optim.SGD(trained, lr=1e-3)
            self.trained = sum(p.numel() for p in trained)
        self.optimizer = optimizer
        self.model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.model.register_comm_hook(None, exchange.hook)
        self.model.train()

    def step(self, ids: Tensor) -> None:
        """One step on this rank's batch."""
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def count(side: Side, ids: Tensor, exchange: Exchange) -> dict[str, Any]:
    """Bytes of a step, which all steps of a side exchange alike but for the reads: the mean of two."""
    side.step(ids)  # DDP arranges its buckets after the first one
    dist.barrier()
    before, exchange.bytes = written(), 0
    for _ in range(2):
        side.step(ids)
    dist.barrier()
    found = {"collectives": exchange.bytes / 2, "sockets": (written() - before) / 2, "numbers_trained": side.trained}
    if isinstance(side.optimizer, smf.SparseMemoryOptimizer):
        report = side.optimizer.last_step
        assert report is not None
        found["rows_read"] = report.rows_read
        n_rows = {layer: memory.shape.n_rows for layer, memory in side.optimizer.memories.items()}
        found["reads_at_most"] = sum(24 * n for n in n_rows.values())  # id, amount and hits, of 8 bytes each
    return found


def timed(sides: dict[str, Side], ids: Tensor, exchange: Exchange, turns: int) -> dict[str, Any]:
    """Seconds of a step by turn, sides interleaved, as ratios to full finetuning; and our collectives' share."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, side in sides.items():
            dist.barrier()
            began = time.perf_counter()
            for _ in range(3):
                side.step(ids)
            dist.barrier()
            seconds[name].append((time.perf_counter() - began) / 3)
    ratios = {name: [a / b for a, b in zip(each, seconds["full"], strict=True)] for name, each in seconds.items()}
    exchange.timed, shares = True, []
    for _ in range(turns):
        exchange.seconds, began = 0.0, time.perf_counter()
        sides["smf"].step(ids)
        shares.append(exchange.seconds / (time.perf_counter() - began))
    exchange.timed = False
    return {
        "ratio_to_full": {name: spread(each) for name, each in ratios.items()},
        "seconds": {name: spread(each) for name, each in seconds.items()},
        "exchange_share_of_smf": spread(shares),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def measure(names: list[str], turns: int) -> dict[str, Any]:
    """All shapes, on this rank."""
    exchange, results = Exchange(), {}
    for shape_name in names:
        shape = SHAPES[shape_name]
        generator = torch.Generator().manual_seed(dist.get_rank())
        size = (shape["batch"], shape["length"])
        ids = torch.randint(shape["sizes"]["vocab_size"], size, generator=generator)
        counted, kept = {}, {}
        for name in SIDES:
            side = Side(name, shape, exchange)
            counted[name] = count(side, ids, exchange)
            if turns and shape_name == "small":
                kept[name] = side
            del side
        results[shape_name] = {"tokens_a_rank": ids.numel(), "bytes_a_step": counted}
        smf_bytes = counted["smf"]["collectives"]
        results[shape_name]["times_smf"] = {n: counted[n]["collectives"] / smf_bytes for n in SIDES}
        if kept:
            results[shape_name] |= timed(kept, ids, exchange, turns)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--turns", type=int, default=5, help="of the small shape that are timed; 0: bytes alone")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
        sys.exit(subprocess.run([*launch, *sys.argv]).returncode)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = measure(options.shapes, options.turns)
    if dist.get_rank() == 0:
        told = {"command": " ".join(["python benchmarks/rank_bytes.py", *sys.argv[1:]]), "ranks": options.ranks}
        told |= {"machine": machine(), "versions": versions(), "shapes": results}
        options.out.write_text(json.dumps(told, indent=1) + "\n")
        for name, result in results.items():
            for side, found in result["bytes_a_step"].items():
                print(f"{name:14} {side:10} {found['collectives']:16,.0f} {found['sockets']:16,.0f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
