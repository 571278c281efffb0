"""Triton: Z = XΩ, then Y += XᵀZ, over chunks of tokens small enough that the second read of X comes from the L2 cache.

Holding a block of rows on chip would need a d-wide tile and a d×l accumulator per program; the two stages instead
exchange Z, which is d/l times smaller than X. Both split their sum where parallelism demands it and add the parts in
order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sst_kernels.ops.tiles import (
    Chip,
    add_partials,
    block,
    chip,
    dot,
    launch,
    load_tile,
    odd,
    rows_contiguous,
    split,
    token_weights,
)

# Bytes of X per chunk: what an H100's 50 MiB second-level cache still holds when the second stage reads it.
CHUNK_BYTES = 24 << 20


@triton.jit
def project_kernel(
    x,
    u,
    weights,
    z,
    squares,
    S,
    d,
    l,
    part,
    x_stride,
    u_stride,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BL: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z[k] = diag(weights) x[:, slice k] u[slice k, :], slices of `part` columns; zero where the weight is zero.

    squares[k, i] = Σ_t weights_t ‖x[t, slice k]‖² over the tokens of block i.
    """
    o_t = (tl.program_id(0).to(tl.int64)) * BT + tl.arange(0, BT)
    o_l = tl.program_id(1) * BL + tl.arange(0, BL)
    k = tl.program_id(2)
    last = tl.minimum((k + 1) * part, d)
    acc = tl.zeros([BT, BL], tl.float32)
    if HAS_SQUARES:
        VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # what a thread holds side by side
        square = tl.zeros([BT, BD // VECTOR], tl.float32)
    for c in range(k * part, last, BD):
        o_d = c + tl.arange(0, BD)
        b_x = load_tile(x, o_t, o_d, x_stride, S, last)
        b_u = load_tile(u, o_d.to(tl.int64), o_l, u_stride, last, l)
        acc = dot(b_x, b_u, acc, PRECISION)
        if HAS_SQUARES:
            wide = b_x.to(tl.float32)
            square += tl.sum(tl.reshape(wide * wide, [BT, BD // VECTOR, VECTOR]), 2)
    if HAS_WEIGHTS:
        w = tl.load(weights + o_t, mask=o_t < S, other=0.0)
        acc = tl.where((w != 0.0)[:, None], acc * w[:, None], 0.0)
    if HAS_SQUARES:
        norm = tl.sum(square, 1)
        if HAS_WEIGHTS:
            norm = tl.where(w != 0.0, norm * w, 0.0)
        if tl.program_id(1) == 0:
            tl.store(squares + k * tl.num_programs(0) + tl.program_id(0), tl.sum(norm, 0))
    p_z = z + (k.to(tl.int64) * S + o_t[:, None]) * l + o_l[None, :]
    tl.store(p_z, acc, mask=(o_t < S)[:, None] & (o_l < l)[None, :])


@triton.jit
def back_kernel(
    x,
    z,
    weights,
    y,
    S,
    d,
    l,
    part,
    x_stride,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BL: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    OVERWRITE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[k] += x[slice k, :]ᵀ z[slice k, :] (= with OVERWRITE), slices of `part` tokens; padding may hold NaN in x and is not read."""
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_l = tl.program_id(1) * BL + tl.arange(0, BL)
    k = tl.program_id(2)
    last = tl.minimum((k + 1) * part, S)
    acc = tl.zeros([BD, BL], tl.float32)
    for t in range(k * part, last, BT):
        o_t = (t + tl.arange(0, BT)).to(tl.int64)
        held = o_t < last
        if HAS_WEIGHTS:
            held &= tl.load(weights + o_t, mask=held, other=0.0) != 0.0
        b_x = tl.load(x + o_t[None, :] * x_stride + o_d[:, None], mask=held[None, :] & (o_d < d)[:, None], other=0.0)
        b_z = load_tile(z, o_t, o_l, l, last, l)
        acc = dot(b_x, b_z, acc, PRECISION)
    p_y = y + (k.to(tl.int64) * d + o_d[:, None]) * l + o_l[None, :]
    mask = (o_d < d)[:, None] & (o_l < l)[None, :]
    if not OVERWRITE:
        acc += tl.load(p_y, mask=mask, other=0.0)
    tl.store(p_y, acc, mask=mask)


def plan_project(S: int, d: int, l: int, wide: bool, small: bool, chip: Chip) -> dict:
    """Tile and launch options; `parts` slices of d keep every processor busy when there are few tokens. Tiles are `small` where
    more of them must pass through registers: odd sizes, and float16 against float32."""
    BT, BL = (64, block(l, 64)) if wide or small else (block(S, 128), block(l, 64))
    tiles = triton.cdiv(S, BT) * triton.cdiv(l, BL)
    parts = min(max(1, chip.processors // tiles), triton.cdiv(d, 512))
    return {
        "parts": parts,
        "BT": BT,
        "BD": 32 if wide or small else 64,
        "BL": BL,
        "num_warps": 4 if chip.reads_shared else 8,
        "num_stages": 3,
    } | _bound(wide, chip)


def plan_back(S: int, d: int, l: int, wide: bool, chip: Chip) -> dict:
    """Tile and launch options; `parts` slices of the tokens keep every processor busy."""
    BD, BL = (64, block(l, 64)) if wide else (128, block(l, 64))
    tiles = triton.cdiv(d, BD) * triton.cdiv(l, BL)
    parts = min(max(1, chip.processors // tiles), triton.cdiv(S, 256))
    return {
        "parts": parts,
        "BT": 64 if chip.reads_shared and not wide else 32,
        "BD": BD,
        "BL": BL,
        "num_warps": 4 if chip.reads_shared or wide else 8,
        "num_stages": 3,
    } | _bound(wide, chip)


def _bound(wide: bool, chip: Chip) -> dict:
    """float32 tiles are spilled to reach one more block per processor unless ptxas is given a bound; on sm_80 it is the bound that spills."""
    return {"maxnreg": 255} if wide and chip.reads_shared else {}


def project(x, u, precision, weights=None, squares=None, **override):
    """diag(weights) x [S, d] @ u [d, l] in float32, any mix of dtypes, no operand rounded; Σ_t weights_t ‖x_t‖² goes in parts
    to the list `squares`."""
    x, u = rows_contiguous(x), rows_contiguous(u)
    (S, d), l = x.shape, u.shape[1]
    small = odd(x) or odd(u) or (x.dtype == torch.float16 and u.dtype == torch.float32)
    meta = plan_project(S, d, l, x.element_size() == 4, small, chip(x.device)) | override
    part, parts = split(d, meta.pop("parts"), meta["BD"])
    z = torch.empty(parts, S, l, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(S, meta["BT"]), triton.cdiv(l, meta["BL"]), parts)
    if squares is not None:
        squares.append(torch.empty(parts * grid[0], dtype=torch.float32, device=x.device))
    launch(
        project_kernel,
        grid,
        x,
        u,
        weights,
        z,
        squares[-1] if squares else None,
        S,
        d,
        l,
        part,
        x.stride(0),
        u.stride(0),
        HAS_WEIGHTS=weights is not None,
        HAS_SQUARES=squares is not None,
        PRECISION=precision,
        **meta,
    )
    return z[0] if parts == 1 else _reduced(z)


def _reduced(parts):
    add_partials(parts[1:], parts[0])
    return parts[0]


def sketch(x, omega, spans, scale, out, precision, trace=None, **override):
    x = rows_contiguous(x)
    (S, d), l, device = x.shape, omega.shape[1], x.device
    weights = None if spans is None else token_weights(S, spans, scale)
    chunks = min(triton.cdiv(S, 512), triton.cdiv(S * d * x.element_size(), CHUNK_BYTES))
    step = min(S, split(S, chunks, 128)[0])
    meta = plan_back(step, d, l, x.element_size() == 4, chip(device)) | override
    part, parts = split(step, meta.pop("parts"), meta["BT"])
    y = torch.empty(parts, d, l, dtype=torch.float32, device=device)
    squares = None if trace is None else []
    for t in range(0, S, step):
        rows, w = x[t : t + step], None if weights is None else weights[t : t + step]
        launch(
            back_kernel,
            (triton.cdiv(d, meta["BD"]), triton.cdiv(l, meta["BL"]), triton.cdiv(len(rows), part)),
            rows,
            project(rows, omega, precision, w, squares),
            w,
            y,
            len(rows),
            d,
            l,
            part,
            x.stride(0),
            HAS_WEIGHTS=weights is not None,
            OVERWRITE=t == 0,
            PRECISION=precision,
            **meta,
        )
    add_partials(y, out)
    if squares:
        trace += torch.cat(squares).sum(dtype=torch.float64)
