"""Symmetric update of a token second moment."""

from __future__ import annotations

from torch import Tensor

from sst_kernels.ops import checks
from sst_kernels.ops.registry import register
from sst_kernels.ops.spans import weighted_rows

_TILE = 128
_BLOCK = 128  # of the diagonal, formed whole


def gram(x: Tensor, spans: Tensor | None, scale: Tensor | None, out: Tensor, *, precision: str = "ieee") -> Tensor:
    """Add the lower triangle of Σ_n scale_n² Σ_{t in span n} x_t x_tᵀ to `out` in place.

    x [S, d]: float32, bfloat16 or float16; spans [N, 2] int64, or None for all tokens; scale [N] float32 or None;
    out [d, d] float32, whose strict upper triangle means nothing: no sum reads it, parts of it are written, `symmetrize_`
    fills it. Half the products of XᵀX are formed. The result depends on the spans only through the tokens they cover and the scale of
    each, so pass whole sequences, never single tokens. Accumulation is float32, one rounding per batch and element.
    `precision` ("ieee", "tf32x3", "tf32") is how float32 inputs are multiplied on a GPU.

    Raises ValueError when a shape, dtype or device does not fit.

    Example:
        >>> from sst_kernels.ops import gram
        >>> gram(torch.ones(5, 2), None, None, torch.zeros(2, 2)).tril()
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
    """out += weight · XᵀX: strips left of the diagonal, then the blocks on it, whole, in one product."""
    d, (row, column) = x.shape[1], out.stride()
    blocks, turned = d // _BLOCK, x.T
    for i, strip, columns in zip(range(0, d, _BLOCK), out.split(_BLOCK), turned.split(_BLOCK)):
        if i:
            strip[:, :i].addmm_(columns, x[:, :i], alpha=weight)
    if blocks:
        where = (_BLOCK * (row + 1), row, column), out.storage_offset()
        b = turned[: blocks * _BLOCK].unflatten(0, (blocks, _BLOCK))
        out.as_strided((blocks, _BLOCK, _BLOCK), *where).baddbmm_(b, b.mT, alpha=weight)
    if rest := d % _BLOCK:
        out[-rest:, -rest:].addmm_(turned[-rest:], x[:, -rest:], alpha=weight)


_gram = register("gram(Tensor x, Tensor? spans, Tensor? scale, Tensor(a!) out, str precision) -> ()", _cpu)
