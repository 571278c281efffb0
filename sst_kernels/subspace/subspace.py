"""`subspace`: which directions of a patch buy most gain per cost, and the filters that keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sst_kernels.fisher.fisher import Fisher
from sst_kernels.profiling import stage
from sst_kernels.subspace.coordinates import WIDTH, Coordinates, module_width
from sst_kernels.subspace.crossfit import folds_of
from sst_kernels.subspace.filters import WEIGHTS, Filter
from sst_kernels.subspace.lora import Lora
from sst_kernels.subspace.modules import Blocks, PerModule
from sst_kernels.subspace.patch import Patch, Prediction
from sst_kernels.subspace.pencils import AcrossModules, Pencil, Rows

Scope = Literal["global", "module"]
Metric = Literal["kronecker", "frobenius"]

_PATH = 161
_REFINED = 33


@stage("subspace")
def subspace(
    gain: Fisher,
    cost: Fisher,
    *,
    scope: Scope = "global",
    metric: Metric = "kronecker",
    damping: float = 1.0,
    folds: int = 4,
    mix_points: bool = False,
    group: Any = None,
) -> Subspace:
    """Solve F_gain v = λ (F_cost + ε M) v for the adapter that both Fishers describe.

    λ is the gain per unit of cost along v. F_cost has the rank of its samples; the damping metric M tells what the other
    directions cost. Either metric is scaled to tr M = n in Frobenius coordinates, and ε = damping · tr(F_cost)/n there.
    F_gain has the rank of its samples, too: to it λ₀ (F_cost + ε M) is added, so that the part of the patch that no sample shows is
    kept in proportion, after all others (`Subspace.unseen`), and a large budget keeps the whole patch.

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

    Example:
        >>> space = sst.subspace(gain, cost, scope="module", folds=2)
        >>> patch = space.soft(kl_budget=0.01)
        >>> 0 < patch.prediction.gain_kept < 1
        True
    """
    for fisher, name in ((gain, "gain"), (cost, "cost")):
        if not isinstance(fisher, Fisher):
            raise TypeError(f"{name} must be a Fisher (fisher_accumulate, Fisher.load), got {type(fisher).__name__}")
        if not fisher.counts.sequences:
            raise ValueError(f"the {name} Fisher holds no sequences: run backward passes before solving")
    for option, value, choices in (("scope", scope, get_args(Scope)), ("metric", metric, get_args(Metric))):
        if value not in choices:
            raise ValueError(f"{option}: expected one of {choices}, got {value!r}")
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
    pencil = _pencil(gain, cost, scope, metric, damping, folds, group)
    return Subspace(gain, cost, scope, metric, damping, folds, pencil)


def _pencil(gain: Fisher, cost: Fisher, scope: Scope, metric: Metric, damping: float, folds: int, group: Any) -> Pencil:
    """The pencil of the kind of evidence that both Fishers hold."""
    device = next(iter(gain.values())).device
    blocks = list(gain.blocks.values())
    width = WIDTH if scope == "global" else module_width(sum(b.size for b in blocks))
    z = Coordinates(blocks, gain.metric, device, width)
    if gain.keeps_rows and cost.keeps_rows:
        of_gain, of_cost = (folds_of(f.groups, folds, n).to(device) for f, n in ((gain, "gain"), (cost, "cost")))
        rows = Rows.dealt(gain.rows().to(device), cost.rows().to(device), of_gain, of_cost, folds)
        if scope == "global":
            return AcrossModules(rows, z, metric, damping)
        return PerModule(rows, z, metric, damping, group)
    if scope == "global":
        return AcrossModules(Rows(gain.joint_rows().to(device), cost.joint_rows().to(device)), z, metric, damping)
    return Blocks(gain, cost, z, metric, damping, group)


@dataclass(frozen=True)
class Subspace:
    """The solved pencil. Filters return a `Patch`.

    Example:
        >>> space = sst.subspace(gain, cost, folds=2)
        >>> len(space.values)  # one λ a gain row, and one for what they leave of the patch
        9
        >>> strengths = [patch.parameter for patch in space.path([0.001, 0.01])]
        >>> strengths[0] > strengths[1]  # a larger budget, a smaller μ
        True
    """

    gain: Fisher = field(repr=False)
    cost: Fisher = field(repr=False)
    scope: Scope
    metric: Metric
    damping: float
    folds: int
    pencil: Pencil = field(repr=False)
    lora: Lora | None = field(default=None, repr=False)

    @cached_property
    def values(self) -> Tensor:
        """All λ > 0 [p], descending, float64, λ₀ included; that of what the samples leave of the patch is among them."""
        values = self.pencil.values.sort(descending=True).values
        return values[values > 0]

    @property
    def unseen(self) -> float:
        """λ₀, the gain per unit of cost of directions that no gain sample shows; 0 where the samples show all of them.

        Measured: what held-out gain samples have, in the mean, in the directions that those of the other folds do not show. Without
        samples to hold out it is the smallest λ.
        """
        return self.pencil.unseen

    @property
    def epsilon(self) -> float:
        """The absolute damping ε that was added, in units of F_cost per unit of the metric."""
        return self.pencil.epsilon

    @property
    def route(self) -> str:
        """How the eigenproblem was solved, and why."""
        return self.pencil.route

    def soft(self, *, mu: float | None = None, kl_budget: float | None = None) -> Patch:
        """w = λ/(λ+μ): the exact minimiser of (s'−s)ᵀ(F_gain+λ₀(F_cost+εM))(s'−s) + μ s'ᵀ(F_cost+εM)s'.

        Give μ, or `kl_budget` in nats per label token: the smallest μ whose predicted cost stays within it, infinity where no
        finite one does. ValueError for both, neither, or a negative one.
        """
        return self._choose("soft", "mu", mu, kl_budget)

    def threshold(self, *, mu: float | None = None, kl_budget: float | None = None) -> Patch:
        """w = 1 where λ > μ, else 0. Arguments as of `soft`."""
        return self._choose("threshold", "mu", mu, kl_budget)

    def top_k(self, k: int | None = None, *, kl_budget: float | None = None) -> Patch:
        """w = 1 for the k directions of largest λ over the whole model, else 0; or the largest k within `kl_budget`.

        ValueError for both, neither, or a k that is no whole number in 0 … the number of `values`.
        """
        if k is not None and not (0 <= k <= len(self.values) and k == int(k)):
            raise ValueError(
                f"k must be a whole number in 0 … {len(self.values)} (directions with a stored λ), got {k}"
            )
        return self._choose("top_k", "k", k, kl_budget)

    @stage("filter")
    def path(self, budgets: Sequence[float], filter: Filter = "soft") -> list[Patch]:
        """The patches of several KL budgets (nats per label token), each as `soft(kl_budget=…)` and the like give it.

        All come from one evaluation of the cost's path. ValueError for an unknown filter or a budget that is no number ≥ 0.
        """
        return [self._patch(filter, parameter) for parameter in self._within(filter, budgets)]

    def predict_cost(self, coordinates: Mapping[str, Tensor]) -> float:
        """½ zᵀ F_cost z in nats per label token for any S [r, r] per module (all rows, no holding out)."""
        return self.pencil.cost(coordinates) / self._labels

    def cost_path(self, filter: Filter, parameters: Tensor) -> Tensor:
        """Held-out predicted cost [G] in nats per label token of `filter` at each of `parameters` [G]."""
        return self.pencil.predicted_cost(WEIGHTS[filter], parameters) / self._labels

    @property
    def _labels(self) -> float:
        return self.cost.counts.labels / self.cost.counts.sequences

    @stage("filter")
    def _choose(self, name: Filter, argument: str, parameter: float | None, kl_budget: float | None) -> Patch:
        if (parameter is None) == (kl_budget is None):
            raise ValueError(f"{name}: give exactly one of {argument} and kl_budget")
        if kl_budget is not None:
            (parameter,) = self._within(name, [kl_budget])
        assert parameter is not None
        if not parameter >= 0:
            raise ValueError(f"{name}: {argument} must not be negative, got {parameter}")
        return self._patch(name, parameter)

    def _patch(self, name: Filter, parameter: float) -> Patch:
        chosen = torch.tensor([float(parameter)], dtype=torch.float64)
        weights, pencil = WEIGHTS[name], self.pencil
        cores = pencil.cores(weights(pencil.values, chosen.to(pencil.values))[:, 0])
        cost = float(pencil.predicted_cost(weights, chosen))
        prediction = Prediction(
            held_out=pencil.held_out,
            cost_per_label=cost / self._labels,
            cost_per_sequence=cost,
            in_sample_cost_per_label=self.predict_cost(cores),
            plain_cost_per_label=self._plain_cost,
            gain_kept=float(pencil.kept_gain(weights, chosen)),
        )
        points = (str(self.gain.meta["point"]), str(self.cost.meta["point"]))
        return Patch(cores, name, float(parameter), prediction, self._energies(cores), self.scope, points, self.lora)

    @cached_property
    def _plain_cost(self) -> float:
        return self.predict_cost(self.pencil.frobenius.identity())

    def _energies(self, cores: Mapping[str, Tensor]) -> dict[str, float]:
        """‖ΔW'‖²_F / ‖ΔW‖²_F per module."""
        z = self.pencil.frobenius
        whole, kept = (z.energies(s) for s in (z.identity(), cores))
        return {name: kept[name] / own if own > 0 else 0.0 for name, own in whole.items()}

    def _within(self, name: Filter, budgets: Sequence[float]) -> list[float]:
        """For each budget the parameter nearest to keeping everything whose path, walked from keeping nothing, never exceeds it.

        Demanding it of the whole path makes the kept part grow with the budget and the prediction stay below it.
        """
        if name not in WEIGHTS:
            raise ValueError(f"filter: expected one of {tuple(WEIGHTS)}, got {name!r}")
        for budget in budgets:
            if not budget >= 0:
                raise ValueError(f"kl_budget must not be negative, got {budget}")
        coarse, costs = self._paths(name)
        nothing = 0.0 if name == "top_k" else float("inf")
        chosen: list[float] = []
        finer: dict[int, Tensor] = {}
        for i, budget in enumerate(budgets):
            last = _last_allowed(costs, budget)
            chosen.append(float(coarse[last]) if last >= 0 else nothing)
            if 0 <= last < len(coarse) - 1 and (name == "top_k" or coarse[last + 1] > 0):
                finer[i] = _between(name, coarse[last], coarse[last + 1])
        if finer:
            told = self.cost_path(name, torch.cat(list(finer.values())))
            for (i, path), own in zip(finer.items(), told.split([len(path) for path in finer.values()])):
                chosen[i] = float(path[max(0, _last_allowed(own, budgets[i]))])
        kept = WEIGHTS[name](self.values, torch.tensor(chosen).to(self.values)).any(0).tolist()
        return [parameter if some else nothing for parameter, some in zip(chosen, kept)]

    def _paths(self, name: Filter) -> tuple[Tensor, Tensor]:
        """Parameters from keeping nothing to keeping everything, and their predicted costs; evaluated once."""
        if name not in self._known:
            if name == "top_k":
                path = _between(name, 0, len(self.values))
            else:
                positive = self.values[self.values > 0].cpu()
                if not len(positive):
                    raise ValueError("the gain Fisher is zero: there is no direction to keep")
                top, bottom = positive[0].log10() + 4, positive[-1].log10() - 4
                path = torch.logspace(float(top), float(bottom), _PATH, dtype=torch.float64)
                path = torch.cat([path, path.new_zeros(1)])
            self._known[name] = path, self.cost_path(name, path)
        return self._known[name]

    @cached_property
    def _known(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {}


def _between(name: Filter, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Parameters from `low` to `high` that refine a path."""
    if name == "top_k":
        return torch.linspace(
            float(low), float(high), min(int(high) - int(low) + 1, _PATH), dtype=torch.float64
        ).round()
    start, end = (float(torch.as_tensor(x).log10()) for x in (low, high))
    return torch.logspace(start, end, _REFINED, dtype=torch.float64)


def _last_allowed(costs: Tensor, budget: float) -> int:
    """Where the costs, walked from the start, last stay within the budget; −1 if nowhere."""
    return int((costs <= budget).to(torch.int8).cummin(0).values.sum()) - 1
