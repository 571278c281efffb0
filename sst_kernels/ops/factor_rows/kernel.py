"""Triton: one program per output tile and sample; tokens stream by, the tile is scaled and stored once."""

from __future__ import annotations

import triton
import triton.language as tl

from sst_kernels.ops.tiles import Chip, block, chip, dot, launch, load_span, load_tile, load_tile_t, rows_contiguous


@triton.jit
def factor_rows_kernel(
    left,
    right,
    spans,
    scale,
    out,
    S,
    p,
    q,
    left_stride,
    right_stride,
    out_stride,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_q = tl.cdiv(q, BQ)
    tiles = tl.cdiv(p, BP) * tiles_q
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    o_p = (tile // tiles_q) * BP + tl.arange(0, BP)
    o_q = (tile % tiles_q) * BQ + tl.arange(0, BQ)
    begin, end = load_span(spans, n, S)

    acc = tl.zeros([BP, BQ], tl.float32)
    for t in range(begin, end, BT):
        o_t = t + tl.arange(0, BT)
        b_left = load_tile_t(left, o_t, o_p, left_stride, end, p)
        b_right = load_tile(right, o_t, o_q, right_stride, end, q)
        acc = dot(b_left, b_right, acc, PRECISION)
    if HAS_SCALE:
        acc *= tl.load(scale + n)
    p_out = out + n * out_stride + o_p.to(tl.int64)[:, None] * q + o_q[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=(o_p < p)[:, None] & (o_q < q)[None, :])


def plan(p: int, q: int, N: int, wide: bool, chip: Chip) -> dict:
    """Tile and launch options. The narrow side is one block; the wide side shrinks until every processor has work.

    `wide` says that some operand is float32, whose products run on fewer tokens at a time to stay in registers.
    """
    BP, BQ = block(p, 64), block(q, 64)
    if min(p, q) <= 32:
        BP, BQ = (BP, block(q, 128)) if p <= q else (block(p, 128), BQ)
    while N * triton.cdiv(p, BP) * triton.cdiv(q, BQ) < 2 * chip.processors and max(BP, BQ) > 32:
        BP, BQ = (BP, BQ // 2) if BQ >= BP else (BP // 2, BQ)
    meta = {"BT": 32 if wide else 64, "BP": BP, "BQ": BQ, "num_warps": 4, "num_stages": 2 if wide else 4}
    # sm_80's ptxas spills 16-bit tiles to reach one more block per processor unless it is given a bound, and float32 ones if it is.
    return meta if chip.reads_shared or wide else meta | {"maxnreg": 255}


def factor_rows(left, right, spans, scale, out, precision, **override):
    left, right = rows_contiguous(left), rows_contiguous(right)
    (S, p), q, N = left.shape, right.shape[1], len(spans)
    wide = left.element_size() == 4 or right.element_size() == 4
    meta = plan(p, q, N, wide, chip(left.device)) | override
    grid = (N * triton.cdiv(p, meta["BP"]) * triton.cdiv(q, meta["BQ"]),)
    launch(
        factor_rows_kernel,
        grid,
        left,
        right,
        spans.contiguous(),
        scale,
        out,
        S,
        p,
        q,
        left.stride(0),
        right.stride(0),
        out.stride(0),
        HAS_SCALE=scale is not None,
        PRECISION=precision,
        **meta,
    )
