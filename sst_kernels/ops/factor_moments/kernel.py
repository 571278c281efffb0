"""Triton: one program per output tile; one loop over the token blocks of all samples, which squares at sample ends.

A grid over samples would have to add its squares across programs; a grid over output tiles adds them in registers, in
the order of the samples, and touches each element of `sum` and `sumsq` once per batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sst_kernels.memo import Memo
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
    N,
    sum,
    sumsq,
    S,
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
    singles,
    others,
    count,
    sum,
    sumsq,
    S,
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
    """The same for many short samples. Those of one token make a product of tokens, Σ (s l rᵀ)² = Σ s² l² (r²)ᵀ, with Σ s² and Σ s
    of each token in `singles` [2, S]; the `count` others, whose numbers come first in `others` [N], are walked one by one."""
    tiles_q = tl.cdiv(q, BQ)
    o_p = (tl.program_id(0) // tiles_q) * BP + tl.arange(0, BP)
    o_q = (tl.program_id(0) % tiles_q) * BQ + tl.arange(0, BQ)

    square = tl.zeros([BP, BQ], tl.float32)
    total = tl.zeros([BP, BQ], tl.float32)
    for t in range(0, S, BT):
        o_t = (t + tl.arange(0, BT)).to(tl.int64)
        w = tl.load(singles + o_t, mask=o_t < S, other=0.0)
        # A token of weight zero may be padding, and NaN.
        b_left = load_tile_t(left, o_t, o_p, left_stride, S, p)
        b_left = tl.where((w != 0.0)[None, :], b_left, 0.0).to(tl.float32)
        b_right = load_tile(right, o_t, o_q, right_stride, S, q)
        b_right = tl.where((w != 0.0)[:, None], b_right, 0.0)
        b_square = b_right.to(tl.float32)
        b_square *= b_square
        if b_right.dtype == tl.float32:
            square = dot(b_left * b_left * w[None, :], b_square, square, PRECISION)
        else:  # the square of 8 or 11 bits has 16 or 22: two or three bfloat16 terms, exactly, for the tensor cores
            for _ in tl.static_range(2 if b_right.dtype == tl.bfloat16 else 3):
                term = b_square.to(tl.bfloat16)
                square = dot(b_left * b_left * w[None, :], term, square, PRECISION)
                b_square -= term.to(tl.float32)
        if HAS_SUM:
            s = tl.load(singles + S + o_t, mask=o_t < S, other=0.0)
            total = dot(b_left * s[None, :], b_right, total, PRECISION)
    for i in range(tl.load(count)):
        n = tl.load(others + i)
        begin, end = load_span(spans, n, S)
        acc = tl.zeros([BP, BQ], tl.float32)
        for start in range(begin, end, BT):
            o_t = start + tl.arange(0, BT)
            b_left = load_tile_t(left, o_t, o_p, left_stride, end, p)
            b_right = load_tile(right, o_t, o_q, right_stride, end, q)
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
def singles_kernel(singles, spans, scale, S, N, BT: tl.constexpr, BN: tl.constexpr, HAS_SCALE: tl.constexpr):
    """singles[0, t] = Σ s² and singles[1, t] = Σ s over the samples that are token t alone."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    squares = tl.zeros([BT], tl.float32)
    sums = tl.zeros([BT], tl.float32)
    for first in range(0, N, BN):
        o_n = first + tl.arange(0, BN)
        begin = tl.load(spans + 2 * o_n, mask=o_n < N, other=0)
        end = tl.load(spans + 2 * o_n + 1, mask=o_n < N, other=0)
        s = tl.full([BN], 1.0, tl.float32)
        if HAS_SCALE:
            s = tl.load(scale + o_n, mask=o_n < N, other=0.0)
        s = tl.where((o_t[:, None] == begin[None, :]) & (end - begin == 1)[None, :], s[None, :], 0.0)
        squares += tl.sum(s * s, 1)
        sums += tl.sum(s, 1)
    tl.store(singles + o_t, squares, mask=o_t < S)
    tl.store(singles + S + o_t, sums, mask=o_t < S)


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
    # Given a bound, however high, ptxas spills nothing to reach one more block per processor.
    return {
        "BT": 32 if wide else 128,
        "BP": BP,
        "BQ": BQ,
        "num_warps": 4,
        "num_stages": 4,
        "maxnreg": 255,
    }


_last_samples = Memo()


def short_samples(S: int, spans, scale) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `short_moments_kernel` wants to know of the samples: `singles`, `others` and `count`, kept for the blocks of a batch."""
    if _last_samples.holds(S, spans, scale):
        return _last_samples.value
    singles = torch.empty(2, S, dtype=torch.float32, device=spans.device)
    args = (singles, spans, scale, S, len(spans))
    launch(singles_kernel, (triton.cdiv(S, 64),), *args, BT=64, BN=32, HAS_SCALE=scale is not None, num_warps=4)
    longer = spans[:, 1] - spans[:, 0] > 1
    others = torch.argsort(longer, descending=True, stable=True)
    return _last_samples.keep((singles, others, longer.sum()), S, spans, scale)


def plan_short(meta: dict, wide: bool, half: bool) -> dict:
    """The same for short samples, whose two products share the registers; float16 squares (`half`) have a third term there."""
    BT = 16 if wide or meta["BP"] * meta["BQ"] > (512 if half else 1024) else 32
    return meta | {"BT": BT, "num_stages": 2 if wide else 3}


def factor_moments(left, right, spans, scale, sum, sumsq, precision, **override):
    left, right = rows_contiguous(left), rows_contiguous(right)
    (S, p), q = left.shape, right.shape[1]
    wide = left.element_size() == 4 or right.element_size() == 4
    meta = plan(p, q, wide, chip(left.device)) | override
    kernel, spans, samples = factor_moments_kernel, spans.contiguous(), (len(spans),)
    if short(S, len(spans), 32):
        kernel, samples = short_moments_kernel, short_samples(S, spans, scale)
        meta = plan_short(meta, wide, right.dtype == torch.float16)
    launch(
        kernel,
        (triton.cdiv(p, meta["BP"]) * triton.cdiv(q, meta["BQ"]),),
        left,
        right,
        spans,
        scale,
        *samples,
        sum,
        sumsq,
        S,
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
