"""The step of the row optimizer against the table's size, and against the papers' way.

    python benchmarks/row_step.py

From given reads (8,192 tokens x 64, by a Zipf law over 16,384 distinct rows of the table) to updated rows: count,
choose 512 by kl, multiply out their gradient, clip, Adam. The table has 16k, 262k, 1M and 4M rows of width 896, the
last in bfloat16. `papers` is what arXiv 2605.03229 and its code do with the same reads: the dense gradient of the table
by autograd, kl over all rows, a mask on the gradient, AdamW on the table. Its forward pass is not timed, nor is ours.
`layer` is a whole memory layer, forward, backward and step, whose scores grow with the square root of the table.

Two tables take turns at a time, the smallest being one of them. Memory is that of processes of their own, beyond the
table and the reads, over five steps. Writes benchmarks/results/row_step.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smf
from memory_growth import Setup, build
from smf.memory import Factors
from turns import Result, alone, bandwidth, compared, multiplications, parser, peak_growth, spreads, take_turns

D, TOKENS, READS, CHOSEN, DISTINCT = 896, 8192, 64, 512, 2**14
SIZES = {"16k": 128, "262k": 512, "1M": 1024, "4M": 2048}  # n_keys, by what the table is called
TINY = 32  # n_keys of a table to warm up with
PAPERS = ("16k", "262k")  # that the papers' way is measured at


def reads(n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row ids `[T, R]`, weights `[T, R]` and gradients of the weighted sum `[T, D]`."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(DISTINCT, generator=generator) * n_rows // DISTINCT  # all over the table
    likely = 1 / torch.arange(1, DISTINCT + 1, dtype=torch.float64)
    picked = torch.multinomial(likely, TOKENS * READS, replacement=True, generator=generator)
    w_TR = torch.rand(TOKENS, READS, generator=generator).softmax(-1)
    return rows[picked].to(torch.int32).view(TOKENS, READS), w_TR, torch.randn(TOKENS, D, generator=generator) * 1e-3


def filled(table: Tensor) -> Tensor:
    """The table with every row written, so that its pages are resident."""
    with torch.no_grad():
        for rows in table.split(2**16):
            rows.uniform_(-0.05, 0.05)
    return table


def optimizer_of(size: str) -> tuple[Any, smf.SparseMemoryOptimizer]:
    """A memory with its table written in full, and its optimizer."""
    dtype = "bfloat16" if size == "4M" else "float32"
    model = build(Setup(SIZES.get(size, TINY), tokens=TOKENS), init="zero", table_dtype=dtype).train()
    memory = smf.memory_layers(model)[0]
    filled(memory.values)
    background = smf.read_background(model, [{"input_ids": torch.arange(128).view(1, -1)}])
    return model, smf.SparseMemoryOptimizer(model, background, lr=1e-2, rows_per_step=CHOSEN)


def ours(size: str) -> Callable[[], None]:
    """A step of ours from the reads."""
    model, optimizer = optimizer_of(size)
    memory = smf.memory_layers(model)[0]
    idx_TR, w_TR, g_TD = reads(memory.shape.n_rows)

    def work(kept: Any = model) -> None:  # which holds the memory
        memory._pending.append(Factors(idx_TR, w_TR, g_TD, None))
        optimizer.step()

    return work


def papers(size: str) -> Callable[[], None]:
    """The same by the dense gradient of the table; the forward pass has been done."""
    n_rows = SIZES.get(size, TINY) ** 2
    table = nn.Parameter(filled(torch.empty(n_rows, D)))
    optimizer = torch.optim.AdamW([table], lr=1e-2, weight_decay=0.0)
    idx_TR, w_TR, g_TD = reads(n_rows)
    general_N = torch.ones(n_rows)
    sums = [F.embedding_bag(idx_TR, table, per_sample_weights=w_TR, mode="sum")]

    def work() -> None:
        sums[0].backward(g_TD, retain_graph=True)
        hits_N = torch.bincount(idx_TR.flatten(), minlength=n_rows)
        p_N, q_N = hits_N / hits_N.sum(), general_N / general_N.sum()
        score_N = p_N * torch.log((p_N + 1e-8) / (q_N + 1e-8))
        mask_N = torch.zeros(n_rows, 1)
        mask_N[score_N.topk(CHOSEN).indices] = 1
        assert table.grad is not None
        table.grad.mul_(mask_N)
        optimizer.step()
        optimizer.zero_grad()

    return work


def layer(size: str) -> Callable[[], None]:
    """Forward, backward and step of a memory layer, on hidden states that need a gradient."""
    model, optimizer = optimizer_of(size)
    memory = smf.memory_layers(model)[0]
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def work(kept: Any = model) -> None:
        memory.forward(x, None, training=True).square().mean().backward()
        optimizer.step()
        x.grad = None

    return work


def five(work: Callable[[], None]) -> None:
    for _ in range(5):
        work()


def growth(size: str, turns: int) -> dict[str, Any]:
    """A table of this size beside the smallest: the row step, and the whole layer."""
    found = {}
    for name, make, count in (("row step", ours, turns), ("layer", layer, max(2, turns // 5))):
        seconds = take_turns({"16k": make("16k"), size: make(size)}, count)
        found[name] = {"times 16k": compared(seconds, size, "16k"), "seconds": spreads(seconds)}
    return found


def against_papers(size: str, turns: int) -> dict[str, Any]:
    """How many times faster than the papers' way, on the same reads."""
    seconds = take_turns({"papers": papers(size), "ours": ours(size)}, turns)
    return {"times faster": compared(seconds, "papers", "ours"), "seconds": spreads(seconds)}


def floor() -> dict[str, Any]:
    """What a step must read, write and multiply, and the seconds of that at this machine's own speed."""
    idx_TR, _, _ = reads(DISTINCT)
    chosen = int(torch.bincount(idx_TR.flatten()).topk(CHOSEN).values.sum())
    touched = 4 * (TOKENS * D + 2 * TOKENS * READS + 7 * CHOSEN * D)  # g, ids and weights; old and new rows and moments
    gathered, flop = 4 * chosen * D, 2 * chosen * D
    return {
        "reads of the chosen rows": chosen,
        "bytes touched": touched,
        "bytes gathered": gathered,
        "FLOP": flop,
        "seconds of a copy of what is touched": touched / bandwidth(),
        "seconds of a copy of what is gathered": gathered / bandwidth(),
        "seconds of the FLOP": flop / multiplications(),
    }


def main() -> None:
    made = parser(__doc__, turns=15)
    made.add_argument("--part", nargs=2, help="measure one thing in this process and print it as JSON")
    options = made.parse_args()
    result = Result(__file__, options)
    if options.part:
        what, size = options.part
        if what == "growth":
            print(json.dumps(growth(size, options.turns)))
        elif what == "papers":
            print(json.dumps(against_papers(size, max(3, options.turns // (1 if size == "16k" else 3)))))
        else:
            make = {"ours": ours, "papers": papers}[what.removeprefix("memory-")]
            five(make("tiny"))  # loads the code
            work = make(size)
            print(json.dumps(peak_growth(lambda: five(work))))
        return

    def part(what: str, size: str) -> Any:
        return alone(__file__, "--turns", str(options.turns), "--threads", str(options.threads), "--part", what, size)

    grown = {size: part("growth", size) for size in SIZES if size != "16k"}
    faster = {size: part("papers", size) for size in PAPERS}
    memory = {size: part("memory-ours", size) for size in SIZES}
    dense = {size: part("memory-papers", size) for size in PAPERS}
    figures: dict[str, Any] = {
        "row step, times that of 16k": {size: each["row step"]["times 16k"] for size, each in grown.items()},
        "layer, times that of 16k": {size: each["layer"]["times 16k"] for size, each in grown.items()},
        "square root of the table, times that of 16k": {size: n / SIZES["16k"] for size, n in SIZES.items()},
        "times faster than the papers' way": {size: each["times faster"] for size, each in faster.items()},
        "peak beyond table and reads, MiB": {size: grew / 2**20 for size, grew in memory.items()},
        "the papers' way, MiB": {size: grew / 2**20 for size, grew in dense.items()},
        "times less memory": {size: dense[size] / memory[size] for size in PAPERS},
    }
    result.write(figures=figures, floor=floor(), growth=grown, papers=faster)


if __name__ == "__main__":
    main()
