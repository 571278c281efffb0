"""`subspace`: which directions of a patch buy most gain per cost, and the filters that keep them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from sst_kernels.fisher.fisher import Fisher
from sst_kernels.gevp import LowRank
from sst_kernels.profiling import stage
from sst_kernels.subspace.coordinates import Coordinates, products
from sst_kernels.subspace.crossfit import Fold, complement, folds_of
from sst_kernels.subspace.filters import WEIGHTS, Weights
from sst_kernels.subspace.patch import Patch, Prediction
from sst_kernels.subspace.rowspace import RowSpace
from sst_kernels.subspace.spectrum import (
    Spectrum,
    block_grams,
    dense_blocks,
    global_spectrum,
    module_spectra,
    per_sequence,
)

_PATH = 161
_EXACT = 1e-13  # damping per coordinate below which inner products would tell folds to less than three digits


def subspace(
    gain: Fisher,
    cost: Fisher,
    *,
    scope: str = "global",
    metric: str = "kronecker",
    damping: float = 1.0,
    folds: int = 4,
    mix_points: bool = False,
    group: Any = None,
) -> Subspace:
    """Solve F_gain v = λ (F_cost + ε M) v for the adapter that both Fishers describe.

    λ is the gain per unit of cost along v. F_cost has the rank of its samples; the damping metric M tells what the other
    directions cost. Either metric is scaled to tr M = n in Frobenius coordinates, and ε = damping · tr(F_cost)/n there.

    Args:
        gain, cost: core-space Fishers of the same adapter weights (for a safety patch: refusals, benign answers).
        scope: "global" solves one pencil over all modules, exactly from the aligned rows (structure "full") or from the sketches
            ("lowrank"); "module" one per module (any structure), ranked on one λ scale.
        metric: "kronecker", the Kronecker product per module with the marginals of F_cost itself (see `Coordinates`), or
            "frobenius", ‖ΔW‖². Nothing depends on the gauge of the adapter in either.
        damping: trace of the damping term over that of F_cost, 1e-100 to 1e100.
        folds: cross-fitting folds for held-out predictions (at least 2); groups of samples stay together.
        mix_points: allow Fishers taken at different evaluation points. Points that were both given explicitly to
            `fisher_accumulate` count as asked for.
        group: torch.distributed group whose ranks hold the same Fishers and share the solves of scope "module" by cost; every
            rank gets the whole result.

    Raises TypeError for what is no Fisher; ValueError when the Fishers hold no sequences or too few for the folds, do not describe
    one adapter, are in factor space, or lie at different points without being asked for.
    """
    for fisher, name in ((gain, "gain"), (cost, "cost")):
        if not isinstance(fisher, Fisher):
            raise TypeError(f"{name} must be a Fisher (fisher_accumulate, Fisher.load), got {type(fisher).__name__}")
        if not fisher.counts.sequences:
            raise ValueError(f"the {name} Fisher holds no sequences: run backward passes before solving")
    if scope not in ("global", "module"):
        raise ValueError(f'scope: expected "global" or "module", got {scope!r}')
    if metric not in ("kronecker", "frobenius"):
        raise ValueError(f'metric: expected "kronecker" or "frobenius", got {metric!r}')
    if not 1e-100 <= damping <= 1e100:  # its products with F stay within float64
        raise ValueError(f"damping must lie in 1e-100 … 1e100 (the cost Fisher alone is singular), got {damping}")
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    gain.check_same(cost, what="solve the pencil of two Fishers")
    if gain.meta["space"] != "core":
        raise ValueError(
            f"subspace works in core space, these Fishers are in {gain.meta['space']} space: accumulate with space='core'"
        )
    points = (str(gain.meta["point"]), str(cost.meta["point"]))
    if points[0] != points[1] and not (mix_points or (gain.meta["point_given"] and cost.meta["point_given"])):
        raise ValueError(
            f"the Fishers lie at different points {points}: give point= to both passes, or mix_points=True, to ask for that"
        )
    return Subspace(gain, cost, scope, metric, damping, folds, group)


@dataclass
class _System:
    """Coordinates z, and in the space that the rows span there: the patch [Σ m] and the rows of both Fishers [N, Σ m]."""

    z: Coordinates
    space: RowSpace
    patch: Tensor
    gain: Tensor
    cost: Tensor

    def products(self) -> Tensor:
        """Inner products of all rows, the gain's first."""
        return self.space.rows @ self.space.rows.T


@dataclass
class Subspace:
    """The solved pencil. `values` are the λ of all directions, descending; filters return a `Patch`."""

    gain: Fisher = field(repr=False)
    cost: Fisher = field(repr=False)
    scope: str
    metric: str
    damping: float
    folds: int
    group: Any = field(default=None, repr=False)

    @stage("subspace")
    def __post_init__(self) -> None:
        self._has_rows = all(
            f.meta["structure"] == "full" and f.meta["sample"] == "sequence" and not _folded(f)
            for f in (self.gain, self.cost)
        )
        device = next(iter(self.gain.values())).device
        frobenius = Coordinates(list(self.gain.blocks.values()), self.gain.metric, device)
        self._labels = self.cost.counts.labels / self.cost.counts.sequences
        self._cost_folds: list[Fold] = []
        self._system: _System | None = None
        if self._has_rows or self.scope == "global":
            self._from_rows(frobenius, device)
        else:
            self._from_blocks(frobenius, device)

    def _from_rows(self, frobenius: Coordinates, device: torch.device) -> None:
        """Solve in the space of the rows. Held rows only add coordinates there: a fold's pencil is what it is without them."""
        given = self._rows_of(self.gain).to(device), self._rows_of(self.cost).to(device)
        for name, rows in zip(("gain", "cost"), given):
            if not isfinite(float(torch.linalg.vector_norm(rows, dtype=torch.float64))):
                raise ValueError(f"the {name} Fisher holds rows that are not finite: were its gradients?")
        folds: list[Tensor] = []
        if self._has_rows:
            self._gain_fold, of_cost = (
                folds_of(f.groups, self.folds, n).to(device) for f, n in ((self.gain, "gain"), (self.cost, "cost"))
            )
            folds = [of_cost == fold for fold in range(self.folds)]
        charts = [frobenius] * (1 + len(folds))
        sums = frobenius.moments(given[1], folds or [slice(None)])
        moments = [torch.stack(x) for x in zip(*sums)]  # of each neighbourhood [folds, 2, M, r, r]
        total = sum(float(x[:, 0].diagonal(dim1=-2, dim2=-1).sum()) for x in moments)
        self._epsilon = self._absolute(total / len(given[1]), frobenius.size)
        if self.metric == "kronecker":
            every = list(range(len(sums)))
            parts = [every, *([j for j in every if j != i] for i in range(len(folds)))]
            charts = [frobenius.kronecker([x[part].sum(0) for x in moments]) for part in parts]
        self._system = own = self._in(charts[0], given)
        self._z, self._patch, self._slices = own.z, own.patch, own.space.slices
        self._spectra = self._solve(own)
        exact = self.damping > _EXACT * frobenius.size and sum(map(len, given)) <= frobenius.size
        self._by_products = bool(folds) and self.scope == "global" and exact
        self._cost_folds = self._without_cost(folds, charts[1:], given)

    def _without_cost(self, folds: list[Tensor], charts: list[Coordinates], given: tuple[Tensor, Tensor]) -> list[Fold]:
        """The pencils without each of the `folds` of cost rows, in its own of the `charts`."""
        own = self._system
        assert own is not None
        if not self._by_products:
            systems = (own if z is own.z else self._in(z, given) for z in charts)
            return [Fold.of_spectra(self._solve(s, cost=~held), s.cost[held]) for s, held in zip(systems, folds)]
        grams = [own.products()] * len(folds) if charts[0] is own.z else products(given, charts)
        count, images, out = len(own.gain), own.gain @ own.patch, []
        for gram, held in zip(grams, folds):
            kept = torch.cat([held.new_zeros(count), ~held])
            rest = complement(gram, kept, self._epsilon)
            out.append(Fold.of_complement(rest, slice(0, count), slice(count, None), images))
        return out

    def _from_blocks(self, frobenius: Coordinates, device: torch.device) -> None:
        self._z = frobenius
        cost = dense_blocks(self.cost, frobenius, device)
        self._epsilon = self._absolute(sum(float(b.trace()) for b in cost), frobenius.size)
        if self.metric == "kronecker":
            self._z = frobenius.kronecker(frobenius.matrix_moments(dict(zip(self.cost, cost))))
            cost = dense_blocks(self.cost, self._z, device)
        self._blocks = dense_blocks(self.gain, self._z, device), cost
        self._patch, self._slices = self._z.patch().to(device), list(self._z.slices.values())
        self._spectra = module_spectra(*self._blocks, self._epsilon, self._patch, self._slices, self.group)

    def _in(self, z: Coordinates, given: tuple[Tensor, Tensor]) -> _System:
        """Gain and cost rows [N, n] with respect to S, moved into z and there into the space they span."""
        rows = z.gradients(*given)
        space = RowSpace(rows, [slice(0, z.size)] if self.scope == "global" else list(z.slices.values()))
        patch = space.project(z.patch().to(rows.device)[:, None])[:, 0]
        return _System(z, space, patch, *space.rows.split([len(own) for own in given]))

    @property
    def values(self) -> Tensor:
        """All stored λ, descending, float64."""
        return torch.cat([s.values for s in self._spectra]).sort(descending=True).values

    @property
    def epsilon(self) -> float:
        """The absolute damping ε that was added, in units of F_cost per unit of the metric."""
        return self._epsilon

    @property
    def route(self) -> str:
        """How the eigenproblem was solved, and why."""
        return self._spectra[0].route

    def soft(self, mu: float | None = None, *, kl_budget: float | None = None) -> Patch:
        """w = λ/(λ+μ): the exact minimiser of (s'−s)ᵀF_gain(s'−s) + μ s'ᵀ(F_cost+εM)s'.

        Give μ, or `kl_budget` in nats per label token: the smallest μ whose predicted cost stays within it.
        """
        return self._choose("soft", mu, kl_budget)

    def threshold(self, mu: float | None = None, *, kl_budget: float | None = None) -> Patch:
        """w = 1 where λ > μ, else 0."""
        return self._choose("threshold", mu, kl_budget)

    def top_k(self, k: int | None = None, *, kl_budget: float | None = None) -> Patch:
        """w = 1 for the k directions of largest λ over the whole model, else 0; or the largest k within `kl_budget`."""
        if k is not None and not (0 <= k <= len(self.values) and k == int(k)):
            raise ValueError(
                f"k must be a whole number in 0 … {len(self.values)} (directions with a stored λ), got {k}"
            )
        return self._choose("top_k", k, kl_budget)

    def predict_cost(self, coordinates: Mapping[str, Tensor]) -> float:
        """½ zᵀ F_cost z in nats per label token for any S [r, r] per module (all rows, no holding out)."""
        z = self._z.from_cores(coordinates)[:, None]
        return self._cost(z if self._system is None else self._system.space.project(z)).item() / self._labels

    def cost_path(self, filter: str, parameters: Tensor) -> Tensor:
        """Held-out predicted cost in nats per label token of `filter` at each of `parameters` [G]."""
        return self._predicted(WEIGHTS[filter], parameters) / self._labels

    def _solve(
        self, system: _System, gain: Tensor | slice = slice(None), cost: Tensor | slice = slice(None)
    ) -> list[Spectrum]:
        """The pencil of those rows of each side."""
        u, w = system.gain[gain], system.cost[cost]
        if self.scope == "global":
            return global_spectrum(u / len(u) ** 0.5, w / len(w) ** 0.5, self._epsilon, system.patch)
        grams, costs = block_grams(u, self._slices), block_grams(w, self._slices)
        return module_spectra(grams, costs, self._epsilon, system.patch, self._slices, self.group)

    def _absolute(self, trace: float, size: int) -> float:
        if trace == 0:
            raise ValueError("the cost Fisher is zero: is the adapter trained (lora_B is zero at the start)?")
        return self.damping * trace / size

    def _rows_of(self, fisher: Fisher) -> Tensor:
        """Rows [N, n] with F = rowsᵀ rows / N per sequence: the samples', or a sketch's."""
        if self._has_rows:
            return fisher.rows()
        operator = getattr(fisher.joint, "operator", lambda: None)()
        if not isinstance(operator, LowRank):
            raise ValueError(
                f"scope='global' needs cross-module statistics, which structure {fisher.meta['structure']!r} (scope={fisher.meta['scope']!r}) "
                "does not keep: accumulate with structure='full' or 'lowrank', or use scope='module'"
            )
        return operator.rows * (per_sequence(fisher) * len(operator.rows)) ** 0.5

    @stage("filter")
    def _choose(self, name: str, parameter: float | None, kl_budget: float | None) -> Patch:
        if parameter is None and kl_budget is not None:
            if not kl_budget >= 0:
                raise ValueError(f"kl_budget must not be negative, got {kl_budget}")
            parameter = self._within(name, kl_budget)
        elif parameter is None or kl_budget is not None:
            raise ValueError(f"{name}: give exactly one of its parameter and kl_budget")
        elif not parameter >= 0:
            raise ValueError(f"{name}: the parameter must not be negative, got {parameter}")
        chosen = torch.tensor([float(parameter)], dtype=torch.float64)
        z, cost, kept = (
            f(WEIGHTS[name], chosen) for f in (partial(self._assemble, self._spectra), self._predicted, self._kept)
        )
        in_sample = self._cost(z).item() / self._labels
        cores = self._z.to_cores((z if self._system is None else self._system.space.lift(z))[:, 0])
        prediction = Prediction(
            held_out=bool(self._cost_folds),
            cost_per_label=cost.item() / self._labels,
            cost_per_sequence=cost.item(),
            in_sample_cost_per_label=in_sample,
            plain_cost_per_label=self._cost(self._patch[:, None]).item() / self._labels,
            gain_kept=kept.item(),
        )
        return Patch(
            cores,
            name,
            float(parameter),
            prediction,
            self._energies(cores),
            self.scope,
            (str(self.gain.meta["point"]), str(self.cost.meta["point"])),
        )

    def _energies(self, cores: Mapping[str, Tensor]) -> dict[str, float]:
        """‖ΔW'‖²_F / ‖ΔW‖²_F per module."""
        kept = {}
        for name, block in self.gain.blocks.items():
            left, right = (x.to(cores[name].device) for x in self.gain.metric[block.module])
            whole = float((left * right).sum())
            kept[name] = float((cores[name] * (left @ cores[name] @ right)).sum()) / whole if whole > 0 else 0.0
        return kept

    def _within(self, name: str, kl_budget: float) -> float:
        """The parameter nearest to keeping everything whose path, walked from keeping nothing, never exceeds the budget.

        Demanding it of the whole path makes the kept part grow with the budget and the prediction stay below it.
        """
        path, between = self._path(name)
        for refine in (True, False):
            allowed = self.cost_path(name, path) <= kl_budget
            last = int(allowed.to(torch.int8).cummin(0).values.sum()) - 1
            if last < 0:
                return 0.0 if name == "top_k" else float("inf")
            if refine and last < len(path) - 1:
                path = between(path[last], path[last + 1])
            else:
                break
        return float(path[last])

    def _path(self, name: str) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """Parameters from keeping nothing to keeping everything, and how to refine between two of them."""
        values = self.values
        if name == "top_k":

            def counts(low: float | Tensor, high: float | Tensor) -> Tensor:
                steps = min(int(high) - int(low) + 1, _PATH)
                return torch.linspace(float(low), float(high), steps, dtype=torch.float64).round()

            return counts(0, len(values)), counts
        positive = values[values > 0]
        if not len(positive):
            raise ValueError("the gain Fisher is zero: there is no direction to keep")
        top, bottom = positive[0].log10() + 4, positive[-1].log10() - 4

        def between(low: Tensor, high: Tensor) -> Tensor:
            return torch.logspace(float(low.log10()), float(high.log10()), 33, dtype=torch.float64)

        return torch.logspace(float(top), float(bottom), _PATH, dtype=torch.float64), between

    def _predicted(self, weights: Weights, parameters: Tensor) -> Tensor:
        """Cost per sequence [G], held out where there are rows to hold out.

        Only cost rows are held out: without some gain rows the filter would keep less, and its cost be told too small.
        """
        if not self._cost_folds:
            return self._cost(self._assemble(self._spectra, weights, parameters))
        total = torch.stack([fold.energy(weights, parameters) for fold in self._cost_folds]).sum(0)
        return 0.5 * total / sum(len(fold.responses) for fold in self._cost_folds)

    def _kept(self, weights: Weights, parameters: Tensor) -> Tensor:
        """Gain of the filtered patch over that of the whole patch [G], on gain rows held out where there are any."""
        if not self._cost_folds:
            return self._gain(self._assemble(self._spectra, weights, parameters)) / self._gain(self._patch[:, None])
        assert self._system is not None
        kept = torch.stack([fold.energy(weights, parameters) for fold in self._gain_folds]).sum(0)
        return kept / float((self._system.gain @ self._patch).square().sum())

    @cached_property
    def _gain_folds(self) -> list[Fold]:
        own, kept = self._system, [self._gain_fold != fold for fold in range(self.folds)]
        assert own is not None
        if not self._by_products:
            return [Fold.of_spectra(self._solve(own, gain=inside), own.gain[~inside]) for inside in kept]
        is_cost = torch.arange(len(own.space.rows), device=own.gain.device) >= len(own.gain)
        rest, images = complement(own.products(), is_cost, self._epsilon), own.gain @ own.patch
        return [Fold.of_complement(rest, inside, ~inside, images[inside]) for inside in kept]

    def _assemble(self, spectra: list[Spectrum], weights: Weights, parameters: Tensor) -> Tensor:
        """Filtered patches [Σ m, G] in the pencil's coordinates, one column per parameter; top-k ranks all spectra together."""
        values = torch.cat([s.values for s in spectra])
        table = weights(values, parameters.to(values))
        out = torch.empty(len(self._patch), len(parameters), dtype=torch.float64, device=self._patch.device)
        for spectrum, part in zip(spectra, table.split([len(s.values) for s in spectra])):
            out[spectrum.where] = spectrum.filtered(part)
        return out

    def _cost(self, z: Tensor) -> Tensor:
        return 0.5 * self._form(1, z)

    def _gain(self, z: Tensor) -> Tensor:
        return self._form(0, z)

    def _form(self, side: int, z: Tensor) -> Tensor:
        """zᵀ F z per column, on the pencil's own data."""
        if self._system is not None:
            rows = (self._system.gain, self._system.cost)[side]
            return (rows @ z).square().sum(0).cpu() / len(rows)
        parts = [(z[s] * (m @ z[s])).sum(0) for s, m in zip(self._slices, self._blocks[side])]
        return sum(parts[1:], parts[0]).cpu()


def _folded(fisher: Fisher) -> bool:
    return any(getattr(s, "folded", False) for s in ([fisher.joint] if fisher.joint is not None else fisher.values()))
