"""What the kernels share: one dot product, one walk over the tokens of all samples, one launch.

`dot` never rounds an operand. Two 16-bit tiles of a type multiply exactly on tensor cores; against a 16-bit tile, a float32
one is split into three bfloat16 terms (8 bits each, 24 together), and a float16 one (11 bits) into two; all else is float32
at `PRECISION`.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sst_kernels.memo import Memo


@triton.jit
def _probe():
    pass


# The interpreter keeps bfloat16 as raw uint16, so tiles are widened there before any arithmetic.
INTERPRET = tl.constexpr(not isinstance(_probe, triton.JITFunction))


@triton.jit
def _mma(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _mma_terms(a, b, acc, PRECISION: tl.constexpr):
    """bfloat16 times float32, either way round: three products of bfloat16."""
    for _ in tl.static_range(3):
        if b.dtype == tl.float32:
            term = b.to(tl.bfloat16)
            acc = _mma(a, term, acc, PRECISION)
            b -= term.to(tl.float32)
        else:
            term = a.to(tl.bfloat16)
            acc = _mma(term, b, acc, PRECISION)
            a -= term.to(tl.float32)
    return acc


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32, exact in the operands (see the module docstring)."""
    if a.dtype == b.dtype:
        acc = _mma(a, b, acc, PRECISION)
    elif b.dtype == tl.float32:
        high = a.to(tl.bfloat16)
        if a.dtype == tl.float16:
            acc = _mma_terms((a.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16), b, acc, PRECISION)
        acc = _mma_terms(high, b, acc, PRECISION)
    elif a.dtype == tl.float32:
        high = b.to(tl.bfloat16)
        if b.dtype == tl.float16:
            acc = _mma_terms(a, (b.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16), acc, PRECISION)
        acc = _mma_terms(a, high, acc, PRECISION)
    else:
        acc = _mma(a.to(tl.float32), b.to(tl.float32), acc, PRECISION)
    return acc


@triton.jit
def load_tile(x, rows, columns, stride, end, width):
    """x[rows, columns] of a row-major [·, width] matrix, zero from row `end` and column `width` on; 64-bit offsets."""
    mask = (rows < end)[:, None] & (columns < width)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_tile_t(x, rows, columns, stride, end, width):
    """x[rows, columns]ᵀ: loaded as such, since a transpose after the load would keep it out of the software pipeline."""
    mask = (rows < end)[None, :] & (columns < width)[:, None]
    return tl.load(x + rows.to(tl.int64)[None, :] * stride + columns[:, None], mask=mask, other=0.0)


@triton.jit
def load_span(spans, n, S):
    """Token range of sample n, clamped to the tokens there are: a bad span must not read outside."""
    begin = tl.maximum(tl.load(spans + 2 * n), 0)
    return begin, tl.minimum(tl.load(spans + 2 * n + 1), S)


@triton.jit
def count_blocks(spans, first, last, S, BT: tl.constexpr):
    """Token blocks of samples first..last-1; an empty sample counts one block, which loads nothing."""
    total = tl.zeros([], tl.int64)
    for n in range(first, last):
        begin, end = load_span(spans, n, S)
        total += tl.maximum((end - begin + BT - 1) // BT, 1)
    return total


@triton.jit
def next_block(spans, n, t, end, last, S, BT: tl.constexpr):
    """The block after token t: in the same sample, or the first of the next one.

    A single loop over the blocks of all samples keeps loads in flight across sample boundaries, which a loop per sample
    would drain.
    """
    done = t + BT >= end
    n = tl.where(done, tl.minimum(n + 1, last - 1), n)
    begin, end = load_span(spans, n, S)
    return n, tl.where(done, begin, t + BT), end


@triton.jit
def zeroed(acc, done):
    """Zeros where the scalar `done`, else acc. Not tl.where, whose condition becomes a tile: Triton 3.9 cannot compile that for an
    accumulator in the tensor memory of sm_100."""
    if done:
        acc = tl.zeros_like(acc)
    return acc


@triton.jit
def token_weights_kernel(weights, spans, scale, S, N, BT: tl.constexpr, BN: tl.constexpr, HAS_SCALE: tl.constexpr):
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    total = tl.zeros([BT], tl.float32)
    for first in range(0, N, BN):
        o_n = first + tl.arange(0, BN)
        begin = tl.load(spans + 2 * o_n, mask=o_n < N, other=0)
        end = tl.load(spans + 2 * o_n + 1, mask=o_n < N, other=0)
        s = tl.full([BN], 1.0, tl.float32)
        if HAS_SCALE:
            s = tl.load(scale + o_n, mask=o_n < N, other=0.0)
        inside = (o_t[:, None] >= begin[None, :]) & (o_t[:, None] < end[None, :])
        total += tl.sum(tl.where(inside, (s * s)[None, :], 0.0), 1)
    tl.store(weights + o_t, total, mask=o_t < S)


_last_weights = {False: Memo(), True: Memo()}  # one for scaled sides, one for unscaled: modules ask for them in turn


def token_weights(S: int, spans: Tensor, scale: Tensor | None) -> Tensor:
    """Weight [S] of every token in a second moment: Σ over the spans that hold it of scale²; zero for padding. Not to be written."""
    last = _last_weights[scale is not None]
    if last.holds(S, spans, scale):
        return last.value
    weights = torch.empty(S, dtype=torch.float32, device=spans.device)
    args = (weights, spans.contiguous(), scale, S, len(spans))
    launch(token_weights_kernel, (triton.cdiv(S, 64),), *args, BT=64, BN=32, HAS_SCALE=scale is not None, num_warps=4)
    return last.keep(weights, S, spans, scale)


def short(S: int, N: int, BT: int) -> bool:
    """Whether the samples are so short (half a block on average) that a walk sample by sample mostly loads nothing."""
    return 2 * S < N * BT


@triton.jit
def add_partials_kernel(
    partials, out, size, width, stride, parts, BLOCK: tl.constexpr, LOWER: tl.constexpr, STRIDED: tl.constexpr
):
    """out[i] += Σ_k partials[k, i], k ascending: the fixed-order second stage of every split sum."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    if LOWER:
        mask &= o // width >= o % width
    total = tl.zeros([BLOCK], tl.float32)
    p_part = partials + o
    for _ in range(parts):
        total += tl.load(p_part, mask=mask, other=0.0)
        p_part += size
    p_out = out + o
    if STRIDED:
        p_out = out + (o // width) * stride + o % width
    tl.store(p_out, tl.load(p_out, mask=mask, other=0.0) + total, mask=mask)


def add_partials(partials: Tensor, out: Tensor, *, lower: bool = False) -> None:
    """out [m, width] += partials [k, m, width] summed over k in ascending order; `lower`: nothing above the diagonal is touched."""
    size, strided = out.numel(), not out.is_contiguous()
    args = (partials, out, size, out.shape[1], out.stride(0), len(partials))
    options = {"BLOCK": 1024, "LOWER": lower, "STRIDED": strided, "num_warps": 4}
    launch(add_partials_kernel, (triton.cdiv(size, 1024),), *args, **options)


def launch(kernel, grid, *args, **meta) -> None:
    """Run `kernel` on the device of its first tensor; fusion of multiply and add is on, and said so."""
    device = next(a.device for a in args if isinstance(a, Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, enable_fp_fusion=True, **meta)


class Chip(NamedTuple):
    """What a launch plan depends on: how many multiprocessors, and whether tensor cores read from shared memory.

    Before sm_90 (`wgmma`, `tcgen05`) operands pass through registers, so a big tile is spread over more warps.
    """

    processors: int = 132
    reads_shared: bool = True


@functools.cache
def chip(device: torch.device) -> Chip:
    """The GPU of `device`; an H100 when there is none to ask (the interpreter)."""
    if device.type != "cuda":
        return Chip()
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.multi_processor_count, properties.major >= 9)


def split(whole: int, parts: int, unit: int) -> tuple[int, int]:
    """(how much a part holds, how many parts): `whole` in about `parts` parts, each but the last a multiple of `unit`."""
    part = triton.cdiv(triton.cdiv(whole, parts), unit) * unit
    return part, triton.cdiv(whole, part)


def odd(x: Tensor) -> bool:
    """Whether rows of `x` [·, d] cannot be loaded as vectors; every element is then masked and addressed by itself."""
    return x.shape[1] % 16 != 0 or x.stride(0) % 16 != 0


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous; a copy only when it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def block(n: int, most: int) -> int:
    """Power-of-two block for n elements: at least 16, the least a tensor core takes, at most `most`."""
    return min(max(16, triton.next_power_of_2(n)), most)
