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
from sst_kernels.subspace.coordinates import FrobeniusCoordinates
from sst_kernels.subspace.filters import WEIGHTS, Weights
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


@dataclass(frozen=True)
class Prediction:
    """What the filtered patch is expected to cost and to keep. KL divergences are in nats, ½ zᵀ F_cost z.

    held_out: the rows that judge (of the cost for costs, of the gain for `gain_kept`) were in no pencil that chose the patch
    (cross-fitting); False when the structures keep no rows to hold out, and then the figures are optimistic, by orders of magnitude for few rows.
    cost_per_label, cost_per_sequence: of the filtered patch. in_sample_cost_per_label: the same on the pencil's own rows.
    plain_cost_per_label: of the whole patch, by the same quadratic. gain_kept: zᵀF_gain z of the filtered patch over that of
    the whole patch.
    """

    held_out: bool
    cost_per_label: float
    cost_per_sequence: float
    in_sample_cost_per_label: float
    plain_cost_per_label: float
    gain_kept: float


@dataclass(frozen=True)
class Patch:
    """A filtered patch: ΔW' = scaling · B S' A with S' = coordinates[module] [r, r] (float64; I would be the whole patch).

    filter: "soft", "top_k" or "threshold"; parameter: its μ or k. kept: per module ‖ΔW'‖²_F / ‖ΔW‖²_F.
    """

    coordinates: dict[str, Tensor]
    filter: str
    parameter: float
    prediction: Prediction
    kept: dict[str, float]
    scope: str
    points: tuple[str, str]


def subspace(
    gain: Fisher,
    cost: Fisher,
    *,
    scope: str = "global",
    damping: float = 3.0,
    folds: int = 4,
    mix_points: bool = False,
    group: Any = None,
) -> Subspace:
    """Solve F_gain v = λ (F_cost + ε M) v for the adapter that both Fishers describe.

    M is the Frobenius metric of ΔW, so nothing depends on the gauge of the adapter, and ε = damping · tr(F_cost)/n in its
    coordinates. λ is the gain per unit of cost along v.

    Args:
        gain, cost: core-space Fishers of the same adapter weights (for a safety patch: refusals, benign answers).
        scope: "global" solves one pencil over all modules, exactly from the aligned rows (structure "full") or from the sketches
            ("lowrank"); "module" one per module (any structure), ranked on one λ scale.
        damping: relative damping, positive.
        folds: cross-fitting folds for held-out predictions (at least 2); groups of samples stay together.
        mix_points: allow Fishers taken at different evaluation points. Points that were both given explicitly to
            `fisher_accumulate` count as asked for.
        group: torch.distributed group whose ranks hold the same Fishers and share the solves of scope "module" by cost; every
            rank gets the whole result.

    Raises ValueError when the Fishers do not describe one adapter, are in factor space, lie at different points without being
    asked for, or hold too little data for the folds.
    """
    if scope not in ("global", "module"):
        raise ValueError(f'scope: expected "global" or "module", got {scope!r}')
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping must be positive and finite (the cost Fisher alone is singular), got {damping}")
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    gain.check_same(cost, what="solve the pencil of two Fishers")
    if gain.meta["space"] != "core":
        raise ValueError(
            f"subspace works in core space, these Fishers are in {gain.meta['space']} space: accumulate with space='core'"
        )
    points = (str(gain.meta["point"]), str(cost.meta["point"]))
    asked = mix_points or (gain.meta["point_given"] and cost.meta["point_given"])
    if points[0] != points[1] and not asked:
        raise ValueError(
            f"the Fishers lie at different points {points}: give point= to both passes, or mix_points=True, to ask for that"
        )
    for fisher, name in ((gain, "gain"), (cost, "cost")):
        if not fisher.counts.sequences:
            raise ValueError(f"the {name} Fisher holds no sequences: run backward passes before solving")
    return Subspace(gain, cost, scope, damping, folds, group)


@dataclass
class _Fold:
    """Spectra of the pencil without some rows of one side, and those rows, in the pencil's coordinates."""

    spectra: list[Spectrum]
    held: Tensor


@dataclass
class Subspace:
    """The solved pencil. `values` are the λ of all directions, descending; filters return a `Patch`."""

    gain: Fisher = field(repr=False)
    cost: Fisher = field(repr=False)
    scope: str
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
        self._z = FrobeniusCoordinates(list(self.gain.blocks.values()), self.gain.metric, device)
        self._whole = self._z.patch().to(device)
        self._labels = self.cost.counts.labels / self.cost.counts.sequences
        self._cost_folds: list[_Fold] = []
        self._rows: tuple[Tensor, Tensor] | None = None
        self._space: RowSpace | None = None
        if self._has_rows or self.scope == "global":
            self._from_rows(device)
        else:
            self._patch, self._slices = self._whole, list(self._z.slices.values())
            gain_blocks, cost_blocks = (dense_blocks(f, self._z, device) for f in (self.gain, self.cost))
            self._epsilon = self._absolute(sum(float(b.trace()) for b in cost_blocks))
            self._blocks = (gain_blocks, cost_blocks)
            self._spectra = module_spectra(*self._blocks, self._epsilon, self._patch, self._slices, self.group)

    def _from_rows(self, device: torch.device) -> None:
        """Solve in the space of the rows. Held rows only add coordinates there: a fold's pencil is what it is without them."""
        given = [self._rows_of(f) for f in (self.gain, self.cost)]
        self._space = self._row_space(given, device)
        self._slices = self._space.slices
        self._patch = self._space.project(self._whole[:, None])[:, 0]
        gain, cost = self._rows = self._space.rows.split([len(rows) for rows in given])
        self._epsilon = self._absolute(float(cost.square().sum()) / len(cost))
        self._spectra = self._solve(gain, cost)
        if self._has_rows:
            self._gain_fold, of_cost = (
                _folds_of(f.groups, self.folds, n) for f, n in ((self.gain, "gain"), (self.cost, "cost"))
            )
            self._cost_folds = [
                _Fold(self._solve(gain, cost[of_cost != i]), cost[of_cost == i]) for i in range(self.folds)
            ]

    def _row_space(self, given: list[Tensor], device: torch.device) -> RowSpace:
        rows = torch.empty(sum(map(len, given)), self._z.size, dtype=torch.float64, device=device)
        for name, own, part in zip(("gain", "cost"), given, rows.split([len(own) for own in given])):
            self._z.gradients(own.to(device), out=part)
            if not isfinite(float(torch.linalg.vector_norm(part))):
                raise ValueError(f"the {name} Fisher holds rows that are not finite: were its gradients?")
        whole = [slice(0, self._z.size)]
        return RowSpace(rows, whole if self.scope == "global" else list(self._z.slices.values()))

    @property
    def values(self) -> Tensor:
        """All stored λ, descending, float64."""
        return torch.cat([s.values for s in self._spectra]).sort(descending=True).values

    @property
    def epsilon(self) -> float:
        """The absolute damping ε that was added, in units of F_cost per ‖ΔW‖²_F."""
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
        if k is not None and not 0 <= k <= len(self.values):
            raise ValueError(f"k must lie in 0 … {len(self.values)} (directions with a stored λ), got {k}")
        return self._choose("top_k", k, kl_budget)

    def predict_cost(self, coordinates: Mapping[str, Tensor]) -> float:
        """½ zᵀ F_cost z in nats per label token for any S [r, r] per module (all rows, no holding out)."""
        z = self._z.from_cores(coordinates)[:, None]
        return self._cost(z if self._space is None else self._space.project(z)).item() / self._labels

    def cost_path(self, filter: str, parameters: Tensor) -> Tensor:
        """Held-out predicted cost in nats per label token of `filter` at each of `parameters` [G]."""
        return self._predicted(WEIGHTS[filter], parameters) / self._labels

    def _solve(self, gain: Tensor, cost: Tensor) -> list[Spectrum]:
        if self.scope == "global":
            return global_spectrum(gain / len(gain) ** 0.5, cost / len(cost) ** 0.5, self._epsilon, self._patch)
        grams, costs = block_grams(gain, self._slices), block_grams(cost, self._slices)
        return module_spectra(grams, costs, self._epsilon, self._patch, self._slices, self.group)

    def _absolute(self, trace: float) -> float:
        if trace == 0:
            raise ValueError("the cost Fisher is zero: is the adapter trained (lora_B is zero at the start)?")
        return self.damping * trace / self._z.size

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
        z = (z if self._space is None else self._space.lift(z))[:, 0]
        energy = {
            m: (float(z[s].square().sum()), float(self._whole[s].square().sum())) for m, s in self._z.slices.items()
        }
        prediction = Prediction(
            held_out=bool(self._cost_folds),
            cost_per_label=cost.item() / self._labels,
            cost_per_sequence=cost.item(),
            in_sample_cost_per_label=in_sample,
            plain_cost_per_label=self._cost(self._patch[:, None]).item() / self._labels,
            gain_kept=kept.item(),
        )
        return Patch(
            self._z.to_cores(z),
            name,
            float(parameter),
            prediction,
            {m: part / whole if whole else 0.0 for m, (part, whole) in energy.items()},
            self.scope,
            (str(self.gain.meta["point"]), str(self.cost.meta["point"])),
        )

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
        cost = torch.zeros(len(parameters), dtype=torch.float64)
        for fold in self._cost_folds:
            cost += 0.5 * (fold.held @ self._assemble(fold.spectra, weights, parameters)).square().sum(0).cpu()
        return cost / sum(len(fold.held) for fold in self._cost_folds)

    def _kept(self, weights: Weights, parameters: Tensor) -> Tensor:
        """Gain of the filtered patch over that of the whole patch [G], on gain rows held out where there are any."""
        if not self._cost_folds:
            return self._gain(self._assemble(self._spectra, weights, parameters)) / self._gain(self._patch[:, None])
        kept, whole = torch.zeros(len(parameters), dtype=torch.float64), 0.0
        for fold in self._gain_folds:
            kept += (fold.held @ self._assemble(fold.spectra, weights, parameters)).square().sum(0).cpu()
            whole += float((fold.held @ self._patch).square().sum())
        return kept / whole

    @cached_property
    def _gain_folds(self) -> list[_Fold]:
        assert self._rows is not None
        (gain, cost), fold = self._rows, self._gain_fold
        return [_Fold(self._solve(gain[fold != i], cost), gain[fold == i]) for i in range(self.folds)]

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
        if self._rows is not None:
            rows = self._rows[side]
            return (rows @ z).square().sum(0).cpu() / len(rows)
        parts = [(z[s] * (m @ z[s])).sum(0) for s, m in zip(self._slices, self._blocks[side])]
        return sum(parts[1:], parts[0]).cpu()


def _folded(fisher: Fisher) -> bool:
    return any(getattr(s, "folded", False) for s in ([fisher.joint] if fisher.joint is not None else fisher.values()))


def _folds_of(groups: list[int], folds: int, name: str) -> Tensor:
    """Fold of each row, groups kept whole and dealt out in order of appearance."""
    order = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    if len(order) < folds:
        raise ValueError(
            f"the {name} Fisher holds {len(order)} groups of samples, fewer than folds={folds}: accumulate more or use fewer folds"
        )
    return torch.tensor([order[g] % folds for g in groups])
