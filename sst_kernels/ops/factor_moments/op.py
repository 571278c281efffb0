"""First and second moments of per-sample gradients, without the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sst_kernels.ops import checks
from sst_kernels.ops.spans import held_tokens, sample_sums, weighted


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


@torch.library.custom_op(
    "sst_kernels::factor_moments",
    mutates_args=("sum", "sumsq"),
    schema="(Tensor left, Tensor right, Tensor spans, Tensor? scale, Tensor(a!)? sum, Tensor(b!) sumsq, str precision)"
    " -> ()",
    device_types="cpu",
)
def _factor_moments(left, right, spans, scale, sum, sumsq, precision):
    checks.span_values(spans, left.shape[0])
    if int((spans[:, 1] - spans[:, 0]).max()) <= 1:  # rank-one samples: (s l rᵀ)² = s² l² (r²)ᵀ
        held, weight = held_tokens(len(left), spans, scale, power=2)
        a, b = left[held].float(), right[held].float()
        sumsq += weighted(a.square(), weight).T @ b.square()
        if sum is not None:
            _, weight = held_tokens(len(left), spans, scale, power=1)
            sum += weighted(a, weight).T @ b
        return
    total, square = torch.zeros_like(sumsq), torch.zeros_like(sumsq)
    for _, G in sample_sums(left, right, spans, scale):
        if sum is not None:
            total += G.sum(0)
        square += G.square_().sum(0)
    sumsq += square
    if sum is not None:
        sum += total


@_factor_moments.register_kernel("cuda")
def _(left, right, spans, scale, sum, sumsq, precision):
    from sst_kernels.ops.factor_moments.kernel import factor_moments

    factor_moments(left, right, spans, scale, sum, sumsq, precision)


@_factor_moments.register_fake
def _(left, right, spans, scale, sum, sumsq, precision):
    return None
