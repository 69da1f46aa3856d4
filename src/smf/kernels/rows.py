"""Triton kernels: the weighted row sum, the gradient of its weights, and the gradient of chosen rows.

Each adds in float32 and in an order that the sizes fix, with no atomics: a repeat on one machine is bit-equal. For the
same reason block sizes are constants and not autotuned. The kernels only move bytes, 2 FLOPs for each number of a row:
what counts is that many rows are on their way at a time, which is what a tile of READS rows x COLS columns is for
(8 KiB, read by two warps: the best of some thirty tried on an H200, or near it). Measured by benchmarks/gpu.py.

Shape letters: T tokens, R reads a token, N rows, D model width, t chosen rows.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch has options and constants that the types of Triton do not know)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ConfigError
from . import OFF, check_table

CHUNK = 128  # reads that one program adds up, where a row has more

# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _weighted_sum(values, idx, weights, out, D, R: tl.constexpr, READS: tl.constexpr, COLS: tl.constexpr):
    """One program for each token and COLS columns."""
    blocks = tl.cdiv(D, COLS)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    col_C = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    sum_RC = tl.zeros((READS, COLS), tl.float32)
    for first in range(0, R, READS):
        read_R = first + tl.arange(0, READS)
        row_R = tl.load(idx + token * R + read_R, mask=read_R < R, other=0).to(tl.int64)
        weight_R = tl.load(weights + token * R + read_R, mask=read_R < R, other=0.0)
        inside_RC = (read_R < R)[:, None] & (col_C < D)[None, :]
        row_RC = tl.load(values + row_R[:, None] * D + col_C[None, :], mask=inside_RC, other=0.0)
        sum_RC += weight_R[:, None] * row_RC.to(tl.float32)
    tl.store(out + token * D + col_C, tl.sum(sum_RC, 0), mask=col_C < D)


@triton.jit
def _dot(values, idx, g, out, D, R: tl.constexpr, READS: tl.constexpr, COLS: tl.constexpr):
    """One program for each token and READS of its reads."""
    blocks = tl.cdiv(R, READS)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    read_R = tl.program_id(0) % blocks * READS + tl.arange(0, READS)
    row_R = tl.load(idx + token * R + read_R, mask=read_R < R, other=0).to(tl.int64)
    sum_RC = tl.zeros((READS, COLS), tl.float32)
    for first in range(0, D, COLS):
        col_C = first + tl.arange(0, COLS)
        g_C = tl.load(g + token * D + col_C, mask=col_C < D, other=0.0)
        inside_RC = (read_R < R)[:, None] & (col_C < D)[None, :]
        row_RC = tl.load(values + row_R[:, None] * D + col_C[None, :], mask=inside_RC, other=0.0)
        sum_RC += row_RC.to(tl.float32) * g_C[None, :]
    tl.store(out + token * R + read_R, tl.sum(sum_RC, 1), mask=read_R < R)


@triton.jit
def _sum_of_reads(places, weights, g, first, last, col_C, D, R: tl.constexpr, READS: tl.constexpr, COLS: tl.constexpr):
    """`w * g` added up over the reads `places[first:last]`, which are places in `[T, R]`."""
    sum_RC = tl.zeros((READS, COLS), tl.float32)
    for start in range(first, last, READS):
        at_R = start + tl.arange(0, READS)
        read_R = tl.load(places + at_R, mask=at_R < last, other=0).to(tl.int64)
        weight_R = tl.load(weights + read_R, mask=at_R < last, other=0.0)
        inside_RC = (at_R < last)[:, None] & (col_C < D)[None, :]
        g_RC = tl.load(g + (read_R // R)[:, None] * D + col_C[None, :], mask=inside_RC, other=0.0)
        sum_RC += weight_R[:, None] * g_RC
    return tl.sum(sum_RC, 0)


@triton.jit
def _chunk_sums(
    places,
    weights,
    g,
    starts,
    reads,
    chunk_ends,
    chunk_row,
    out,
    t,
    D,
    R: tl.constexpr,
    SIZE: tl.constexpr,
    READS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program for each whole chunk of a row's reads and COLS columns; there are at most as many as are launched."""
    blocks = tl.cdiv(D, COLS)
    chunk = tl.program_id(0) // blocks
    col_C = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    row = tl.load(chunk_row + chunk)
    if row < t:
        first_chunk = tl.load(chunk_ends + row) - tl.load(reads + row) // SIZE
        first = tl.load(starts + row) + (chunk - first_chunk) * SIZE
        sum_C = _sum_of_reads(places, weights, g, first, first + SIZE, col_C, D, R, READS, COLS)
        tl.store(out + chunk.to(tl.int64) * D + col_C, sum_C, mask=col_C < D)


@triton.jit
def _row_sums(
    places,
    weights,
    g,
    starts,
    reads,
    chunk_ends,
    chunk_sums,
    grad,
    D,
    R: tl.constexpr,
    SIZE: tl.constexpr,
    READS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program for each row and COLS columns: adds the row's chunks, in order, and the reads behind the last one."""
    blocks = tl.cdiv(D, COLS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col_C = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    begin = tl.load(starts + row)
    count = tl.load(reads + row)
    last = tl.load(chunk_ends + row)
    chunks = count // SIZE
    sum_RC = tl.zeros((READS, COLS), tl.float32)
    for start in range(last - chunks, last, READS):
        chunk_R = start + tl.arange(0, READS)
        inside_RC = (chunk_R < last)[:, None] & (col_C < D)[None, :]
        sum_RC += tl.load(chunk_sums + chunk_R.to(tl.int64)[:, None] * D + col_C[None, :], mask=inside_RC, other=0.0)
    rest_C = _sum_of_reads(places, weights, g, begin + chunks * SIZE, begin + count, col_C, D, R, READS, COLS)
    at_C = grad + row * D + col_C
    tl.store(at_C, tl.load(at_C, mask=col_C < D) + tl.sum(sum_RC, 0) + rest_C, mask=col_C < D)


# -- what memory.py and gradient.py call ------------------------------------------------------------------------------


def _check(values_ND: Tensor, other: Tensor) -> None:
    check_table(values_ND)
    if other.dtype != torch.float32:
        raise ConfigError(
            f"the GPU kernels compute in float32, but the memory's input is {other.dtype}; cast it, {OFF}"
        )


# Operators of torch, so that torch.compile does not look inside and breaks no graph.
@torch.library.custom_op("smf::weighted_row_sum", mutates_args=())
def weighted_row_sum(values_ND: Tensor, idx_TR: Tensor, w_TR: Tensor) -> Tensor:
    """`o[t] = sum over r of w[t, r] * values[idx[t, r]]`, `[T, D]` in float32; see `memory.weighted_row_sum`."""
    _check(values_ND, w_TR)
    (T, R), D = idx_TR.shape, values_ND.shape[1]
    out_TD = w_TR.new_empty(T, D)
    if out_TD.numel():
        with torch.cuda.device_of(values_ND):
            _weighted_sum[(T * triton.cdiv(D, 256),)](
                values_ND,
                idx_TR.contiguous(),
                w_TR.contiguous(),
                out_TD,
                D,
                R,
                READS=32 // values_ND.element_size(),
                COLS=256,
                num_warps=2,
            )
    return out_TD


@weighted_row_sum.register_fake
def _(values_ND: Tensor, idx_TR: Tensor, w_TR: Tensor) -> Tensor:
    return w_TR.new_empty(idx_TR.shape[0], values_ND.shape[1])


@torch.library.custom_op("smf::row_dot", mutates_args=())
def row_dot(values_ND: Tensor, idx_TR: Tensor, g_TD: Tensor) -> Tensor:
    """`values[idx[t, r]] . g[t]`, `[T, R]` in float32: the gradient of the weights."""
    _check(values_ND, g_TD)
    (T, R), D = idx_TR.shape, values_ND.shape[1]
    out_TR = g_TD.new_empty(T, R)
    if out_TR.numel():
        with torch.cuda.device_of(values_ND):
            _dot[(T * triton.cdiv(R, 16),)](
                values_ND,
                idx_TR.contiguous(),
                g_TD.contiguous(),
                out_TR,
                D,
                R,
                READS=16,
                COLS=512 // values_ND.element_size(),
                num_warps=2,
            )
    return out_TR


@row_dot.register_fake
def _(values_ND: Tensor, idx_TR: Tensor, g_TD: Tensor) -> Tensor:
    return g_TD.new_empty(idx_TR.shape)


def add_row_gradient(
    grad_tD: Tensor, places_P: Tensor, starts_t: Tensor, reads_t: Tensor, w_TR: Tensor, g_TD: Tensor
) -> None:
    """Add to `grad_tD` the gradient of t rows from the factors of one backward pass, in place.

    A row that many tokens read is cut into chunks of CHUNK reads, which are added up side by side, then in order;
    nothing waits for the device to say how many there are.

    Args:
        grad_tD: float32.
        places_P: int32, the places of all `P = T * R` reads in `[T, R]`, row by row.
        starts_t: int32, where a row's reads begin among them.
        reads_t: int32, how many it has.
        w_TR: the weights of the reads.
        g_TD: the gradient of the weighted row sum.
    """
    _check(grad_tD, w_TR)
    (T, R), (t, D) = w_TR.shape, grad_tD.shape
    if T * R * t * D == 0:
        return
    chunk_ends_t = (reads_t // CHUNK).cumsum(0, dtype=torch.int32)
    most = T * R // CHUNK
    chunk_row = torch.searchsorted(
        chunk_ends_t, torch.arange(most, device=w_TR.device, dtype=torch.int32), right=True, out_int32=True
    )
    chunk_sums = grad_tD.new_empty(most, D)
    blocks = triton.cdiv(D, 256)
    reads = (places_P, w_TR.contiguous(), g_TD.contiguous(), starts_t, reads_t, chunk_ends_t)
    sizes = {"R": R, "SIZE": CHUNK, "READS": 8, "COLS": 256, "num_warps": 2}
    with torch.cuda.device_of(grad_tD):
        if most:
            _chunk_sums[(most * blocks,)](*reads, chunk_row, chunk_sums, t, D, **sizes)
        _row_sums[(t * blocks,)](*reads, chunk_sums, grad_tD, D, **sizes)
