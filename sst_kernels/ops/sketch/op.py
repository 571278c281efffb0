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
    """Add [X, D⁻¹W]ᵀ W to `out` in place, W = D X Ω and D = diag(scale²) over the tokens of the spans.

    `out` [d + l, l] float32: above Y = Xᵀ W, which is F Ω of F = Xᵀ D X but for the rounding of W, below C = Wᵀ D⁻¹ W, which
    is Ωᵀ F Ω likewise. For bfloat16 x, W is rounded to bfloat16 once, so that tensor cores take it as it is. Whatever it is
    rounded to, **Y C⁺ Yᵀ ⪯ F**: both are products of D^½ X with one matrix D^-½ W, and Y C⁺ Yᵀ = Xᵀ D^½ P D^½ X, P the projector
    on its range (Nyström; Gittens & Mahoney 1303.1849). Nothing else is rounded below float32, and nothing of float32 and float16 x.

    `trace` [] float64, or None: tr F = Σ scale² ‖x_t‖² is added to it, from the same read of X.

    x [S, d]: float32, bfloat16 or float16; omega [d, l] float32 or the dtype of x; spans [N, 2] int64, or None for all
    tokens; scale [N] float32 or None. `precision` ("ieee", "tf32x3", "tf32") is how float32 inputs are multiplied on a GPU.

    Raises ValueError when a shape, dtype or device does not fit.

    Example:
        >>> from sst_kernels.ops import sketch
        >>> sketch(torch.ones(5, 3), torch.ones(3, 1), None, None, torch.zeros(4, 1)).flatten()  # Y, then C
        tensor([15., 15., 15., 45.])
    """
    checks.tokens("x", x)
    checks.spans_and_scale(x, spans, scale)
    if omega.ndim != 2 or omega.shape[0] != x.shape[1] or omega.dtype not in (torch.float32, x.dtype):
        raise ValueError(
            f"omega: expected [{x.shape[1]}, l] float32 or {x.dtype}, got {list(omega.shape)} {omega.dtype}"
        )
    checks.accumulator("out", out, (x.shape[1] + omega.shape[1], omega.shape[1]), x)
    if trace is not None:
        checks.accumulator("trace", trace, (), x, (torch.float64,))
    checks.precision(precision)
    if x.numel() and omega.numel() and (spans is None or len(spans)):
        _sketch(x, omega, spans, scale, out, precision, trace)
    return out


def rounded(dtype: torch.dtype) -> torch.dtype:
    """What W is rounded to for tokens of this dtype: float16, which X Ω could overflow, is not kept."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _cpu(x, omega, spans, scale, out, precision, trace):
    d, omega, kept = x.shape[1], omega.float(), rounded(x.dtype)
    for rows, weight in weighted_rows(x, spans, scale):
        if trace is not None:
            trace += (torch.linalg.vector_norm(rows, dim=1, keepdim=True).square() * weight).sum(dtype=torch.float64)
        z = torch.mm(rows, omega)
        w = z * weight
        if kept != torch.float32:
            w = w.to(kept).float()
            z = w / weight
        if len(rows) < 32 * omega.shape[1]:
            out[:d].addmm_(rows.T, w)
        else:  # of many tokens the narrow result is turned instead of them
            out[:d].add_((w.T @ rows).T)
        out[d:].addmm_(z.T, w)


_sketch = register(
    "sketch(Tensor x, Tensor omega, Tensor? spans, Tensor? scale, Tensor(a!) out, str precision, Tensor(b!)? trace)"
    " -> ()",
    _cpu,
)
