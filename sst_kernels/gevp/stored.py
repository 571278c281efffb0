"""Batches of stored pencils: what a solve copies, and the pieces in which a memory budget lets it run."""

from __future__ import annotations

from bisect import bisect_right
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from sst_kernels.gevp.dense import empty_outputs, gevp_dense, threads, workspace_bytes
from sst_kernels.gevp.operators import Dense
from sst_kernels.gevp.pencils import Route, iterable
from sst_kernels.gevp.result import GEVPResult, GEVPStatus, left_note
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
    limits = (settings.tol, settings.max_cycles, settings.seed)
    how = (k, route.name, preconditioner, *limits, False)
    if settings.method == "auto" and route.name != "direct":
        how = (*how[:-1], True)
    size, others = count, max(count, 1)
    if budget is not None:
        others = threads() if gain.device.type == "cpu" else 8
        size = _fitting(gain, cost, damping, dtype, how, others, budget)
        if not size:  # rather without leave to go over to the direct route than not at all
            how = (*how[:-1], False)
            size = _fitting(gain, cost, damping, dtype, how, 0, budget) or _refuse(
                gain, cost, damping, dtype, how, budget
            )

    def solved(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        b = Dense(b).damped(damping).matrix if damping else b
        return _solve_or_leave(_packed(a, dtype), _packed(b, dtype), how, others)

    if size >= count:
        values, rows, bound, status, cycles, left = solved(gain.matrix, cost.matrix)
    else:
        outputs = (
            *empty_outputs((count,), n, k, gain.device),
            torch.empty(count, dtype=torch.bool, device=gain.device),
        )
        for first in range(0, count, size):
            last = min(first + size, count)
            for whole, part in zip(outputs, solved(gain.problems(first, last), cost.problems(first, last))):
                whole[first:last] = part
        values, rows, bound, status, cycles, left = (x.view(*batch, *x.shape[1:]) for x in outputs)
    taken = str(route)
    if preconditioner != "cholesky" and route.name != "direct":
        taken = f"{taken}; preconditioner {preconditioner}"
    rerouted = left if how[-1] and bool(left.any()) else None
    return GEVPResult(values, rows.mT, bound, status, taken + left_note(rerouted), cycles, rerouted)


def _solve_or_leave(a: Tensor, b: Tensor, how: tuple, others: int) -> tuple[Tensor, ...]:
    """`_solve`, and the direct route, `others` problems at a time, for those that left the iteration; which they are comes last."""
    values, rows, bound, status, cycles = outputs = _solve(a, b, how)
    left = cycles < 0
    if not how[-1]:
        return (*outputs, left)
    cycles = torch.where(left, -1 - cycles, cycles)
    stopped = (status == GEVPStatus.max_iterations) & ~left
    a, b = (x.view(-1, *x.shape[-2:]) for x in (a, b))
    for members in stopped.view(-1).nonzero()[:, 0].split(others):
        again = _solve(a[members], b[members], (how[0], "direct", *how[2:-1], False))
        for old, new in zip(outputs[:4], again):
            old.view(-1, *new.shape[1:])[members] = new
    return values, rows, bound, status, cycles, left | stopped


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


def _bytes(gain: Dense, cost: Dense, damping: float, dtype: torch.dtype, how: tuple, others: int, problems: int) -> int:
    """What that many problems take at most beside the caller's matrices and the result, symmetric parts of both sides included, with
    `others` of them at a time going over to the direct route."""
    k, method, preconditioner = how[:3]
    entries, single, others = gain.n * gain.n, dtype is torch.float32, min(others, problems) if how[-1] else 0
    matrix, result = entries * dtype.itemsize, 8 * (k * (gain.n + 2) + 1)
    copied = 0
    for side, shift in ((gain, 0.0), (cost, damping)):
        copied += entries * side.dtype.itemsize * ((not side.packed) + (shift != 0))
        copied += matrix * (side.dtype is not dtype or not side.packed)
    workspace = workspace_bytes(problems, gain.n, k, method, preconditioner, single, gain.device)
    size = problems * (copied + 2 * matrix + 2 * result) + max(workspace, 2 * problems * matrix)
    if others:
        direct = workspace_bytes(others, gain.n, k, "direct", preconditioner, single, gain.device)
        size += others * (2 * matrix + result) + max(direct, 2 * others * matrix)
    return size


def _fitting(gain: Dense, cost: Dense, damping: float, dtype: torch.dtype, how: tuple, others: int, budget: int) -> int:
    """How many problems a piece may have; 0 where the budget does not hold one."""
    count, n, k = gain.batch.numel(), gain.n, how[0]
    if not (count and n and k):
        return max(count, 1)
    return bisect_right(range(1, count + 1), budget, key=partial(_bytes, gain, cost, damping, dtype, how, others))


def _refuse(gain: Dense, cost: Dense, damping: float, dtype: torch.dtype, how: tuple, budget: int) -> NoReturn:
    n, k = gain.n, how[0]
    need = partial(_bytes, gain, cost, damping, dtype, how, 0)
    ways = {'method="direct"': ("direct", "cholesky")}
    if iterable(n, k):
        ways |= {'method="jacobi_davidson"': ("jacobi_davidson", "cholesky")}
        ways |= {'method="jacobi_davidson", preconditioner="diagonal"': ("jacobi_davidson", "diagonal")}
    sizes = {what: _bytes(gain, cost, damping, dtype, (k, *way, False), 0, 1) for what, way in ways.items()}
    fitting = [f"{what} ({_mib(taken)})" for what, taken in sizes.items() if taken <= budget]
    least = min(sizes, key=sizes.__getitem__)
    more = f"give it at least {need(1)} bytes, or {sizes[least]} bytes with {least}"
    advice = f"these would fit: {'; '.join(fitting)}" if fitting else more
    raise MemoryError(
        f"one problem of order {n} takes up to {_mib(need(1))} beside its matrices, and memory_budget is {_mib(budget)}; {advice}"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
