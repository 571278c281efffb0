"""Held-out predictions: what a filter of the pencil without some rows does to these rows.

A filtered patch of rows is a combination of rows, so what it does to others needs inner products alone. With E = εN I + WWᵀ over the
N cost rows W of the pencil, B⁻¹ = (I − WᵀE⁻¹W)/ε, and on all other rows V the form V B⁻¹Vᵀ is the Schur complement of E: for the gain
rows the pencil's own matrix, between held rows and gain rows the response of the former. Inner products round to eps of their
size, so predictions have a relative error of about eps·n/damping; the patch itself comes from the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sst_kernels.subspace.filters import Weights
from sst_kernels.subspace.spectrum import Spectrum


@dataclass
class Fold:
    """λ [p] of a pencil, and what its eigenvectors, times the patch's components, do to the rows it has not seen [held, p]."""

    values: Tensor
    responses: Tensor

    @classmethod
    def of_spectra(cls, spectra: Sequence[Spectrum], held: Tensor) -> Fold:
        """From solved pencils and held rows in their coordinates."""
        responses = [held[:, s.where] @ (s.vectors * s.components) for s in spectra]
        return cls(torch.cat([s.values for s in spectra]), torch.cat(responses, 1))

    @classmethod
    def of_complement(cls, complement: Tensor, gain: Tensor | slice, held: Tensor | slice, images: Tensor) -> Fold:
        """From a Schur complement [V, V], which of V are the pencil's gain rows and which are held, and gain rows · patch."""
        own = complement[gain][:, gain] / len(images)
        values, y = torch.linalg.eigh(own)
        live = values > own.diagonal().amax() * len(complement) * torch.finfo(values.dtype).eps
        values, y = values[live], y[:, live]
        return cls(values, complement[held][:, gain] @ (y * ((images @ y) / (len(images) * values))))

    def energy(self, weights: Weights, parameters: Tensor) -> Tensor:
        """Σ over held rows of (row · filtered patch)² for each of `parameters` [G], on the CPU."""
        table = weights(self.values, parameters.to(self.values))
        return (self.responses @ table).square().sum(0).cpu()


def complement(products: Tensor, cost: Tensor, epsilon: float) -> Tensor:
    """V B⁻¹Vᵀ over the rows V that are not in the mask `cost`, of the inner products [N, N] of all."""
    values, vectors = torch.linalg.eigh(products[cost][:, cost])
    x = vectors.T @ products[cost][:, ~cost]
    return (products[~cost][:, ~cost] - x.T @ (x / (values.clamp_min(0) + epsilon * len(values))[:, None])) / epsilon


def folds_of(groups: list[int], folds: int, name: str) -> Tensor:
    """Fold of each row, groups kept whole and dealt out in order of appearance."""
    order = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    if len(order) < folds:
        raise ValueError(
            f"the {name} Fisher holds {len(order)} groups of samples, fewer than folds={folds}: accumulate more or use fewer folds"
        )
    return torch.tensor([order[g] % folds for g in groups])
