"""Float64 products that the structures share: with RᵀR for tall float32 rows, and with Kronecker products."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 24  # numbers widened to float64 at once


def rows_times(rows: Tensor, vectors: Tensor) -> Tensor:
    """R @ V in float64 for rows [N, n] and vectors [n] or [n, k], widening a bounded piece of R at a time."""
    step = max(1, CHUNK // max(1, rows.shape[1]))
    v = vectors.to(rows.device, torch.float64)
    return torch.cat([rows[i : i + step].double() @ v for i in range(0, max(1, len(rows)), step)])


def rows_gramian(rows: Tensor, vectors: Tensor) -> Tensor:
    """Rᵀ(R @ V) in float64, same shape as `vectors`."""
    step = max(1, CHUNK // max(1, rows.shape[1]))
    v = vectors.to(rows.device, torch.float64)
    out = torch.zeros_like(v)
    for i in range(0, len(rows), step):
        piece = rows[i : i + step].double()
        out += piece.mT @ (piece @ v)
    return out


def add_gram(rows: Tensor, out: Tensor) -> None:
    """out [n, n] float64 += Rᵀ R for rows [N, n], widening a bounded piece of R at a time."""
    step = max(1, CHUNK // max(1, rows.shape[1]))
    for i in range(0, len(rows), step):
        piece = rows[i : i + step].double()
        out.addmm_(piece.mT, piece)


def rows_inner(rows: Tensor) -> Tensor:
    """R Rᵀ [N, N] in float64 for rows [N, n], widening a bounded range of columns at a time."""
    step = max(1, CHUNK // max(1, len(rows)))
    out = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for i in range(0, rows.shape[1], step):
        piece = rows[:, i : i + step].double()
        out += piece @ piece.mT
    return out


def kron_times(left: Tensor, right: Tensor, vectors: Tensor) -> Tensor:
    """(L ⊗ R) @ V for L [p', p], R [q', q], V [p·q] or [p·q, k], row-major: vec(M) ↦ vec(L M Rᵀ)."""
    v = vectors.reshape(left.shape[1], right.shape[1], -1)
    out = torch.einsum("ij,jlk,ml->imk", left, v, right)
    return out.reshape(left.shape[0] * right.shape[0], *vectors.shape[1:])


def symmetric(lower: Tensor) -> Tensor:
    """The symmetric float64 matrix whose lower triangle is given."""
    low = lower.double().tril()
    return low + low.tril(-1).mT


def psd_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and never negative, and eigenvectors of a matrix that is PSD up to rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def nearest_psd(matrix: Tensor) -> Tensor:
    """The PSD matrix nearest to a symmetric one, for sums whose float32 rounding left eigenvalues of −1e-8·‖M‖."""
    values, vectors = psd_eigh(matrix)
    root = vectors * values.sqrt()
    return root @ root.mT
