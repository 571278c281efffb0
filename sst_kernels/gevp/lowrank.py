"""Exact reductions for A = U^T U with few rows: no iteration, one p x p symmetric eigenproblem.

Split projection: with B = W^T W + D the space is split into range(W^T) and its complement, on which B acts as S + 1 and as 1
(after scaling by D^-1/2). M = U B^-1 U^T is then a sum of two positive semi-definite terms. The Gram-Woodbury form subtracts
them instead and loses 3.5 % in float32, 6e-5 in float64 at hard dampings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sst_kernels.gevp.operators import LowRank
from sst_kernels.gevp.result import GEVPResult, GEVPStatus

_EPS = torch.finfo(torch.float64).eps


def split_projection(gain: LowRank, cost: LowRank, k: int, seed: int, route: str) -> GEVPResult:
    """Top-k pairs of U^T U v = lambda (W^T W + D) v; rows of `gain` U [p, n], of `cost` W [q, n], D > 0.

    Work 2 n (q^2 + 4 p q + p^2) flops in float64; memory n (p + q) float64 beyond the inputs.
    """
    damping = cost.diagonal_part()
    root = damping.rsqrt()
    u, w = gain.rows.double() * root, cost.rows.double() * root
    s, z = torch.linalg.eigh(w @ w.mT)
    live = s > s.amax().clamp_min(0) * len(s) * 10 * _EPS if len(s) else s > 0
    s, z = s[live], z[:, live] / s[live].sqrt()  # columns of w^T z are orthonormal: they are never formed

    c = z.mT @ (w @ u.mT)
    outside = u - (z @ c).mT @ w
    again = z.mT @ (w @ outside.mT)
    outside -= (z @ again).mT @ w
    c += again
    inside = c / (s + 1).sqrt()[:, None]
    m = outside @ outside.mT + inside.mT @ inside

    def inverse(y: Tensor) -> Tensor:
        return root[:, None] * (outside.mT @ y + w.mT @ (z @ ((c @ y) / (s + 1)[:, None])))

    return _from_projected(m, inverse, gain.rows, cost.matmul, k, seed, route)


def cholesky_projection(gain: LowRank, cost: Tensor, k: int, seed: int, route: str) -> GEVPResult:
    """Top-k pairs of U^T U v = lambda B v with a dense B [n, n]: M = (L^-1 U^T)^T (L^-1 U^T)."""
    cost = cost.double()
    factor, info = torch.linalg.cholesky_ex(cost)
    if int(info) != 0:
        return failed(cost.shape[0], k, GEVPStatus.not_positive_definite, route, cost.device)
    x = torch.linalg.solve_triangular(factor, gain.rows.double().mT, upper=False)

    def inverse(y: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor.mT, x @ y, upper=True)

    return _from_projected(x.mT @ x, inverse, gain.rows, cost.__matmul__, k, seed, route)


def _from_projected(
    m: Tensor,
    inverse: Callable[[Tensor], Tensor],
    rows: Tensor,
    cost: Callable[[Tensor], Tensor],
    k: int,
    seed: int,
    route: str,
) -> GEVPResult:
    """Pairs of the pencil from M = U B^-1 U^T: v = B^-1 U^T y / sqrt(lambda); what M's rank does not give is padded."""
    n = rows.shape[1]
    if not bool(torch.isfinite(m).all()):
        return failed(n, k, GEVPStatus.non_finite, route, rows.device)
    values, y = torch.linalg.eigh(m)
    values, y = values.flip(0)[:k], y.flip(1)[:, :k]
    rank = int((values > values[:1].clamp_min(0) * len(m) * _EPS).sum()) if len(values) else 0
    values, y = values[:rank], y[:, :rank]

    vectors = inverse(y) / values.sqrt()
    # r = U^T e with e = U v - sqrt(lambda) y, hence r' B^-1 r = e' M e.
    e = rows.double() @ vectors - values.sqrt() * y
    bound = (e * (m @ e)).sum(0).clamp_min(0).sqrt()
    if rank < k:
        vectors = torch.cat([vectors, _complement(vectors, cost, n, k - rank, seed)], dim=1)
        values, bound = (torch.cat([x, x.new_zeros(k - rank)]) for x in (values, bound))
    status = GEVPStatus.converged if rank == k else GEVPStatus.rank_deficient
    return GEVPResult(
        values, oriented(vectors), bound, torch.tensor(int(status), dtype=torch.int32), route, _no_cycles()
    )


def _complement(vectors: Tensor, cost: Callable[[Tensor], Tensor], n: int, count: int, seed: int) -> Tensor:
    """`count` random vectors, B-orthonormal and B-orthogonal to `vectors`; that complement is the null space of A."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, count, dtype=torch.float64, generator=generator).to(vectors.device)
    for _ in range(3):
        x = x - vectors @ (vectors.mT @ cost(x))
        lower = torch.linalg.cholesky(x.mT @ cost(x))
        x = torch.linalg.solve_triangular(lower, x.mT, upper=False).mT
    return x


def oriented(vectors: Tensor) -> Tensor:
    """Columns with their largest component positive."""
    peak = vectors.abs().argmax(dim=-2, keepdim=True)
    return vectors * torch.where(vectors.gather(-2, peak) < 0, -1.0, 1.0)


def failed(n: int, k: int, status: GEVPStatus, route: str, device: torch.device) -> GEVPResult:
    """NaN results with a reason."""
    values = torch.full((k,), torch.nan, dtype=torch.float64, device=device)
    vectors = torch.full((n, k), torch.nan, dtype=torch.float64, device=device)
    return GEVPResult(
        values, vectors, values.clone(), torch.tensor(int(status), dtype=torch.int32), route, _no_cycles()
    )


def _no_cycles() -> Tensor:
    return torch.tensor(0, dtype=torch.int32)
