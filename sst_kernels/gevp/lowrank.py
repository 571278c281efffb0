"""Exact reductions for A = U^T U with few rows. With B = F^T F and X = F^-T U^T the pairs of the pencil are those of the p x p
matrix M = X^T X, v = F^-1 X y / sqrt(lambda), and M costs no subtraction.

Split projection: for B = W^T W + D, scaled by D^-1/2, Householder's Q with W^T = Q [R; 0] splits the space into range(W^T), where B
acts as I + R R^T = T^T T, and its complement, where it acts as 1. T is the triangle of [R^T; I], so that W counts with its own
condition and not with that of its Gram matrix. The Gram-Woodbury form subtracts and loses 3.5 % in float32, 6e-5 in float64 at
hard dampings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sst_kernels.gevp.iterate import operator_jacobi_davidson
from sst_kernels.gevp.operators import Dense, Diagonal, LowRank, power_of_two
from sst_kernels.gevp.pencils import dense_route
from sst_kernels.gevp.result import LEFT, GEVPResult, GEVPStatus, failed, no_cycles
from sst_kernels.gevp.settings import Settings

_EPS = torch.finfo(torch.float64).eps

Map = Callable[[Tensor], Tensor]


def split_projection(gain: LowRank, cost: LowRank, k: int, settings: Settings, route: str) -> GEVPResult:
    """Top-k pairs of U^T U v = lambda (W^T W + D) v; rows of `gain` U [p, n], of `cost` W [q, n], D > 0.

    Work 2 n (q^2 + 2 p q + p^2) flops in float64 and the p x p problem; memory 2 n (p + q) float64 beyond the inputs.
    """
    root = cost.diagonal_part().rsqrt()
    reflectors, tau = torch.geqrf((cost.rows * root).mT)
    r = len(tau)
    inside = torch.cat([reflectors[:r].triu().mT, torch.eye(r, dtype=torch.float64, device=tau.device)])
    triangle = torch.linalg.qr(inside, mode="r").R
    turn = partial(torch.ormqr, reflectors[:, :r], tau)

    x = turn((gain.rows * root).mT, transpose=True)
    x[:r] = torch.linalg.solve_triangular(triangle.mT, x[:r], upper=False)

    def back(z: Tensor) -> Tensor:
        z[:r] = torch.linalg.solve_triangular(triangle, z[:r], upper=True)
        return root[:, None] * turn(z)

    return _from_projected(x, back, gain.rows, cost.matmul, k, settings, route)


def cholesky_projection(gain: LowRank, cost: Tensor, k: int, settings: Settings, route: str) -> GEVPResult:
    """Top-k pairs of U^T U v = lambda B v with a dense B [n, n] = L L^T: X = L^-1 U^T."""
    cost = cost.double()
    factor, info = torch.linalg.cholesky_ex(cost)
    if int(info) != 0:
        return failed(cost.shape[0], k, GEVPStatus.not_positive_definite, route, cost.device)
    x = torch.linalg.solve_triangular(factor, gain.rows.double().mT, upper=False)
    back = partial(torch.linalg.solve_triangular, factor.mT, upper=True)
    return _from_projected(x, back, gain.rows, cost.__matmul__, k, settings, route)


def _from_projected(
    x: Tensor, back: Map, rows: Tensor, cost: Map, k: int, settings: Settings, route: str
) -> GEVPResult:
    """Pairs of the pencil from X [n, p]; what the rank of M does not give is padded. `back` is F^-1 and may overwrite."""
    n = rows.shape[1]
    unit = power_of_two(x)  # squares neither overflow nor vanish
    x /= unit
    m = x.mT @ x
    if not bool(torch.isfinite(m).all()):
        return failed(n, k, GEVPStatus.non_finite, route, rows.device)
    solved = top_pairs(m, min(k, len(m)), settings)
    route, status = f"{route} ({solved.route})", GEVPStatus(int(solved.status))
    if not status.usable and status is not GEVPStatus.max_iterations:
        return failed(n, k, status, route, rows.device)
    rank = int((solved.values > 0).sum())
    values, y = solved.values[:rank], solved.vectors[:, :rank]

    vectors = back((y.mT @ x.mT).mT / values.sqrt())
    # r = U^T e with e = U v - sqrt(lambda) y, hence r' B^-1 r = e' M e.
    e = rows.double() @ vectors / unit - values.sqrt() * y
    bound = (e * (m @ e)).sum(0).clamp_min(0).sqrt()
    values, bound = values * unit * unit, bound * unit * unit
    if not bool(torch.isfinite(values).all()):
        return failed(n, k, GEVPStatus.non_finite, route, rows.device)
    if rank < k:
        rest = _complement(vectors, cost, n, k - rank, settings.seed)
        if rest is None:
            return failed(n, k, GEVPStatus.not_positive_definite, route, rows.device)
        vectors = torch.cat([vectors, rest], dim=1)
        values, bound = (torch.cat([a, a.new_zeros(k - rank)]) for a in (values, bound))
    if status is not GEVPStatus.max_iterations:
        status = GEVPStatus.converged if rank == k else GEVPStatus.rank_deficient
    code = torch.tensor(int(status), dtype=torch.int32, device=values.device)
    return GEVPResult(values, oriented(vectors), bound, code, route, solved.cycles)


def top_pairs(m: Tensor, k: int, settings: Settings) -> GEVPResult:
    """The k largest pairs of a positive semi-definite M [p, p], by eigh or from the measured crossover on by Jacobi-Davidson."""
    p = len(m)
    chosen = dense_route(p, k, settings.method, m.device.type, "projected")
    route = str(chosen)
    cycles = no_cycles()
    if chosen.name == "jacobi_davidson":
        ones = torch.ones(p, dtype=torch.float64, device=m.device)
        solved = operator_jacobi_davidson(Dense(m), Diagonal(ones), k, settings, route)
        if settings.method != "auto" or solved.statuses() != [GEVPStatus.max_iterations]:
            return solved
        route, cycles = route + LEFT, solved.cycles
    values, y = torch.linalg.eigh(m)
    values, y = values.flip(0)[:k], y.flip(1)[:, :k]
    rounding = values[:1].clamp_min(0) * p * _EPS
    values = values.where(values > rounding, 0.0)
    code = torch.tensor(int(GEVPStatus.converged), dtype=torch.int32)
    return GEVPResult(values, y, rounding.expand(k), code, route, cycles)


def _complement(vectors: Tensor, cost: Callable[[Tensor], Tensor], n: int, count: int, seed: int) -> Tensor | None:
    """`count` random vectors, B-orthonormal and B-orthogonal to `vectors`; that complement is the null space of A.

    None where B on them is no more than its rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, count, dtype=torch.float64, generator=generator).to(vectors.device)
    noise = (n * _EPS) ** 2 * ((x * cost(x)).sum(0) / (x * x).sum(0)).amax()
    for _ in range(3):
        x = x - vectors @ (vectors.mT @ cost(x))
        lower, info = torch.linalg.cholesky_ex(x.mT @ cost(x))
        if info:
            return None
        x = torch.linalg.solve_triangular(lower, x.mT, upper=False).mT
    return None if bool((noise * (x * x).sum(0) >= 1).any()) else x


def oriented(vectors: Tensor) -> Tensor:
    """Columns with their largest component positive."""
    peak = vectors.abs().argmax(dim=-2, keepdim=True)
    return vectors * torch.where(vectors.gather(-2, peak) < 0, -1.0, 1.0)
