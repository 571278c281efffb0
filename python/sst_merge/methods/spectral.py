"""Merging by singular vectors, in the real rank of the adapters.

The published forms take SVDs of the full d×d ΔW. On LoRA adapters most singular values there are exactly zero, their vectors
are whatever rounding makes of them, and orthogonalising or boosting them moves the output by most of its size under 1e-12
noise. Restricted to the real rank (r_task + r_safety) every step is well posed and equals the published one on deltas
of full rank. TSV-M and isotropy do not see orthonormal bases, so in the real rank they are what Core Space merging makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..io.adapters import Adapter, LoraTerm
from .base import Inputs, Method, as_term, densely, per_module, thin_svd, weights_of
from .task_arithmetic import ALPHAS

Svd = tuple[Tensor, Tensor, Tensor]  # U [d_out, R], σ [R], Vᵀ [R, d_in]
DENSITY = 0.5
ENERGY = 0.5  # β of Subspace Boosting: share of Σσ above which singular values are lifted to the one at that point


def tsv_merge(terms: list[LoraTerm], weights: list[float], keep: int | None = None) -> Svd:
    """The top `keep` singular triplets of each task (all by default), left and right vectors orthogonalised (Procrustes)."""
    if len(terms) == 1 or not all(weights):
        return thin_svd(terms, weights)
    parts = [thin_svd([t], [w]) for t, w in zip(terms, weights)]
    u = torch.cat([u[:, :keep] for u, _, _ in parts], 1)
    s = torch.cat([s[:keep] for _, s, _ in parts])
    vh = torch.cat([vh[:keep] for _, _, vh in parts])
    return _nearest_orthogonal(u), s, _nearest_orthogonal(vh.T).T


def directional(terms: list[LoraTerm], weights: list[float]) -> LoraTerm:
    """Σ Û_t σ_t V̂_tᵀ: the singular frames of each w_t ΔW_t moved to the nearest orthonormal ones in the subspace that the sum leads.

    That subspace is spanned by as many leading singular vectors of Σ w_t ΔW_t as the largest adapter has directions.
    """
    if len(terms) == 1 or not all(weights):
        return as_term(*thin_svd(terms, weights))
    u, _, vh = thin_svd(terms, weights)
    parts = [thin_svd([t], [w]) for t, w in zip(terms, weights)]
    k = max(len(s) for _, s, _ in parts)
    u, v = u[:, :k], vh[:k].T
    left = [_nearest_orthogonal(u @ (u.T @ own)) * s for own, s, _ in parts]
    right = [_nearest_orthogonal(v @ (v.T @ own.T)).T for _, _, own in parts]
    return LoraTerm(torch.cat(right).float(), torch.cat(left, 1).float(), 1.0)


def subspace_boost(u: Tensor, s: Tensor, vh: Tensor, energy: float = ENERGY) -> Svd:
    """Singular values beyond the share `energy` of their sum are lifted to the value there."""
    cutoff = min(int((s.cumsum(0) / s.sum() < energy).sum()), len(s) - 1) if len(s) else 0
    return u, s.clamp_min(s[cutoff]) if len(s) else s, vh


def isotropic(u: Tensor, s: Tensor, vh: Tensor) -> Svd:
    """Every singular value replaced by their mean."""
    return u, s.mean().expand_as(s) if len(s) else s, vh


def core_space(terms: list[LoraTerm], rule: Callable[[list[Tensor]], Tensor]) -> LoraTerm:
    """U · rule([Uᵀ ΔW_t V]) · Vᵀ: whatever merges matrices, on cores of order Σ r that lose nothing.

    The published bases are those of the stacked B and of the stacked A, which change with the gauge of the adapters. Here
    U and V are the singular vectors of [ΔW_1 | ΔW_2 …] and of [ΔW_1; ΔW_2 …], and the result does not.
    """
    parts = [thin_svd([t], [1.0]) for t in terms]
    left = _range(torch.cat([u * s for u, s, _ in parts], 1))
    right = _range(torch.cat([vh.T * s for _, s, vh in parts], 1))
    u, s, vh = torch.linalg.svd(rule([(left.T @ (u * s)) @ (vh @ right) for u, s, vh in parts]))
    return as_term(left @ u, s, vh @ right.T)


def knots_ties(pair: list[Tensor], strength: float, density: float = DENSITY) -> Tensor:
    """U Σ · TIES(V_task, V_safety), with U Σ [V_task | V_safety]ᵀ the SVD of [ΔW_task | ΔW_safety]."""
    whole = torch.cat(pair, 1)
    u = _range(whole)
    aligned = (u.T @ whole).split([p.shape[1] for p in pair], 1)
    return u @ _ties(list(aligned), [1.0, strength], density)


def _ties(matrices: list[Tensor], weights: list[float], density: float = DENSITY) -> Tensor:
    from peft.utils.merge_utils import ties

    return ties(matrices, torch.tensor(weights, dtype=torch.float64), density)


def _range(x: Tensor) -> Tensor:
    """The left singular vectors of x that carry anything."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    return u[:, s > s[:1] * max(x.shape) * torch.finfo(s.dtype).eps]


def _nearest_orthogonal(x: Tensor) -> Tensor:
    p, _, qh = torch.linalg.svd(x, full_matrices=False)
    return p @ qh


def _each(rule: Callable[[list[LoraTerm], list[float]], LoraTerm], inputs: Inputs, strength: float) -> Adapter:
    names = {id(t): n for a in (inputs.task, inputs.safety) if a is not None for n, t in a.terms.items()}
    return per_module(inputs, lambda terms: rule(terms, weights_of(inputs, terms, names[id(terms[-1])], strength)))


def _method(name: str, source: str, variant: str, rule: Callable[[list[LoraTerm], list[float]], LoraTerm]) -> Method:
    return Method(name, source, f"{variant}, real rank", "weight of safety", ALPHAS, partial(_each, rule))


METHODS = [
    _method("tsv-m", "arXiv:2412.00081", "all r directions of each adapter", lambda t, w: as_term(*tsv_merge(t, w))),
    _method("subspace-boosting", "arXiv:2506.16506", f"of the weighted sum, β = {ENERGY}", lambda t, w: as_term(*subspace_boost(*thin_svd(t, w)))),
    _method("iso-c", "arXiv:2502.04959", "of the weighted sum", lambda t, w: as_term(*isotropic(*thin_svd(t, w)))),
    _method("directional-alignment", "after arXiv:2512.00391", "its parameter part: singular frames of both moved into the leading subspace of the sum (Procrustes), then added; no simplex ETF, no training of the feature part", directional),
    _method("core-space", "arXiv:2509.17786", "TSV-M, then isotropic, in the core; without the latter it is tsv-m", lambda t, w: as_term(*isotropic(*tsv_merge(t, w)))),
    _method("core-ties", "arXiv:2509.17786", f"PEFT's TIES in the core, density {DENSITY}, bases of ΔW", lambda t, w: core_space(t, lambda cores: _ties(cores, w))),
    Method("knots-ties", "arXiv:2410.19735", f"density {DENSITY}", "weight of safety", ALPHAS, lambda i, s: densely(i, lambda pair: knots_ties(pair, s))),
]  # fmt: skip
