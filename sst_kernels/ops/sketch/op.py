"""Streaming product of a token second moment with a test matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from sst_kernels.ops import checks
from sst_kernels.ops.registry import register
from sst_kernels.ops.spans import weighted_rows


def sketch(
    x: Tensor,
    omega: Tensor,
    spans: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
    *,
    trace: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """Add Xᵀ D (X Ω) to `out` in place, D = diag(scale²) over the tokens of the spans: Y += F Ω without F.

    `trace` [] float64, or None: tr F = Σ scale² ‖x_t‖² is added to it, from the same read of X.

    x [S, d]: float32, bfloat16 or float16; omega [d, l] float32 or the dtype of x; spans [N, 2] int64, or None for
    all tokens; scale [N] float32 or None; out [d, l] float32. The inner product Z = XΩ is never rounded below
    float32, so ΩᵀY stays symmetric positive semi-definite to float32 and a Nyström factor can be taken from it. For
    bfloat16 x the float32 operand is split into three bfloat16 terms, which is exact, and tensor cores do the rest.
    `precision` ("ieee", "tf32x3", "tf32") is how float32 inputs are multiplied on a GPU.

    Raises ValueError when a shape, dtype or device does not fit.
    """
    checks.tokens("x", x)
    checks.spans_and_scale(x, spans, scale)
    if omega.ndim != 2 or omega.shape[0] != x.shape[1] or omega.dtype not in (torch.float32, x.dtype):
        raise ValueError(
            f"omega: expected [{x.shape[1]}, l] float32 or {x.dtype}, got {list(omega.shape)} {omega.dtype}"
        )
    checks.accumulator("out", out, tuple(omega.shape), x)
    if trace is not None:
        checks.accumulator("trace", trace, (), x, (torch.float64,))
    checks.precision(precision)
    if x.numel() and omega.numel() and (spans is None or len(spans)):
        _sketch(x, omega, spans, scale, out, precision, trace)
    return out


def _cpu(x, omega, spans, scale, out, precision, trace):
    for rows, weight in weighted_rows(x, spans, scale):
        if trace is not None:
            trace += (torch.linalg.vector_norm(rows, dim=1, keepdim=True).square() * weight).sum(dtype=torch.float64)
        out.addmm_(rows.T, (rows @ omega.float()).mul_(weight))


_sketch = register(
    "sketch(Tensor x, Tensor omega, Tensor? spans, Tensor? scale, Tensor(a!) out, str precision, Tensor(b!)? trace)"
    " -> ()",
    _cpu,
)
