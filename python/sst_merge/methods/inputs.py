"""Methods that look at what modules read, and keep or steer the patch there: AlphaSteer and Safe Delta, for a patch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..io.adapters import Adapter, LoraTerm
from .base import Inputs, Method, check_strength, joined, with_task
from .sst import SHARES

NULL_SHARE = (
    0.6  # of the benign inputs' eigenvectors, those of the smallest eigenvalues, that count as their null space
)
RIDGE = 0.01  # of the mean eigenvalue, in the regression
DAMPING = 0.01  # Safe Delta's: of the mean diagonal of H


def steer(term: LoraTerm, harm: Tensor, mean: Tensor, benign: Tensor) -> LoraTerm:
    """r uᵀ: r [d_out] is what the patch adds on average to harmful inputs, u [d_in] reads 1 on those and nothing of benign ones.

    harm, benign: second moments per token [d_in, d_in] float64; mean: of harmful inputs [d_in]. u = N (NᵀHN + εI)⁻¹ Nᵀ mean minimises
    E‖r uᵀx − r‖² + ε‖r uᵀ‖² over harmful x among the u in the span of N, the benign null space.
    """
    null = torch.linalg.eigh(benign)[1][:, : max(1, round(NULL_SHARE * len(benign)))]
    inner = null.T @ harm @ null
    ridge = RIDGE * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype)
    reads = null @ torch.linalg.solve(inner + ridge, null.T @ mean)
    adds = term.scaling * term.B.double() @ (term.A.double() @ mean)
    return LoraTerm(reads[None].float(), adds[:, None].float(), 1.0)


def safe_delta(term: LoraTerm, gram: Tensor, share: float) -> LoraTerm:
    """The patch's columns of least cost per gain, and in the others what makes up for their effect on benign inputs best.

    With H = gram + damping a column m of ΔW costs ‖ΔW_m‖² / 2[H⁻¹]_mm (optimal brain surgeon) and gains in proportion to ‖ΔW_m‖². In the order
    of [H⁻¹]_mm columns K are kept until their costs come to `share` of all; the others R become −ΔW_K H_KR H_RR⁻¹, which minimises
    the change of outputs on those inputs given ΔW_K.
    """
    h = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    inverse = torch.linalg.inv(h).diagonal()
    a, b = term.A.double(), term.scaling * term.B.double()
    cost = (a * (b.T @ b @ a)).sum(0) / (2 * inverse)
    order = inverse.argsort(descending=True)
    count = int((cost[order].cumsum(0) <= share * cost.sum() * (1 + 1e-12)).sum())
    kept, rest = order[:count], order[count:]
    made = torch.zeros_like(a)
    made[:, kept] = a[:, kept]
    made[:, rest] = -torch.linalg.solve(h[rest][:, rest], h[rest][:, kept] @ a[:, kept].T).T
    return LoraTerm(made.float(), term.B, term.scaling)


def _alpha_steer(inputs: Inputs, strength: float) -> Adapter:
    check_strength(strength)
    source = inputs.require()
    harm, benign, mean = source.second_moments("harm"), source.second_moments("benign"), source.means("harm")
    terms = {n: steer(t, harm[n], mean[n], benign[n]) for n, t in inputs.safety.terms.items()}
    return with_task(inputs, joined(inputs, terms), strength)


def _safe_delta(inputs: Inputs, strength: float) -> Adapter:
    check_strength(strength, 0.0, 1.0)
    grams = inputs.require().second_moments("benign")
    terms = {n: safe_delta(t, grams[n], strength) for n, t in inputs.safety.terms.items()}
    return with_task(inputs, joined(inputs, terms))


_NEEDS = ("harm", "benign", "model")
METHODS = [
    Method("alpha-steer", "after AlphaSteer, arXiv:2506.07022", f"its Δ as a rank-one adapter on each module of the patch: refusal direction = the patch's mean output on harmful inputs, null space = {NULL_SHARE:.0%} of benign eigenvectors, ridge {RIDGE:g} of the mean eigenvalue; all tokens, no layer selection", "λ, times the steering", (0.1, 0.2, 0.5, 1.0, 2.0), _alpha_steer, _NEEDS),
    Method("safe-delta", "after Safe Delta, arXiv:2505.12038", f"mirrored: the patch is the delta, benign inputs are to be kept; whole columns of ΔW by [H⁻¹]_mm, exact compensation of the others, damping {DAMPING:g}, budget per module as a share of the patch's own cost", "share of the cost", (*SHARES, 1.0), _safe_delta, ("benign", "model")),
]  # fmt: skip
