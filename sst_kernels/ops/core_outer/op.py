"""Per-sample core gradients of every module at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from sst_kernels.ops import checks
from sst_kernels.ops.registry import register
from sst_kernels.ops.spans import layout


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

    Example:
        >>> from sst_kernels.ops import core_outer
        >>> spans = torch.tensor([[0, 3], [3, 5]])
        >>> lefts, rights = [torch.ones(5, 2)] * 3, [torch.ones(5, 2)] * 3  # three modules of rank 2
        >>> core_outer(lefts, rights, spans, None, torch.empty(2, 12))[:, 0]
        tensor([3., 2.])
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


def _cpu(lefts, rights, spans, scale, out, precision):
    of = layout(len(lefts[0]), spans, scale)
    runs, empty = of.runs, of.empty
    if empty:
        out[empty] = 0
    column = 0
    for (p, q), modules in itertools.groupby(zip(lefts, rights), lambda m: (m[0].shape[1], m[1].shape[1])):
        members = [(left.float(), right.float()) for left, right in modules]
        width = len(members) * p * q
        if width:
            rows = out[:, column : column + width].unflatten(1, (len(members), p, q))
            (_equal if len(runs) == 1 else _ragged)(runs, members, rows)
        column += width
    if scale is not None and len(runs) != 1:
        out *= scale[:, None]


def _equal(runs, members, rows):
    """Samples of one length: a batched product per module, of views, and one scaled copy of all."""
    (run,) = runs
    G = torch.empty(len(members), run.last - run.first, *rows.shape[2:])
    for g, (left, right) in zip(G.unbind(0), members):
        torch.bmm(run.turned(left), run.windows(right), out=g)
    rows = rows[run.first : run.last].transpose(0, 1)
    torch.mul(G, run.scale, out=rows)


def _ragged(runs, members, rows):
    """Samples of many lengths: a product per sample, batched over the modules, which are copied side by side for it."""
    left, right = (torch.stack(side) for side in zip(*members))
    for run in runs:
        for n in range(run.first, run.last):
            begin = run.begin + (n - run.first) * run.step
            end = begin + run.length
            torch.bmm(left[:, begin:end].mT, right[:, begin:end], out=rows[n])


_core_outer = register(
    "core_outer(Tensor[] lefts, Tensor[] rights, Tensor spans, Tensor? scale, Tensor(a!) out, str precision) -> ()",
    _cpu,
)
