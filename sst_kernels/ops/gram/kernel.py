"""Triton: one program per lower-triangle tile, XᵀX on tensor cores, added to `out` in place.

A matrix of few tiles splits its tokens or samples, so that every processor has work; the parts are added in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sst_kernels.ops.tiles import (
    Chip,
    add_partials,
    chip,
    count_blocks,
    dot,
    launch,
    load_span,
    load_tile,
    load_tile_t,
    next_block,
    odd,
    rows_contiguous,
    short,
    split,
    token_weights,
)


@triton.jit
def gram_kernel(
    x,
    spans,
    scale,
    weights,
    out,
    S,
    N,
    d,
    part,
    x_stride,
    out_stride,
    BT: tl.constexpr,
    BD: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`part` samples (tokens, without spans) per program; with SPLIT, part k is stored in out[k], which it overwrites."""
    # Tiles (i, j), j ≤ i, numbered row by row; the float root is corrected to the exact integer one.
    tile = tl.program_id(0)
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    o_i = i * BD + tl.arange(0, BD)
    o_j = j * BD + tl.arange(0, BD)
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, N if HAS_SPANS else S)

    acc = tl.zeros([BD, BD], tl.float32)
    if HAS_WEIGHTS:
        for t in range(first, last, BT):
            o_t = (t + tl.arange(0, BT)).to(tl.int64)
            w = tl.load(weights + o_t, mask=o_t < last, other=0.0)
            # A row of weight zero is padding, which may hold NaN: it moves past the end, where nothing is read.
            o_t = tl.where(w != 0.0, o_t, S)
            b_i = load_tile_t(x, o_t, o_i, x_stride, S, d)
            b_j = load_tile(x, o_t, o_j, x_stride, S, d)
            acc = dot(b_i, b_j.to(tl.float32) * w[:, None], acc, PRECISION)
    elif HAS_SCALE:
        for n in range(first, last):
            begin, end = load_span(spans, n, S)
            G = tl.zeros([BD, BD], tl.float32)
            for t in range(begin, end, BT):
                o_t = t + tl.arange(0, BT)
                b_i = load_tile(x, o_t, o_i, x_stride, end, d)
                b_j = load_tile(x, o_t, o_j, x_stride, end, d)
                G = dot(tl.trans(b_i), b_j, G, PRECISION)
            s = tl.load(scale + n)
            acc += s * s * G
    elif HAS_SPANS:
        n = first.to(tl.int64)
        t, end = load_span(spans, n, S)
        for _ in range(count_blocks(spans, first, last, S, BT)):
            o_t = t + tl.arange(0, BT)
            b_i = load_tile(x, o_t, o_i, x_stride, end, d)
            b_j = load_tile(x, o_t, o_j, x_stride, end, d)
            acc = dot(tl.trans(b_i), b_j, acc, PRECISION)
            n, t, end = next_block(spans, n, t, end, last, S, BT)
    else:
        for t in range(first, last, BT):
            o_t = (t + tl.arange(0, BT)).to(tl.int64)
            b_i = load_tile(x, o_t, o_i, x_stride, last, d)
            b_j = load_tile(x, o_t, o_j, x_stride, last, d)
            acc = dot(tl.trans(b_i), b_j, acc, PRECISION)

    # Half a tile at a time: the old values of a whole one do not fit beside the sums in registers.
    low, high = tl.split(tl.permute(tl.reshape(acc, [BD, 2, BD // 2]), [0, 2, 1]))
    o_j = j * BD + tl.arange(0, BD // 2)
    if SPLIT:
        out += tl.program_id(1).to(tl.int64) * d * out_stride
    _put(out, low, o_i, o_j, d, out_stride, SPLIT)
    _put(out, high, o_i, o_j + BD // 2, d, out_stride, SPLIT)


@triton.jit
def _put(out, tile, o_i, o_j, d, stride, OVERWRITE: tl.constexpr):
    p_out = out + o_i.to(tl.int64)[:, None] * stride + o_j[None, :]
    mask = (o_i < d)[:, None] & (o_j < d)[None, :]
    if not OVERWRITE:
        tile += tl.load(p_out, mask=mask, other=0.0)
    tl.store(p_out, tile, mask=mask)


def plan(d: int, wide: bool, scaled: bool, odd: bool, chip: Chip) -> dict:
    """Tile and launch options.

    A 128-wide tile fills the tensor cores; two such programs share a processor, so that one multiplies while the other
    reads and writes `out`. A scaled sum keeps two accumulators and needs eight warps. Small matrices take small tiles, and
    so do odd ones, whose loads pass through registers.
    """
    if wide:
        return {"BT": 16, "BD": 64, "num_warps": 8, "num_stages": 2}
    BD = 64 if odd else 128
    while BD > 32 and triton.cdiv(d, BD) * (triton.cdiv(d, BD) + 1) // 2 < chip.processors:
        BD //= 2
    warps = 8 if BD == 128 and (scaled or not chip.reads_shared) else 4
    return {"BT": 32 if odd else 64, "BD": BD, "num_warps": warps, "num_stages": 3}


def plan_weighted(meta: dict) -> dict:
    """The same for weighted rows, which pass through registers in three terms: tiles of at most 64."""
    return meta | {"BT": min(meta["BT"], 32), "BD": min(meta["BD"], 64), "num_warps": 4, "num_stages": 2}


def plan_parts(d: int, S: int, N: int | None, meta: dict, chip: Chip) -> tuple[int, int]:
    """(part, parts): enough for every processor, each of whole samples, or without spans of at least 256 tokens."""
    tiles = triton.cdiv(d, meta["BD"])
    parts = max(1, chip.processors // (tiles * (tiles + 1) // 2))
    return split(S, min(parts, triton.cdiv(S, 256)), meta["BT"]) if N is None else split(N, min(parts, N), 1)


def gram(x, spans, scale, out, precision, **override):
    x = rows_contiguous(x)
    S, d = x.shape
    meta = plan(d, x.element_size() == 4, scale is not None, odd(x), chip(x.device)) | override
    weights = None
    if spans is not None and short(S, len(spans), meta["BT"]):
        # Weighted rows need three products where whole samples need one, and any number of samples costs the same.
        weights, spans, scale = token_weights(S, spans, scale), None, None
        meta = plan_weighted(meta)
    N = None if spans is None else len(spans)
    part, parts = plan_parts(d, S, N, meta, chip(x.device))
    sums = out if parts == 1 else torch.empty(parts, d, d, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(d, meta["BD"])
    launch(
        gram_kernel,
        (tiles * (tiles + 1) // 2, parts),
        x,
        None if spans is None else spans.contiguous(),
        scale,
        weights,
        sums,
        S,
        N or 0,
        d,
        part,
        x.stride(0),
        sums.stride(-2),
        HAS_SPANS=spans is not None,
        HAS_SCALE=scale is not None,
        HAS_WEIGHTS=weights is not None,
        SPLIT=parts > 1,
        PRECISION=precision,
        **meta,
    )
    if parts > 1:
        add_partials(sums, out, lower=True)
