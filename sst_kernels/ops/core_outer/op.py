"""Per-sample core gradients of every module at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sst_kernels.ops import checks
from sst_kernels.ops.spans import CHUNK_ELEMENTS, by_length


def core_outer(
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    spans: Tensor,
    scale: Tensor | None,
    out: Tensor,
    *,
    precision: str = "ieee",
) -> Tensor:
    """Overwrite `out` with the per-sample gradients C_n = scale_n Σ_{t in span n} left_t right_tᵀ of all modules.

    lefts, rights: M tensors [S, p_m] and [S, q_m]; float32, bfloat16 or float16; spans [N, 2] int64; scale [N] float32
    or None; out [N, Σ p_m q_m] float32, row stride free. Columns of module m are vec(C_n), row-major, in the order
    given. One launch per distinct (p, q, dtype) on a GPU: the modules of a shape are reached through a pointer table.
    Accumulation is float32; `precision` ("ieee", "tf32x3", "tf32") is how float32 inputs are multiplied on a GPU.

    Raises ValueError when a shape, dtype or device does not fit.
    """
    if len(lefts) != len(rights):
        raise ValueError(f"expected as many lefts as rights, got {len(lefts)} and {len(rights)}")
    checks.precision(precision)
    width = 0
    for m, (left, right) in enumerate(zip(lefts, rights)):
        checks.tokens(f"lefts[{m}]", left, lefts[0].shape[0])
        checks.tokens(f"rights[{m}]", right, lefts[0].shape[0])
        width += left.shape[1] * right.shape[1]
    checks.spans_and_scale(out, spans, scale)
    checks.accumulator("out", out, (len(spans), width), spans)
    if len(lefts) and len(spans):
        _core_outer(list(lefts), list(rights), spans, scale, out, precision)
    return out


@torch.library.custom_op(
    "sst_kernels::core_outer",
    mutates_args=("out",),
    schema="(Tensor[] lefts, Tensor[] rights, Tensor spans, Tensor? scale, Tensor(a!) out, str precision) -> ()",
    device_types="cpu",
)
def _core_outer(lefts, rights, spans, scale, out, precision):
    checks.span_values(spans, lefts[0].shape[0])
    out.zero_()
    offset, shapes = 0, {}
    for left, right in zip(lefts, rights):
        p, q = left.shape[1], right.shape[1]
        shapes.setdefault((p, q), []).append((left, right, offset))
        offset += p * q
    for (p, q), modules in shapes.items():
        if p * q == 0:
            continue
        a, b = torch.stack([m[0].float() for m in modules]), torch.stack([m[1].float() for m in modules])
        for samples, take in by_length(spans, CHUNK_ELEMENTS // (p * q * len(modules))):
            G = take(a).mT @ take(b)
            if scale is not None:
                G *= scale[samples, None, None]
            for rows, (_, _, column) in zip(G, modules):
                out[samples, column : column + p * q] = rows.flatten(1)


@_core_outer.register_kernel("cuda")
def _(lefts, rights, spans, scale, out, precision):
    from sst_kernels.ops.core_outer.kernel import core_outer

    core_outer(lefts, rights, spans, scale, out, precision)


@_core_outer.register_fake
def _(lefts, rights, spans, scale, out, precision):
    return None
