"""The pencils of one module each, from rows and from whatever else structures keep of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sst_kernels.distributed import gather_objects, gather_rows, raise_together, share_by_cost
from sst_kernels.fisher.fisher import Fisher
from sst_kernels.subspace.coordinates import Charts, Coordinates, kronecker_metric, matrix_moments, mean_trace
from sst_kernels.subspace.crossfit import Fold, combinations, complement, unseen, with_rest
from sst_kernels.subspace.filters import Weights
from sst_kernels.subspace.pencils import Pencil, RowPencil, Rows, others
from sst_kernels.subspace.spectrum import directions


@dataclass(frozen=True)
class Part:
    """The pencils of neighbouring modules: λ [M, p], and their directions times the patch's components in S [M, r², p].

    The directions add up to the patch. told: [2] of `unseen`, on the CPU or, shared by ranks, beside them.
    """

    values: Tensor
    directions: Tensor
    route: str
    told: Tensor
    cost_folds: tuple[Fold, ...] = ()
    gain_folds: tuple[Fold, ...] = ()


class ModulePencil(Pencil):
    """What pencils of one module each share: neighbours are solved together, and ranks share the neighbourhoods."""

    def _solve_parts(self, solve: Callable[[int], Part], group: Any) -> tuple[float, float]:
        """`solve` each neighbourhood; the ranks of a `group` hold the same evidence, and all get the same bits. Returns what `unseen` tells."""
        charts = self.frobenius.charts
        costs = [len(c.names) * float(c.scale[0].numel()) ** 3 for c in charts]
        self._parts = _shared(costs, solve, group)
        self.values = torch.cat([part.values.flatten() for part in self._parts])
        self.route = self._parts[0].route
        energy, directions = torch.stack([part.told for part in self._parts]).sum(0).tolist()
        return energy, directions

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

    def _solve(self, damping: float) -> tuple[float, float]:
        few = len(self.rows.gain) + len(self.rows.cost)
        told = self._solve_parts(
            lambda i: (
                self._from_products(i) if few <= self.frobenius.charts[i].scale[0].numel() else self._from_grams(i)
            ),
            self._group,
        )
        for side in ("cost_folds", "gain_folds"):
            folds = zip(*(getattr(part, side) for part in self._parts))
            setattr(self, f"_{side}", [Fold.side_by_side(fold) for fold in folds])
        return told

    def _load(self, charts: Charts) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients [M, r, r, N] in S, and which of N are of the gain and of the cost."""
        rows = self.rows
        cores = charts.load((rows.gain, rows.cost))
        index = torch.arange(cores.shape[-1], device=cores.device)
        return cores, index[: len(rows.gain)], index[len(rows.gain) :]

    def _from_products(self, i: int) -> Part:
        rows, epsilon = self.rows, self.epsilon
        cores, gain, cost = self._load(self.frobenius.charts[i])
        images, cost_images = (cores.diagonal(dim1=1, dim2=2).sum(-1)[:, side] for side in (gain, cost))
        gram: Tensor | None = None
        cost_folds = []
        charts = [z.charts[i] for z in self._every]
        for z, held in zip(charts, [None, *rows.cost_folds]):
            if gram is None or z is not charts[0]:
                x = z.gradients(cores).flatten(1, 2)
                gram = x.mT @ x
            if held is None:
                own, solve = complement(gram, cost, gain, epsilon)
                values, y = combinations(own, images)
                mix = torch.cat([y, -solve(y)], 1) / epsilon
                ways = z.inverses((x @ mix).view(*z.scale.shape, -1)).flatten(1, 2)
                values, ways = with_rest(
                    values, ways, torch.eye(z.scale.shape[-1]).to(ways).flatten().expand(len(ways), -1)
                )
            else:
                rest, _ = complement(gram, others(cost, held), torch.cat([gain, cost[held]]), epsilon)
                sides = slice(0, len(gain)), slice(len(gain), None)
                cost_folds.append(Fold.of_complement(rest, *sides, images, cost_images[:, held]))
        inside = [(others(gain, held), held) for held in rows.gain_folds]
        gain_folds = [Fold.of_complement(own, index, held, images[:, index], images[:, held]) for index, held in inside]
        told = torch.tensor(unseen(own, rows.gain_folds, charts[0].scale[0].numel()), dtype=torch.float64)
        route = f"inner products of {len(gain)} + {len(cost)} rows, {charts[0].scale[0].numel()} coordinates per module"
        return Part(values, ways, route, told, tuple(cost_folds), tuple(gain_folds))

    @cached_property
    def _every(self) -> list[Coordinates]:
        return self._coordinates()

    def _from_grams(self, i: int) -> Part:
        rows, charts = self.rows, self.frobenius.charts[i]
        cores, gain, cost = self._load(charts)
        count = len(gain)
        x = charts.gradients(cores).flatten(1, 2)
        patch = charts.forward(torch.eye(cores.shape[1]).to(charts.scale)).flatten(1)
        sides = x[..., :count], x[..., count:]
        totals = [side @ side.mT for side in sides]

        def solve(without: tuple[int, slice] | None, metric: Tensor) -> tuple[Fold, Tensor, str]:
            """The pencil without some rows of one side, and what it does to these."""
            sums, counts = list(totals), [len(gain), len(cost)]
            held = x[..., :0]
            if without is not None:
                side, part = without
                held = sides[side][..., part]
                sums[side] = sums[side] - held @ held.mT
                counts[side] -= held.shape[-1]
            damped = sums[1] / counts[1] + self.epsilon * metric
            values, ways, route = directions(sums[0] / counts[0], damped, patch)
            return Fold(values.flatten(), (held.mT @ ways).movedim(1, 0).flatten(1)), ways, route

        metrics = self._metrics(i)
        whole, ways, route = solve(None, metrics[0])
        cost_folds = [solve((1, held), metric)[0] for held, metric in zip(rows.cost_folds, metrics[1:])]
        gain_folds = [solve((0, held), metrics[0])[0] for held in rows.gain_folds]
        told = torch.zeros(2, dtype=torch.float64)
        if count < len(patch[0]):  # else gain rows show every direction
            damped = totals[1] / len(cost) + self.epsilon * metrics[0]
            own = sides[0].mT @ torch.linalg.solve(damped, sides[0])
            told = torch.tensor(unseen(own, rows.gain_folds, len(patch[0])), dtype=torch.float64)
        ways = charts.inverses(ways.view(*charts.scale.shape, -1)).flatten(1, 2)
        return Part(whole.values.view(len(x), -1), ways, route, told, tuple(cost_folds), tuple(gain_folds))

    def _metrics(self, i: int) -> list[Tensor]:
        """M [M, r², r²] or [r², r²] in Frobenius coordinates, of the whole and of each fold."""
        charts = self.frobenius.charts[i]
        if self._moments is None:
            eye = torch.eye(charts.scale[0].numel()).to(charts.scale)
            return [eye] * (1 + len(self.rows.cost_folds))
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
            hidden = values <= 2 * len(eye) * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
            told = torch.tensor([0, int(hidden.sum())], dtype=torch.float64)
            return Part(values, charts.inverses(ways.view(*charts.scale.shape, -1)).flatten(1, 2), route, told)

        self._raise(*self._solve_parts(solve, group))

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
    told = part.told.to(part.values.device)
    return [part.values, part.directions, told, *(t for fold in folds for t in (fold.values, fold.responses))]


def _part(route: str, count: int, tensors: list[Tensor]) -> Part:
    values, ways, told, *rest = tensors
    folds = [Fold(*pair) for pair in zip(rest[::2], rest[1::2])]
    return Part(values, ways, route, told, tuple(folds[:count]), tuple(folds[count:]))
