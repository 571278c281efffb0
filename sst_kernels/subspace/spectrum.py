"""The pencil (F_gain, F_cost + ε I) in Frobenius coordinates and the patch's components along its eigenvectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sst_kernels.fisher.fisher import Fisher
from sst_kernels.gevp import LowRank, gevp
from sst_kernels.subspace.coordinates import FrobeniusCoordinates


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
    solved = gevp(LowRank(gain), LowRank(cost, damping), k=min(gain.shape)).raise_if_failed()
    live = solved.values > 0
    values, vectors = solved.values[live], solved.vectors[:, live]
    components = vectors.T @ (cost.T @ (cost @ patch) + damping * patch)
    return [Spectrum(slice(0, len(patch)), values, vectors, components, solved.route)]


def module_spectra(
    gain: Sequence[Tensor], cost: Sequence[Tensor], damping: float, patch: Tensor, slices: Sequence[slice]
) -> list[Spectrum]:
    """One pencil per module from its dense matrices [m, m]; modules of one size are solved as a batch."""
    spectra: dict[int, Spectrum] = {}
    by_size: dict[int, list[int]] = {}
    for i, matrix in enumerate(gain):
        by_size.setdefault(len(matrix), []).append(i)
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
    return [spectra[i] for i in range(len(gain))]


def dense_blocks(fisher: Fisher, coordinates: FrobeniusCoordinates, device: torch.device) -> list[Tensor]:
    """Each module's Fisher matrix in z coordinates, whatever its structure."""
    return [coordinates.matrix(name, fisher[name].dense().to(device)) for name in fisher]


def block_grams(rows: Tensor, slices: Sequence[slice]) -> list[Tensor]:
    """The diagonal blocks of rowsᵀ rows."""
    return [rows[:, s].T @ rows[:, s] for s in slices]
