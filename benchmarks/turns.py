"""What the benchmarks share: sides of a comparison that take turns, medians with spreads, memory, the result file.

Every figure is a ratio of two sides within one run. A turn of one side is followed by a turn of the next, so that
what else the machine does meets all of them; the ratio is taken turn by turn, and its median and spread are kept.
Seconds are given twice: of the clock, and of the processor for this process, which other processes' work hardly
touches. Where the machine was busy (its load is in the result), the second is the one to read.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from memory_growth import machine, resident, versions

RESULTS = Path(__file__).parent / "results"
Seconds = dict[str, list[float]]  # "clock" and "processor", a number a turn


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and ends."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    names = ("least", "lower quartile", "median", "upper quartile", "most")
    return dict(zip(names, (min(values), *quartiles, max(values)), strict=True))


def take_turns(sides: Mapping[str, Callable[[], Any]], turns: int, warm_up: int = 1) -> dict[str, Seconds]:
    """Let the sides work in turn; the first `warm_up` rounds are not kept."""
    seconds: dict[str, Seconds] = {side: {"clock": [], "processor": []} for side in sides}
    for turn in range(-warm_up, turns):
        for side, work in sides.items():
            clock, processor = time.perf_counter(), time.process_time()
            work()
            took = time.perf_counter() - clock, time.process_time() - processor
            if turn >= 0:
                seconds[side]["clock"].append(took[0])
                seconds[side]["processor"].append(took[1])
    return seconds


def compared(seconds: Mapping[str, Seconds], side: str, other: str) -> dict[str, dict[str, float]]:
    """The ratio of a side's seconds to another's, turn by turn: its spread, by the clock and by the processor."""
    return {
        kind: spread([a / b for a, b in zip(seconds[side][kind], seconds[other][kind], strict=True)])
        for kind in ("clock", "processor")
    }


def spreads(seconds: Mapping[str, Seconds]) -> dict[str, Any]:
    """The seconds of each side, as spreads."""
    return {side: {kind: spread(values) for kind, values in own.items()} for side, own in seconds.items()}


def peak_growth(work: Callable[[], Any]) -> int:
    """By how many bytes the resident memory of this process grows at most while it works (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed is given back, so that using it again is growth
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    work()
    return resident("VmHWM") - before


def alone(script: str, *arguments: str) -> Any:
    """What a benchmark prints last, as JSON, when it runs with these arguments in a process of its own."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def bandwidth() -> float:
    """Bytes a second that a copy of 1 GiB reads and writes, on as many threads as torch has: for the floors."""
    one, other = torch.ones(2**28), torch.ones(2**28)
    return 2 * one.nbytes / min(take_turns({"copy": lambda: other.copy_(one)}, 5)["copy"]["clock"])


def multiplications() -> float:
    """FLOP a second of a product of two 2,048 x 2,048 matrices in float32: for the floors."""
    one, other = torch.randn(2, 2048, 2048)
    return 2 * 2048**3 / min(take_turns({"product": lambda: one @ other}, 5)["product"]["clock"])


def parser(description: str | None, turns: int) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--turns", type=int, default=turns, help="of each side")
    made.add_argument("--threads", type=int, default=1, help="of torch")
    made.add_argument("--output", type=Path, help="none: benchmarks/results/NAME.json")
    return made


class Result:
    """The result file of one benchmark; made before it measures, so that it knows how busy the machine was then."""

    def __init__(self, script: str, options: argparse.Namespace):
        torch.set_num_threads(options.threads)
        name = Path(script).stem
        self.path = options.output or RESULTS / f"{name}.json"
        self.head = {
            "command": " ".join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
            "machine": machine() | {"load average at the start": os.getloadavg()[0]},
            "versions": versions(),
        }

    def write(self, **found: Any) -> None:
        """Write it, and print the figures."""
        self.head["machine"] |= {"load average at the end": os.getloadavg()[0]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.head | found, indent=1) + "\n")
        print(json.dumps(found.get("figures", found), indent=1))
        print(f"written to {self.path}")
