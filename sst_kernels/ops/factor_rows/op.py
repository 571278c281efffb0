"""Per-sample gradients of one block as rows."""

from __future__ import annotations

import torch
from torch import Tensor

from sst_kernels.ops import checks
from sst_kernels.ops.registry import register
from sst_kernels.ops.spans import gradients, layout


def factor_rows(
    left: Tensor, right: Tensor, spans: Tensor, scale: Tensor | None, out: Tensor, *, precision: str = "ieee"
) -> Tensor:
    """Overwrite row n of `out` with vec(G_n), G_n = scale_n Σ_{t in span n} left_t right_tᵀ, row-major.

    left [S, p], right [S, q]: float32, bfloat16 or float16; spans [N, 2] int64; scale [N] float32 or None;
    out [N, p*q] float32 or bfloat16 (rounded once, after the scale), row stride free. Accumulation is float32.
    `precision` ("ieee", "tf32x3", "tf32") is how float32 inputs are multiplied on a GPU.

    Raises ValueError when a shape, dtype or device does not fit.

    Example:
        >>> from sst_kernels.ops import factor_rows
        >>> factor_rows(torch.ones(5, 2), torch.ones(5, 2), torch.tensor([[0, 3], [3, 5]]), None, torch.empty(2, 4))
        tensor([[3., 3., 3., 3.],
                [2., 2., 2., 2.]])
    """
    checks.tokens("left", left)
    checks.tokens("right", right, left.shape[0])
    checks.spans_and_scale(left, spans, scale)
    checks.accumulator("out", out, (len(spans), left.shape[1] * right.shape[1]), left, (torch.float32, torch.bfloat16))
    checks.precision(precision)
    if out.numel():
        _factor_rows(left, right, spans, scale, out, precision)
    return out


def _cpu(left, right, spans, scale, out, precision):
    of = layout(len(left), spans, scale)
    runs, empty = of.runs, of.empty
    left, right = left.float(), right.float()
    rows = out.view(-1, left.shape[1], right.shape[1])
    for run in runs:
        into = rows[run.first : run.last]
        if out.dtype == torch.float32:
            gradients(run, left, right, into)
        else:
            exact = torch.empty(into.shape)
            gradients(run, left, right, exact)
            into.copy_(exact)
    if empty:
        rows[empty] = 0


_factor_rows = register(
    "factor_rows(Tensor left, Tensor right, Tensor spans, Tensor? scale, Tensor(a!) out, str precision) -> ()", _cpu
)
