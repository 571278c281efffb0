"""Held-out predictions: what a filter of the pencil without some rows does to these rows.

A filtered patch of rows is a combination of rows, so what it does to others needs inner products alone. With E = εN I + WWᵀ over the
N cost rows W of the pencil, B⁻¹ = (I − WᵀE⁻¹W)/ε, and on all other rows V the form V B⁻¹Vᵀ is the Schur complement of E: for the gain
rows the pencil's own matrix, between held rows and gain rows the response of the former. Inner products round to eps of their
size, so what comes of them has a relative error of at most about eps·n/damping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sst_kernels.subspace.filters import Weights


@dataclass(frozen=True)
class Fold:
    """λ [p] of a pencil, and what its eigenvectors, times the patch's components, do to rows [held, p]."""

    values: Tensor
    responses: Tensor

    @classmethod
    def of_complement(
        cls, complement: Tensor, gain: Tensor | slice, held: Tensor | slice, images: Tensor, held_images: Tensor
    ) -> Fold:
        """From Schur complements [..., V, V], which of V are the pencil's gain rows and which are held, and both · patch."""
        values, coefficients = combinations(complement[..., gain, :][..., gain], images)
        values, responses = with_rest(values, complement[..., held, :][..., gain] @ coefficients, held_images)
        return cls(values.flatten(), responses.movedim(-2, 0).flatten(1))

    @classmethod
    def side_by_side(cls, folds: Sequence[Fold]) -> Fold:
        """The pencils of several groups of modules as one: what they do to a row adds."""
        return cls(torch.cat([f.values for f in folds]), torch.cat([f.responses for f in folds], 1))

    def raised(self, unseen: float) -> Fold:
        """With all λ raised by this much."""
        return replace(self, values=self.values + unseen)

    def energy(self, weights: Weights, parameters: Tensor) -> Tensor:
        """Σ over the rows of (row · filtered patch)² for each of `parameters` [G], on the CPU."""
        table = weights(self.values, parameters.to(self.values))
        return (self.responses @ table).square().sum(0).cpu()


def with_rest(values: Tensor, ways: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """λ [..., p] and directions [..., m, p] with one more, of λ = 0: what the others leave of the `whole` [..., m]."""
    rest = whole[..., None] - ways.sum(-1, keepdim=True)
    return torch.cat([values, values.new_zeros(*values.shape[:-1], 1)], -1), torch.cat([ways, rest], -1)


def combinations(own: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """λ [..., g], and which combinations of B⁻¹Uᵀ [..., g, g] the eigenvectors times the patch's components are.

    own: U B⁻¹Uᵀ [..., g, g] of the gain rows U; images: U · patch [..., g]. λ that are rounding alone are 0, with 0 beside them.
    """
    count = own.shape[-1]
    values, y = torch.linalg.eigh(own)
    live = values > _floor(own)
    scale = torch.where(live, (y.mT @ images[..., None])[..., 0] / torch.where(live, values, 1), 0)
    return torch.where(live, values, 0) / count, y * scale[..., None, :]


def _floor(own: Tensor) -> Tensor:
    """Below it eigenvalues of products [..., g, g] are rounding."""
    return own.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True) * 2 * own.shape[-1] * torch.finfo(own.dtype).eps


def complement(
    products: Tensor, cost: Tensor, others: Tensor, epsilon: float
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """V B⁻¹Vᵀ [..., V, V] of the rows V = `others`, of inner products [..., all, all]; and y [..., V, p] ↦ E⁻¹WVᵀy with the cost rows W."""
    inner = products[..., cost, :][..., cost]
    inner.diagonal(dim1=-2, dim2=-1).add_(epsilon * len(cost))
    factor = torch.linalg.cholesky(inner)
    half = torch.linalg.solve_triangular(factor, products[..., cost, :][..., others], upper=False)
    rest = (products[..., others, :][..., others] - half.mT @ half) / epsilon
    return rest, lambda y: torch.linalg.solve_triangular(factor.mT, half @ y, upper=True)


def unseen(own: Tensor, held: Sequence[slice], size: int) -> tuple[float, float]:
    """What gain rows have in directions that no other fold's rows show: Σ λ there, and how many such directions there are.

    own: U B⁻¹Uᵀ [..., g, g] of the gain rows of as many pencils, of `size` coordinates each. Both are means over the folds `held`, so that
    their ratio tells the λ of a direction that no row has shown, in the mean over such directions.
    """
    count, energy, directions = own.shape[-1], 0.0, 0.0
    index = torch.arange(count, device=own.device)
    for part in held:
        inside = torch.cat([index[: part.start], index[part.stop :]])
        values, y = torch.linalg.eigh(own[..., inside, :][..., inside])
        live = values > _floor(own[..., inside, :][..., inside])
        shown = own[..., part, :][..., inside] @ y
        shown = torch.where(live, 1 / torch.where(live, values, 1), 0)[..., None, :] * shown.square()
        all_of = own.diagonal(dim1=-2, dim2=-1)[..., part]
        rest = all_of - shown.sum(-1)
        rounding = 2 * count * torch.finfo(own.dtype).eps * all_of.amax(-1, keepdim=True)
        left = torch.where(own.diagonal(dim1=-2, dim2=-1).amax(-1) > 0, (size - live.sum(-1)).clamp_min(0), 0)
        rest = torch.where((rest > rounding) & (left > 0)[..., None], rest, 0)
        energy += float(rest.sum()) / count
        directions += float(left.sum()) * (part.stop - part.start) / count
    return energy, directions


def folds_of(groups: list[int], folds: int, name: str) -> Tensor:
    """Fold of each row, groups kept whole and dealt out in order of appearance."""
    order = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    if len(order) < folds:
        raise ValueError(
            f"the {name} Fisher holds {len(order)} groups of samples, fewer than folds={folds}: accumulate more or use fewer folds"
        )
    return torch.tensor([order[g] % folds for g in groups])
