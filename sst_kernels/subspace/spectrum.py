"""The eigenproblems that need eigenvectors: stored matrices module by module, and rows whose damping is too small for products."""

from __future__ import annotations

import torch
from torch import Tensor

from sst_kernels.gevp import LowRank, gevp


def directions(gain: Tensor, cost: Tensor, patch: Tensor) -> tuple[Tensor, Tensor, str]:
    """λ [M, m] ≥ 0 and the eigenvectors times the components of the patch [M, m, m] of stored matrices [M, m, m]; patch [M, m].

    `cost` holds its damping. A filtered patch is `directions @ weights`.
    """
    solved = gevp(gain, cost, k=gain.shape[-1]).raise_if_failed()
    components = solved.vectors.mT @ (cost @ patch[..., None])
    return solved.values.clamp_min(0), solved.vectors * components.mT, solved.route


def row_directions(gain: Tensor, cost: Tensor, epsilon: float, patch: Tensor) -> tuple[Tensor, Tensor, str]:
    """λ [p] > 0 and the same directions [n, p] of one pencil of rows, F = rowsᵀrows / N + ε I, without a product of rows.

    gain [g, n], cost [c, n], patch [n]. Exact at any damping.
    """
    gain, cost = (x / len(x) ** 0.5 for x in (gain, cost))
    gain, cost = (torch.linalg.qr(x, mode="r").R if len(x) > len(patch) else x for x in (gain, cost))
    solved = gevp(LowRank(gain), LowRank(cost, epsilon), k=min(gain.shape)).raise_if_failed()
    live = solved.values > 0
    values, vectors = solved.values[live], solved.vectors[:, live]
    components = vectors.T @ (cost.T @ (cost @ patch) + epsilon * patch)
    return values, vectors * components, solved.route
