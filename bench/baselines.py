"""What else merges adapters, on the same shapes: each as published (dense ΔW), and where its mathematics allows it on the
factors alone, because beating only the dense form would prove little.

All take lists of modules, each with T tasks as (B [p, r], A [r, q]), scaling folded into B, and return ΔW (dense) or its factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Tasks = Sequence[tuple[Tensor, Tensor]]
Factors = tuple[Tensor, Tensor]


def tsv_dense(tasks: Tasks) -> Tensor:
    """TSV-Merge (Gargiulo et al., 2412.00081) on ΔW: the top 1/T singular triples of each task, decorrelated."""
    p, q = len(tasks[0][0]), tasks[0][1].shape[1]
    keep = min(p, q) // len(tasks)
    triples = [torch.linalg.svd(B @ A, full_matrices=False) for B, A in tasks]
    u = torch.cat([t[0][:, :keep] for t in triples], 1)
    s = torch.cat([t[1][:keep] for t in triples])
    vh = torch.cat([t[2][:keep] for t in triples])
    return (_orthogonal(u) * s) @ _orthogonal(vh)


def tsv_factors(tasks: Tasks) -> Factors:
    """The same from the factors: rank-r tasks have r singular triples, whatever p and q."""
    triples = [thin_svd(B, A) for B, A in tasks]
    u, s, v = (torch.cat([t[i] for t in triples], -1) for i in range(3))
    return _orthogonal_thin(u) * s[..., None, :], _orthogonal_thin(v).mT


def boosting_dense(tasks: Tasks, energy: float = 0.8) -> Tensor:
    """Subspace Boosting (Skorobogat et al., 2506.16506) of the task-arithmetic sum: singular values beyond `energy` of their
    total are raised to the last one within it."""
    u, s, vh = torch.linalg.svd(sum(B @ A for B, A in tasks), full_matrices=False)
    return (u * _boosted(s, energy)) @ vh


def boosting_factors(tasks: Tasks, energy: float = 0.8) -> Factors:
    """The same from the factors of the sum; the singular values it does not have stay zero."""
    u, s, v = thin_svd(torch.cat([B for B, _ in tasks], -1), torch.cat([A for _, A in tasks], -2))
    return u * _boosted(s, energy)[..., None, :], v.mT


def core_space(tasks: Tasks) -> Factors:
    """Core Space merging (Panariello et al., 2509.17786): all tasks in one common basis, cores of order T·r, added there."""
    u = torch.linalg.svd(torch.cat([B for B, _ in tasks], -1), full_matrices=False).U
    v = torch.linalg.svd(torch.cat([A for _, A in tasks], -2), full_matrices=False).Vh
    core = sum((u.mT @ B) @ (A @ v.mT) for B, A in tasks)
    return u @ core, v


def core_space_qr(tasks: Tasks) -> Factors:
    """Core Space merging with QR bases: for sums the same result, several times cheaper; takes stacked modules."""
    u = torch.linalg.qr(torch.cat([B for B, _ in tasks], -1)).Q
    v = torch.linalg.qr(torch.cat([A for _, A in tasks], -2).mT).Q.mT
    core = sum((u.mT @ B) @ (A @ v.mT) for B, A in tasks)
    return u @ core, v


def dare_dense(tasks: Tasks, density: float = 0.5) -> Tensor:
    """DARE (Yu et al., 2311.03099) without any SVD: drop, rescale, add; the result is a full weight change."""
    total = torch.zeros((), device=tasks[0][0].device)
    for B, A in tasks:
        delta = B @ A
        total = total + delta * torch.empty_like(delta).bernoulli_(density) / density
    return total


def thin_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [p, r], s [r], V [q, r] of B A through two thin QRs."""
    left, left_core = torch.linalg.qr(B)
    right, right_core = torch.linalg.qr(A.mT)
    u, s, vh = torch.linalg.svd(left_core @ right_core.mT)
    return left @ u, s, right @ vh.mT


def _orthogonal(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def _orthogonal_thin(x: Tensor) -> Tensor:
    """The polar factor of a tall matrix through its QR."""
    q, core = torch.linalg.qr(x)
    return q @ _orthogonal(core)


def _boosted(s: Tensor, energy: float) -> Tensor:
    share = s.cumsum(-1) / s.sum(-1, keepdim=True)
    cut = (share < energy).sum(-1, keepdim=True).clamp_max(s.shape[-1] - 1)
    return torch.maximum(s, s.gather(-1, cut))


DENSE: dict[str, Callable[[Tasks], Tensor]] = {
    "TSV-Merge dense": tsv_dense,
    "Subspace Boosting dense": boosting_dense,
    "DARE dense, no SVD": dare_dense,
}
FACTORED: dict[str, Callable[[Tasks], Factors]] = {
    "Core Space": core_space,
    "Core Space QR": core_space_qr,
    "TSV-Merge factors": tsv_factors,
    "Subspace Boosting factors": boosting_factors,
}
