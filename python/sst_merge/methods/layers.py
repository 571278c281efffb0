"""One α for each module, fitted on the same Fishers: what a pencil over single directions adds to a choice of layers."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from scipy.optimize import nnls
from torch import Tensor

import sst_kernels as sst

from ..io.adapters import Adapter
from .base import Inputs, Method, check_strength, from_cores
from .sst import BUDGETS

_STEPS = 40  # halvings of log μ


def projected(fisher: sst.Fisher) -> Tensor:
    """The Fisher along the patch's modules [L, L] float64: E[d dᵀ] of the derivatives d_l = ∂L/∂α_l of ΔW = Σ α_l ΔW_l, per sequence."""
    rows, parts, start = fisher.rows().cpu(), [], 0
    for block in fisher.blocks.values():
        own = rows[:, start : start + block.size].double().view(-1, *block.shape)
        parts.append(own.diagonal(dim1=1, dim2=2).sum(1))
        start += block.size
    d = torch.stack(parts, 1)
    return d.T @ d / len(d)


def fit(gain: Tensor, cost: Tensor, metric: Tensor, mu: float) -> Tensor:
    """argmin over α ≥ 0 of (α − 1)ᵀ gain (α − 1) + μ αᵀ (cost + diag(metric)) α, all [L, L] or [L] float64, metric positive: [L]."""
    root = torch.linalg.cholesky(gain + mu * (cost + metric.diag()))
    target = torch.linalg.solve_triangular(root, gain.sum(1, keepdim=True), upper=False).squeeze(1)
    return torch.from_numpy(nnls(root.T.numpy(), target.numpy())[0])


def within(gain: Tensor, cost: Tensor, metric: Tensor, budget: float) -> Tensor:
    """`fit` at the smallest μ whose ½ αᵀ cost α is at most `budget`, found by halving log μ."""
    level = math.log(max(float(gain.trace()), 1e-300) / max(float(cost.trace()), 1e-300))
    low, high = level + math.log(1e-6), level + math.log(1e8)
    best = torch.zeros(len(cost), dtype=torch.float64)
    for step in range(_STEPS):
        middle = low if step == 0 else (low + high) / 2
        alpha = fit(gain, cost, metric, math.exp(middle))
        if float(alpha @ cost @ alpha) / 2 <= budget:
            best, high = alpha, middle
            if step == 0:
                break
        else:
            low = middle
    return best


def _merge(inputs: Inputs, strength: float) -> Adapter:
    check_strength(strength)
    gain, cost = inputs.require().fishers(replace(inputs.pencil.fishers, input_filter=0.0))
    sizes = torch.tensor([float((c * a).sum()) for c, a in (gain.metric[n] for n in gain.blocks)], dtype=torch.float64)
    q = projected(cost)
    metric = inputs.pencil.damping * q.trace() * (sizes / sizes.sum()).clamp_min(1e-9)
    labels = cost.counts.labels / cost.counts.sequences
    alphas = within(projected(gain), q, metric, strength * labels)
    ranks = {name: inputs.safety.terms[name].rank for name in gain.blocks}
    cores = {n: float(a) * torch.eye(ranks[n], dtype=torch.float64) for n, a in zip(gain.blocks, alphas)}
    return from_cores(inputs, cores)


METHODS = [
    Method("layer-alpha", "ours, a control", "α ≥ 0 of each module: (α − 1)ᵀF_harm(α − 1) + μ αᵀ(F_benign + damping)α, sst's soft filter with one scalar a module; damping by ‖ΔW_l‖²; μ from the KL that its own rows predict", "KL budget, nats per label token", BUDGETS, _merge, ("harm", "benign", "model")),
]  # fmt: skip
