"""What the Triton kernels compute: in Triton's interpreter on the CPU (`TRITON_INTERPRET=1`), else on a CUDA device.

The interpreter is chosen before triton is imported, so test_kernels.py runs this as a process and reads its JSON.
Memory that nobody has written is NaN here (`use_deterministic_algorithms` fills it), so that a number left out shows.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

import torch
from torch import Tensor

import smf
from conftest import batch, tiny_model
from smf.gradient import row_gradient
from smf.kernels import rows as kernels
from smf.memory import Factors, row_dot, weighted_row_sum

# tokens, reads a token, rows, width; hub: every token reads rows 3 and 6; sizes that fit no tile, and one that fits all
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPES = {
    "one number": (1, 1, 4, 1),
    "odd": (13, 7, 20, 33),
    "wider than a tile": (5, 18, 20, 515),
    "even": (4, 64, 32, 256),
    "hub": (50, 3, 9, 17),
}


def data(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A table, row ids, weights, and the gradient of the weighted row sum."""
    T, R, N, D = SHAPES[name]
    generator = torch.Generator().manual_seed(T)
    values_ND = torch.randn(N, D, generator=generator).to(dtype)
    idx_TR = torch.randint(0, N, (T, R), generator=generator, dtype=torch.int32)
    if name == "hub":
        idx_TR[:, 1] = idx_TR[::2, 0] = 3  # some tokens read it twice
        idx_TR[:, 2] = 6  # a second hub, whose chunks come behind the first one's
    w_TR, g_TD = torch.rand(T, R, generator=generator), torch.randn(T, D, generator=generator)
    return values_ND.to(DEVICE), idx_TR.to(DEVICE), w_TR.to(DEVICE), g_TD.to(DEVICE)


def error(got: Tensor, expected: Tensor) -> float:
    """Of float32 against float64, by norm; NaN if any number is."""
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def dense(idx_TR: Tensor, w_TR: Tensor, g_TD: Tensor, n_rows: int) -> Tensor:
    """The gradient of the whole table, in float64."""
    each_TRD = w_TR.double().unsqueeze(-1) * g_TD.double().unsqueeze(1)
    out_ND = torch.zeros(n_rows, g_TD.shape[1], dtype=torch.float64, device=DEVICE)
    return out_ND.index_add_(0, idx_TR.flatten(), each_TRD.flatten(0, 1))


def compare(name: str, dtype: torch.dtype) -> dict[str, float | bool]:
    """Errors of the kernels and of PyTorch's operators against float64, and whether a repeat is bit-equal."""
    values_ND, idx_TR, w_TR, g_TD = data(name, dtype)
    n_rows = len(values_ND)
    rows_t = torch.arange(0, n_rows + 3, 3, device=DEVICE)  # the last is read by nobody
    half = len(g_TD) // 2  # of the tokens are read by a second micro-batch too
    factors = [Factors(idx_TR, w_TR, g_TD, None), Factors(idx_TR[:half], w_TR[:half], g_TD[:half], None)]
    exact = {
        "sum": torch.einsum("tr,trd->td", w_TR.double(), values_ND[idx_TR].double()),
        "dot": torch.einsum("td,trd->tr", g_TD.double(), values_ND[idx_TR].double()),
        "rows": sum(dense(f.idx_TR, f.w_TR, f.g_TD, n_rows + 3)[rows_t] for f in factors),
    }
    ours, again, torchs = (
        {
            "sum": weighted_row_sum(values_ND, idx_TR, w_TR, on),
            "dot": row_dot(values_ND, idx_TR, g_TD, on),
            "rows": row_gradient([replace(f, kernels=on) for f in factors], rows_t, values_ND),
        }
        for on in (True, True, False)
    )
    found: dict[str, float | bool] = {f"{key}, kernel": error(ours[key], exact[key]) for key in exact}
    found |= {f"{key}, torch": error(torchs[key], exact[key]) for key in exact}
    found |= {f"{key}, repeat": torch.equal(ours[key], again[key]) for key in exact}
    found["unread row"] = float(ours["rows"][-1].abs().max())
    found["dtypes"] = all(each.dtype == torch.float32 for each in ours.values())
    return found


def empty() -> dict[str, bool]:
    """No tokens, and no chosen rows."""
    values_ND, idx_TR, w_TR, g_TD = data("odd", torch.float32)
    some_t = torch.arange(4, device=DEVICE)
    some = Factors(idx_TR, w_TR, g_TD, None, kernels=True)
    none = Factors(idx_TR[:0], w_TR[:0], g_TD[:0], None, kernels=True)
    return {
        "sum": kernels.weighted_row_sum(values_ND, idx_TR[:0], w_TR[:0]).shape == (0, 33),
        "dot": kernels.row_dot(values_ND, idx_TR[:0], g_TD[:0]).shape == (0, 7),
        "no tokens": not row_gradient([none], some_t, values_ND).any(),
        "no rows": row_gradient([some], some_t[:0], values_ND).shape == (0, 33),
    }


def inputs(seed: int = 0) -> dict[str, Tensor]:
    """A batch on the device."""
    return {name: each.to(DEVICE) for name, each in batch(seed=seed).items()}


def training(table_dtype: str) -> dict[str, float | bool]:
    """Two steps of a tiny model without and, twice, with the kernels."""
    tables, chosen = [], []
    for on in (False, True, True):
        model = tiny_model(init="paper", table_dtype=table_dtype).to(DEVICE).train()
        start = {layer: memory.values.detach().clone() for layer, memory in smf.memory_layers(model).items()}
        smf.use_kernels(model, on)
        optimizer = smf.SparseMemoryOptimizer(model, rule="tf", rows_per_step=8, reads="gradient", update="sgd", lr=1.0)
        for i in range(2):
            model(**inputs(i)).loss.backward()
            optimizer.step()
        assert optimizer.last_step is not None
        chosen.append(optimizer.last_step.rows)
        tables.append({k: memory.values.detach() - start[k] for k, memory in smf.memory_layers(model).items()})
    off, first, second = tables
    return {
        "moved": float(sum(moved.norm() for moved in off.values())),
        "difference": max(error(first[layer], off[layer].double()) for layer in off),
        "same rows": all(torch.equal(chosen[0][layer], chosen[1][layer]) for layer in off),
        "repeat": all(torch.equal(first[layer], second[layer]) for layer in off),
    }


def weights_gradient() -> float:
    """How far the gradient of the query is from the one without kernels, while healing."""
    grads = []
    for on in (False, True):
        model = tiny_model(init="paper", train="memory").to(DEVICE).train()
        smf.use_kernels(model, on)
        optimizer = smf.SparseMemoryOptimizer(model, lr=0.1)
        model(**inputs()).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "query" in n]))
        optimizer.zero_grad()
    return error(grads[1], grads[0].double())


def compiled() -> float:
    """How far a memory under torch.compile is from the one that is not; a graph break raises."""
    model = tiny_model(init="paper").to(DEVICE)
    smf.use_kernels(model)
    memory = smf.memory_layers(model)[1]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    forward = torch.compile(memory.forward, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    with torch.no_grad():
        expected = memory.forward(x, None, training=False)
        return error(forward(x, None, training=False), expected.double())


def refused() -> dict[str, str]:
    """What the kernels say of dtypes that they do not compute in."""
    said = {}
    try:
        smf.use_kernels(tiny_model().double().to(DEVICE))
    except smf.ConfigError as caught:
        said["table"] = str(caught)
    values_ND, idx_TR, w_TR, _ = data("odd", torch.float32)
    try:
        kernels.weighted_row_sum(values_ND, idx_TR, w_TR.double())
    except smf.ConfigError as caught:
        said["input"] = str(caught)
    return said


def main() -> None:
    """Print everything as one line of JSON."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    kernels.CHUNK = 16  # so that few tokens make many chunks
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    found = {f"{name}, {dtype}": compare(name, dtypes[dtype]) for name in SHAPES for dtype in dtypes}
    found |= {
        "empty": empty(),
        "weights' gradient": weights_gradient(),
        "refused": refused(),
        "compiled": compiled(),
    }
    found |= {f"training, {dtype}": training(dtype) for dtype in dtypes}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
