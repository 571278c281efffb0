"""What data-aware methods know: Fishers of the safety adapter and input Grams of its modules, collected once, when asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sst_kernels as sst
from sst_kernels.subspace import Metric, Scope

from ..adapters import Adapter
from ..algebra import with_reads
from ..data import Dataset, batches
from ..errors import headlined
from ..passes import fisher_pass, input_pass
from ..pipeline import over_points
from ..session import SAFETY, TASK, Session

PATH: tuple[str | float, ...] = ("reference", 0.5, "patched")


@dataclass
class Evidence:
    """Fitting data on a session. `draws`: label draws per benign prompt. Everything asked for is made once and kept."""

    session: Session
    harm: Dataset
    benign: Dataset
    tokens_per_batch: int = 1024
    draws: int = 2
    damping: float = 1.0
    folds: int = 4
    opening: tuple[int, float] = (4, 3.0)
    input_filter: float = 3.0
    input_rank: int | None = 512
    seed: int = 0
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def fishers(self, structure: str = "full", **options: Any) -> tuple[sst.Fisher, sst.Fisher]:
        """(`gain`, `cost`) with the same structure and options, those of `gain`."""
        of_both = {key: options[key] for key in ("space", "filtered") if key in options}
        return self.gain(structure, **options), self.cost(structure, **of_both)

    def gain(
        self,
        structure: str = "full",
        *,
        space: str = "core",
        point: str | float = "reference",
        weighted: bool = False,
        filtered: bool = False,
    ) -> sst.Fisher:
        """Refusals with the data's labels at `point` or along the "path", with what the structure keeps of the correlations between modules.

        weighted: the first words of refusals weigh more, as `opening` (their number, their weight) says. filtered: of `patch()`.
        """

        def along_path() -> sst.Fisher:
            at = partial(self.gain, structure, space=space, weighted=weighted, filtered=filtered)
            return over_points(PATH, lambda p: copy.deepcopy(at(point=p)))

        def at_point() -> sst.Fisher:
            opening = self.opening if weighted else None
            options: dict[str, Any] = {"name": f"harm-{point}", "point": point, "opening": opening}
            return self._pass(self.harm, filtered, structure=structure, space=space, **options)

        key = ("gain", structure, space, point, weighted, filtered)
        return self._once(key, along_path if point == "path" else at_point)

    def cost(self, structure: str = "full", *, space: str = "core", filtered: bool = False) -> sst.Fisher:
        """Benign answers with drawn labels at the reference."""

        def make() -> sst.Fisher:
            options: dict[str, Any] = {"name": "benign", "point": "reference", "labels": "model", "draws": self.draws}
            return self._pass(self.benign, filtered, structure=structure, space=space, **options)

        return self._once(("cost", structure, space, filtered), make)

    def _pass(self, data: Dataset, filtered: bool, **options: Any) -> sst.Fisher:
        self.session.use(self.patch() if filtered else self.session.safety)
        try:
            return fisher_pass(self.session, data, tokens_per_batch=self.tokens_per_batch, seed=self.seed, **options)
        finally:
            self.session.use(self.session.safety)

    def subspace(
        self,
        structure: str = "full",
        *,
        scope: Scope = "global",
        point: str = "reference",
        metric: Metric = "kronecker",
        weighted: bool = True,
        filtered: bool = True,
    ) -> sst.Subspace:
        def solve() -> sst.Subspace:
            gain, cost = self.fishers(structure, point=point, weighted=weighted, filtered=filtered)
            with headlined("the pencil cannot be solved"):
                return sst.subspace(
                    gain, cost, scope=scope, metric=metric, damping=self.damping, folds=self.folds, mix_points=True
                )

        return self._once(("subspace", structure, scope, point, metric, weighted, filtered), solve)

    def patch(self, mu: float | None = None) -> Adapter:
        """The safety adapter with its reads closed to benign inputs at the price `mu`, `input_filter` by default."""
        mu = self.input_filter if mu is None else mu
        if mu == 0:
            return self.session.safety
        gain, cost = self._once("inputs", self._inputs)
        return self._once(("patch", mu), lambda: with_reads(self.session.safety, sst.filter_inputs(gain, cost, mu)))

    def _inputs(self) -> list[sst.InputMoments]:
        options: dict[str, Any] = {
            "rank": self.input_rank,
            "tokens_per_batch": self.tokens_per_batch,
            "seed": self.seed,
        }
        sides = (("harm", self.harm), ("benign", self.benign))
        return [input_pass(self.session, data, name=name, **options) for name, data in sides]

    def grams(self, side: str) -> dict[str, Tensor]:
        """Σ_t x_t xᵀ_t [d_in, d_in] float64 of every adapted module's input, over the tokens of one side's data."""
        return self._once(("gram", side), lambda: self._grams(self.harm if side == "harm" else self.benign, side))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @torch.no_grad()
    def _grams(self, data: Dataset, side: str) -> dict[str, Tensor]:
        session, out = self.session, dict[str, Tensor]()
        mask: Tensor | None = None
        device = next(session.model.parameters()).device
        own = SAFETY if side == "harm" else TASK
        active = own if own == SAFETY or session.task is not None else SAFETY
        session.model.base_model.set_adapter(active)

        def see(name: str, module: Any, args: tuple) -> None:
            x = args[0][mask].double()
            out[name] = out.get(name, 0) + (x.T @ x).cpu()

        names = {*session.safety.terms, *(session.task.terms if session.task is not None else ())}
        modules = {n: m for n, m in session.model.get_base_model().named_modules() if n in names}
        handles = [m.register_forward_pre_hook(partial(see, n)) for n, m in modules.items()]
        try:
            for batch in batches(data, self.tokens_per_batch):
                inputs = batch.inputs(device)
                inputs.pop("labels")
                mask = inputs["attention_mask"].bool()
                session.model(**inputs, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return out
