"""Product-key search against exact search over all keys, which finds the same rows.

    python benchmarks/search.py

Queries of four heads, 16 rows each, keys of width 256. `sums` scores both halves and adds up all pairs, the cheapest
exact search; `products` multiplies each query with every whole key. The tokens of a turn are fewer for larger tables,
so that the exact scores take 512 MiB at most. Queries that are given are searched: their own product is the same for
all. Writes benchmarks/results/search.json.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import smf
from memory_growth import Setup, build
from turns import Result, compared, parser, spreads, take_turns

HEADS, KNN, HALF = 4, 16, 128
SIZES = {"4k": 64, "16k": 128, "65k": 256, "262k": 512, "1M": 1024}
PRODUCTS = ("4k", "16k", "65k", "262k")  # the whole keys of a larger table do not fit


def exact(score_THN: Tensor) -> tuple[Tensor, Tensor]:
    best_THK, id_THK = score_THN.topk(KNN, dim=-1)
    return id_THK.to(torch.int32).flatten(1), best_THK.softmax(-1).flatten(1)


def sides_of(size: str, x_TD: Tensor) -> dict[str, Any]:
    """The ways to search, all from the same hidden states."""
    model = build(Setup(SIZES[size], heads=HEADS, knn=KNN, k_dim=2 * HALF), init="zero")
    memory = smf.memory_layers(model)[0]
    keys_HPnC = memory.tensor("keys")
    n = SIZES[size]

    def query(kept: Any = model) -> Tensor:  # which holds the memory
        weight, bias = memory.tensor("query_weight"), memory.tensor("query_bias")
        return torch.nn.functional.linear(x_TD, weight, bias).view(len(x_TD), HEADS, 2, HALF)

    def sums() -> tuple[Tensor, Tensor]:
        score_THPn = torch.einsum("thpc,hpnc->thpn", query(), keys_HPnC)
        return exact((score_THPn[:, :, 0, :, None] + score_THPn[:, :, 1, None, :]).flatten(2))

    sides: dict[str, Any] = {"product keys": lambda: memory.search(x_TD), "sums": sums}
    if size in PRODUCTS:
        first = keys_HPnC[:, 0, :, None].expand(-1, -1, n, -1)
        second = keys_HPnC[:, 1, None, :].expand(-1, n, -1, -1)
        keys_HNC = torch.cat([first, second], dim=-1).flatten(1, 2)
        sides["products"] = lambda: exact(torch.einsum("thc,hnc->thn", query().flatten(2), keys_HNC))
    return sides


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__, turns=9).parse_args()
    result = Result(__file__, options)
    figures, seconds = {}, {}
    for size, n in SIZES.items():
        tokens = min(512, 2**27 // (HEADS * n * n))
        sides = sides_of(size, torch.randn(tokens, 896, generator=torch.Generator().manual_seed(0)))
        found = {side: search()[0] for side, search in sides.items()}
        same = {side: float((ids == found["product keys"]).float().mean()) for side, ids in found.items()}
        took = take_turns(sides, options.turns)
        figures[size] = {
            f"{side}, times product keys": compared(took, side, "product keys")
            | {"tokens": tokens, "rows that are the same": same[side]}
            for side in sides
            if side != "product keys"
        }
        seconds[size] = spreads(took)
    result.write(figures=figures, seconds=seconds)


if __name__ == "__main__":
    main()
