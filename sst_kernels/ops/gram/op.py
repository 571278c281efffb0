"""Symmetric update of a token second moment."""

from __future__ import annotations

import torch
from torch import Tensor

from sst_kernels.ops import checks
from sst_kernels.ops.spans import held_tokens, weighted

_TILE = 128


def gram(x: Tensor, spans: Tensor | None, scale: Tensor | None, out: Tensor, *, precision: str = "ieee") -> Tensor:
    """Add the lower triangle of Σ_n scale_n² Σ_{t in span n} x_t x_tᵀ to `out` in place.

    x [S, d]: float32, bfloat16 or float16; spans [N, 2] int64, or None for all tokens; scale [N] float32 or None;
    out [d, d] float32, whose strict upper triangle is neither read nor written (`symmetrize_` fills it). Half the
    products of XᵀX are formed. The result depends on the spans only through the tokens they cover and the scale of
    each, so pass whole sequences, never single tokens. Accumulation is float32, one rounding per batch and element.
    `precision` ("ieee", "tf32x3", "tf32") is how float32 inputs are multiplied on a GPU.

    Raises ValueError when a shape, dtype or device does not fit.
    """
    checks.tokens("x", x)
    checks.spans_and_scale(x, spans, scale)
    checks.accumulator("out", out, (x.shape[1], x.shape[1]), x)
    checks.precision(precision)
    if x.numel() and (spans is None or len(spans)):
        _gram(x, spans, scale, out, precision)
    return out


def symmetrize_(out: Tensor) -> Tensor:
    """Copy the strict lower triangle of `out` [d, d] onto the upper one, in place and blockwise; returns `out`."""
    d = out.shape[0]
    for i in range(0, d, _TILE):
        block = out[i : i + _TILE, i : i + _TILE]
        block.copy_(block.tril() + block.tril(-1).T)
        out[i : i + _TILE, i + _TILE :] = out[i + _TILE :, i : i + _TILE].T
    return out


@torch.library.custom_op(
    "sst_kernels::gram",
    mutates_args=("out",),
    schema="(Tensor x, Tensor? spans, Tensor? scale, Tensor(a!) out, str precision) -> ()",
    device_types="cpu",
)
def _gram(x, spans, scale, out, precision):
    checks.span_values(spans, x.shape[0])
    d = x.shape[1]
    held, weight = held_tokens(len(x), spans, scale, power=2)
    x = x[held].float()
    left = weighted(x, weight)
    for i in range(0, d, _TILE):
        rows = left[:, i : i + _TILE].T
        out[i : i + _TILE, :i] += rows @ x[:, :i]
        out[i : i + _TILE, i : i + _TILE] += (rows @ x[:, i : i + _TILE]).tril_()


@_gram.register_kernel("cuda")
def _(x, spans, scale, out, precision):
    from sst_kernels.ops.gram.kernel import gram

    gram(x, spans, scale, out, precision)


@_gram.register_fake
def _(x, spans, scale, out, precision):
    return None
