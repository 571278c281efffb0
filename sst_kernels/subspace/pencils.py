"""The pencil F_gain v = λ (F_cost + εM) v, solved from each kind of evidence that Fishers keep.

    AcrossModules   one pencil over all modules, from rows (per-sample gradients, or those of a sketch)
    PerModule       one pencil per module, from rows
    Blocks          one pencil per module, from whatever a structure keeps of it

Rows can be held out. The pencil of fold i is without the cost rows of fold i in every respect, its metric M included: taking the
metric of all rows for every fold halves the predicted cost (SmolLM2-135M, 64 + 224 rows: 0.51 to 0.66 of it), since one
prompt's gradients then raise the price of exactly the directions that they lie in.

Where there are fewer rows than coordinates, everything but the patch itself comes from inner products of the rows (see `crossfit`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from sst_kernels.distributed import gather_objects, gather_rows, raise_together, share_by_cost
from sst_kernels.fisher.fisher import Fisher
from sst_kernels.gevp.operators import power_of_two
from sst_kernels.subspace.coordinates import Charts, Coordinates, kronecker_metric, matrix_moments, mean_trace, products
from sst_kernels.subspace.crossfit import Fold, combinations, complement
from sst_kernels.subspace.filters import Weights
from sst_kernels.subspace.rowspace import RowSpace
from sst_kernels.subspace.spectrum import directions, row_directions

_LOST = 1e-8  # relative error of a patch, at most, up to which it is taken from inner products of rows
_SINGLE = 1e-2  # and of a fold's prediction, up to which it is taken from products in float32
_LARGE = 1 << 20  # numbers in the rows from which float32 is worth it


class Pencil(ABC):
    """A solved pencil. Costs and gains are ½ zᵀF_cost z and zᵀF_gain z, per sequence.

    values: λ [p] ≥ 0, group after group. epsilon: ε, absolute. route: how it was solved. held_out: whether predictions are
    of rows that the pencils have not seen. frobenius: coordinates whose metric is ‖ΔW‖².
    """

    frobenius: Coordinates
    values: Tensor
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


@dataclass(frozen=True)
class Rows:
    """Gradients with respect to S of both sides [N, n] (any float dtype); F = rowsᵀrows / N per sequence.

    gain_fold, cost_fold: the fold of each row in 0 … folds − 1; folds = 0 holds nothing out.
    """

    gain: Tensor
    cost: Tensor
    folds: int = 0
    gain_fold: Tensor | None = None
    cost_fold: Tensor | None = None

    def __post_init__(self) -> None:
        for name, rows in (("gain", self.gain), ("cost", self.cost)):
            if not (isfinite(float(rows.sum())) or bool(rows.isfinite().all())):  # a sum alone may overflow
                raise ValueError(f"the {name} Fisher holds rows that are not finite: were its gradients?")

    def held(self, side: Literal["gain", "cost"]) -> list[Tensor]:
        """For each fold, the mask of the side's rows that it holds out."""
        of = {"gain": self.gain_fold, "cost": self.cost_fold}[side]
        return [] if of is None else [of == i for i in range(self.folds)]


class RowPencil(Pencil):
    """What the pencils of rows share: metrics of the whole and of each fold, and predictions from `Fold`s."""

    def __init__(self, rows: Rows, z: Coordinates, metric: str, damping: float):
        self.rows, self.frobenius = rows, z
        self.held_out = rows.folds > 0
        held = rows.held("cost")
        every = torch.arange(len(rows.cost), device=rows.cost.device)
        sums = z.moments(rows.cost, [every[mask] for mask in held] or [every])
        stacked = [torch.stack(x) for x in zip(*sums)]  # of each neighbourhood [folds, 2, M, r, r]
        total = sum(float(x[:, 0].diagonal(dim1=-2, dim2=-1).sum()) for x in stacked)
        self._damp(damping, total / len(rows.cost), z.size)
        folds = list(range(len(sums)))
        parts = [folds, *([j for j in folds if j != i] for i in range(len(held)))]
        self._moments = [[x[part].sum(0) for x in stacked] for part in parts] if metric == "kronecker" else None
        self._row = power_of_two(torch.tensor((total / len(rows.cost)) ** 0.5))
        self._cost_folds: list[Fold] = []
        self._gain_folds: list[Fold] = []
        self._solve(damping)

    @abstractmethod
    def _solve(self, damping: float) -> None:
        """Set values, route and the folds; without rows to hold out one fold of all rows for each side."""

    def _coordinates(self) -> list[Coordinates]:
        """z of the whole and of each fold."""
        if self._moments is None:
            return [self.frobenius] * (1 + self.rows.folds)
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

    def _solve(self, damping: float) -> None:
        count, size = len(self.rows.gain) + len(self.rows.cost), self.frobenius.size
        exact = torch.finfo(torch.float64).eps * size <= _LOST * damping
        (self._from_products if exact and count <= size else self._from_span)(damping)

    def _from_products(self, damping: float) -> None:
        rows, epsilon = self.rows, self.epsilon
        coordinates = self._coordinates()
        distinct = list(dict.fromkeys(coordinates))
        grams = products((rows.gain, rows.cost), distinct, self._unit(damping, self.frobenius.size))
        grams = grams if len(distinct) > 1 else grams * len(coordinates)
        gain = torch.arange(len(rows.gain), device=rows.gain.device)
        cost = torch.arange(len(rows.cost), device=rows.gain.device) + len(gain)
        own, solved = complement(grams[0], cost, gain, epsilon)
        self.values, y = combinations(own, self._images)
        mix = torch.cat([y, -solved @ y]) / epsilon  # of all rows, in z

        def lift(weights: Tensor) -> Tensor:
            parts = (mix @ weights).split([len(gain), len(cost)])
            mixed = mixture(rows.gain, parts[0]) + mixture(rows.cost, parts[1])
            return coordinates[0].gradients(mixed[None])[0]

        self._z, self._lift = coordinates[0], lift
        self.route = f"inner products of {len(gain)} + {len(cost)} rows, {self.frobenius.size} coordinates"
        for gram, held in zip(grams[1:], rows.held("cost")):
            rest, _ = complement(gram, cost[~held], torch.cat([gain, cost[held]]), epsilon)
            self._cost_folds.append(Fold.of_complement(rest, slice(0, len(gain)), slice(len(gain), None), self._images))
        for held in rows.held("gain"):
            self._gain_folds.append(Fold.of_complement(own, ~held, held, self._images[~held]))
        if not rows.folds:
            gain_part, cost_part = (grams[0] @ mix).split([len(gain), len(cost)])
            self._gain_folds, self._cost_folds = [Fold(self.values, gain_part)], [Fold(self.values, cost_part)]

    def _from_span(self, damping: float) -> None:
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
        for held in rows.held("gain"):
            values, ways, _ = row_directions(gain[~held], cost, epsilon, patch)
            self._gain_folds.append(Fold(values, gain[held] @ ways))
        if not rows.folds:
            self._gain_folds = [Fold(self.values, gain @ own)]
            self._cost_folds = [Fold(self.values, cost @ own)]
        for z, held in zip(coordinates[1:], rows.held("cost")):
            if z is not coordinates[0]:
                _, patch, gain, cost = spanned(z)
            values, ways, _ = row_directions(gain, cost[~held], epsilon, patch)
            self._cost_folds.append(Fold(values, cost[held] @ ways))

    def cores(self, weights: Tensor) -> dict[str, Tensor]:
        return self._z.to_cores(self._lift(weights))


@dataclass(frozen=True)
class Part:
    """The pencils of neighbouring modules: λ [M, p], and their directions times the patch's components in S [M, r², p]."""

    values: Tensor
    directions: Tensor
    route: str
    cost_folds: tuple[Fold, ...] = ()
    gain_folds: tuple[Fold, ...] = ()


class ModulePencil(Pencil):
    """What pencils of one module each share: neighbours are solved together, and ranks share the neighbourhoods."""

    def _solve_parts(self, solve: Callable[[int], Part], group: Any) -> None:
        """`solve` each neighbourhood; the ranks of a `group` hold the same evidence, and all get the same bits."""
        charts = self.frobenius.charts
        costs = [len(c.names) * float(c.scale[0].numel()) ** 3 for c in charts]
        self._parts = _shared(costs, solve, group)
        self.values = torch.cat([part.values.flatten() for part in self._parts])
        self.route = self._parts[0].route

    def cores(self, weights: Tensor) -> dict[str, Tensor]:
        cores: dict[str, Tensor] = {}
        for charts, (part, own) in zip(self.frobenius.charts, self._split(weights[:, None])):
            cores |= zip(charts.names, (part.directions @ own).view(charts.scale.shape))
        return cores

    def _split(self, table: Tensor) -> list[tuple[Part, Tensor]]:
        """Each part with its share [M, p, G] of a table [Σ M p, G]."""
        shares = table.split([part.values.numel() for part in self._parts])
        return [(part, own.view(*part.values.shape, -1)) for part, own in zip(self._parts, shares)]


class PerModule(RowPencil, ModulePencil):
    """One pencil for the rows of each module; what the filtered modules cost together is told by the whole rows."""

    def __init__(self, rows: Rows, z: Coordinates, metric: str, damping: float, group: Any = None):
        self._group = group
        super().__init__(rows, z, metric, damping)

    def _solve(self, damping: float) -> None:
        few = len(self.rows.gain) + len(self.rows.cost)
        self._solve_parts(
            lambda i: (
                self._from_products(i) if few <= self.frobenius.charts[i].scale[0].numel() else self._from_grams(i)
            ),
            self._group,
        )
        for side in ("cost_folds", "gain_folds"):
            folds = zip(*(getattr(part, side) for part in self._parts))
            setattr(self, f"_{side}", [Fold.side_by_side(fold) for fold in folds])

    def _load(self, charts: Charts) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients [M, r, r, N] in S, and which of N are of the gain and of the cost."""
        rows = self.rows
        cores = charts.load((rows.gain, rows.cost))
        index = torch.arange(cores.shape[-1], device=cores.device)
        return cores, index[: len(rows.gain)], index[len(rows.gain) :]

    def _from_products(self, i: int) -> Part:
        rows, epsilon = self.rows, self.epsilon
        cores, gain, cost = self._load(self.frobenius.charts[i])
        images = cores.diagonal(dim1=1, dim2=2).sum(-1)[:, gain]
        gram: Tensor | None = None
        cost_folds = []
        charts = [z.charts[i] for z in self._every]
        for z, held in zip(charts, [None, *rows.held("cost")]):
            if gram is None or z is not charts[0]:
                x = z.gradients(cores).flatten(1, 2)
                gram = x.mT @ x
            if held is None:
                own, solved = complement(gram, cost, gain, epsilon)
                values, y = combinations(own, images)
                mix = torch.cat([y, -solved @ y], 1) / epsilon
                ways = z.inverses((x @ mix).view(*z.scale.shape, -1)).flatten(1, 2)
            else:
                rest, _ = complement(gram, cost[~held], torch.cat([gain, cost[held]]), epsilon)
                cost_folds.append(Fold.of_complement(rest, slice(0, len(gain)), slice(len(gain), None), images))
        gain_folds = [Fold.of_complement(own, ~held, held, images[:, ~held]) for held in rows.held("gain")]
        route = f"inner products of {len(gain)} + {len(cost)} rows, {charts[0].scale[0].numel()} coordinates per module"
        return Part(values, ways, route, tuple(cost_folds), tuple(gain_folds))

    @cached_property
    def _every(self) -> list[Coordinates]:
        return self._coordinates()

    def _from_grams(self, i: int) -> Part:
        rows, charts = self.rows, self.frobenius.charts[i]
        cores, gain, cost = self._load(charts)
        x = charts.gradients(cores).flatten(1, 2)
        patch = charts.forward(torch.eye(cores.shape[1]).to(charts.scale)).flatten(1)
        sides = x[..., gain], x[..., cost]
        totals = [side @ side.mT for side in sides]

        def solve(without: tuple[int, Tensor] | None, metric: Tensor) -> tuple[Fold, Tensor, str]:
            """The pencil without some rows of one side, and what it does to these."""
            sums, counts = list(totals), [len(gain), len(cost)]
            held = x[..., :0]
            if without is not None:
                side, mask = without
                held = sides[side][..., mask]
                sums[side] = sums[side] - held @ held.mT
                counts[side] -= held.shape[-1]
            damped = sums[1] / counts[1] + self.epsilon * metric
            values, ways, route = directions(sums[0] / counts[0], damped, patch)
            return Fold(values.flatten(), (held.mT @ ways).movedim(1, 0).flatten(1)), ways, route

        metrics = self._metrics(i)
        whole, ways, route = solve(None, metrics[0])
        cost_folds = [solve((1, held), metric)[0] for held, metric in zip(rows.held("cost"), metrics[1:])]
        gain_folds = [solve((0, held), metrics[0])[0] for held in rows.held("gain")]
        ways = charts.inverses(ways.view(*charts.scale.shape, -1)).flatten(1, 2)
        return Part(whole.values.view(len(x), -1), ways, route, tuple(cost_folds), tuple(gain_folds))

    def _metrics(self, i: int) -> list[Tensor]:
        """M [M, r², r²] or [r², r²] in Frobenius coordinates, of the whole and of each fold."""
        charts = self.frobenius.charts[i]
        if self._moments is None:
            eye = torch.eye(charts.scale[0].numel()).to(charts.scale)
            return [eye] * (1 + self.rows.folds)
        return [kronecker_metric(moments[i], mean) for moments, mean in zip(self._moments, self._means)]

    @cached_property
    def _means(self) -> list[float]:
        return [mean_trace(moments, self.frobenius.size) for moments in self._moments or ()]


class Blocks(ModulePencil):
    """One pencil per module from the Fisher matrices that structures estimate; no rows, so nothing is held out."""

    held_out = False

    def __init__(self, gain: Fisher, cost: Fisher, z: Coordinates, metric: str, damping: float, group: Any = None):
        self.frobenius = z
        self._gain, self._cost = (_matrices(fisher, z) for fisher in (gain, cost))
        inside = [charts.matrices(f) for charts, f in zip(z.charts, self._cost)]
        self._damp(damping, sum(float(f.diagonal(dim1=1, dim2=2).sum()) for f in inside), z.size)
        moments = [matrix_moments(f) for f in inside]
        mean = mean_trace(moments, z.size)

        def solve(i: int) -> Part:
            charts = z.charts[i]
            eye = torch.eye(charts.scale[0].numel()).to(charts.scale)
            own = kronecker_metric(moments[i], mean) if metric == "kronecker" else eye
            patch = charts.forward(torch.eye(charts.scale.shape[-1]).to(charts.scale)).flatten(1)
            values, ways, route = directions(charts.matrices(self._gain[i]), inside[i] + self.epsilon * own, patch)
            return Part(values, charts.inverses(ways.view(*charts.scale.shape, -1)).flatten(1, 2), route)

        self._solve_parts(solve, group)

    def cost(self, cores: Mapping[str, Tensor]) -> float:
        return 0.5 * float(self._form(self._cost, self._stack(cores)))

    def predicted_cost(self, weights: Weights, parameters: Tensor) -> Tensor:
        return 0.5 * self._form(self._cost, self._filtered(weights, parameters))

    def kept_gain(self, weights: Weights, parameters: Tensor) -> Tensor:
        plain = self._form(self._gain, self._stack(self.frobenius.identity()))
        return self._form(self._gain, self._filtered(weights, parameters)) / plain

    def _filtered(self, weights: Weights, parameters: Tensor) -> list[Tensor]:
        """Filtered patches [M, r², G] in S, of each neighbourhood."""
        table = weights(self.values, parameters.to(self.values))
        return [part.directions @ own for part, own in self._split(table)]

    def _stack(self, cores: Mapping[str, Tensor]) -> list[Tensor]:
        return [
            torch.stack([cores[name].to(charts.scale).flatten() for name in charts.names])[..., None]
            for charts in self.frobenius.charts
        ]

    @staticmethod
    def _form(matrices: Sequence[Tensor], s: Sequence[Tensor]) -> Tensor:
        """Σ sᵀFs [G] over the modules, on the CPU."""
        return torch.stack([(x * (f @ x)).sum((0, 1)) for f, x in zip(matrices, s)]).sum(0).cpu()


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


def _matrices(fisher: Fisher, z: Coordinates) -> list[Tensor]:
    """The modules' Fishers [M, r², r²] per sequence in S coordinates, whatever their structure."""
    factor = per_sequence(fisher)
    return [
        torch.stack([fisher[name].dense().to(charts.scale) for name in charts.names]) * factor for charts in z.charts
    ]


def per_sequence(fisher: Fisher) -> float:
    """What turns a Fisher that is divided by its `count` (tokens, labels) into one per sequence."""
    return getattr(fisher.counts, fisher.meta["count"]) / fisher.counts.sequences


def _shared(costs: Sequence[float], solve: Callable[[int], Part], group: Any) -> list[Part]:
    """`solve(i)` for every i, shared by cost between the ranks of a group: each then holds what the others solved."""
    if group is None:
        return [solve(i) for i in range(len(costs))]
    shares = share_by_cost(costs, dist.get_world_size(group))
    solved: dict[int, Part] = {}
    error = None
    try:
        solved = {i: solve(i) for i in sorted(shares[dist.get_rank(group)])}
    except Exception as own:
        error = own
    raise_together(error, group)
    flat = {i: _tensors(part) for i, part in solved.items()}
    about = {i: (part.route, len(part.cost_folds), [t.shape for t in flat[i]]) for i, part in solved.items()}
    pieces = [torch.cat([t.flatten() for ts in flat.values() for t in ts])[:, None]] if flat else []
    mine = pieces[0] if pieces else torch.empty(0, 1, dtype=torch.float64)
    for known, piece in zip(gather_objects(about, group), gather_rows(mine, group), strict=True):
        values = piece[:, 0]
        for i, (route, count, shapes) in known.items():
            sizes = [shape.numel() for shape in shapes]
            share, values = values.split([sum(sizes), len(values) - sum(sizes)])
            solved[i] = _part(route, count, [t.view(shape) for t, shape in zip(share.split(sizes), shapes)])
    return [solved[i] for i in range(len(costs))]


def _tensors(part: Part) -> list[Tensor]:
    folds = (*part.cost_folds, *part.gain_folds)
    return [part.values, part.directions, *(t for fold in folds for t in (fold.values, fold.responses))]


def _part(route: str, count: int, tensors: list[Tensor]) -> Part:
    values, ways, *rest = tensors
    folds = [Fold(*pair) for pair in zip(rest[::2], rest[1::2])]
    return Part(values, ways, route, tuple(folds[:count]), tuple(folds[count:]))
