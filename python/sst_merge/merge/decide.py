"""Which strength a recipe asks for: one given outright, a KL budget, a rate of refusal, or the knee of what is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import MergeError
from ..evaluate import Evaluation, Evaluator
from ..io.adapters import for_output
from ..io.data import Dataset
from ..recipe import DEFAULT_BUDGET, Recipe
from ..run.launch import world
from ..session import Session, evaluator_on
from ..specs import Pencil, Strength
from . import front
from .algebra import recompress
from .source import Source
from .trust import Choice, Knee, Measured, Trial, measured, reaching, within

MEASURED = {"eval_harm", "eval_benign", "eval_safe", "eval_task"}


@dataclass(frozen=True)
class Decision:
    """What is to be written, and what was measured on the way: of it, of the model without a patch, and of a front's strengths."""

    choice: Choice
    known: Evaluation | None = None
    nothing: Evaluation | None = None
    outcome: Measured | None = None
    chosen: Trial | None = None
    front: tuple[Trial, ...] = ()


def decide(recipe: Recipe, session: Session, source: Source, data: Mapping[str, Dataset]) -> Decision:
    """The strength that a recipe asks for, measured where there are rows to measure on.

    Without a model or rows a budget is a prediction, and without anything asked for it is `DEFAULT_BUDGET`. Raises MergeError where a
    rate is asked for and there is nothing to measure it on.
    """
    asked, rates = recipe.strength, "eval_harm" in data and bool(recipe.generate_tokens)
    measurable = {"eval_benign"} <= data.keys()
    if asked.target_refusal is not None and not rates:
        raise MergeError(
            "target_refusal: is measured on held-out harmful prompts: give model, harm_data with at least five rows and a holdout, or "
            "eval_harm_data; and generate_tokens above 0"
        )
    if asked == Strength(asked.filter) and not (rates and measurable):
        asked = Strength(asked.filter, kl_budget=DEFAULT_BUDGET)
    if recipe.sweep and not (rates and measurable):
        session.reporter.warn("sweep: there are no harmful and benign rows to measure a front on, so there is none")
    given = asked.mu is not None or asked.k is not None
    if (given or (asked.kl_budget is not None and not measurable)) and not (recipe.sweep and rates and measurable):
        return Decision(_chooser(recipe, session, source, recipe.pencil, asked)(None))
    start = time.monotonic()
    try:
        decision = _measured(recipe, asked, session, source, data, rates)
    except MergeError:
        raise
    except Exception as error:  # no measurement costs a merge
        budget = asked if given or asked.kl_budget is not None else Strength(asked.filter, kl_budget=DEFAULT_BUDGET)
        what = "the budget" if budget is asked else "what was asked for"
        stands = "its prediction" if budget is asked else f"a predicted budget of {DEFAULT_BUDGET:g} nats"
        session.reporter.warn(f"{what} could not be measured, so {stands} stands: {type(error).__name__}: {error}")
        return Decision(_chooser(recipe, session, source, recipe.pencil, budget)(None))
    session.seconds["decide"] = time.monotonic() - start
    return decision


def _measured(
    recipe: Recipe, asked: Strength, session: Session, source: Source, data: Mapping[str, Dataset], rates: bool
) -> Decision:
    rows = data.get("eval_benign")
    sweeping = rates and rows is not None and (recipe.sweep or asked == Strength(asked.filter))
    measure = _measurer(recipe, session, data, rates=asked.kl_budget is None or sweeping)
    choose = _chooser(recipe, session, source, recipe.pencil, Strength(asked.filter, kl_budget=DEFAULT_BUDGET))
    points = front.sweep(choose, measure) if sweeping else []
    if asked.kl_budget is not None:
        assert rows is not None
        best, outcome, tried = within(asked.kl_budget, choose, measure, rows)
        return Decision(best.choice, best.found, None, outcome, best, tuple([*points, *tried] if sweeping else ()))
    if asked.target_refusal is not None:
        ways = [choose, *_closer(recipe, session, source)]
        best, target, tried = reaching(asked.target_refusal, DEFAULT_BUDGET, ways, measure, rows)
        return Decision(best.choice, best.found, None, target, best, tuple([*points, *tried] if sweeping else ()))
    if asked.mu is not None or asked.k is not None:
        best = measure(_chooser(recipe, session, source, recipe.pencil, asked)(None))
        return Decision(best.choice, best.found, None, Measured(**measured(best, [best], rows)), best, tuple(points))
    nothing = _quick(session, recipe, data)(session.reference, label="no patch", generate_tokens=recipe.generate_tokens)
    best = front.knee(points, nothing)
    helps = any(p.found.refusal_rate > nothing.refusal_rate for p in points)
    return Decision(
        best.choice, best.found, nothing, Knee(**measured(best, points, rows), helps=helps), best, tuple(points)
    )


def _chooser(
    recipe: Recipe, session: Session, source: Source, pencil: Pencil, strength: Strength
) -> Callable[[float | None], Choice]:
    """From the KL that is allowed (None: what `strength` says; infinite: the whole patch) to a choice."""

    def choose(allowed: float | None) -> Choice:
        asked = strength if allowed is None else replace(strength, kl_budget=min(allowed, 1e300))
        patch, reads = source.filtered(pencil, asked)
        adapter, lost = session.merged(reads, patch.coordinates), None
        if recipe.rank is not None:
            adapter, lost = recompress(adapter, recipe.rank)
        budget = asked.kl_budget or 0.0 if allowed is None else allowed
        whole = keeps_all(patch, source.subspace(pencil).values)
        return Choice(budget, patch, for_output(adapter, recipe.model), lost, pencil, whole)

    return choose


def _closer(recipe: Recipe, session: Session, source: Source) -> list[Callable[[float | None], Choice]]:
    """Strengths of the patch with its inputs filtered less, and not at all: its whole refuses more, and costs more."""
    if not recipe.from_evidence or world() is not None:  # ranks solve pencils together, and only the first decides
        return []
    made = []
    for price in (recipe.input_filter / 10, 0.0) if recipe.input_filter else ():
        pencil = replace(recipe.pencil, fishers=replace(recipe.pencil.fishers, input_filter=price))
        made.append(_chooser(recipe, session, source, pencil, Strength(recipe.filter, kl_budget=DEFAULT_BUDGET)))
    return made


def evaluator_of(
    session: Session, recipe: Recipe, data: Mapping[str, Dataset], *, forgiving: bool = False
) -> Evaluator:
    """What measures an adapter on those of the recipe's data whose names begin with `eval_`."""
    given = {name.removeprefix("eval_"): rows for name, rows in data.items() if name in MEASURED}
    return evaluator_on(
        session.model, session.tokenizer, recipe, given, reference=session.reference, reporter=session.reporter, forgiving=forgiving
    )  # fmt: skip


def _quick(session: Session, recipe: Recipe, data: Mapping[str, Dataset]) -> Evaluator:
    """What measures a strength on the way: without tasks, a named judge, or prompts put differently."""
    recipe = recipe.model_copy(update={"judge": None, "robustness": False})
    return evaluator_of(session, recipe, {name: rows for name, rows in data.items() if name != "eval_task"})


def _measurer(
    recipe: Recipe, session: Session, data: Mapping[str, Dataset], *, rates: bool
) -> Callable[[Choice], Trial]:
    """Measures a choice: benign KL, and with `rates` refusals and over-refusal."""
    evaluator = _quick(session, recipe, data)

    def measure(choice: Choice) -> Trial:
        label = f"{choice.patch.prediction.cost_per_label:.3g} nats"
        options: dict[str, Any] = {"generate_tokens": recipe.generate_tokens}
        return Trial(choice, session.measure(evaluator, choice.adapter, label, only_benign=not rates, **options))

    return measure


def keeps_all(patch: Any, values: Any) -> bool:
    """Whether the filter keeps the whole patch: a larger budget changes nothing."""
    if patch.filter == "top_k":
        return patch.parameter >= len(values)
    return patch.parameter <= 1e-3 * min(values.tolist(), default=math.inf)
