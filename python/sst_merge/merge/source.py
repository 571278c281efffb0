"""What data-aware merges know, made once and when asked for: the one producer of evidence, Fishers and filtered patches."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sst_kernels as sst

from ..errors import MergeError, headlined
from ..io.adapters import Adapter
from ..io.data import Dataset, batches
from ..run.checkpoints import Continuity
from ..run.collect import OPENING, REST, activate, collect, input_pass, model_digest
from ..run.grams import Grams
from ..run.launch import world
from ..run.passes import fisher_pass
from ..session import SAFETY, TASK, Session
from ..specs import Collection, Fishers, Pencil, Strength
from .algebra import with_lora_A


@dataclass
class Source:
    """Fitting data on a session, or evidence that was collected before; everything asked for is made once and kept.

    gradients: False where only Fishers with passes of their own are wanted: then no evidence is read.
    """

    session: Session
    spec: Collection
    harm: Dataset | None = None
    benign: Dataset | None = None
    continuity: Continuity | None = None
    given: sst.Evidence | None = None
    gradients: bool = True
    safe: Dataset | None = None
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def evidence(self) -> sst.Evidence:
        """The evidence, as it was read, or as it was given; condensed once a decision was taken from it."""
        if self.given is not None:
            return self.given
        return self._kept["decisions"] if "decisions" in self._kept else self._once("evidence", self._collect)

    @property
    def decisions(self) -> sst.Evidence:
        """The evidence that decisions are taken from: in a basis, so that each costs milliseconds."""

        def condense() -> sst.Evidence:
            start = time.monotonic()
            with headlined("the evidence cannot be condensed"):
                found = self.evidence.condense()
            self.session.seconds["condense"] = time.monotonic() - start
            self._kept.pop("evidence", None)  # tens of times the size, and no decision needs it
            return found

        return self._once("decisions", condense)

    def patch(self, input_filter: float) -> Adapter:
        """The safety adapter with its inputs filtered, benign ones weighing this much; 0 leaves it."""
        if input_filter == 0:
            return self.session.safety

        def make() -> Adapter:
            if self.gradients:
                known = next((self._kept[key] for key in self._filters if key[1] == input_filter), None)
                return with_lora_A(self.session.safety, (known or self._filtered(input_filter, None)).lora_A)
            start = time.monotonic()
            activate(self.session)
            gain, cost = (input_pass(self.session, side, self._data(side), self.spec) for side in ("harm", "benign"))
            with headlined("the inputs cannot be filtered"):
                reads = sst.filter_inputs(gain, cost, input_filter)
            self.session.seconds["inputs"] = time.monotonic() - start
            return with_lora_A(self.session.safety, reads)

        return self._once(("patch", input_filter), make)

    def fishers(self, spec: Fishers) -> tuple[sst.Fisher, sst.Fisher]:
        """(F_harm, F_benign) of the patch that `spec` names."""
        return self.gain(spec), self.cost(spec)

    def gain(self, spec: Fishers) -> sst.Fisher:
        """F_harm: refusals, the first words weighing more; the mean over the points of the patch's path that `spec` names."""

        def along_the_path() -> sst.Fisher:
            # Where a patch has won already its gradient vanishes: at S = I alone the refusals hardly show the words that decide them.
            first, *rest = (self.gain(replace(spec, harm_points=(point,))) for point in spec.harm_points)
            total = copy.deepcopy(first)
            for part in rest:
                total.merge(part, mix_points=True)
            return total

        spec = replace(spec, benign_point="reference")
        if len(spec.harm_points) > 1:
            return self._once(("gain", spec), along_the_path)
        if spec.from_evidence and self.gradients and self._holds(spec.opening_weight):
            return self._filtered(spec.input_filter, spec.opening_weight, spec.guard).gain
        (point,) = spec.harm_points
        opening = None if spec.opening_weight == 1 else (self.spec.opening_tokens, spec.opening_weight)
        options: dict[str, Any] = {"name": f"harm-{point}", "opening": opening}
        return self._once(("gain", spec), lambda: self._pass("harm", spec, point=point, **options))

    def cost(self, spec: Fishers) -> sst.Fisher:
        """F_benign: the model's own answers, or the data's, at the reference."""
        if replace(spec, harm_points=("reference",)).from_evidence and self.gradients:
            return self._filtered(spec.input_filter, None, spec.guard).cost
        key = replace(spec, harm_points=("reference",), opening_weight=1.0)
        options: dict[str, Any] = {"name": "benign", "labels": self.spec.labels, "draws": self.spec.draws}
        return self._once(("cost", key), lambda: self._pass("benign", spec, point=spec.benign_point, **options))

    def subspace(self, pencil: Pencil) -> sst.Subspace:
        """The solved pencil F_harm v = λ (F_benign + εM) v, with cross-fitted folds for predictions."""

        def solve() -> sst.Subspace:
            gain, cost = self.fishers(pencil.fishers)
            start = time.monotonic()
            with headlined("the pencil cannot be solved"):
                space = sst.subspace(
                    gain, cost, scope=pencil.scope, metric=pencil.metric, damping=pencil.damping, folds=pencil.folds,
                    mix_points=True, group=world(),
                )  # fmt: skip
            self.session.seconds["subspace"] = time.monotonic() - start
            return space

        return self._once(("subspace", pencil), solve)

    def filtered(self, pencil: Pencil, strength: Strength) -> tuple[sst.Patch, Adapter]:
        """The patch that pencil and strength keep: its core coordinates, and what they are coordinates of."""
        with headlined("the patch cannot be filtered"):
            choose = getattr(self.subspace(pencil), strength.filter)
            given = {
                "kl_budget": strength.kl_budget,
                "k" if strength.filter == "top_k" else "mu": strength.k if strength.filter == "top_k" else strength.mu,
            }
            patch = choose(**{name: value for name, value in given.items() if value is not None})
        return patch, self.patch(pencil.fishers.input_filter)

    def grams(self, side: str) -> dict[str, Tensor]:
        """Σ_t x_t xᵀ_t [d_in, d_in] float64 of every adapted module's input, over the tokens of one side's data."""
        return {name: total[:-1, :-1] for name, total in self._inputs(side).items()}

    def second_moments(self, side: str) -> dict[str, Tensor]:
        """`grams` per token: E[x xᵀ]."""
        return {name: total[:-1, :-1] / total[-1, -1] for name, total in self._inputs(side).items()}

    def means(self, side: str) -> dict[str, Tensor]:
        """The mean x [d_in] float64 of every adapted module's input, over the same tokens."""
        return {name: total[:-1, -1] / total[-1, -1] for name, total in self._inputs(side).items()}

    def _holds(self, opening_weight: float) -> bool:
        """Whether the evidence has refusals whose first words count this much. MergeError where it has not, and nothing can be read."""
        evidence = self.decisions
        kept = evidence.about.get("opening_weight")
        if OPENING in evidence.gain.rows or kept == str(float(opening_weight)):
            return True
        if self.harm is None:
            raise MergeError(
                f"opening_weight: {opening_weight:g} is asked for, and the evidence holds refusals whose first tokens count {kept}; take that, or "
                "collect again with --opening-apart, which leaves the choice open"
            )
        return False

    def _collect(self) -> sst.Evidence:
        return collect(self.session, self._data("harm"), self._data("benign"), self.spec, self.continuity, self.safe)

    def _filtered(self, input_filter: float, opening_weight: float | None, guard: float = 0.0) -> sst.Filtered:
        """`Evidence.filter`; without a weight for whoever wants what is read, or F_benign, alone."""
        evidence = self.decisions
        apart = OPENING in evidence.gain.rows
        if apart and opening_weight is None:
            opening_weight = next((w for _, f, w, g in self._filters if (f, g) == (input_filter, guard)), 1.0)

        def make() -> sst.Filtered:
            start = time.monotonic()
            with headlined("the inputs cannot be filtered"):
                found = evidence.filter(
                    input_filter, losses={OPENING: opening_weight or 0.0, REST: 1.0} if apart else None, guard=guard
                )
            self.session.seconds["filter"] = time.monotonic() - start
            return found

        return self._once(("filtered", input_filter, opening_weight if apart else None, guard), make)

    @property
    def _filters(self) -> list[tuple[str, float, float, float]]:
        return [key for key in self._kept if isinstance(key, tuple) and key[0] == "filtered"]

    def _pass(self, side: str, spec: Fishers, **options: Any) -> sst.Fisher:
        self.session.use(self.patch(spec.input_filter))
        try:
            return fisher_pass(
                self.session, self._data(side), structure=spec.structure, structure_options=dict(spec.options), space=spec.space,
                scope=spec.scope, tokens_per_batch=self.spec.tokens_per_batch, seed=self.spec.seed, continuity=self.continuity, **options,
            )  # fmt: skip
        finally:
            self.session.use(self.session.safety)

    def _data(self, side: str) -> Dataset:
        found = self.harm if side == "harm" else self.benign
        if found is None:
            raise MergeError(f"this needs the {side} data, which evidence alone does not hold: give --{side}-data")
        return found

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def _inputs(self, side: str) -> dict[str, Tensor]:
        return self._once(("inputs", side), lambda: self._read_inputs(side))

    @torch.no_grad()
    def _read_inputs(self, side: str) -> dict[str, Tensor]:
        """`Grams` over one side's data, its own adapter on: the safety adapter for harm, the task adapter (where there is one) for benign."""
        session = self.session
        device = next(session.model.parameters()).device
        session.model.base_model.set_adapter(SAFETY if side == "harm" or session.task is None else TASK)
        names = {*session.safety.terms, *(session.task.terms if session.task is not None else ())}
        with Grams(session.model.get_base_model(), sorted(names)) as grams:
            for batch in batches(self._data(side), self.spec.tokens_per_batch):
                inputs = batch.inputs(device)
                inputs.pop("labels")
                grams.mask = inputs["attention_mask"].bool()
                session.model(**inputs, use_cache=False)
        return grams.sums


def _root(name: str) -> str:
    return name.partition(".layers.")[0].partition(".h.")[0]


def load_evidence(path: Path, session: Session) -> sst.Evidence:
    """Evidence of a file. Raises MergeError when it is none, or of another adapter, task adapter or model."""
    try:
        with headlined(f"--evidence {path} cannot be used"):
            evidence = sst.Evidence.load(path)
    except OSError as error:
        raise MergeError(
            f"--evidence {path}: cannot be read ({error.strerror or error}); give a file of collect, or of an earlier merge"
        ) from error
    found = evidence.weights
    strange = {*session.safety.terms} ^ {*found.scaling}
    if (strange and not {*session.safety.terms} & {*found.scaling}) or {
        _root(n) for n in (session.task.terms if session.task else ())
    } - {_root(n) for n in found.scaling}:
        session.model  # noqa: B018 (names of other releases become this model's when it is loaded; without one it says so)
    given = {name: term.scaling for name, term in session.safety.terms.items()}
    if found.scaling != given or any(
        not torch.equal(found.a[n], term.A.float()) for n, term in session.safety.terms.items()
    ):
        raise MergeError(
            f"{path} is evidence about another safety adapter than {session.safety.path}: give the one that it was collected with, or collect again"
        )
    task = session.task.sha256 if session.task is not None else ""
    if evidence.about.get("task", task) != task:
        raise MergeError(
            f"{path} was collected with another task adapter (or none): give that one with --task, or collect again"
        )
    if session.loaded and session.weights and evidence.about.get("model") != model_digest(session.model):
        raise MergeError(
            f"{path} was collected from another model, or in another dtype, than the one given: measuring on that would say nothing about it; "
            "give the model and dtype of the collection, or collect again"
        )
    return evidence
