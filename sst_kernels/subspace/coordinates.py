"""Core coordinates z in which the damping metric M of a pencil is the identity: ‖z‖² = vec(S)ᵀ M vec(S).

Frobenius: M = (c²BᵀB) ⊗ (AAᵀ) per module, so that ‖z‖ = ‖ΔW(S)‖_F with ΔW(S) = c·B S A. Nothing depends on the gauge
(B X⁻¹, X A) of the adapter any more. Directions of S that do not reach ΔW (rank-deficient A or B) are dropped.

Kronecker: in Frobenius coordinates a module's Fisher is E[vec C vec Cᵀ] over gradients C [r, r], and E[CCᵀ] ⊗ E[CᵀC] / tr is the
Kronecker product with its marginals (Shampoo, arXiv:1802.09568, and K-FAC, arXiv:1503.05671, use the like as preconditioners). It is
of full rank from few samples, so as M it tells what directions cost that no sample has shown: shrinkage towards a structured
target (Ledoit and Wolf 2004), where the Frobenius metric calls all of them equally dear.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sst_kernels.fisher.base import Block

_LEVEL = 1e-3  # share of the Kronecker metric that is the Frobenius one: nothing is free because no sample has shown its cost

Moments = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Chart:
    """z = U (scale ∘ (Uᵀ left S right V)) Vᵀ, [r, r]: a symmetric root of the metric, whatever signs and order U and V have."""

    left: Tensor
    right: Tensor
    left_inverse: Tensor
    right_inverse: Tensor
    u: Tensor
    v: Tensor
    scale: Tensor

    def scaled(self, x: Tensor, power: int) -> Tensor:
        """U (scale^power ∘ (Uᵀ x V)) Vᵀ of x [..., r, r]."""
        return self.u @ (self.scale**power * (self.u.mT @ x @ self.v)) @ self.v.mT


class Coordinates:
    """z [n], n = Σ r² over the modules in order; `slices[module]` are a module's coordinates. Made in the Frobenius metric.

    Args:
        blocks: the modules.
        metric: per module (c²BᵀB, AAᵀ), [r, r] float64.
        device: where z lives.
    """

    def __init__(self, blocks: Sequence[Block], metric: Mapping[str, tuple[Tensor, Tensor]], device: torch.device):
        self.slices: dict[str, slice] = {}
        self.size = 0
        for block in blocks:
            self.slices[block.name] = slice(self.size, self.size + block.size)
            self.size += block.size
        self._charts: dict[str, _Chart] = {}
        sides = {block.name: metric[block.module] for block in blocks}
        for names, (values, vectors) in _eigen(sides):
            live = values > values[..., -1:].clamp_min(0) * values.shape[-1] * torch.finfo(values.dtype).eps * 8
            root = torch.where(live, values, 0).sqrt()
            inverse = torch.where(live, 1 / torch.where(live, root, 1), 0)
            roots, inverses = ((vectors * x[..., None, :] @ vectors.mT).to(device) for x in (root, inverse))
            one, ones = torch.eye(values.shape[-1], dtype=torch.float64, device=device), torch.ones_like(roots[0, 0])
            for name, (left, right), (left_inverse, right_inverse) in zip(names, roots, inverses):
                self._charts[name] = _Chart(left, right, left_inverse, right_inverse, one, one, ones)

    def kronecker(self, moments: Moments) -> Coordinates:
        """The coordinates whose metric is the Kronecker one of these `moments`, scaled to trace n, as the Frobenius metric has."""
        found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for names, (values, vectors) in _eigen(moments):
            values = values.clamp_min(0)
            trace = values[:, 0].sum(1)[:, None, None]
            shape = values[:, 0, :, None] * values[:, 1, None, :] / torch.where(trace > 0, trace, 1)
            found |= {name: (*pair, own) for name, pair, own in zip(names, vectors, shape)}
        mean = sum(float(shape.sum()) for *_, shape in found.values()) / self.size
        out = copy.copy(self)
        out._charts = {}
        for name, chart in self._charts.items():
            u, v, shape = (x.to(chart.left.device) for x in found[name])
            out._charts[name] = replace(chart, u=u, v=v, scale=((1 - _LEVEL) * shape / mean + _LEVEL).sqrt())
        return out

    def patch(self) -> Tensor:
        """z [n] of the whole patch, S = I."""
        ranks = {name: len(chart.left) for name, chart in self._charts.items()}
        return self.from_cores({name: torch.eye(r, dtype=torch.float64) for name, r in ranks.items()})

    def from_cores(self, cores: Mapping[str, Tensor]) -> Tensor:
        """z [n] of S [r, r] per module."""
        charts = ((self._charts[name], cores[name]) for name in self.slices)
        return torch.cat([c.scaled(c.left @ core.to(c.left) @ c.right, 1).flatten() for c, core in charts])

    def to_cores(self, z: Tensor) -> dict[str, Tensor]:
        """S [r, r] float64 per module, of z [n]."""
        cores = {}
        for name, where in self.slices.items():
            c = self._charts[name]
            cores[name] = c.left_inverse @ c.scaled(z[where].reshape(c.scale.shape), -1) @ c.right_inverse
        return cores

    def gradients(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Per-sample gradients [N, n] with respect to S (any float dtype) -> with respect to z, float64; into `out` if given."""
        out = torch.empty(rows.shape, dtype=torch.float64, device=rows.device) if out is None else out
        for name, where in self.slices.items():
            out[:, where] = self._gradients(name, rows[:, where])
        return out

    def _gradients(self, name: str, rows: Tensor) -> Tensor:
        c = self._charts[name]
        return c.scaled(c.left_inverse @ rows.double().reshape(-1, *c.scale.shape) @ c.right_inverse, -1).flatten(1)

    def matrix(self, name: str, fisher: Tensor) -> Tensor:
        """A module's Fisher [r², r²] in S coordinates -> in z coordinates."""
        return self._gradients(name, self._gradients(name, fisher).mT)

    def moments(self, rows: Tensor) -> Moments:
        """E[CCᵀ] and E[CᵀC] [r, r] per module, of gradients [N, n] with respect to z."""
        out = {}
        for name, where in self.slices.items():
            own = rows[:, where].reshape(-1, *self._charts[name].scale.shape)
            flat = own.mT.flatten(0, 1), own.flatten(0, 1)
            out[name] = (flat[0].mT @ flat[0] / len(rows), flat[1].mT @ flat[1] / len(rows))
        return out

    def matrix_moments(self, name: str, fisher: Tensor) -> tuple[Tensor, Tensor]:
        """The same, of a module's Fisher [r², r²] in z coordinates: its partial traces."""
        r = len(self._charts[name].left)
        split = fisher.reshape(r, r, r, r)
        return torch.einsum("ijkj->ik", split), torch.einsum("ijil->jl", split)


def _eigen(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Iterable[tuple[list[str], tuple[Tensor, Tensor]]]:
    """Names and eigenpairs ([M, 2, r], [M, 2, r, r], float64, CPU) of the pairs of one size.

    Hundreds of r x r problems: one batch on the CPU, since a GPU would take them one by one.
    """
    by_rank: dict[int, list[str]] = {}
    for name, (left, _) in pairs.items():
        by_rank.setdefault(len(left), []).append(name)
    for names in by_rank.values():
        stacked = torch.stack([torch.stack(tuple(pairs[name])) for name in names]).to("cpu", torch.float64)
        yield names, tuple(torch.linalg.eigh(stacked))
