"""gevp(): the top-k pairs of a symmetric-definite generalized eigenproblem, by whichever route its structure allows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, overload

from torch import Tensor

from sst_kernels.gevp import lowrank, structured
from sst_kernels.gevp.checks import operand
from sst_kernels.gevp.dense import Preconditioner, empty_outputs
from sst_kernels.gevp.iterate import operator_jacobi_davidson
from sst_kernels.gevp.operators import Dense, Diagonal, EigenKronecker, Kronecker, LowRank, Operator
from sst_kernels.gevp.pencils import STORED_LIMIT, choose
from sst_kernels.gevp.ragged import Side, solve_list
from sst_kernels.gevp.result import LEFT, GEVPResult, GEVPStatus
from sst_kernels.gevp.settings import Method, Settings, check_count
from sst_kernels.gevp.stored import solve_stored
from sst_kernels.profiling import stage


@overload
def gevp(
    A: Tensor | Operator,
    B: Tensor | Operator,
    k: int,
    *,
    method: Method = ...,
    damping: float = ...,
    tol: float = ...,
    max_cycles: int = ...,
    seed: int = ...,
    preconditioner: Preconditioner = ...,
    memory_budget: int | None = ...,
) -> GEVPResult: ...


@overload
def gevp(
    A: Side,
    B: Side,
    k: int,
    *,
    method: Method = ...,
    damping: float = ...,
    tol: float = ...,
    max_cycles: int = ...,
    seed: int = ...,
    preconditioner: Preconditioner = ...,
    memory_budget: int | None = ...,
) -> list[GEVPResult]: ...


@stage("gevp")
def gevp(
    A: Tensor | Operator | Side,
    B: Tensor | Operator | Side,
    k: int,
    *,
    method: Method = "auto",
    damping: float = 0.0,
    tol: float = 1e-10,
    max_cycles: int = 100,
    seed: int = 0,
    preconditioner: Preconditioner = "cholesky",
    memory_budget: int | None = None,
) -> GEVPResult | list[GEVPResult]:
    """Top-k pairs of A v = lambda (B + damping I) v, largest lambda first, for one problem, a batch, or a list of any orders.

    A problem that has no answer never raises and never touches its neighbours: its outputs are NaN and `status` says why
    (`GEVPResult.raise_if_failed` turns that into an exception). No gradient flows through the result.

    Args:
        A: symmetric [..., n, n], float32 or float64 (sums run in float64 either way), or an operator.
        B: symmetric positive definite once damped; a tensor of the same shape, dtype and device, or an operator. Two lists of
            matrices or operators of different orders are solved in groups that agree in order.
        k: pairs per problem, 0 <= k <= n.
        method: "auto" follows the structure and a measured crossover table, and takes a problem on which the iteration is too slow over
            to the direct route; "direct" and "jacobi_davidson" insist.
        damping: added to the diagonal of B.
        tol: an iterative solve stops when sqrt(r' B^-1 r) <= tol * |lambda_1|; a direct one is as exact as float64 allows.
        max_cycles: restart cycles of an iterative solve.
        seed: of the random start block, the same on every device.
        preconditioner: how a stored B is inverted in an iterative solve: "cholesky", "cholesky_single" (float32 factor, float64
            refinement), "diagonal" or "none" (projected block CG).
        memory_budget: bytes that the solve may take beside the caller's matrices and the result: copies, temporaries and workspace.
            A batch or list of matrices is solved in as few pieces as that allows, with the same bits; where it does not hold one direct
            solve, no problem goes over to that.

    Returns:
        Values [..., k], B-orthonormal vectors [..., n, k], error bounds [..., k], status [...], route; for lists, a list of these.

    Raises:
        ValueError: shapes, k or a setting do not fit; a memory budget for a pencil of operators, which cannot be split.
        MemoryError: `memory_budget` does not hold one problem; the message says what would fit.
        TypeError: a dtype that is neither float32 nor float64 nor convertible to them; a setting that there is not.

    Example:
        >>> A, B = torch.diag(torch.tensor([4.0, 2.0, 1.0])), torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        >>> result = sst.gevp(A, B, k=2)
        >>> result.values.round(decimals=6)
        tensor([4., 1.], dtype=torch.float64)
        >>> batch = sst.gevp(torch.stack([A, B]), torch.stack([B, A]), k=1)
        >>> batch.values.shape
        torch.Size([2, 1])
    """
    check_count("k", k, 0)
    settings = Settings(
        method=method,
        damping=damping,
        tol=tol,
        max_cycles=max_cycles,
        seed=seed,
        preconditioner=preconditioner,
        memory_budget=memory_budget,
    )
    return _one_or_all(A, B, k, settings)


def _one_or_all(A: Any, B: Any, k: int, settings: Settings) -> Any:
    if isinstance(A, list | tuple) or isinstance(B, list | tuple):
        return solve_list(lambda a, b: _one_or_all(a, b, k, settings), A, B)
    return _solve(A, B, k, settings)


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
            result = operator_jacobi_davidson(gain, cost, k, settings, route)
            slow = result.statuses() == [GEVPStatus.max_iterations]
            if not slow or settings.method != "auto" or gain.n > STORED_LIMIT:
                return result
            stored = _solve(gain.dense().double(), cost.dense().double(), k, replace(settings, method="direct"))
            return replace(stored, route=route + LEFT, cycles=result.cycles)
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
