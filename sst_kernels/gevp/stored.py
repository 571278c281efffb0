"""Batches of stored pencils: what a solve copies, and the pieces in which a memory budget lets it run."""

from __future__ import annotations

from bisect import bisect_right
from functools import partial

import torch
from torch import Tensor

from sst_kernels.gevp.dense import empty_outputs, gevp_dense, workspace_bytes
from sst_kernels.gevp.operators import Dense
from sst_kernels.gevp.pencils import Route, iterable
from sst_kernels.gevp.result import GEVPResult, GEVPStatus
from sst_kernels.gevp.settings import Settings

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def solve_stored(gain: Dense, cost: Dense, k: int, route: Route, settings: Settings) -> GEVPResult:
    """Top-k pairs of `gain` against `cost` + damping I, in as few pieces as `memory_budget` bytes allow (None: in one).

    A problem's bits do not depend on its company, so they do not depend on the pieces either.

    Raises:
        MemoryError: the budget does not hold one problem; the message says what would fit.
    """
    batch, count, n = gain.batch, gain.batch.numel(), gain.n
    dtype = torch.float64 if torch.float64 in (gain.dtype, cost.dtype) else torch.float32
    damping, preconditioner, budget = settings.damping, settings.preconditioner, settings.memory_budget
    how = (k, route.name, preconditioner, settings.tol, settings.max_cycles, settings.seed)

    def solved(a: Tensor, b: Tensor) -> Outputs:
        b = Dense(b).damped(damping).matrix if damping else b
        return _solve(_packed(a, dtype), _packed(b, dtype), how)

    size = count if budget is None else _fitting(gain, cost, damping, dtype, how, budget)
    if size >= count:
        values, rows, bound, status, cycles = solved(gain.matrix, cost.matrix)
    else:
        outputs = empty_outputs((count,), n, k, gain.device)
        for first in range(0, count, size):
            last = min(first + size, count)
            for whole, part in zip(outputs, solved(gain.problems(first, last), cost.problems(first, last))):
                whole[first:last] = part
        values, rows, bound, status, cycles = (x.view(*batch, *x.shape[1:]) for x in outputs)
    taken = str(route)
    if preconditioner != "cholesky" and route.name != "direct":
        taken = f"{taken}; preconditioner {preconditioner}"
    return GEVPResult(values, rows.mT, bound, status, taken, cycles)


def _solve(a: Tensor, b: Tensor, how: tuple) -> Outputs:
    outputs = gevp_dense(a, b, *how)
    status = outputs[3].view(-1)
    if GEVPStatus.not_symmetric in status.tolist():
        a, b = (x.view(-1, *x.shape[-2:]) for x in (a, b))
        skewed = (status == GEVPStatus.not_symmetric).nonzero()[:, 0]
        skewed = skewed[_nearly_symmetric(a[skewed]) & _nearly_symmetric(b[skewed])]
        again = gevp_dense(*((x + x.mT).div_(2) for x in (a[skewed], b[skewed])), *how)
        for old, new in zip(outputs, again):
            old.view(-1, *new.shape[1:])[skewed] = new
    return outputs


def _packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.requires_grad or x.dtype is not dtype or not x.is_contiguous():
        return x.detach().to(dtype).contiguous()
    return x


def _nearly_symmetric(x: Tensor) -> Tensor:
    """Whether asymmetry is what accumulation in float32 leaves; such a matrix is solved as its symmetric part."""
    return (x - x.mT).abs_().amax((-2, -1)) <= 1e-5 * x.abs().amax((-2, -1))


def _bytes(gain: Dense, cost: Dense, damping: float, dtype: torch.dtype, how: tuple, problems: int) -> int:
    """What that many problems take at most beside the caller's matrices and the result, symmetric parts of both sides included."""
    k, method, preconditioner = how[:3]
    entries = gain.n * gain.n
    matrix, result = entries * dtype.itemsize, 8 * (k * (gain.n + 2) + 1)
    copied = 0
    for side, shift in ((gain, 0.0), (cost, damping)):
        copied += entries * side.dtype.itemsize * ((not side.packed) + (shift != 0)) + matrix * (
            side.dtype is not dtype or not side.packed
        )
    workspace = workspace_bytes(problems, gain.n, k, method, preconditioner, dtype is torch.float32, gain.device)
    return problems * (copied + 2 * matrix + 2 * result) + max(workspace, 2 * problems * matrix)


def _fitting(gain: Dense, cost: Dense, damping: float, dtype: torch.dtype, how: tuple, budget: int) -> int:
    count, n, k = gain.batch.numel(), gain.n, how[0]
    if not (count and n and k):
        return count
    need = partial(_bytes, gain, cost, damping, dtype, how)
    size = bisect_right(range(1, count + 1), budget, key=need)
    if size:
        return size
    ways = {'method="direct"': ("direct", "cholesky")}
    if iterable(n, k):
        ways |= {'method="jacobi_davidson"': ("jacobi_davidson", "cholesky")}
        ways |= {'method="jacobi_davidson", preconditioner="diagonal"': ("jacobi_davidson", "diagonal")}
    sizes = {what: _bytes(gain, cost, damping, dtype, (k, *way), 1) for what, way in ways.items()}
    fitting = [f"{what} ({_mib(taken)})" for what, taken in sizes.items() if taken <= budget]
    least = min(sizes, key=sizes.__getitem__)
    more = f"give it at least {need(1)} bytes, or {sizes[least]} bytes with {least}"
    advice = f"these would fit: {'; '.join(fitting)}" if fitting else more
    raise MemoryError(
        f"one problem of order {n} takes up to {_mib(need(1))} beside its matrices, and memory_budget is {_mib(budget)}; {advice}"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
