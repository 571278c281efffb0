"""The merge itself: Fisher passes → subspace → filtered patch → adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import sst_kernels as sst
from sst_kernels.env import versions

from .adapters import Adapter, for_output, write_adapter
from .algebra import recompress
from .data import Dataset, load_dataset
from .errors import RecipeError, headlined
from .evaluate import Evaluation, Evaluator, write_prompts
from .memory import check_pencil
from .models import check_fit
from .output import check_output, output_folder
from .passes import Continuity, continuing, filtered_reads, fisher_pass, leader, world
from .progress import Reporter
from .recipe import Recipe
from .report import write_report
from .session import Session, open_session


def both_passes(
    session: Session, recipe: Recipe, harm: Dataset, benign: Dataset, continuity: Continuity | None = None
) -> tuple[sst.Fisher, sst.Fisher]:
    """The gain Fisher (refusals, labels from the data) and the cost Fisher (benign) of a recipe, of the patch with its reads filtered."""
    if recipe.input_filter:
        session.use(
            filtered_reads(
                session,
                harm,
                benign,
                mu=recipe.input_filter,
                rank=recipe.input_rank,
                tokens_per_batch=recipe.tokens_per_batch,
                seed=recipe.seed,
                continuity=continuity,
            )
        )
    common: dict[str, Any] = {
        "structure": recipe.structure,
        "structure_options": recipe.structure_options,
        "space": recipe.space,
        "scope": recipe.fisher_scope,
        "tokens_per_batch": recipe.tokens_per_batch,
        "seed": recipe.seed,
        "continuity": continuity,
    }
    opening = (recipe.opening_tokens, recipe.opening_weight)
    gain = over_points(
        recipe.harm_points,
        lambda point: fisher_pass(session, harm, name=f"harm-{point}", point=point, opening=opening, **common),
    )
    cost = fisher_pass(
        session,
        benign,
        name="benign",
        point=recipe.benign_point,
        labels=recipe.benign_labels,
        draws=recipe.label_draws,
        **common,
    )
    return gain, cost


def over_points(points: Sequence[str | float], run: Callable[[str | float], sst.Fisher]) -> sst.Fisher:
    """The mean of the Fishers that `run` takes at each point.

    Where a patch has won already, its gradient vanishes: at S = I alone the Fisher of the refusals hardly sees the first words that
    decide them. More points than the reference gained little in the study (docs/quality.md).
    """
    total = run(points[0])
    for point in points[1:]:
        total.merge(run(point), mix_points=True)
    return total


def solve(session: Session, recipe: Recipe, gain: sst.Fisher, cost: sst.Fisher) -> sst.Subspace:
    """The safety subspace: F_harm v = λ (F_benign + εM) v, with cross-fitted folds for predictions."""
    start = time.monotonic()
    with headlined("the pencil cannot be solved"):
        options = {name: getattr(recipe, name) for name in ("scope", "metric", "damping", "folds")}
        space = sst.subspace(gain, cost, mix_points=True, group=world(), **options)
    session.seconds["subspace"] = time.monotonic() - start
    return space


def filtered(space: sst.Subspace, recipe: Recipe) -> sst.Patch:
    """The patch that the recipe's filter and strength keep."""
    choose = getattr(space, recipe.filter)
    with headlined("the patch cannot be filtered"):
        if recipe.kl_budget is not None:
            return choose(kl_budget=recipe.kl_budget)
        return choose(recipe.k if recipe.filter == "top_k" else recipe.mu)


def load_data(recipe: Recipe, tokenizer: Any) -> dict[str, Dataset]:
    """The recipe's data files, tokenised; evaluation data only where given. Raises DataError."""
    paths = {
        "harm": recipe.harm_data,
        "benign": recipe.benign_data,
        "eval_harm": recipe.eval_harm_data,
        "eval_benign": recipe.eval_benign_data,
    }
    options: dict[str, Any] = {
        "max_length": recipe.max_length,
        "limit": recipe.limit,
        "skip_bad_lines": recipe.skip_bad_lines,
        "template": recipe.template,
        "columns": recipe.columns,
    }
    return {name: load_dataset(path, tokenizer, **options) for name, path in paths.items() if path is not None}


def check_folds(recipe: Recipe, data: Mapping[str, Dataset]) -> None:
    """RecipeError for more folds than examples, which the pencil would refuse after the passes."""
    for name in ("harm", "benign") if recipe.keeps_rows else ():
        if len(data[name]) < recipe.folds:
            raise RecipeError(
                f"folds: {recipe.folds} need as many examples, {data[name].path} has {len(data[name])}; add some, or lower folds"
            )


def merge(
    recipe: Recipe,
    *,
    force: bool = False,
    reporter: Reporter | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Run a recipe: write the merged adapter with report, plots, model card and recipe; return the report.

    `checkpoint_every` batches the Fisher passes are saved beside the output, and `resume` goes on from there. Under torchrun all ranks
    share the passes and the solves; the first one evaluates, writes and returns the report, the others return {}.

    Raises MergeError (with what to do) for unusable inputs; nothing is left under the output's name unless all went well.
    """
    reporter = reporter or Reporter()
    leading = leader()
    if leading:
        check_output(recipe.output, force=force)
    with (
        continuing(recipe.output, checkpoint_every, resume) as continuity,
        output_folder(recipe.output, force=force) if leading else nullcontext(recipe.output) as folder,
    ):
        session = open_session(
            recipe.model,
            recipe.safety,
            recipe.task,
            dtype=recipe.dtype,
            device=recipe.device,
            quantization=recipe.quantization,
            reporter=reporter,
        )
        data = load_data(recipe, session.tokenizer)
        for name, dataset in data.items():
            reporter.say("\n".join([f"{name}: {dataset.kind}", *dataset.notes]))
        check_folds(recipe, data)
        check_pencil(recipe, session.safety, data, next(session.model.parameters()).device)
        gain, cost = both_passes(session, recipe, data["harm"], data["benign"], continuity)
        space = solve(session, recipe, gain, cost)
        if not leading:
            return {}
        patch = filtered(space, recipe)
        adapter = session.merged(patch.coordinates)
        lost = None
        if recipe.rank is not None:
            adapter, lost = recompress(adapter, recipe.rank)
        adapter = for_output(adapter, recipe.model)
        write_adapter(adapter, folder)
        evaluations = _evaluate(session, recipe, data, adapter)
        report = describe(session, recipe, data, gain, cost, space, patch, adapter)
        report["recompression"] = lost.summary() if lost is not None else None
        report["evaluation"] = {name: e.summary() for name, e in evaluations.items()}
        report["failed_evaluations"] = {name: e.failed for name, e in evaluations.items() if e.failed}
        measured = report["evaluation"].get("merged", {}).get("benign_kl")
        if measured is not None:
            report["calibration"] = [calibration_point(patch, measured)]
        if evaluations:
            write_prompts(folder / "prompts.json", evaluations)
        (folder / "recipe.yml").write_text(recipe.to_yaml(), encoding="utf-8")
        write_report(report, folder)
    return report


def describe(
    session: Session,
    recipe: Recipe,
    data: Mapping[str, Dataset],
    gain: sst.Fisher,
    cost: sst.Fisher,
    space: sst.Subspace,
    patch: sst.Patch,
    adapter: Adapter,
) -> dict[str, Any]:
    """The report's facts, as JSON-able values; `report.write_report` turns them into files."""
    values, summary = space.values, adapter.summary()
    positive = values[values > 0].log10()
    path = curve = positive
    if len(positive):
        path = torch.logspace(float(positive[0]) + 3, float(positive[-1]) - 2, 40, dtype=torch.float64)
        curve = space.cost_path("soft", path)
    return {
        "schema": 1,
        "recipe": recipe.model_dump(mode="json"),
        "inputs": {
            "safety": session.safety.summary(),
            "task": session.task.summary() if session.task is not None else None,
            "data": {name: d.summary() for name, d in data.items()},
        },
        "fisher": {name: _fisher_facts(f) for name, f in (("harm", gain), ("benign", cost))},
        "subspace": {
            "scope": space.scope,
            "route": space.route,
            "metric": space.metric,
            "relative_damping": space.damping,
            "epsilon": space.epsilon,
            "folds": space.folds,
            "directions": len(values),
            "lambda": values[:512].tolist(),
            "soft_path": {"mu": path.tolist(), "predicted_kl": curve.tolist()},
        },
        "patch": {
            "filter": patch.filter,
            "parameter": patch.parameter if math.isfinite(patch.parameter) else None,
            "whole": _keeps_all(patch, space.values),
            "points": list(patch.points),
            "prediction": asdict(patch.prediction),
            "kept_energy": patch.kept,
        },
        "adapter": summary | {"notes": summary["notes"] + check_fit(session.model, adapter)},
        "seconds": {name: round(value, 2) for name, value in session.seconds.items()},
        "versions": versions(),
    }


def _keeps_all(patch: sst.Patch, values: torch.Tensor) -> bool:
    """Whether the filter keeps every direction that F_harm knows: a larger budget changes nothing."""
    if patch.filter == "top_k":
        return patch.parameter >= len(values)
    return patch.parameter <= 1e-3 * min(values[values > 0].tolist(), default=math.inf)


def calibration_point(patch: sst.Patch, measured: float) -> dict[str, float]:
    """Predicted beside measured benign KL, in nats per label token."""
    return {"parameter": patch.parameter, "predicted_kl": patch.prediction.cost_per_label, "measured_kl": measured}


def _evaluate(session: Session, recipe: Recipe, data: Mapping[str, Dataset], adapter: Adapter) -> dict[str, Evaluation]:
    if not {"eval_harm", "eval_benign"} & data.keys():
        return {}
    start = time.monotonic()
    evaluator = Evaluator(
        session.model,
        session.tokenizer,
        harmful=data.get("eval_harm"),
        benign=data.get("eval_benign"),
        reference=session.reference,
        tokens_per_batch=recipe.tokens_per_batch,
        reporter=session.reporter,
        forgiving=True,
    )
    options: dict[str, Any] = {"generate_tokens": recipe.generate_tokens}
    results = {"no patch": evaluator(session.reference, label="no patch", **options)}
    for name, candidate in (("plain addition", session.plain(1.0)), ("merged", adapter)):
        results[name] = evaluator.attempt(name, partial(session.measure, evaluator, candidate, name, **options))
    session.seconds["evaluate"] = time.monotonic() - start
    return results


def _fisher_facts(fisher: sst.Fisher) -> dict[str, Any]:
    counts = fisher.counts
    return {
        **{key: value for key, value in fisher.meta.items() if _plain(value) and key != "labels"},
        "label_source": fisher.meta.get("labels"),
        "sequences": counts.sequences,
        "tokens": counts.tokens,
        "label_tokens": counts.labels,
        "bytes": fisher.nbytes,
    }


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
