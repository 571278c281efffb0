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
from math import isqrt

import torch
from torch import Tensor

from sst_kernels.fisher.base import Block

_CHUNK = 8  # rows that are changed at once: their temporaries stay small beside all rows
_LEVEL = 1e-3  # share of the Kronecker metric that is the Frobenius one: nothing is free because no sample has shown its cost

Moments = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Charts:
    """All modules of one rank: z = U (scale ∘ (Uᵀ left S right V)) Vᵀ, all [M, r, r], `where` [M·r²] among the coordinates.

    A symmetric root of the metric, whatever signs and order the eigenvectors U and V have.
    """

    names: list[str]
    where: Tensor
    left: Tensor
    right: Tensor
    left_inverse: Tensor
    right_inverse: Tensor
    u: Tensor
    v: Tensor
    scale: Tensor

    def forward(self, cores: Tensor) -> Tensor:
        """S [M, r, r] -> z."""
        return self.u @ (self.scale * (self.u.mT @ self.left @ cores @ self.right @ self.v)) @ self.v.mT

    def inverse(self, z: Tensor) -> Tensor:
        """z [M, r, r] -> S."""
        x = self.u @ (self.u.mT @ z @ self.v / self.scale) @ self.v.mT
        return self.left_inverse @ x @ self.right_inverse

    def gradients(self, rows: Tensor) -> Tensor:
        """∂L/∂S -> ∂L/∂z of [N, M, r, r]."""
        x = _sandwich(self.u.mT @ self.left_inverse, rows, self.right_inverse @ self.v) / self.scale
        return _sandwich(self.u, x, self.v.mT)


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
        self._charts: list[_Charts] = []
        for names, (values, vectors) in _eigen({block.name: metric[block.module] for block in blocks}):
            live = values > values[..., -1:].clamp_min(0) * values.shape[-1] * torch.finfo(values.dtype).eps * 8
            root = torch.where(live, values, 0).sqrt()
            inverse = torch.where(live, 1 / torch.where(live, root, 1), 0)
            roots, inverses = ((vectors * x[..., None, :] @ vectors.mT).to(device) for x in (root, inverse))
            one = torch.eye(values.shape[-1], dtype=torch.float64, device=device).expand_as(roots[:, 0])
            where = torch.cat([torch.arange(self.slices[name].start, self.slices[name].stop) for name in names])
            (left, right), (left_inverse, right_inverse) = roots.unbind(1), inverses.unbind(1)
            ones = torch.ones_like(left)
            self._charts.append(
                _Charts(names, where.to(device), left, right, left_inverse, right_inverse, one, one, ones)
            )

    def kronecker(self, moments: Moments) -> Coordinates:
        """The coordinates whose metric is the Kronecker one of these `moments`, scaled to trace n, as the Frobenius metric has."""
        found = {tuple(names): pairs for names, pairs in _eigen(moments)}
        shapes = []
        for charts in self._charts:
            values = found[tuple(charts.names)][0].clamp_min(0)
            trace = values[:, 0].sum(1)[:, None, None]
            shapes.append(values[:, 0, :, None] * values[:, 1, None, :] / torch.where(trace > 0, trace, 1))
        mean = sum(float(shape.sum()) for shape in shapes) / self.size
        out = copy.copy(self)
        out._charts = []
        for charts, shape in zip(self._charts, shapes):
            u, v = found[tuple(charts.names)][1].to(charts.left.device).unbind(1)
            scale = ((1 - _LEVEL) * shape / mean + _LEVEL).sqrt().to(u.device)
            out._charts.append(replace(charts, u=u, v=v, scale=scale))
        return out

    def patch(self) -> Tensor:
        """z [n] of the whole patch, S = I."""
        ranks = {name: charts.left.shape[-1] for charts in self._charts for name in charts.names}
        return self.from_cores({name: torch.eye(r, dtype=torch.float64) for name, r in ranks.items()})

    def from_cores(self, cores: Mapping[str, Tensor]) -> Tensor:
        """z [n] of S [r, r] per module."""
        out = torch.empty(self.size, dtype=torch.float64, device=self._charts[0].left.device)
        for charts in self._charts:
            stacked = torch.stack([cores[name].to(charts.left) for name in charts.names])
            out[charts.where] = charts.forward(stacked).flatten()
        return out

    def to_cores(self, z: Tensor) -> dict[str, Tensor]:
        """S [r, r] float64 per module, of z [n]."""
        found: dict[str, Tensor] = {}
        for charts in self._charts:
            found |= zip(charts.names, charts.inverse(z[charts.where].reshape(charts.left.shape)))
        return {name: found[name] for name in self.slices}

    def gradients(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Per-sample gradients [N, n] with respect to S (any float dtype) -> with respect to z, float64; into `out` if given."""
        out = torch.empty(rows.shape, dtype=torch.float64, device=rows.device) if out is None else out
        for charts in self._charts:
            for own, part in zip(rows.split(_CHUNK), out.split(_CHUNK)):
                cores = own[:, charts.where].double().reshape(-1, *charts.left.shape)
                part[:, charts.where] = charts.gradients(cores).flatten(1)
        return out

    def matrices(self, fishers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The modules' Fishers [r², r²] in S coordinates -> in z coordinates."""
        found: dict[str, Tensor] = {}
        for charts in self._charts:
            stacked = torch.stack([fishers[name].to(charts.left) for name in charts.names], 1)  # [r², M, r²]
            for _ in range(2):
                rows = charts.gradients(stacked.reshape(len(stacked), *charts.left.shape)).flatten(2)
                stacked = rows.permute(2, 1, 0)
            found |= zip(charts.names, stacked.permute(1, 2, 0))
        return {name: found[name] for name in self.slices}

    def moments(self, rows: Tensor) -> Moments:
        """E[CCᵀ] and E[CᵀC] [r, r] per module, of gradients [N, n] with respect to z."""
        out: dict[str, tuple[Tensor, Tensor]] = {}
        for charts in self._charts:
            sums = torch.zeros(2, *charts.left.shape, dtype=torch.float64, device=rows.device)
            for own in rows.split(_CHUNK):
                cores = own[:, charts.where].reshape(-1, *charts.left.shape).transpose(0, 1)
                across, down = cores.mT.flatten(1, 2), cores.flatten(1, 2)
                sums += torch.stack([across.mT @ across, down.mT @ down])
            across, down = sums / len(rows)
            out |= zip(charts.names, zip(across, down))
        return out


def matrix_moments(fisher: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a module's Fisher [r², r²] in z coordinates: its partial traces."""
    r = isqrt(len(fisher))
    split = fisher.reshape(r, r, r, r)
    return torch.einsum("ijkj->ik", split), torch.einsum("ijil->jl", split)


def _sandwich(left: Tensor, x: Tensor, right: Tensor) -> Tensor:
    """left x right of x [N, M, r, r] and [M, r, r]: two products for each of the M, whatever N."""
    n, m, r, _ = x.shape
    x = x.transpose(0, 1).reshape(m, n * r, r) @ right
    x = x.reshape(m, n, r, r).mT.reshape(m, n * r, r) @ left.mT
    return x.reshape(m, n, r, r).mT.transpose(0, 1)


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
