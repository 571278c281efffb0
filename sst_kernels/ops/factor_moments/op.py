"""First and second moments of per-sample gradients, without the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sst_kernels.ops import checks
from sst_kernels.ops.registry import register
from sst_kernels.ops.spans import add_weighted, layout, products, turns


def factor_moments(
    left: Tensor,
    right: Tensor,
    spans: Tensor,
    scale: Tensor | None,
    sum: Tensor | None,
    sumsq: Tensor,
    *,
    precision: str = "ieee",
) -> None:
    """Add Σ_n G_n to `sum` and Σ_n G_n² to `sumsq` in place, G_n = scale_n Σ_{t in span n} left_t right_tᵀ.

    left [S, p], right [S, q]: float32, bfloat16 or float16; spans [N, 2] int64; scale [N] float32 or None; sum [p, q]
    float32 or None when it is not wanted; sumsq [p, q] float32. No G_n is ever stored on a GPU: each output tile
    reduces the tokens of a sample in registers, squares, and goes on to the next sample.
    Accumulation is float32 with one rounding per batch and element, a relative error of about 2⁻²⁴·√batches.
    `precision` ("ieee", "tf32x3", "tf32") is how float32 inputs are multiplied on a GPU.

    Raises ValueError when a shape, dtype or device does not fit.

    Example:
        >>> from sst_kernels.ops import factor_moments
        >>> square = torch.zeros(2, 2)
        >>> factor_moments(torch.ones(5, 2), torch.ones(5, 2), torch.tensor([[0, 3], [3, 5]]), None, None, square)
        >>> square  # 3² + 2²
        tensor([[13., 13.],
                [13., 13.]])
    """
    checks.tokens("left", left)
    checks.tokens("right", right, left.shape[0])
    checks.spans_and_scale(left, spans, scale)
    shape = (left.shape[1], right.shape[1])
    checks.accumulator("sumsq", sumsq, shape, left)
    if sum is not None:
        checks.accumulator("sum", sum, shape, left)
    checks.precision(precision)
    if len(spans) and sumsq.numel():
        _factor_moments(left, right, spans, scale, sum, sumsq, precision)


def _cpu(left, right, spans, scale, sum, sumsq, precision):
    left, right = left.float(), right.float()
    runs = layout(len(left), spans, scale).runs
    # The sums of many runs are added to those of all batches at the end, with one rounding.
    square, total = sumsq, sum
    if len(runs) > 1:
        square, total = torch.zeros_like(sumsq), None if sum is None else torch.zeros_like(sum)
    for run in runs:
        for piece in run.pieces(sumsq.numel()):
            _add_moments(piece, left, right, total, square)
    if len(runs) > 1:
        sumsq += square
        if sum is not None:
            sum += total


def _add_moments(run, left, right, total, square):
    if run.length == 1:  # rank one: (s l rᵀ)² = s² l² (r²)ᵀ
        a, b = run.windows(left)[:, 0] * run.weights.T, run.windows(right)[:, 0]
        square.addmm_(a.square().T, b.square())
        if total is not None:
            total.addmm_(a.T, b)
        return
    if run.last - run.first == 1:
        (G,) = products(run, left, right)
        if total is not None:
            total.add_(G, alpha=run.scale)
        square.addcmul_(G, G, value=run.scale**2)
        return
    if turns(run, left, right):
        left, right, square, total = right, left, square.T, None if total is None else total.T
    rows = products(run, left, right).flatten(1)
    if total is not None:
        add_weighted(total, run.weights, rows)
    add_weighted(square, run.squares, rows.square_())


_factor_moments = register(
    "factor_moments(Tensor left, Tensor right, Tensor spans, Tensor? scale, Tensor(a!)? sum, Tensor(b!) sumsq,"
    " str precision) -> ()",
    _cpu,
)
