"""Merging by singular vectors, in the real rank of the adapters.

The published forms take SVDs of the full d×d ΔW. On LoRA adapters most singular values there are exactly zero, their vectors
are whatever rounding makes of them, and orthogonalising or boosting them moves the output by most of its size under 1e-12
noise. Restricted to the real rank (r_task + r_safety) every step is well posed and equals the published one on deltas
of full rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters import Adapter, LoraTerm
from .base import Inputs, Method, as_term, densely, per_module, thin_svd, weights_of
from .task_arithmetic import ALPHAS

ENERGY = 0.5  # β of Subspace Boosting: share of Σσ above which singular values are lifted to the one at that point


def tsv_merge(terms: list[LoraTerm], weights: list[float], ranks: list[int]) -> LoraTerm:
    """Σ of each task's top singular triplets after orthogonalising all left and all right vectors (Procrustes)."""
    parts = [tuple(x for x in thin_svd([t], [w])) for t, w in zip(terms, weights)]
    u = torch.cat([p[0][:, :k] for p, k in zip(parts, ranks)], 1)
    s = torch.cat([p[1][:k] for p, k in zip(parts, ranks)])
    vh = torch.cat([p[2][:k] for p, k in zip(parts, ranks)])
    return as_term(_nearest_orthogonal(u), s, _nearest_orthogonal(vh.T).T)


def subspace_boost(u: Tensor, s: Tensor, vh: Tensor, energy: float = ENERGY) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values beyond the share `energy` of their sum are lifted to the value there."""
    cutoff = min(int((s.cumsum(0) / s.sum() < energy).sum()), len(s) - 1) if len(s) else 0
    return u, s.clamp_min(s[cutoff]) if len(s) else s, vh


def knots_ties(pair: list[Tensor], strength: float, density: float) -> Tensor:
    """U Σ · TIES(V_task, V_safety), with U Σ [V_task | V_safety]ᵀ the SVD of [ΔW_task | ΔW_safety]."""
    from peft.utils.merge_utils import ties

    u, s, vh = torch.linalg.svd(torch.cat(pair, 1), full_matrices=False)
    live = s > s[0] * max(vh.shape) * torch.finfo(s.dtype).eps
    aligned = list((s[live, None] * vh[live]).split([p.shape[1] for p in pair], 1))
    return u[:, live] @ ties(aligned, torch.tensor([1.0, strength], dtype=torch.float64), density)


def _nearest_orthogonal(x: Tensor) -> Tensor:
    p, _, qh = torch.linalg.svd(x, full_matrices=False)
    return p @ qh


def _named(inputs: Inputs, strength: float, rule) -> Adapter:
    names = {id(t): n for a in (inputs.task, inputs.safety) if a is not None for n, t in a.terms.items()}
    return per_module(inputs, lambda terms: rule(terms, weights_of(inputs, terms, names[id(terms[-1])], strength)))


def _tsv(inputs: Inputs, strength: float) -> Adapter:
    return _named(
        inputs,
        strength,
        lambda terms, w: tsv_merge(terms, w, [t.rank for t in terms]) if len(terms) > 1 and all(w) else _sum(terms, w),
    )


def _boost(inputs: Inputs, strength: float) -> Adapter:
    return _named(inputs, strength, lambda terms, w: as_term(*subspace_boost(*thin_svd(terms, w))))


def _isotropic(inputs: Inputs, strength: float) -> Adapter:
    def rule(terms: list[LoraTerm], weights: list[float]) -> LoraTerm:
        u, s, vh = thin_svd(terms, weights)
        return as_term(u, s.mean().expand_as(s) if len(s) else s, vh)

    return _named(inputs, strength, rule)


def _sum(terms: list[LoraTerm], weights: list[float]) -> LoraTerm:
    return as_term(*thin_svd(terms, weights))


METHODS = [
    Method("tsv-m", "arXiv:2412.00081", "all r directions of each adapter, real rank", "weight of safety", ALPHAS, _tsv),
    Method("subspace-boosting", "arXiv:2506.16506", f"of the weighted sum, β = {ENERGY}, real rank", "weight of safety", ALPHAS, _boost),
    Method("iso-c", "arXiv:2502.04959", "of the weighted sum, real rank", "weight of safety", ALPHAS, _isotropic),
    Method("knots-ties", "arXiv:2410.19735", "density 0.5", "weight of safety", ALPHAS, lambda i, s: densely(i, lambda pair: knots_ties(pair, s, 0.5))),
]  # fmt: skip
