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

from ..data import Dataset, batches
from ..errors import headlined
from ..pipeline import fisher_pass, over_points
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
    seed: int = 0
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def fishers(
        self, structure: str = "full", *, space: str = "core", point: str = "reference", weighted: bool = False
    ) -> tuple[sst.Fisher, sst.Fisher]:
        """(gain, cost): refusals with the data's labels at `point` or along the "path"; benign answers with drawn labels at the reference.

        weighted: the first words of refusals weigh more, as `opening` (their number, their weight) says.

        Both keep what they can of the correlations between modules, from which either scope is solved.
        """
        over = partial(
            fisher_pass,
            self.session,
            structure=structure,
            space=space,
            tokens_per_batch=self.tokens_per_batch,
            seed=self.seed,
        )

        def at(point: str | float) -> sst.Fisher:
            key = ("gain", structure, space, point, weighted)
            opening = self.opening if weighted else None
            return self._once(key, lambda: over(self.harm, name=f"harm-{point}", point=point, opening=opening))

        def along_path() -> sst.Fisher:
            return over_points(PATH, lambda p: copy.deepcopy(at(p)))

        gain = at(point) if point != "path" else self._once(("gain", structure, space, "path", weighted), along_path)
        cost = self._once(
            ("cost", structure, space),
            lambda: over(self.benign, name="benign", point="reference", labels="model", draws=self.draws),
        )
        return gain, cost

    def subspace(
        self,
        structure: str = "full",
        *,
        scope: str = "global",
        point: str = "reference",
        metric: str = "kronecker",
        weighted: bool = True,
    ) -> sst.Subspace:
        def solve() -> sst.Subspace:
            gain, cost = self.fishers(structure, point=point, weighted=weighted)
            with headlined("the pencil cannot be solved"):
                return sst.subspace(
                    gain, cost, scope=scope, metric=metric, damping=self.damping, folds=self.folds, mix_points=True
                )

        return self._once(("subspace", structure, scope, point, metric, weighted), solve)

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
