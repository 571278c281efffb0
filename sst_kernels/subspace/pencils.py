"""The pencil F_gain v = λ (F_cost + εM) v, solved from each kind of evidence that Fishers keep.

    AcrossModules   one pencil over all modules, from rows (per-sample gradients, or those of a sketch)
    PerModule       one pencil per module, from rows
    Blocks          one pencil per module, from whatever a structure keeps of it

Rows can be held out. The pencil of fold i is without the cost rows of fold i in every respect, its metric M included: taking the
metric of all rows for every fold halves the predicted cost (SmolLM2-135M, 64 + 224 rows: 0.51 to 0.66 of it), since one
prompt's gradients then raise the cost of exactly the directions that they lie in.

Few refusals show few directions. What they leave of the patch is one more direction, kept in proportion and after all others: to
F_gain λ₀ (F_cost + εM) is added, so that a filter's path ends at the whole patch. λ₀ is what directions that no other fold's gain rows
show turn out to have, in the mean, by the rows of a fold that is held out.

Where there are fewer rows than coordinates, everything but the patch itself comes from inner products of the rows (see `crossfit`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite

import torch
from torch import Tensor

from sst_kernels.gevp.operators import power_of_two
from sst_kernels.subspace.coordinates import Coordinates, products
from sst_kernels.subspace.crossfit import Fold, combinations, complement, unseen, with_rest
from sst_kernels.subspace.filters import Weights
from sst_kernels.subspace.rowspace import RowSpace
from sst_kernels.subspace.spectrum import row_directions

_LOST = 1e-8  # relative error of a patch, at most, up to which it is taken from inner products of rows
_SINGLE = 1e-2  # and of a fold's prediction, up to which it is taken from products in float32
_LARGE = 1 << 20  # numbers in the rows from which float32 is worth it


class Pencil(ABC):
    """A solved pencil. Costs and gains are ½ zᵀF_cost z and zᵀF_gain z, per sequence.

    values: λ [p] ≥ 0, group after group, λ₀ included. unseen: λ₀, 0 where every direction is shown or none is. epsilon: ε, absolute.
    route: how it was solved. held_out: whether predictions are of rows that the pencils have not seen. frobenius: coordinates whose
    metric is ‖ΔW‖².
    """

    frobenius: Coordinates
    values: Tensor
    unseen: float
    epsilon: float
    route: str
    held_out: bool

    @abstractmethod
    def cores(self, weights: Tensor) -> dict[str, Tensor]:
        """S [r, r] float64 per module of the patch filtered with weights [p]."""

    @abstractmethod
    def cost(self, cores: Mapping[str, Tensor]) -> float:
        """The cost of any S, on all that the cost Fisher holds."""

    @abstractmethod
    def predicted_cost(self, weights: Weights, parameters: Tensor) -> Tensor:
        """The cost [G] of the filtered patches, on the CPU; held out where possible."""

    @abstractmethod
    def kept_gain(self, weights: Weights, parameters: Tensor) -> Tensor:
        """The gain [G] of the filtered patches over that of the whole patch, likewise."""

    def _damp(self, damping: float, trace: float, size: int) -> None:
        if trace == 0:
            raise ValueError("the cost Fisher is zero: is the adapter trained (lora_B is zero at the start)?")
        self.epsilon = damping * trace / size

    def _raise(self, energy: float, directions: float) -> None:
        """Set λ₀ from what `unseen` tells, and add it to all λ; without held-out rows it is the smallest λ that is not rounding."""
        shown = self.values[self.values > 2 * len(self.values) * torch.finfo(torch.float64).eps * self.values.amax()]
        self.unseen = 0.0
        if directions and len(shown):
            self.unseen = energy / directions if energy else float(shown.min())
        self.values = self.values + self.unseen


@dataclass(frozen=True)
class Rows:
    """Gradients with respect to S of both sides [N, n] (any float dtype); F = rowsᵀrows / N per sequence.

    gain_folds, cost_folds: the rows of each fold; empty where nothing is held out.
    """

    gain: Tensor
    cost: Tensor
    gain_folds: tuple[slice, ...] = ()
    cost_folds: tuple[slice, ...] = ()

    @classmethod
    def dealt(cls, gain: Tensor, cost: Tensor, of_gain: Tensor, of_cost: Tensor, folds: int) -> Rows:
        """Of rows with the fold of each, [N] in 0 … folds − 1; copied, so that a fold's rows lie together."""
        gain, gain_folds = _together(gain, of_gain, folds)
        cost, cost_folds = _together(cost, of_cost, folds)
        return cls(gain, cost, gain_folds, cost_folds)

    def __post_init__(self) -> None:
        for name, rows in (("gain", self.gain), ("cost", self.cost)):
            if not (isfinite(float(rows.sum())) or bool(rows.isfinite().all())):  # a sum alone may overflow
                raise ValueError(f"the {name} Fisher holds rows that are not finite: were its gradients?")


def _together(rows: Tensor, folds_of: Tensor, folds: int) -> tuple[Tensor, tuple[slice, ...]]:
    stops = torch.bincount(folds_of, minlength=folds).cumsum(0).tolist()
    return rows[folds_of.argsort(stable=True)], tuple(slice(a, b) for a, b in zip([0, *stops], stops))


def others(index: Tensor, held: slice) -> Tensor:
    """`index` without the entries `held`."""
    return torch.cat([index[: held.start], index[held.stop :]])


class RowPencil(Pencil):
    """What the pencils of rows share: metrics of the whole and of each fold, and predictions from `Fold`s."""

    def __init__(self, rows: Rows, z: Coordinates, metric: str, damping: float):
        self.rows, self.frobenius = rows, z
        self.held_out = bool(rows.cost_folds)
        sums = z.moments(rows.cost, rows.cost_folds or [slice(None)])
        stacked = [torch.stack(x) for x in zip(*sums)]  # of each neighbourhood [folds, 2, M, r, r]
        total = sum(float(x[:, 0].diagonal(dim1=-2, dim2=-1).sum()) for x in stacked)
        self._damp(damping, total / len(rows.cost), z.size)
        folds = list(range(len(sums)))
        parts = [folds, *([j for j in folds if j != i] for i in range(len(rows.cost_folds)))]
        self._moments = [[x[part].sum(0) for x in stacked] for part in parts] if metric == "kronecker" else None
        self._row = power_of_two(torch.tensor((total / len(rows.cost)) ** 0.5))
        self._cost_folds: list[Fold] = []
        self._gain_folds: list[Fold] = []
        self._raise(*self._solve(damping))
        self._cost_folds = [fold.raised(self.unseen) for fold in self._cost_folds]
        self._gain_folds = [fold.raised(self.unseen) for fold in self._gain_folds]

    @abstractmethod
    def _solve(self, damping: float) -> tuple[float, float]:
        """Set values, route and the folds, without λ₀; return what `unseen` tells.

        Without rows to hold out there is one fold of all rows for each side.
        """

    def _coordinates(self) -> list[Coordinates]:
        """z of the whole and of each fold."""
        if self._moments is None:
            return [self.frobenius] * (1 + len(self.rows.cost_folds))
        return self.frobenius.kronecker(*self._moments)

    def _unit(self, damping: float, size: int) -> float | None:
        """The unit of `products` where float32 will do for the folds in pencils of `size` coordinates."""
        rows = (self.rows.gain, self.rows.cost)
        large = sum(x.numel() for x in rows) >= _LARGE and all(x.dtype is torch.float32 for x in rows)
        return self._row if large and torch.finfo(torch.float32).eps * size <= _SINGLE * damping else None

    @cached_property
    def _images(self) -> Tensor:
        """Gain rows · patch."""
        return times(self.rows.gain, self._flat(self.frobenius.identity()))

    @cached_property
    def _cost_images(self) -> Tensor:
        """Cost rows · patch."""
        return times(self.rows.cost, self._flat(self.frobenius.identity()))

    def _flat(self, cores: Mapping[str, Tensor]) -> Tensor:
        """S of all modules side by side [n]."""
        return torch.cat([cores[name].flatten() for name in self.frobenius.slices]).to(self.rows.cost.device)

    def cost(self, cores: Mapping[str, Tensor]) -> float:
        rows = self.rows.cost
        return 0.5 * float(times(rows, self._flat(cores)).square().sum()) / len(rows)

    def predicted_cost(self, weights: Weights, parameters: Tensor) -> Tensor:
        """Only cost rows are held out: without some gain rows the filter would keep less, and its cost be told too small."""
        energies = torch.stack([fold.energy(weights, parameters) for fold in self._cost_folds]).sum(0)
        return 0.5 * energies / len(self.rows.cost)

    def kept_gain(self, weights: Weights, parameters: Tensor) -> Tensor:
        kept = torch.stack([fold.energy(weights, parameters) for fold in self._gain_folds]).sum(0)
        return kept / float(self._images.square().sum())


class AcrossModules(RowPencil):
    """One pencil over the rows of all modules: cross-module correlations count."""

    def _solve(self, damping: float) -> tuple[float, float]:
        rows, size = self.rows, self.frobenius.size
        exact = torch.finfo(torch.float64).eps * size <= _LOST * damping
        few = len(rows.gain) + len(rows.cost) <= size
        told = (self._from_products if exact and few else self._from_span)(damping)
        self.values = torch.cat([self.values, self.values.new_zeros(1)])  # of what the directions leave of the patch
        if len(self.values) > size:  # every direction is shown, if not by the rows of some folds
            return 0.0, 0.0
        return told if self.held_out else (0.0, 1.0)

    def _from_products(self, damping: float) -> tuple[float, float]:
        rows, epsilon = self.rows, self.epsilon
        coordinates = self._coordinates()
        distinct = list(dict.fromkeys(coordinates))
        grams = products((rows.gain, rows.cost), distinct, self._unit(damping, self.frobenius.size))
        grams = grams if len(distinct) > 1 else grams * len(coordinates)
        gain = torch.arange(len(rows.gain), device=rows.gain.device)
        cost = torch.arange(len(rows.cost), device=rows.gain.device) + len(gain)
        own, solve = complement(grams[0], cost, gain, epsilon)
        self.values, y = combinations(own, self._images)
        mix = torch.cat([y, -solve(y)]) / epsilon  # of all rows, in z

        def lift(weights: Tensor) -> Tensor:
            parts = (mix @ weights).split([len(gain), len(cost)])
            mixed = mixture(rows.gain, parts[0]) + mixture(rows.cost, parts[1])
            return coordinates[0].gradients(mixed[None])[0]

        self._z, self._lift = coordinates[0], lift
        self.route = f"inner products of {len(gain)} + {len(cost)} rows, {self.frobenius.size} coordinates"
        for gram, held in zip(grams[1:], rows.cost_folds):
            rest, _ = complement(gram, others(cost, held), torch.cat([gain, cost[held]]), epsilon)
            sides = slice(0, len(gain)), slice(len(gain), None)
            self._cost_folds.append(Fold.of_complement(rest, *sides, self._images, self._cost_images[held]))
        for held in rows.gain_folds:
            inside = others(gain, held)
            self._gain_folds.append(Fold.of_complement(own, inside, held, self._images[inside], self._images[held]))
        if not self.held_out:
            gain_part, cost_part = (grams[0] @ mix).split([len(gain), len(cost)])
            self._gain_folds = [Fold(*with_rest(self.values, gain_part, self._images))]
            self._cost_folds = [Fold(*with_rest(self.values, cost_part, self._cost_images))]
        return unseen(own, rows.gain_folds, self.frobenius.size)

    def _from_span(self, damping: float) -> tuple[float, float]:
        """In an orthonormal basis of the rows, at any damping. Held rows only add coordinates there."""
        rows, epsilon = self.rows, self.epsilon

        def spanned(z: Coordinates) -> tuple[RowSpace, Tensor, Tensor, Tensor]:
            space = RowSpace(z.gradients(rows.gain, rows.cost))
            patch = space.project(z.patch()[:, None])[:, 0]
            return space, patch, *space.rows.split([len(rows.gain), len(rows.cost)])

        coordinates = self._coordinates()
        space, patch, gain, cost = spanned(coordinates[0])
        self.values, own, self.route = row_directions(gain, cost, epsilon, patch)
        self._z, self._lift = coordinates[0], lambda weights: space.lift(own @ weights[:, None])[:, 0]
        told = unseen(_response(gain, cost, epsilon), rows.gain_folds, self.frobenius.size)
        for held in rows.gain_folds:
            values, ways, _ = row_directions(others(gain, held), cost, epsilon, patch)
            self._gain_folds.append(Fold(*with_rest(values, gain[held] @ ways, self._images[held])))
        if not self.held_out:
            self._gain_folds = [Fold(*with_rest(self.values, gain @ own, self._images))]
            self._cost_folds = [Fold(*with_rest(self.values, cost @ own, self._cost_images))]
        for z, held in zip(coordinates[1:], rows.cost_folds):
            if z is not coordinates[0]:
                _, patch, gain, cost = spanned(z)
            values, ways, _ = row_directions(gain, others(cost, held), epsilon, patch)
            self._cost_folds.append(Fold(*with_rest(values, cost[held] @ ways, self._cost_images[held])))
        return told

    def cores(self, weights: Tensor) -> dict[str, Tensor]:
        *_, rest = weights.tolist()
        shown = self._z.to_cores(self._lift(weights[:-1] - rest))
        return {name: core + rest * torch.eye(len(core)).to(core) for name, core in shown.items()}


def _response(gain: Tensor, cost: Tensor, epsilon: float) -> Tensor:
    """U B⁻¹Uᵀ [g, g] of rows [N, m] float64 whose damping is ε, at any ε."""
    values, vectors = torch.linalg.eigh(cost.mT @ cost / len(cost))
    x = gain @ vectors
    return (x / (values.clamp_min(0) + epsilon)) @ x.mT


def times(rows: Tensor, vector: Tensor) -> Tensor:
    """rows @ vector [n] float64, widening what a core's cache holds at a time."""
    return torch.cat([piece.double() @ vector for piece in _pieces(rows)])


def mixture(rows: Tensor, weights: Tensor) -> Tensor:
    """rowsᵀ @ weights [N] float64, likewise."""
    total = weights.new_zeros(rows.shape[1])
    for piece, own in zip(_pieces(rows), weights.split(_step(rows))):
        total += own @ piece.double()
    return total


def _step(rows: Tensor) -> int:
    return max(1, (1 << 17) // rows.shape[1])


def _pieces(rows: Tensor) -> Sequence[Tensor]:
    return rows.split(_step(rows))
