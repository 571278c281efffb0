"""Triton: one program per output tile; one loop over the token blocks of all samples, which squares at sample ends.

A grid over samples would have to add its squares across programs; a grid over output tiles adds them in registers, in
the order of the samples, and touches each element of `sum` and `sumsq` once per batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sst_kernels.ops.tiles import (
    block,
    count_blocks,
    dot,
    launch,
    load_span,
    load_tile,
    load_tile_t,
    next_block,
    processors,
    rows_contiguous,
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
        acc = tl.where(done, 0.0, acc)
        n, t, end = next_block(spans, n, t, end, N, S, BT)

    mask = (o_p < p)[:, None] & (o_q < q)[None, :]
    o_p = o_p.to(tl.int64)
    p_square = sumsq + o_p[:, None] * sumsq_stride + o_q[None, :]
    tl.store(p_square, tl.load(p_square, mask=mask, other=0.0) + square, mask=mask)
    if HAS_SUM:
        p_total = sum + o_p[:, None] * sum_stride + o_q[None, :]
        tl.store(p_total, tl.load(p_total, mask=mask, other=0.0) + total, mask=mask)


def plan(p: int, q: int, wide: bool, processors: int) -> dict:
    """Tile and launch options. The narrow side is one block; the wide side shrinks until every processor has a tile.

    `wide` says that some operand is float32, whose products run on fewer tokens at a time to stay in registers.
    """
    BP, BQ = block(p, 64), block(q, 64)
    while triton.cdiv(p, BP) * triton.cdiv(q, BQ) < processors * 15 // 16 and max(BP, BQ) > 16:
        BP, BQ = (BP, BQ // 2) if BQ >= BP else (BP // 2, BQ)
    return {"BT": 32 if wide else 128, "BP": BP, "BQ": BQ, "num_warps": 4, "num_stages": 2 if wide else 4}


def factor_moments(left, right, spans, scale, sum, sumsq, precision, **override):
    left, right = rows_contiguous(left), rows_contiguous(right)
    (S, p), q = left.shape, right.shape[1]
    wide = left.element_size() == 4 or right.element_size() == 4
    meta = plan(p, q, wide, processors(left.device)) | override
    launch(
        factor_moments_kernel,
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
