"""Memory rows on a GPU: Triton kernels against PyTorch's operators and a copy's bandwidth, and a whole training step.

    python benchmarks/gpu.py                                        # all parts, some minutes, about 40 GB of GPU memory

Parts (`--parts`): `rows` is reading (weighted row sum, forward) and the gradient of the weights; `gradient` is the
gradient of chosen rows; `step` is a training step of a model of Qwen2.5-0.5B's shape (benchmarks/qwen_shape.py: the
same base, memory, options and text) in bfloat16. Milliseconds are those of CUDA events; the sides take turns, after a
warm-up. Each repeat has other ids, and the tables of the ids together are larger than the L2 cache, so that no repeat
finds the rows of the one before it.

`gathered` counts every read's row; `distinct` counts each row once, which no way of computing can go below;
both count ids, weights and the result too. A copy's bandwidth (bytes read and written) is measured in the same
run. Row ids are uniform or Zipf's (1 / rank, ranks dealt to rows anew for each set of ids). Errors are by norm,
against float64. Peaks are torch.cuda.max_memory_allocated: what a side holds, and what its steps take on top.
A part that fails is reported with its traceback, and the others go on. Writes benchmarks/results/gpu_NAME.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

import qwen_shape
from gpu_events import copy_bandwidth, error, extra_peak, race, spread
from gpu_step import step_part
from memory_growth import machine, versions
from smf.gradient import row_gradient
from smf.memory import Factors, row_dot, weighted_row_sum

RESULTS = Path(__file__).parent / "results"
TOKENS, READS, CHOSEN = 8192, 64, 512
SIZES = {"16k": 2**14, "262k": 2**18, "1M": 2**20}
WIDTHS = (896, 1024)
SETS = 4  # of ids, used in turn
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# -- rows -------------------------------------------------------------------------------------------------------------


def draw_ids(kind: str, n_rows: int, tokens: int) -> Tensor:
    """Row ids `[T, R]` in int32."""
    if kind == "uniform":
        return torch.randint(0, n_rows, (tokens, READS), device="cuda", dtype=torch.int32)
    heap = (1 / torch.arange(1, n_rows + 1, device="cuda", dtype=torch.float64)).cumsum(0)
    draws = torch.rand(tokens, READS, device="cuda", dtype=torch.float64) * heap[-1]
    rank = torch.searchsorted(heap, draws).clamp_(max=n_rows - 1)
    return torch.randperm(n_rows, device="cuda")[rank].int()


def draw_reads(kind: str, n_rows: int, width: int, tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`SETS` of row ids, weights, and gradients of the weighted row sum."""
    return [
        (
            draw_ids(kind, n_rows, tokens),
            torch.rand(tokens, READS, device="cuda").softmax(-1),
            torch.randn(tokens, width, device="cuda"),
        )
        for _ in range(SETS)
    ]


def exact_rows(values_ND: Tensor, idx_TR: Tensor, w_TR: Tensor, g_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted row sum and the gradient of the weights in float64, some tokens at a time."""
    sums, dots = [], []
    for idx, w, g in zip(idx_TR.split(256), w_TR.split(256), g_TD.split(256), strict=True):
        rows_TRD = values_ND[idx].double()
        sums.append(torch.einsum("tr,trd->td", w.double(), rows_TRD))
        dots.append(torch.einsum("td,trd->tr", g.double(), rows_TRD))
    return torch.cat(sums), torch.cat(dots)


def traffic(idx_TR: Tensor, row_bytes: int, result_bytes: int) -> dict[str, int]:
    """Bytes that reading takes: every read's row, and each row once; ids and weights or result (4 bytes) with both."""
    beside = idx_TR.numel() * 8 + result_bytes
    return {
        "gathered": idx_TR.numel() * row_bytes + beside,
        "distinct": len(torch.unique(idx_TR)) * row_bytes + beside,
    }


def rows_case(
    kind: str, n_rows: int, width: int, dtype: str, repeats: int, tokens: int, copy_gbs: float
) -> dict[str, Any]:
    """Reading and the gradient of the weights, for one table."""
    count = SETS if n_rows * width * 4 < 2**28 else 1  # one large table holds different rows for each set of ids
    tables = [torch.randn(n_rows, width, device="cuda", dtype=DTYPES[dtype]) for _ in range(count)]
    reads = draw_reads(kind, n_rows, width, tokens)

    def given(i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tables[i % count], *reads[i % SETS]

    def bag(i: int) -> Tensor:
        values, idx, w, _ = given(i)
        return F.embedding_bag(idx, values, per_sample_weights=w.to(values.dtype), mode="sum")

    def sums(kernels: bool) -> Callable[[int], Tensor]:
        return lambda i: weighted_row_sum(*given(i)[:3], kernels)

    def dots(kernels: bool) -> Callable[[int], Tensor]:
        return lambda i: row_dot(given(i)[0], given(i)[1], given(i)[3], kernels)

    sides = {
        "sum": {"kernel": sums(True), "torch": sums(False), "EmbeddingBag": bag},
        "dot": {"kernel": dots(True), "torch": dots(False)},
    }
    exact = dict(zip(sides, exact_rows(*given(0)), strict=True))
    row_bytes, result = width * tables[0].element_size(), tokens * width * 4
    counts = [traffic(idx, row_bytes, result) for idx, _, _ in reads]
    counted = {key: statistics.median(each[key] for each in counts) for key in counts[0]}
    case: dict[str, Any] = {"ids": kind, "rows": n_rows, "width": width, "dtype": dtype, "bytes": counted}
    for what, racing in sides.items():
        taken = race(racing, repeats)
        for name, side in racing.items():
            milliseconds = statistics.median(taken[name])
            case[f"{what}, {name}"] = spread(taken[name]) | {
                "gathered GB/s": counted["gathered"] / milliseconds / 1e6,
                "gathered, share of a copy": counted["gathered"] / milliseconds / 1e6 / copy_gbs,
                "distinct, share of a copy": counted["distinct"] / milliseconds / 1e6 / copy_gbs,
                "error": error(side(0), exact[what]),
                "repeat is bit-equal": torch.equal(side(0), side(0)),
                "extra MiB": extra_peak(lambda side=side: side(0)),
            }
    return case


def rows_part(given: argparse.Namespace, copy_gbs: float) -> list[dict[str, Any]]:
    """Every kind of ids, size, width and dtype."""
    cases = []
    print(f"{'':34}   sum: kernel      torch  EmbeddingBag    of a copy |  dot: kernel      torch")
    for kind in ("uniform", "zipf"):
        for size, n_rows in SIZES.items():
            for width in WIDTHS:
                for dtype in DTYPES:
                    case = rows_case(kind, n_rows, width, dtype, given.repeats, given.tokens, copy_gbs)
                    cases.append(case)
                    ms = {key: each["median"] for key, each in case.items() if "," in key}
                    share = case["sum, kernel"]["gathered, share of a copy"]
                    print(
                        f"{kind:>8} {size:>5} x {width:>4} {dtype:>8} ms {ms['sum, kernel']:>11.3f} "
                        f"{ms['sum, torch']:>10.3f} {ms['sum, EmbeddingBag']:>13.3f} {share:>11.0%}  | "
                        f"{ms['dot, kernel']:>11.3f} {ms['dot, torch']:>10.3f}",
                        flush=True,
                    )
    return cases


# -- the chosen rows' gradient ----------------------------------------------------------------------------------------


def choose(idx_TR: Tensor, which: str) -> Tensor:
    """`CHOSEN` of the rows read: the most read, or any; ascending."""
    rows_R, hits_R = torch.unique(idx_TR, return_counts=True)
    order_R = hits_R.argsort(descending=True) if which == "most read" else torch.randperm(len(rows_R), device="cuda")
    return rows_R[order_R[:CHOSEN]].sort().values.long()


def gradient_case(kind: str, n_rows: int, width: int, which: str, repeats: int, tokens: int) -> dict[str, Any]:
    """Multiplying the factors out for chosen rows; sorting the reads, which comes before it, is measured by itself."""
    like = torch.empty(0, width, device="cuda")
    sets = [([Factors(*reads, None)], choose(reads[0], which)) for reads in draw_reads(kind, n_rows, width, tokens)]
    for (factors,), _ in sets:
        factors.by_row  # noqa: B018  # both sides need the reads sorted; a step sorts once, and counts by it too

    def multiplied(kernels: bool) -> Callable[[int], Tensor]:
        def side(i: int) -> Tensor:
            sets[i % SETS][0][0].kernels = kernels
            return row_gradient(*sets[i % SETS], like)

        return side

    sides = {"kernel": multiplied(True), "torch": multiplied(False)}
    sorting = {"sort": lambda i: replace(sets[i % SETS][0][0]).by_row}
    (factors,), rows_t = sets[0]
    factors = replace(factors, w_TR=factors.w_TR.double(), g_TD=factors.g_TD.double(), kernels=False)
    exact = row_gradient([factors], rows_t, like.double())
    read = torch.isin(sets[0][0][0].idx_TR, rows_t.int()).double().mean()
    case: dict[str, Any] = {"ids": kind, "rows": n_rows, "width": width, "chosen": which, "share read": float(read)}
    case["sort"] = spread(race(sorting, repeats)["sort"])
    for name, taken in race(sides, repeats).items():
        case[name] = spread(taken) | {
            "error": error(sides[name](0), exact),
            "repeat is bit-equal": torch.equal(sides[name](0), sides[name](0)),
            "extra MiB": extra_peak(lambda name=name: sides[name](0)),
        }
    return case


def gradient_part(given: argparse.Namespace, copy_gbs: float) -> list[dict[str, Any]]:
    """Every kind of ids, size and width; the most read rows, and any."""
    cases = []
    print(f"{'':44}kernel, ms      torch, ms   share of the reads   sort, ms")
    for kind in ("uniform", "zipf"):
        for size, n_rows in SIZES.items():
            for width in WIDTHS:
                for which in ("most read", "any"):
                    case = gradient_case(kind, n_rows, width, which, given.repeats, given.tokens)
                    cases.append(case)
                    print(
                        f"{kind:>8} {size:>5} x {width:>4} {CHOSEN} {which:>10} rows "
                        f"{case['kernel']['median']:>14.3f} {case['torch']['median']:>14.3f} "
                        f"{case['share read']:>14.1%} {case['sort']['median']:>16.3f}",
                        flush=True,
                    )
    return cases


# -- all of it --------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[argparse.Namespace, float], Any]] = {
    "rows": rows_part,
    "gradient": gradient_part,
    "step": step_part,
}


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = qwen_shape.Setup()
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of the parts rows and gradient")
    parser.add_argument("--repeats", type=int, default=20, help="of each side there")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of a turn that are not timed")
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn that are timed")
    parser.add_argument("--turns", type=int, default=4, help="turns of each side")
    parser.add_argument("--tokenizer", default=text.tokenizer, help="folder or hub name, of the text")
    parser.add_argument("--text", default=text.text, help="JSON lines with a text each; absent: ids by Zipf's law")
    parser.add_argument("--tiny", action="store_true", help="a base of three layers of width 32, to try the part step")
    parser.add_argument("--profile", action="store_true", help="add what takes most of the device in a step")
    parser.add_argument("--output", type=Path, help="none: benchmarks/results/gpu_NAME.json")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the result."""
    given = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; the kernels' values are tested without one: tests/test_kernels.py")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    output = given.output or RESULTS / f"gpu_{re.sub('[^a-z0-9]+', '_', name.lower())}.json"
    copy_gbs = copy_bandwidth(given.repeats)
    print(f"{name}: a copy moves {copy_gbs:.0f} GB/s")
    found: dict[str, Any] = {
        "command": f"python {' '.join(sys.argv)}",
        "machine": machine() | {"gpu": name, "load average at the start": os.getloadavg()[0]},
        "versions": versions() | {"triton": triton.__version__, "cuda": torch.version.cuda},
        "setup": {"tokens": given.tokens, "reads a token": READS, "chosen rows": CHOSEN, "sets of ids": SETS},
        "copy GB/s": copy_gbs,
    }
    failed = []
    for part in given.parts:
        started = time.perf_counter()
        try:
            found[part] = PARTS[part](given, copy_gbs)
        except Exception:  # what a GPU was rented for is not lost: the other parts go on
            failed.append(part)
            found[part] = {"failed": traceback.format_exc()}
            print(found[part]["failed"])
        torch.cuda.empty_cache()
        print(f"{part}: {time.perf_counter() - started:.0f} s\n", flush=True)
        output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {output}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
