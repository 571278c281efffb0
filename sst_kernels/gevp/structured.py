"""Pencils whose structure is the solution: diagonal in a known basis, or a pair of Kronecker products."""

from __future__ import annotations

import torch
from torch import Tensor

from sst_kernels.gevp.lowrank import oriented
from sst_kernels.gevp.operators import Diagonal, EigenKronecker, Kronecker
from sst_kernels.gevp.result import GEVPResult, GEVPStatus, failed


def diagonal_pair(gain: Diagonal, cost: Diagonal, k: int, route: str) -> GEVPResult:
    """Eigenvalues a_i / b_i, eigenvectors e_i / sqrt(b_i)."""
    picked = _ratios(gain.diag, cost.diag, k)
    if isinstance(picked, GEVPStatus):
        return failed(gain.n, k, picked, route, gain.device)
    values, index = picked
    vectors = torch.zeros(gain.n, k, dtype=torch.float64, device=gain.device)
    vectors[index, torch.arange(k, device=gain.device)] = cost.diag[index].rsqrt()
    return _exact(values, vectors, route)


def eigenbasis_pair(gain: EigenKronecker, cost: EigenKronecker, k: int, route: str) -> GEVPResult:
    """Both diagonal in one Kronecker eigenbasis: ratios of spectra; vectors are outer products of basis columns."""
    picked = _ratios(gain.s.reshape(-1), cost.s.reshape(-1), k)
    if isinstance(picked, GEVPStatus):
        return failed(gain.n, k, picked, route, gain.device)
    values, index = picked
    q = gain.s.shape[1]
    outer = torch.einsum("ik,jk->ijk", gain.u_left[:, index // q], gain.u_right[:, index % q])
    return _exact(values, outer.reshape(gain.n, k) * cost.s.reshape(-1)[index].rsqrt(), route)


def kronecker_pair(left: GEVPResult, right: GEVPResult, k: int, route: str) -> GEVPResult:
    """From the pairs of the two small pencils: eigenvalues multiply, eigenvectors are Kronecker products.

    The factors are positive semi-definite, so the top k products are among the products of the top k of each side.
    """
    for side in (left, right):
        status = GEVPStatus(int(side.status))
        if not status.usable:
            return failed(left.vectors.shape[0] * right.vectors.shape[0], k, status, route, left.values.device)
    a, b = left.values.clamp_min(0), right.values.clamp_min(0)
    values, index = torch.outer(a, b).reshape(-1).topk(k)
    i, j = index // len(b), index % len(b)
    vectors = torch.einsum("ik,jk->ijk", left.vectors[:, i], right.vectors[:, j]).reshape(-1, k)
    bound = a[i] * right.error_bound[j] + b[j] * left.error_bound[i] + left.error_bound[i] * right.error_bound[j]
    return _exact(values, vectors, route, bound)


def sides(gain: Kronecker, cost: Kronecker) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two small pencils of a Kronecker pair."""
    return (gain.left, cost.left), (gain.right, cost.right)


def _ratios(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor] | GEVPStatus:
    if not bool((torch.isfinite(a) & torch.isfinite(b)).all()):
        return GEVPStatus.non_finite
    if bool((b <= 0).any()):
        return GEVPStatus.not_positive_definite
    values, index = (a / b).topk(k)
    return values, index


def _exact(values: Tensor, vectors: Tensor, route: str, bound: Tensor | None = None) -> GEVPResult:
    if not bool(torch.isfinite(values).all()):
        return failed(len(vectors), len(values), GEVPStatus.non_finite, route, values.device)
    zero = values.abs() <= values.abs().amax() * torch.finfo(torch.float64).eps * len(values)
    status = GEVPStatus.rank_deficient if bool(zero.any()) else GEVPStatus.converged
    bound = values.abs() * 4 * torch.finfo(torch.float64).eps if bound is None else bound
    code = torch.tensor(int(status), dtype=torch.int32, device=values.device)
    return GEVPResult(values.masked_fill(zero, 0.0), oriented(vectors), bound, code, route, torch.zeros_like(code))
