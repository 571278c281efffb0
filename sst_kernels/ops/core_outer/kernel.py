"""Triton: one launch for all modules of a shape; a program owns one module and one sample.

The modules are separate tensors, so the kernel reads their addresses from a table [M, 3] of (left, right, column of
`out`). The table goes to the device from pinned memory without a synchronisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sst_kernels.ops.tiles import block, dot, launch, load_span, load_tile, load_tile_t


@triton.jit
def core_outer_kernel(
    table,
    spans,
    scale,
    out,
    S,
    N,
    out_stride,
    DTYPE_LEFT: tl.constexpr,
    DTYPE_RIGHT: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = (tl.program_id(0) % N).to(tl.int64)
    entry = table + 3 * (tl.program_id(0) // N)
    left = tl.multiple_of(tl.load(entry).to(tl.pointer_type(DTYPE_LEFT)), 16)
    right = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(DTYPE_RIGHT)), 16)
    column = tl.load(entry + 2)
    o_p = tl.program_id(1) * BP + tl.arange(0, BP)
    o_q = tl.program_id(2) * BQ + tl.arange(0, BQ)
    begin, end = load_span(spans, n, S)

    acc = tl.zeros([BP, BQ], tl.float32)
    for t in range(begin, end, BT):
        o_t = t + tl.arange(0, BT)
        b_left = load_tile_t(left, o_t, o_p, P, end, P)
        b_right = load_tile(right, o_t, o_q, Q, end, Q)
        acc = dot(b_left, b_right, acc, PRECISION)
    if HAS_SCALE:
        acc *= tl.load(scale + n)
    p_out = out + n * out_stride + column + o_p[:, None] * Q + o_q[None, :]
    tl.store(p_out, acc, mask=(o_p < P)[:, None] & (o_q < Q)[None, :])


def plan(p: int, q: int, wide: bool) -> dict:
    """Tile and launch options: few warps for small ranks, since a GPU holds many small programs at once."""
    BP, BQ = block(p, 64), block(q, 64)
    warps = 1 if BP * BQ <= 256 and not wide else 2 if BP * BQ <= 1024 else 4
    return {"BT": 32 if wide else 64, "BP": BP, "BQ": BQ, "num_warps": warps, "num_stages": 2 if wide else 4}


def core_outer(lefts, rights, spans, scale, out, precision, **override):
    S, N, column, groups, keep = lefts[0].shape[0], len(spans), 0, {}, []
    for left, right in zip(lefts, rights):
        left, right = _packed(left), _packed(right)
        keep += [left, right]
        key = (left.shape[1], right.shape[1], left.dtype, right.dtype)
        groups.setdefault(key, []).append((left.data_ptr(), right.data_ptr(), column))
        column += left.shape[1] * right.shape[1]
    table = _upload([entry for group in groups.values() for entry in group], out.device)
    spans, row = spans.contiguous(), 0
    for (p, q, dtype_left, dtype_right), group in groups.items():
        entries, row = table[row : row + len(group)], row + len(group)
        if p * q == 0:
            continue
        meta = plan(p, q, torch.float32 in (dtype_left, dtype_right)) | override
        launch(
            core_outer_kernel,
            (len(group) * N, triton.cdiv(p, meta["BP"]), triton.cdiv(q, meta["BQ"])),
            entries,
            spans,
            scale,
            out,
            S,
            N,
            out.stride(0),
            DTYPE_LEFT=_TYPES[dtype_left],
            DTYPE_RIGHT=_TYPES[dtype_right],
            P=p,
            Q=q,
            HAS_SCALE=scale is not None,
            PRECISION=precision,
            **meta,
        )


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _packed(x):
    """`x` row-major without gaps and aligned for 16-byte loads; a copy only when it is not."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _upload(entries, device):
    if device.type == "cpu":
        return torch.tensor(entries, dtype=torch.int64)
    return torch.tensor(entries, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
