"""Small Fishers with rows of their own, and their pencils straight from the definition."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch

from sst_kernels import Fisher
from sst_kernels.fisher import Block, Counts

RANKS = {"a": 2, "b": 3, "c": 2}


def fisher_of(rows: torch.Tensor, metric: dict, *, point: str = "patched", groups=None, **options) -> Fisher:
    """A core-space Fisher of the modules in RANKS that holds `rows` [N, Σ r²]."""
    blocks = [Block(name, name, (r, r)) for name, r in RANKS.items()]
    fisher = Fisher.empty(
        blocks, options.pop("structure", "full"), devices=dict.fromkeys(RANKS, torch.device("cpu")), metric=metric,
        scope="global", sample="sequence", count=options.pop("count", "sequences"), options=options,
        meta={"space": "core", "fingerprint": "x", "adapter": "a", "point": point, "point_given": True},
    )  # fmt: skip
    n = len(rows)
    fisher.joint.append(rows, Counts(n, 4 * n, 2 * n))
    fisher.note("data", n, groups)
    return fisher


def metrics(generator: torch.Generator) -> dict:
    def spd(r: int) -> torch.Tensor:
        x = torch.randn(r, 2 * r, dtype=torch.float64, generator=generator)
        return x @ x.T

    return {name: (spd(r), spd(r)) for name, r in RANKS.items()}


def pair(seed: int = 0, gain_rows: int = 12, cost_rows: int = 40, **options) -> tuple[Fisher, Fisher]:
    generator = torch.Generator().manual_seed(seed)
    metric, n = metrics(generator), sum(r * r for r in RANKS.values())
    gain = torch.randn(gain_rows, n, generator=generator) + 0.5
    cost = torch.randn(cost_rows, n, generator=generator) * torch.logspace(0, -2, n)
    return fisher_of(gain, metric, **options), fisher_of(cost, metric, **options)


def dense_metric(cost: Fisher, kind: str) -> np.ndarray:
    """M in S coordinates, module by module from its definition."""
    blocks, rows, start = [], cost.rows().double().numpy(), 0
    for left, right in (tuple(x.numpy() for x in pair) for pair in cost.metric.values()):
        r = len(left)
        roots = [np.real(scipy.linalg.sqrtm(x)) for x in (left, right)]
        samples = rows[:, start : start + r * r].reshape(-1, r, r)
        samples = np.linalg.solve(roots[0], samples) @ np.linalg.inv(roots[1])
        l_moment, r_moment = (np.einsum(path, samples, samples) / len(rows) for path in ("nij,nkj->ik", "nij,nil->jl"))
        shape = np.kron(l_moment, r_moment) / np.trace(l_moment) if kind == "kronecker" else np.eye(r * r)
        blocks.append((shape, np.kron(*roots)))
        start += r * r
    mean = sum(np.trace(shape) for shape, _ in blocks) / start
    shapes = ((0.999 * shape / mean + 0.001 * np.eye(len(shape)), root) for shape, root in blocks)
    return scipy.linalg.block_diag(*(root @ shape @ root for shape, root in shapes))


def dense_pencil(
    gain: Fisher, cost: Fisher, epsilon: float, scope: str, kind: str = "kronecker", *, unseen: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """F_gain + λ₀B and B = F_cost + εM in S coordinates, straight from the definition."""
    a, b = (f.rows().double().numpy() for f in (gain, cost))
    a, b = a.T @ a / len(a), b.T @ b / len(b)
    if scope == "module":
        mask = scipy.linalg.block_diag(*(np.ones((r * r, r * r)) for r in RANKS.values()))
        a, b = a * mask, b * mask
    b = b + epsilon * dense_metric(cost, kind)
    return a + unseen * b, b


def flat(patch) -> np.ndarray:
    return torch.cat([patch.coordinates[name].flatten() for name in RANKS]).numpy()


IDENTITY = np.concatenate([np.eye(r).ravel() for r in RANKS.values()])
