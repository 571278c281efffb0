"""gevp(): the top-k pairs of a symmetric-definite generalized eigenproblem, by whichever route its structure allows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any, cast, overload

from torch import Tensor

from sst_kernels.gevp import lowrank, structured
from sst_kernels.gevp.checks import operand
from sst_kernels.gevp.dense import empty_outputs
from sst_kernels.gevp.iterate import operator_jacobi_davidson
from sst_kernels.gevp.operators import Dense, Diagonal, EigenKronecker, Kronecker, LowRank, Operator
from sst_kernels.gevp.pencils import choose
from sst_kernels.gevp.ragged import Side, solve_list
from sst_kernels.gevp.result import GEVPResult
from sst_kernels.gevp.settings import Settings, check_count
from sst_kernels.gevp.stored import solve_stored
from sst_kernels.profiling import stage


@overload
def gevp(A: Tensor | Operator, B: Tensor | Operator, k: int, **settings: Any) -> GEVPResult: ...


@overload
def gevp(A: Side, B: Side, k: int, **settings: Any) -> list[GEVPResult]: ...


@stage("gevp")
def gevp(
    A: Tensor | Operator | Side, B: Tensor | Operator | Side, k: int, **settings: Any
) -> GEVPResult | list[GEVPResult]:
    """Top-k pairs of A v = lambda (B + damping I) v, largest lambda first, for one problem, a batch, or a list of any orders.

    A problem that has no answer never raises and never touches its neighbours: its outputs are NaN and `status` says why
    (`GEVPResult.raise_if_failed` turns that into an exception). No gradient flows through the result.

    Args:
        A: symmetric [..., n, n], float32 or float64 (sums run in float64 either way), or an operator.
        B: symmetric positive definite once damped; a tensor of the same shape, dtype and device, or an operator. Two lists of
            matrices or operators of different orders are solved in groups that agree in order.
        k: pairs per problem, 0 <= k <= n.
        **settings: those of `Settings`, which has their meanings and defaults.

    Returns:
        Values [..., k], B-orthonormal vectors [..., n, k], error bounds [..., k], status [...], route; for lists, a list of these.

    Raises:
        ValueError: shapes, k or a setting do not fit; a memory budget for a pencil of operators, which cannot be split.
        MemoryError: `memory_budget` does not hold one problem; the message says what would fit.
        TypeError: a dtype that is neither float32 nor float64 nor convertible to them; a setting that there is not.
    """
    chosen = Settings(**settings)
    check_count("k", k, 0)
    if isinstance(A, list | tuple) or isinstance(B, list | tuple):
        return solve_list(partial(gevp, k=k, **settings), cast(Side, A), cast(Side, B))
    return _solve(cast(Any, A), cast(Any, B), k, chosen)


_FREE, _KEYWORD = signature(gevp), signature(Settings)
gevp.__signature__ = _FREE.replace(  # type: ignore[attr-defined]
    parameters=[*list(_FREE.parameters.values())[:3], *_KEYWORD.parameters.values()]
)


def _solve(A: Tensor | Operator, B: Tensor | Operator, k: int, settings: Settings) -> GEVPResult:
    gain, cost = operand("A", A), operand("B", B)
    _check(gain, cost, k)
    if isinstance(gain, Dense) and isinstance(cost, Dense):
        return solve_stored(gain, cost, k, choose(gain, cost, k, settings.method), settings)
    if settings.memory_budget is not None:
        raise ValueError(
            f"memory_budget splits batches of stored matrices; a pencil of {type(gain).__name__} and {type(cost).__name__} is one "
            "problem and cannot be split: leave it out"
        )
    if k == 0:
        values, rows, bound, status, cycles = empty_outputs((), gain.n, 0, gain.device)
        return GEVPResult(values, rows.mT, bound, status.zero_(), "no pair was asked for", cycles.zero_())
    cost, settings = cost.damped(settings.damping), replace(settings, damping=0.0)
    chosen = choose(gain, cost, k, settings.method)
    route = str(chosen)
    match chosen.name, gain, cost:
        case "diagonal", Diagonal(), Diagonal():
            return structured.diagonal_pair(gain, cost, k, route)
        case "eigenbasis", EigenKronecker(), EigenKronecker():
            return structured.eigenbasis_pair(gain, cost, k, route)
        case "kronecker", Kronecker(), Kronecker():
            left, right = (_solve(a, b, min(k, len(a)), settings) for a, b in structured.sides(gain, cost))
            return structured.kronecker_pair(left, right, k, f"{route} (left {left.route}; right {right.route})")
        case "split_projection", LowRank(), LowRank():
            return lowrank.split_projection(gain, cost, k, settings, route)
        case "split_projection", LowRank(), Diagonal():
            return lowrank.split_projection(gain, LowRank(gain.rows[:0], cost.diag), k, settings, route)
        case "cholesky_projection", LowRank(), Dense():
            return lowrank.cholesky_projection(gain, cost.matrix, k, settings, route)
        case "operator_jacobi_davidson", _, _:
            return operator_jacobi_davidson(gain, cost, k, settings, route)
        case "stored", _, _:
            result = _solve(gain.dense().double(), cost.dense().double(), k, settings)
            return replace(result, route=f"{route} ({result.route})")
    raise AssertionError(f"{route} is no route for {type(gain).__name__} and {type(cost).__name__}")


def _check(gain: Operator, cost: Operator, k: int) -> None:
    if gain.n != cost.n:
        raise ValueError(f"A is of order {gain.n}, B of order {cost.n}; they must agree")
    if gain.device != cost.device:
        raise ValueError(f"A is on {gain.device}, B on {cost.device}; move one of them")
    if isinstance(gain, Dense) and isinstance(cost, Dense) and gain.batch != cost.batch:
        raise ValueError(
            f"A is {(*gain.batch, gain.n, gain.n)}, B {(*cost.batch, cost.n, cost.n)}; batches must agree, use expand()"
        )
    if not 0 <= k <= gain.n:
        raise ValueError(f"k must be between 0 and n = {gain.n}, got {k}")
