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
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sst_kernels.fisher.base import Block

WIDTH = 1024  # columns that are changed at once: they stay in a core's cache beside all rows' other columns
_PANEL = {torch.float64: 256, torch.float32: 128}  # columns of a symmetric product at once, from the diagonal down
_LEVEL = 1e-3  # share of the Kronecker metric that is the Frobenius one: nothing is free because no sample has shown its cost

Moments = list[Tensor]


@dataclass(frozen=True)
class Charts:
    """Neighbouring modules of one rank: z = scale ∘ (left S right), all [M, r, r], the columns `where` of the coordinates.

    Gradients of N samples are [M, r, r, N], samples last, so that a product takes all of them at once.
    """

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

    def inverses(self, columns: Tensor) -> Tensor:
        """z [M, r, r, G] -> S: `inverse` of many at once."""
        x = torch.matmul(self.right_inverse.mT[:, None], columns / self.scale[..., None])
        return torch.bmm(self.left_inverse, x.flatten(2)).view(columns.shape)

    def gradients(self, cores: Tensor, unit: float = 1.0) -> Tensor:
        """∂L/∂S -> ∂L/∂z / unit of [M, r, r, N], in the dtype of `cores`."""
        right, left, weight = (x.to(cores) for x in (self.right_inverse, self.left_inverse / unit, 1 / self.scale))
        x = torch.matmul(right[:, None], cores)
        return torch.bmm(left.mT, x.flatten(2)).view(cores.shape).mul_(weight[..., None])

    def matrices(self, fishers: Tensor) -> Tensor:
        """Fishers [M, r², r²] in S coordinates -> in z coordinates."""
        for _ in range(2):
            fishers = self.gradients(fishers.reshape(*self.scale.shape, -1)).flatten(1, 2).mT
        return fishers

    def load(self, rows: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
        """These modules' part of gradients [Nᵢ, n] of any float dtype, as [M, r, r, Σ Nᵢ].

        Put side by side first, then turned, then widened: each is a fast copy, one that does all of it is not.
        """
        return torch.cat([own[:, self.where] for own in rows]).T.contiguous().to(dtype).view(*self.scale.shape, -1)


class Coordinates:
    """z [n], n = Σ r² over the modules in order; `slices[module]` are a module's coordinates. Made in the Frobenius metric.

    Args:
        blocks: the modules.
        metric: per module (c²BᵀB, AAᵀ), [r, r] float64.
        device: where z lives.
        width: columns of the neighbouring modules that are handled at once.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        metric: Mapping[str, tuple[Tensor, Tensor]],
        device: torch.device,
        width: int = WIDTH,
    ):
        self.slices: dict[str, slice] = {}
        self.size = 0
        for block in blocks:
            self.slices[block.name] = slice(self.size, self.size + block.size)
            self.size += block.size
        self.charts: list[Charts] = []
        for group in _neighbours(blocks, width):
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
            self.charts.append(Charts(names, where, left, right, left_inverse, right_inverse, ones))

    def kronecker(self, *moments: Moments) -> list[Coordinates]:
        """For each of some `moments` the coordinates whose metric is the Kronecker one, scaled to trace n as the Frobenius metric is.

        `moments` are of gradients in Frobenius coordinates, times any positive number. z is turned into their eigenvectors,
        whose signs and order change no pencil. Without any gradient to take a shape from the metric stays the Frobenius one.
        """
        means = [mean_trace(own, self.size) for own in moments]
        out = [copy.copy(self) for _ in moments]
        for made in out:
            made.charts = []
        at = 0
        for _, run in groupby(self.charts, lambda charts: charts.left.shape[-1]):
            members = list(run)
            own = slice(at, at := at + len(members))
            pairs = torch.stack([torch.cat(x[own], 1) for x in moments])  # [folds, 2, M, r, r]
            # Hundreds of r x r problems: one batch on the CPU, since a GPU would take them one by one.
            values, vectors = torch.linalg.eigh(pairs.cpu())
            across, down = values.clamp_min_(0).unbind(1)
            shape = across[..., None] * down[..., None, :] / _nonzero(across.sum(-1))[..., None, None]
            mean = torch.tensor(means, dtype=torch.float64).view(-1, 1, 1, 1)
            scale = torch.where(mean > 0, (1 - _LEVEL) * shape / _nonzero(mean) + _LEVEL, 1).sqrt_()
            u, v = vectors.to(members[0].left.device).unbind(1)
            left, right, left_inverse, right_inverse = (
                torch.cat([getattr(charts, side) for charts in members])
                for side in ("left", "right", "left_inverse", "right_inverse")
            )
            turned = u.mT @ left, right @ v, left_inverse @ u, v.mT @ right_inverse, scale.to(u.device)
            counts = [len(charts.names) for charts in members]
            for made, *sides in zip(out, *turned):
                parts = zip(*(side.split(counts) for side in sides))
                made.charts += [Charts(c.names, c.where, *part) for c, part in zip(members, parts)]
        return out

    def patch(self) -> Tensor:
        """z [n] of the whole patch."""
        return self.from_cores(self.identity())

    def identity(self) -> dict[str, Tensor]:
        """S = I of every module: the whole patch."""
        ranks = {name: charts.left.shape[-1] for charts in self.charts for name in charts.names}
        return {name: torch.eye(r, dtype=torch.float64) for name, r in ranks.items()}

    def from_cores(self, cores: Mapping[str, Tensor]) -> Tensor:
        """z [n] of S [r, r] per module."""
        parts = (c.forward(torch.stack([cores[name].to(c.left) for name in c.names])).flatten() for c in self.charts)
        return torch.cat(list(parts))

    def to_cores(self, z: Tensor) -> dict[str, Tensor]:
        """S [r, r] float64 per module, of z [n]."""
        cores: dict[str, Tensor] = {}
        for charts in self.charts:
            cores |= zip(charts.names, charts.inverse(z[charts.where].reshape(charts.left.shape)))
        return cores

    def energies(self, cores: Mapping[str, Tensor]) -> dict[str, float]:
        """‖z‖² of every module of S [r, r] per module: ‖ΔW(S)‖²_F in Frobenius coordinates."""
        z, found = self.from_cores(cores).square(), dict[str, float]()
        for charts in self.charts:
            found |= zip(charts.names, z[charts.where].view(len(charts.names), -1).sum(1).tolist())
        return found

    def gradients(self, *rows: Tensor) -> Tensor:
        """Per-sample gradients [Nᵢ, n] with respect to S (any float dtype) -> all with respect to z [Σ Nᵢ, n], float64."""
        out = torch.empty(sum(map(len, rows)), self.size, dtype=torch.float64, device=rows[0].device)
        for charts in self.charts:
            out[:, charts.where] = charts.gradients(charts.load(rows)).flatten(0, 2).T
        return out

    def moments(self, rows: Tensor, parts: Sequence[slice]) -> list[Moments]:
        """ΣCCᵀ and ΣCᵀC [2, M, r, r] of all neighbours, over each of the `parts` of gradients [N, n] with respect to S."""
        out: list[Moments] = [[] for _ in parts]
        for charts in self.charts:
            cores = charts.gradients(charts.load([rows]))
            for part, moments in zip(parts, out):
                own = cores[..., part]
                across, down = own.flatten(2), own.transpose(1, 2).flatten(2)
                moments.append(torch.stack([across @ across.mT, down @ down.mT]))
        return out


def mean_trace(moments: Moments, size: int) -> float:
    """What scales the Kronecker metric of these moments to trace n = `size`."""
    return sum(float(_traces(across).sum()) for across, _ in moments) / size


def kronecker_metric(moments: Tensor, mean: float) -> Tensor:
    """The Kronecker metric of neighbours as matrices [M, r², r²] in Frobenius coordinates, of their moments [2, M, r, r]."""
    across, down = moments
    size = across.shape[-1] ** 2
    share = (1 - _LEVEL) / mean / _nonzero(_traces(across)) if mean else torch.zeros_like(across[:, 0, 0])
    metric = torch.einsum("mik,mjl->mijkl", share[:, None, None] * across, down).reshape(-1, size, size)
    metric.diagonal(dim1=1, dim2=2).add_(_LEVEL if mean else 1.0)
    return metric


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1)


def products(rows: Sequence[Tensor], coordinates: Sequence[Coordinates], unit: float | None = None) -> list[Tensor]:
    """Inner products [N, N] float64 of gradients [Nᵢ, n], N = Σ Nᵢ, in each of the `coordinates` of the same modules.

    Nothing of n columns is stored: neighbours are loaded once, changed into each of the coordinates and multiplied. With a
    `unit`, near the length of a row, all coordinates but the first are computed in float32, at about half the time: products
    are then off by some 1e-7 of the rows' lengths, as rounding the rows to float32 once more would leave them.
    """
    count = sum(map(len, rows))
    dtypes = [torch.float64 if unit is None or not i else torch.float32 for i in range(len(coordinates))]
    grams = [torch.zeros(count, count, dtype=dtype, device=rows[0].device) for dtype in dtypes]
    for charts in zip(*(z.charts for z in coordinates)):
        loaded = charts[0].load(rows, dtypes[-1])
        cores = {dtype: loaded.to(dtype) for dtype in dict.fromkeys(dtypes)}
        for own, gram, dtype in zip(charts, grams, dtypes):
            x = own.gradients(cores[dtype], unit or 1.0).flatten(0, 2)
            for i in range(0, count, _PANEL[dtype]):
                gram[i:, i : i + _PANEL[dtype]].addmm_(x[:, i:].T, x[:, i : i + _PANEL[dtype]])
    return [_mirrored(gram, (unit or 1.0) ** 2, _PANEL[gram.dtype]) for gram in grams]


def _mirrored(gram: Tensor, factor: float, panel: int) -> Tensor:
    """`factor` times the symmetric matrix that is given by panels from the diagonal down, float64."""
    out = torch.empty_like(gram, dtype=torch.float64)
    for i in range(0, len(gram), panel):
        out[i:, i : i + panel] = gram[i:, i : i + panel]
        out[i : i + panel, i + panel :] = gram[i + panel :, i : i + panel].T
    return out.mul_(factor)


def matrix_moments(fishers: Tensor) -> Tensor:
    """ΣCCᵀ and ΣCᵀC [2, M, r, r] of the modules' Fishers [M, r², r²]: their partial traces."""
    r = int(fishers.shape[-1] ** 0.5)
    split = fishers.reshape(-1, r, r, r, r)
    return torch.stack([torch.einsum("mijkj->mik", split), torch.einsum("mijil->mjl", split)])


def module_width(size: int) -> int:
    """Columns of the neighbourhoods whose modules are solved apart: enough of them for ranks to share, whatever their number is.

    So the bits do not depend on it either.
    """
    return min(WIDTH, size // 16)


def neighbours_width(sizes: Iterable[int], width: int = WIDTH) -> int:
    """At most how many of the columns of modules with `sizes` coordinates are changed at once."""
    return max(min(max(1, width // size), len(list(run))) * size for size, run in groupby(sizes))


def _neighbours(blocks: Sequence[Block], width: int) -> Iterator[list[Block]]:
    """Runs of blocks of one size, of at most `width` columns where one block is not wider."""
    for size, run in groupby(blocks, lambda block: block.size):
        members = list(run)
        step = max(1, width // size)
        for i in range(0, len(members), step):
            yield members[i : i + step]
