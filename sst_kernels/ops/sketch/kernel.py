"""Triton: W = diag(weights) X Ω, then [X, diag(weights)⁻¹ W]ᵀ W, added to `out` in place: two launches, X read twice.

Holding a block of rows on chip would need a d-wide tile and a d×l accumulator per program; the two stages instead
exchange W, which is d/l times smaller than X. For bfloat16 tokens W is rounded to bfloat16, once: both products then run on
tensor cores as they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sst_kernels.ops.sketch.op import rounded
from sst_kernels.ops.tiles import (
    Chip,
    add_partials,
    block,
    chip,
    dot,
    launch,
    load_tile,
    load_tile_t,
    odd,
    rows_contiguous,
    split,
    token_weights,
)


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
    tl.store(p_z, acc.to(z.dtype.element_ty), mask=(o_t < S)[:, None] & (o_l < l)[None, :])


@triton.jit
def back_kernel(
    x,
    w,
    weights,
    squares,
    out,
    trace,
    S,
    d,
    l,
    count,
    x_stride,
    out_stride,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BL: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_TRACE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[:d] += xᵀ w, out[d:] += wᵀ diag(weights)⁻¹ w, trace += Σ squares [count]. Padding may hold NaN in x and is not read."""
    tiles = tl.cdiv(d, BD)
    i = tl.program_id(0)
    o_l = tl.program_id(1) * BL + tl.arange(0, BL)
    acc = tl.zeros([BD, BL], tl.float32)
    if i < tiles:
        o_d = i * BD + tl.arange(0, BD)
        for t in range(0, S, BT):
            o_t = (t + tl.arange(0, BT)).to(tl.int64)
            held = o_t < S
            if HAS_WEIGHTS:
                held &= tl.load(weights + o_t, mask=held, other=0.0) != 0.0
            p_x = x + o_t[None, :] * x_stride + o_d[:, None]
            b_x = tl.load(p_x, mask=held[None, :] & (o_d < d)[:, None], other=0.0)
            acc = dot(b_x, load_tile(w, o_t, o_l, l, S, l), acc, PRECISION)
        _add_rows(out, acc, o_d, o_l, d, l, out_stride)
    else:
        o_d = (i - tiles) * BD + tl.arange(0, BD)
        for t in range(0, S, BT):
            o_t = t + tl.arange(0, BT)
            b_left = load_tile_t(w, o_t, o_d, l, S, l)
            b_right = load_tile(w, o_t, o_l, l, S, l)
            if HAS_WEIGHTS:
                b_weights = tl.load(weights + o_t, mask=o_t < S, other=0.0)
                b_weights = tl.where(b_weights != 0.0, b_weights, 1.0)  # w is zero there
                acc = dot(b_left, b_right.to(tl.float32) / b_weights[:, None], acc, PRECISION)
            else:
                acc = dot(b_left, b_right, acc, PRECISION)
        _add_rows(out + d.to(tl.int64) * out_stride, acc, o_d, o_l, l, l, out_stride)
        if HAS_TRACE and (i == tiles) & (tl.program_id(1) == 0):
            total = tl.zeros([BT], tl.float64)
            for k in range(0, count, BT):
                o_k = k + tl.arange(0, BT)
                total += tl.load(squares + o_k, mask=o_k < count, other=0.0).to(tl.float64)
            tl.store(trace, tl.load(trace) + tl.sum(total, 0))


@triton.jit
def _add_rows(out, tile, o_d, o_l, d, l, stride):
    p_out = out + o_d.to(tl.int64)[:, None] * stride + o_l[None, :]
    mask = (o_d < d)[:, None] & (o_l < l)[None, :]
    tl.store(p_out, tl.load(p_out, mask=mask, other=0.0) + tile, mask=mask)


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


def plan_sketch(S: int, d: int, l: int, wide: bool, small: bool, chip: Chip) -> tuple[dict, dict]:
    """Tiles and launch options of both stages. Neither splits its sum: tiles shrink until every processor has one."""
    project, back = (plan_project(S, d, l, wide, small, chip) | {"parts": 1} for _ in range(2))
    while (
        triton.cdiv(S, project["BT"]) * triton.cdiv(l, project["BL"]) < chip.processors * 15 // 16
        and project["BT"] > 32
    ):
        project["BT"] //= 2
    back |= {"BT": 64 if chip.reads_shared and not wide else 32, "BD": 32 if wide else 128}
    del back["parts"]
    while triton.cdiv(d, back["BD"]) * triton.cdiv(l, back["BL"]) < chip.processors * 15 // 16 and back["BD"] > 32:
        back["BD"] //= 2
    return project, back


def _bound(wide: bool, chip: Chip) -> dict:
    """float32 tiles are spilled to reach one more block per processor unless ptxas is given a bound; on sm_80 it is the bound that spills."""
    return {"maxnreg": 255} if wide and chip.reads_shared else {}


def project(x, u, precision, **override):
    """x [S, d] @ u [d, l] in float32, any mix of dtypes, no operand rounded."""
    x, u = rows_contiguous(x), rows_contiguous(u)
    meta = plan_project(*x.shape, u.shape[1], x.element_size() == 4, _small(x, u), chip(x.device)) | override
    part, parts = split(x.shape[1], meta.pop("parts"), meta["BD"])
    z = torch.empty(parts, len(x), u.shape[1], dtype=torch.float32, device=x.device)
    _project(x, u, None, z, None, part, precision, meta)
    if parts > 1:
        add_partials(z[1:], z[0])
    return z[0]


def _small(x, u) -> bool:
    return odd(x) or odd(u) or (x.dtype == torch.float16 and u.dtype == torch.float32)


def _project(x, u, weights, z, squares, part, precision, meta):
    (S, d), l = x.shape, u.shape[1]
    launch(
        project_kernel,
        (triton.cdiv(S, meta["BT"]), triton.cdiv(l, meta["BL"]), triton.cdiv(d, part)),
        x,
        u,
        weights,
        z,
        squares,
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


def sketch(x, omega, spans, scale, out, precision, trace=None, **override):
    x, omega = rows_contiguous(x), rows_contiguous(omega)
    (S, d), l, device = x.shape, omega.shape[1], x.device
    weights = None if spans is None else token_weights(S, spans, scale)
    project, back = plan_sketch(S, d, l, x.element_size() == 4, _small(x, omega), chip(device))
    project, back = project | {k: v for k, v in override.items() if k in ("BT", "num_warps")}, back | override
    del project["parts"]
    w = torch.empty(S, l, dtype=rounded(x.dtype), device=device)
    count = triton.cdiv(S, project["BT"])
    squares = None if trace is None else torch.empty(count, dtype=torch.float32, device=device)
    _project(x, omega, weights, w, squares, d, precision, project)
    launch(
        back_kernel,
        (triton.cdiv(d, back["BD"]) + triton.cdiv(l, back["BD"]), triton.cdiv(l, back["BL"])),
        x,
        w,
        weights,
        squares,
        out,
        trace,
        S,
        d,
        l,
        count,
        x.stride(0),
        out.stride(0),
        HAS_WEIGHTS=weights is not None,
        HAS_TRACE=trace is not None,
        PRECISION=precision,
        **back,
    )
