"""Symmetric update of a token second moment."""

from __future__ import annotations

import torch
from torch import Tensor

from sst_kernels.ops import checks
from sst_kernels.ops.registry import register
from sst_kernels.ops.spans import weighted_rows

_TILE = 128
_BLOCK = 128  # of the diagonal, formed whole, at most


def gram(x: Tensor, spans: Tensor | None, scale: Tensor | None, out: Tensor, *, precision: str = "ieee") -> Tensor:
    """Add the lower triangle of Σ_n scale_n² Σ_{t in span n} x_t x_tᵀ to `out` in place.

    x [S, d]: float32, bfloat16 or float16; spans [N, 2] int64, or None for all tokens; scale [N] float32 or None;
    out [d, d] float32, whose strict upper triangle is neither read nor written (`symmetrize_` fills it). Half the
    products of XᵀX are formed. The result depends on the spans only through the tokens they cover and the scale of
    each, so pass whole sequences, never single tokens. Accumulation is float32, one rounding per batch and element.
    `precision` ("ieee", "tf32x3", "tf32") is how float32 inputs are multiplied on a GPU.

    Raises ValueError when a shape, dtype or device does not fit.

    Example:
        >>> from sst_kernels.ops import gram
        >>> gram(torch.ones(5, 2), None, None, torch.zeros(2, 2))  # the lower triangle
        tensor([[5., 0.],
                [5., 5.]])
    """
    checks.tokens("x", x)
    checks.spans_and_scale(x, spans, scale)
    checks.accumulator("out", out, (x.shape[1], x.shape[1]), x)
    checks.precision(precision)
    if x.numel() and (spans is None or len(spans)):
        _gram(x, spans, scale, out, precision)
    return out


def symmetrize_(out: Tensor) -> Tensor:
    """Copy the strict lower triangle of `out` [d, d] onto the upper one, in place and blockwise; returns `out`.

    Example:
        >>> from sst_kernels.ops import symmetrize_
        >>> symmetrize_(torch.tensor([[5.0, 0.0], [4.0, 3.0]]))
        tensor([[5., 4.],
                [4., 3.]])
    """
    d = out.shape[0]
    for i in range(0, d, _TILE):
        block = out[i : i + _TILE, i : i + _TILE]
        block.copy_(block.tril() + block.tril(-1).T)
        out[i : i + _TILE, i + _TILE :] = out[i + _TILE :, i : i + _TILE].T
    return out


def _cpu(x, spans, scale, out, precision):
    # A piece of its own reads and writes `out`, d² numbers; a copy those of its tokens, and again where it is weighted.
    for rows, weight in weighted_rows(x, spans, scale, least=x.shape[1] // 2):
        if isinstance(weight, Tensor):
            rows, weight = rows * weight.sqrt(), 1.0
        _add_lower(rows, weight, out)


def _add_lower(x: Tensor, weight: float, out: Tensor) -> None:
    """out += weight · XᵀX, the lower triangle alone: halves against halves, then the blocks on the diagonal in one product."""
    d = x.shape[1]
    block = _BLOCK if len(x) < 128 else _BLOCK // 2  # of few tokens few products, each of them wider
    blocks, at = d // block, d // block * block
    _add_below(x, weight, out, block)
    if blocks:
        b = x[:, :at].unflatten(1, (blocks, block))
        G = torch.bmm(b.permute(1, 2, 0), b.transpose(0, 1)).tril_()
        out.as_strided(G.shape, (block * (out.stride(0) + 1), *out.stride()), out.storage_offset()).add_(
            G, alpha=weight
        )
    if at < d:
        rest = x[:, at:]
        out[at:, at:].add_((rest.T @ rest).tril_(), alpha=weight)


def _add_below(x: Tensor, weight: float, out: Tensor, block: int) -> None:
    d = x.shape[1]
    if d > block:
        half = -(-d // 2 // block) * block
        low, high = x[:, :half], x[:, half:]
        out[half:, :half].addmm_(high.T, low, alpha=weight)
        _add_below(low, weight, out[:half, :half], block)
        _add_below(high, weight, out[half:, half:], block)


_gram = register("gram(Tensor x, Tensor? spans, Tensor? scale, Tensor(a!) out, str precision) -> ()", _cpu)
