"""The pencil (F_gain, F_cost + ε I) in coordinates whose metric is I and the patch's components along its eigenvectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sst_kernels.distributed import gather_objects, gather_rows, raise_together, share_by_cost
from sst_kernels.fisher.fisher import Fisher
from sst_kernels.gevp import LowRank, gevp
from sst_kernels.subspace.coordinates import Coordinates


@dataclass
class Spectrum:
    """Eigenpairs of F_gain v = λ (F_cost + ε I) v over the coordinates `where`, vᵢᵀ(F_cost + εI)vⱼ = δᵢⱼ.

    values [p] descending, vectors [len(where), p], components [p] = vᵢᵀ(F_cost + εI) z of the patch z; all float64. Directions
    beyond the p stored ones have λ = 0.
    """

    where: slice
    values: Tensor
    vectors: Tensor
    components: Tensor
    route: str

    def filtered(self, weights: Tensor) -> Tensor:
        """Σᵢ wᵢ cᵢ vᵢ for weights [p, G]: [len(where), G]."""
        return self.vectors @ (weights * self.components[:, None])


def global_spectrum(gain: Tensor, cost: Tensor, damping: float, patch: Tensor) -> list[Spectrum]:
    """One pencil over all coordinates, exact from rows: gain [p, n] and cost [q, n] with F = rowsᵀ rows, patch [n]."""
    gain, cost = (torch.linalg.qr(x, mode="r").R if len(x) > len(patch) else x for x in (gain, cost))
    solved = gevp(LowRank(gain), LowRank(cost, damping), k=min(gain.shape)).raise_if_failed()
    live = solved.values > 0
    values, vectors = solved.values[live], solved.vectors[:, live]
    components = vectors.T @ (cost.T @ (cost @ patch) + damping * patch)
    return [Spectrum(slice(0, len(patch)), values, vectors, components, solved.route)]


def module_spectra(
    gain: Sequence[Tensor],
    cost: Sequence[Tensor],
    damping: float,
    patch: Tensor,
    slices: Sequence[slice],
    group: Any = None,
) -> list[Spectrum]:
    """One pencil per module from its dense matrices [m, m]; modules of one size are solved as a batch.

    The ranks of a torch.distributed `group`, which hold the same matrices, share the modules by cost m³ and exchange what they
    solved: every rank has the same bits, and the same eigenpairs as without sharing.
    """
    modules = range(len(gain))
    if group is None:
        solved = _solve_modules(modules, gain, cost, damping, patch, slices)
        return [solved[i] for i in modules]
    shares = share_by_cost([float(len(matrix)) ** 3 for matrix in gain], dist.get_world_size(group))
    solved, error = {}, None
    try:
        solved = _solve_modules(shares[dist.get_rank(group)], gain, cost, damping, patch, slices)
    except Exception as own:
        error = own
    raise_together(error, group)
    routes = {
        i: route for part in gather_objects({i: s.route for i, s in solved.items()}, group) for i, route in part.items()
    }
    flat = [torch.cat([s.values, s.components, s.vectors.mT.flatten()]) for _, s in sorted(solved.items())]
    pieces = gather_rows(torch.cat(flat)[:, None] if flat else patch.new_empty(0, 1), group)
    for share, piece in zip(shares, pieces, strict=True):
        members = sorted(share)
        sizes = [len(gain[i]) for i in members]
        for i, m, part in zip(members, sizes, piece[:, 0].split([m * (m + 2) for m in sizes])):
            values, components, vectors = part.split([m, m, m * m])
            solved[i] = Spectrum(slices[i], values, vectors.reshape(m, m).mT, components, routes[i])
    return [solved[i] for i in modules]


def _solve_modules(
    modules: Iterable[int],
    gain: Sequence[Tensor],
    cost: Sequence[Tensor],
    damping: float,
    patch: Tensor,
    slices: Sequence[slice],
) -> dict[int, Spectrum]:
    spectra: dict[int, Spectrum] = {}
    by_size: dict[int, list[int]] = {}
    for i in modules:
        by_size.setdefault(len(gain[i]), []).append(i)
    for size, members in by_size.items():
        a = torch.stack([gain[i] for i in members])
        b = torch.stack([cost[i] for i in members]) + damping * torch.eye(size, dtype=a.dtype, device=a.device)
        solved = gevp(a, b, k=size).raise_if_failed()
        z = torch.stack([patch[slices[i]] for i in members])
        components = torch.einsum("bnk,bnm,bm->bk", solved.vectors, b, z)
        for j, i in enumerate(members):
            spectra[i] = Spectrum(
                slices[i], solved.values[j].clamp_min(0), solved.vectors[j], components[j], solved.route
            )
    return spectra


def dense_blocks(fisher: Fisher, coordinates: Coordinates, device: torch.device) -> list[Tensor]:
    """Each module's Fisher matrix per sequence in z coordinates, whatever its structure."""
    factor = per_sequence(fisher)
    blocks = coordinates.matrices({name: fisher[name].dense().to(device) for name in fisher})
    return [block * factor for block in blocks.values()]


def per_sequence(fisher: Fisher) -> float:
    """What turns a Fisher that is divided by its `count` (tokens, labels) into one per sequence."""
    return getattr(fisher.counts, fisher.meta["count"]) / fisher.counts.sequences


def block_grams(rows: Tensor, slices: Sequence[slice]) -> list[Tensor]:
    """The diagonal blocks of rowsᵀ rows / N."""
    return [rows[:, s].T @ rows[:, s] / len(rows) for s in slices]
