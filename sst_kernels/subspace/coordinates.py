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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from sst_kernels.fisher.base import Block

_WIDTH = 1024  # columns that are changed at once: they stay in a core's cache beside all rows' other columns
_PANEL = 256  # columns of a symmetric product that are computed at once, from the diagonal down
_LEVEL = 1e-3  # share of the Kronecker metric that is the Frobenius one: nothing is free because no sample has shown its cost

Moments = list[Tensor]


@dataclass(frozen=True)
class _Charts:
    """Neighbouring modules of one rank: z = scale ∘ (left S right), all [M, r, r], the columns `where` of the coordinates."""

    names: list[str]
    where: slice
    left: Tensor
    right: Tensor
    left_inverse: Tensor
    right_inverse: Tensor
    scale: Tensor

    def forward(self, cores: Tensor) -> Tensor:
        """S [M, r, r] -> z."""
        return self.scale * (self.left @ cores @ self.right)

    def inverse(self, z: Tensor) -> Tensor:
        """z [M, r, r] -> S."""
        return self.left_inverse @ (z / self.scale) @ self.right_inverse

    def gradients(self, cores: Tensor) -> Tensor:
        """∂L/∂S -> ∂L/∂z of [M, r, r, N]: samples last, so that both products take all of them at once."""
        x = torch.matmul(self.right_inverse[:, None], cores)
        x = torch.bmm(self.left_inverse.mT, x.flatten(2)).view(cores.shape)
        return x.div_(self.scale[..., None])

    def load(self, rows: Sequence[Tensor]) -> Tensor:
        """These modules' part of gradients [Nᵢ, n] of any float dtype, as [M, r, r, Σ Nᵢ] float64."""
        counts = [len(own) for own in rows]
        out = self.scale.new_empty(self.scale.numel(), sum(counts))
        for own, part in zip(rows, out.split(counts, 1)):
            part.copy_(own[:, self.where].T)
        return out.view(*self.scale.shape, -1)


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
        for group in _neighbours(blocks):
            names = [block.name for block in group]
            pairs = torch.stack([torch.stack(tuple(metric[block.module])) for block in group], 1)
            values, vectors = torch.linalg.eigh(pairs.to("cpu", torch.float64))
            live = values > values[..., -1:].clamp_min(0) * values.shape[-1] * torch.finfo(values.dtype).eps * 8
            root = torch.where(live, values, 0).sqrt()
            inverse = torch.where(live, 1 / torch.where(live, root, 1), 0)
            roots, inverses = ((vectors * x[..., None, :] @ vectors.mT).to(device) for x in (root, inverse))
            where = slice(self.slices[names[0]].start, self.slices[names[-1]].stop)
            (left, right), (left_inverse, right_inverse) = roots, inverses
            ones = torch.ones_like(left)
            self._charts.append(_Charts(names, where, left, right, left_inverse, right_inverse, ones))

    def kronecker(self, moments: Moments) -> Coordinates:
        """The coordinates whose metric is the Kronecker one of these `moments`, scaled to trace n, as the Frobenius metric has.

        `moments` are of gradients in Frobenius coordinates, times any positive number. z is turned into their eigenvectors,
        whose signs and order change no pencil.
        """
        shapes, bases = [], []
        for pairs in moments:
            # Hundreds of r x r problems: one batch on the CPU, since a GPU would take them one by one.
            values, vectors = torch.linalg.eigh(pairs.cpu())
            across, down = values.clamp_min(0)
            trace = across.sum(1)[:, None, None]
            shapes.append(across[:, :, None] * down[:, None, :] / torch.where(trace > 0, trace, 1))
            bases.append(vectors)
        mean = sum(float(shape.sum()) for shape in shapes) / self.size
        if mean == 0:  # no gradient to take a shape from
            return self
        out = copy.copy(self)
        out._charts = []
        for charts, shape, basis in zip(self._charts, shapes, bases):
            u, v = basis.to(charts.left.device)
            turned = replace(
                charts,
                left=u.mT @ charts.left,
                right=charts.right @ v,
                left_inverse=charts.left_inverse @ u,
                right_inverse=v.mT @ charts.right_inverse,
                scale=((1 - _LEVEL) * shape / mean + _LEVEL).sqrt().to(u.device),
            )
            out._charts.append(turned)
        return out

    def patch(self) -> Tensor:
        """z [n] of the whole patch, S = I."""
        ranks = {name: charts.left.shape[-1] for charts in self._charts for name in charts.names}
        return self.from_cores({name: torch.eye(r, dtype=torch.float64) for name, r in ranks.items()})

    def from_cores(self, cores: Mapping[str, Tensor]) -> Tensor:
        """z [n] of S [r, r] per module."""
        parts = (c.forward(torch.stack([cores[name].to(c.left) for name in c.names])).flatten() for c in self._charts)
        return torch.cat(list(parts))

    def to_cores(self, z: Tensor) -> dict[str, Tensor]:
        """S [r, r] float64 per module, of z [n]."""
        cores: dict[str, Tensor] = {}
        for charts in self._charts:
            cores |= zip(charts.names, charts.inverse(z[charts.where].reshape(charts.left.shape)))
        return cores

    def gradients(self, *rows: Tensor) -> Tensor:
        """Per-sample gradients [Nᵢ, n] with respect to S (any float dtype) -> all with respect to z [Σ Nᵢ, n], float64."""
        out = torch.empty(sum(map(len, rows)), self.size, dtype=torch.float64, device=rows[0].device)
        for charts in self._charts:
            out[:, charts.where] = charts.gradients(charts.load(rows)).flatten(0, 2).T
        return out

    def matrices(self, fishers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The modules' Fishers [r², r²] in S coordinates -> in z coordinates."""
        found: dict[str, Tensor] = {}
        for charts in self._charts:
            stacked = torch.stack([fishers[name].to(charts.left) for name in charts.names])
            for _ in range(2):
                stacked = charts.gradients(stacked.reshape(*charts.left.shape, -1)).flatten(1, 2).mT
            found |= zip(charts.names, stacked)
        return found

    def moments(self, rows: Tensor, parts: Sequence[Tensor | slice]) -> list[Moments]:
        """ΣCCᵀ and ΣCᵀC [2, M, r, r] of all neighbours, over each of the `parts` of gradients [N, n] with respect to S."""
        out: list[Moments] = [[] for _ in parts]
        for charts in self._charts:
            cores = charts.gradients(charts.load([rows]))
            for part, moments in zip(parts, out):
                own = cores[..., part]
                across, down = own.flatten(2), own.transpose(1, 2).flatten(2)
                moments.append(torch.stack([across @ across.mT, down @ down.mT]))
        return out

    def matrix_moments(self, fishers: Mapping[str, Tensor]) -> Moments:
        """The same of the modules' Fishers [r², r²] in z coordinates: their partial traces."""
        out = []
        for charts in self._charts:
            r = charts.left.shape[-1]
            split = torch.stack([fishers[name] for name in charts.names]).reshape(-1, r, r, r, r)
            out.append(torch.stack([torch.einsum("mijkj->mik", split), torch.einsum("mijil->mjl", split)]))
        return out


def products(rows: Sequence[Tensor], coordinates: Sequence[Coordinates]) -> list[Tensor]:
    """Inner products [N, N] of gradients [Nᵢ, n], N = Σ Nᵢ, in each of the `coordinates` of the same modules.

    Nothing of n columns is stored: neighbours are loaded once, changed into each of the coordinates and multiplied.
    """
    count = sum(map(len, rows))
    grams = [torch.zeros(count, count, dtype=torch.float64, device=rows[0].device) for _ in coordinates]
    for charts in zip(*(z._charts for z in coordinates)):
        cores = charts[0].load(rows)
        for own, gram in zip(charts, grams):
            x = own.gradients(cores).flatten(0, 2)
            for i in range(0, count, _PANEL):
                gram[i:, i : i + _PANEL].addmm_(x[:, i:].T, x[:, i : i + _PANEL])
    for gram in grams:
        gram.tril_()
        gram += gram.tril(-1).T
    return grams


def neighbours_width(sizes: Iterable[int]) -> int:
    """At most how many of the columns of modules with `sizes` coordinates are changed at once."""
    return max(min(max(1, _WIDTH // size), len(list(run))) * size for size, run in groupby(sizes))


def _neighbours(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Runs of blocks of one size, of at most _WIDTH columns where one block is not wider."""
    for size, run in groupby(blocks, lambda block: block.size):
        members = list(run)
        step = max(1, _WIDTH // size)
        for i in range(0, len(members), step):
            yield members[i : i + step]
