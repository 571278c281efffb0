"""Triton: one program per output tile; one loop over the token blocks of all samples, which squares at sample ends.

A grid over samples would have to add its squares across programs; a grid over output tiles adds them in registers, in
the order of the samples, and touches each element of `sum` and `sumsq` once per batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sst_kernels.ops.tiles import (
    Chip,
    block,
    chip,
    count_blocks,
    dot,
    launch,
    load_span,
    load_tile,
    load_tile_t,
    next_block,
    rows_contiguous,
    short,
    zeroed,
)


@triton.jit
def factor_moments_kernel(
    left,
    right,
    spans,
    scale,
    sum,
    sumsq,
    S,
    N,
    p,
    q,
    left_stride,
    right_stride,
    sum_stride,
    sumsq_stride,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_q = tl.cdiv(q, BQ)
    o_p = (tl.program_id(0) // tiles_q) * BP + tl.arange(0, BP)
    o_q = (tl.program_id(0) % tiles_q) * BQ + tl.arange(0, BQ)

    acc = tl.zeros([BP, BQ], tl.float32)
    square = tl.zeros([BP, BQ], tl.float32)
    total = tl.zeros([BP, BQ], tl.float32)
    n = tl.zeros([], tl.int64)
    t, end = load_span(spans, n, S)
    for _ in range(count_blocks(spans, 0, N, S, BT)):
        o_t = t + tl.arange(0, BT)
        b_left = load_tile_t(left, o_t, o_p, left_stride, end, p)
        b_right = load_tile(right, o_t, o_q, right_stride, end, q)
        acc = dot(b_left, b_right, acc, PRECISION)
        done = t + BT >= end
        g = tl.where(done, acc, 0.0)
        if HAS_SCALE:
            g *= tl.load(scale + n)
        square += g * g
        if HAS_SUM:
            total += g
        acc = zeroed(acc, done)
        n, t, end = next_block(spans, n, t, end, N, S, BT)

    _add(sumsq, square, o_p, o_q, p, q, sumsq_stride)
    if HAS_SUM:
        _add(sum, total, o_p, o_q, p, q, sum_stride)


@triton.jit
def short_moments_kernel(
    left,
    right,
    spans,
    scale,
    sum,
    sumsq,
    S,
    N,
    p,
    q,
    left_stride,
    right_stride,
    sum_stride,
    sumsq_stride,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same for many short samples: BT samples of at most one token are one product, (s l rᵀ)² = (s l)² (r²)ᵀ."""
    tiles_q = tl.cdiv(q, BQ)
    o_p = (tl.program_id(0) // tiles_q) * BP + tl.arange(0, BP)
    o_q = (tl.program_id(0) % tiles_q) * BQ + tl.arange(0, BQ)

    square = tl.zeros([BP, BQ], tl.float32)
    total = tl.zeros([BP, BQ], tl.float32)
    for first in range(0, N, BT):
        o_n = first + tl.arange(0, BT)
        begin = tl.maximum(tl.load(spans + 2 * o_n, mask=o_n < N, other=0), 0)
        end = tl.minimum(tl.load(spans + 2 * o_n + 1, mask=o_n < N, other=0), S)
        if tl.max(end - begin) <= 1:
            o_t = tl.where(begin < end, begin, S)
            b_left = load_tile_t(left, o_t, o_p, left_stride, S, p).to(tl.float32)
            b_right = load_tile(right, o_t, o_q, right_stride, S, q).to(tl.float32)
            if HAS_SCALE:
                b_left *= tl.load(scale + o_n, mask=o_n < N, other=0.0)[None, :]
            square = dot(b_left * b_left, b_right * b_right, square, PRECISION)
            if HAS_SUM:
                total = dot(b_left, b_right, total, PRECISION)
        else:
            for n in range(first, tl.minimum(first + BT, N)):
                t, end_n = load_span(spans, n, S)
                acc = tl.zeros([BP, BQ], tl.float32)
                for start in range(t, end_n, BT):
                    o_t = start + tl.arange(0, BT)
                    b_left = load_tile_t(left, o_t, o_p, left_stride, end_n, p)
                    b_right = load_tile(right, o_t, o_q, right_stride, end_n, q)
                    acc = dot(b_left, b_right, acc, PRECISION)
                if HAS_SCALE:
                    acc *= tl.load(scale + n)
                square += acc * acc
                if HAS_SUM:
                    total += acc
    _add(sumsq, square, o_p, o_q, p, q, sumsq_stride)
    if HAS_SUM:
        _add(sum, total, o_p, o_q, p, q, sum_stride)


@triton.jit
def _add(out, tile, o_p, o_q, p, q, stride):
    p_out = out + o_p.to(tl.int64)[:, None] * stride + o_q[None, :]
    mask = (o_p < p)[:, None] & (o_q < q)[None, :]
    tl.store(p_out, tl.load(p_out, mask=mask, other=0.0) + tile, mask=mask)


def plan(p: int, q: int, wide: bool, chip: Chip) -> dict:
    """Tile and launch options. The narrow side is one block; the wide side shrinks until every processor has a tile.

    `wide` says that some operand is float32, whose products run on fewer tokens at a time to stay in registers.
    """
    BP, BQ = block(p, 64), block(q, 64)
    while triton.cdiv(p, BP) * triton.cdiv(q, BQ) < chip.processors * 15 // 16 and max(BP, BQ) > 16:
        BP, BQ = (BP, BQ // 2) if BQ >= BP else (BP // 2, BQ)
    return {"BT": 32 if wide else 128, "BP": BP, "BQ": BQ, "num_warps": 4, "num_stages": 2 if wide else 4}


def plan_short(meta: dict) -> dict:
    """The same for short samples, whose two products share the registers: with a bound of its own, however high, ptxas spills
    none of them to reach one more block per processor."""
    return meta | {"BT": 16, "num_stages": 2, "maxnreg": 255}


def factor_moments(left, right, spans, scale, sum, sumsq, precision, **override):
    left, right = rows_contiguous(left), rows_contiguous(right)
    (S, p), q = left.shape, right.shape[1]
    wide = left.element_size() == 4 or right.element_size() == 4
    meta = plan(p, q, wide, chip(left.device)) | override
    kernel = factor_moments_kernel
    if short(S, len(spans), 32):
        kernel, meta = short_moments_kernel, plan_short(meta)
    launch(
        kernel,
        (triton.cdiv(p, meta["BP"]) * triton.cdiv(q, meta["BQ"]),),
        left,
        right,
        spans.contiguous(),
        scale,
        sum,
        sumsq,
        S,
        len(spans),
        p,
        q,
        left.stride(0),
        right.stride(0),
        0 if sum is None else sum.stride(0),
        sumsq.stride(0),
        HAS_SCALE=scale is not None,
        HAS_SUM=sum is not None,
        PRECISION=precision,
        **meta,
    )
