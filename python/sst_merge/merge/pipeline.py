"""The merge itself: one reading of the data → filtered patch → adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

import sst_kernels as sst
from sst_kernels.env import versions

from ..errors import MergeError, RecipeError
from ..evaluate import Evaluation, Evaluator, write_prompts
from ..io.adapters import Adapter, for_output, write_adapter
from ..io.data import Dataset, load_dataset
from ..io.models import check_fit
from ..io.output import check_output, output_file, output_folder
from ..progress import Reporter
from ..recipe import SAFE, Recipe
from ..report import write_report
from ..run.checkpoints import continuing
from ..run.collect import rows_digest
from ..run.launch import leader
from ..run.memory import check_pencil
from ..run.own_prompts import FEW, OWN, beside, joined, own_rows
from ..session import Session, open_session
from ..specs import Strength
from .algebra import recompress
from .source import Source, load_evidence
from .trust import Budget, Choice, hold_out, within

EVIDENCE = "evidence.safetensors"  # in the output: for other strengths, filters and scopes in seconds


def session_of(recipe: Recipe, reporter: Reporter) -> Session:
    """The model and adapters of a recipe."""
    return open_session(
        recipe.model, recipe.safety, recipe.task, dtype=recipe.dtype, device=recipe.device, quantization=recipe.quantization,
        reporter=reporter,
    )  # fmt: skip


def load_data(
    recipe: Recipe, tokenizer: Any, write: Callable[[Dataset, int], Dataset] | None = None
) -> dict[str, Dataset]:
    """The recipe's data files, tokenised, with benign rows that `write(harm, count)` adds where the recipe wants some. Raises DataError."""
    options: dict[str, Any] = {
        "max_length": recipe.max_length,
        "limit": recipe.limit,
        "skip_bad_lines": recipe.skip_bad_lines,
        "template": recipe.template,
        "columns": recipe.columns,
    }
    given = {
        name: load_dataset(path, tokenizer, **options | ({"skip_bad_lines": True} if path == SAFE else {}))
        for name, path in recipe.files.items()
    }
    if write is not None and recipe.self_benign:
        given["benign"] = joined(given.get("benign"), write(given["harm"], recipe.self_benign))
    return hold_out(given, recipe.holdout)


def check_folds(recipe: Recipe, data: Mapping[str, Dataset]) -> None:
    """RecipeError for more folds than examples, which the pencil would refuse after the passes."""
    for name in ("harm", "benign") if recipe.keeps_rows else ():
        if name in data and len(data[name]) < recipe.folds:
            raise RecipeError(
                f"folds: {recipe.folds} need as many examples, {data[name].path} has {len(data[name])}; add some, or lower folds"
            )


def open_source(recipe: Recipe, session: Session, data: Mapping[str, Dataset], continuity: Any = None) -> Source:
    """The producer of a recipe's evidence and Fishers, from its data, or from the evidence that it names."""
    given = load_evidence(recipe.evidence, session) if recipe.evidence is not None else None
    return Source(
        session,
        recipe.collection,
        data.get("harm"),
        data.get("benign"),
        continuity,
        given,
        gradients=recipe.from_evidence,
        safe=data.get("safe"),
    )


def merge(
    recipe: Recipe,
    *,
    force: bool = False,
    reporter: Reporter | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    keep_evidence: bool = True,
) -> dict[str, Any]:
    """Run a recipe: write the merged adapter with report, plots, model card, recipe and evidence; return the report.

    `checkpoint_every` batches the reading is saved beside the output, and `resume` goes on from there. Under torchrun all ranks
    share the reading and the solves; the first one evaluates, writes and returns the report, the others return {}. The adapter is
    written before it is measured: an evaluation that fails is a line in the report.

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
        session = session_of(recipe, reporter)
        write = partial(own_rows, session, recipe, continuity=continuity, file=folder / OWN if leading else None)
        data = load_data(recipe, session.tokenizer, write) if recipe.files else {}
        for name, dataset in data.items():
            reporter.say("\n".join([f"{name}: {dataset.kind}", *dataset.notes]))
        if recipe.evidence is None and not recipe.self_benign and len(data["benign"]) < FEW:
            reporter.say(f"benign: {len(data['benign'])} rows are few; --self-benign 200 lets the model write more")
        if recipe.evidence is not None:
            data = _seen_by_nobody(data, source := open_source(recipe, session, {}), reporter)
        else:
            check_folds(recipe, data)
            check_pencil(recipe, session.safety, data, next(session.model.parameters()).device)
            source = open_source(recipe, session, data, continuity)
        space = source.subspace(recipe.pencil)
        if not leading:
            return {}
        chosen, known, budget = _chosen(recipe, session, source, data)
        patch, adapter, lost = chosen.patch, chosen.adapter, chosen.lost
        write_adapter(adapter, folder)
        (folder / "recipe.yml").write_text(recipe.to_yaml(), encoding="utf-8")
        if keep_evidence and recipe.from_evidence:
            source.decisions.save(folder / EVIDENCE)
        report = describe(session, recipe, data, source, space, patch, adapter)
        report["budget"] = budget.summary() if budget is not None else None
        report["recompression"] = lost.summary() if lost is not None else None
        evaluations = _evaluate(session, recipe, data, adapter, known)
        report["evaluation"] = {name: e.summary() for name, e in evaluations.items()}
        report["failed_evaluations"] = {name: e.failed for name, e in evaluations.items() if e.failed}
        report["seconds"] = {name: round(value, 2) for name, value in session.seconds.items()}
        measured = report["evaluation"].get("merged", {}).get("benign_kl")
        if measured is not None:
            report["calibration"] = [calibration_point(patch, measured)]
        if evaluations:
            write_prompts(folder / "prompts.json", evaluations)
        write_report(report, folder)
    return report


def _seen_by_nobody(data: Mapping[str, Dataset], source: Source, reporter: Reporter) -> dict[str, Dataset]:
    """The data without those that evidence stands for; benign rows that were held out of it stay, to measure on."""
    kept = dict(data)
    benign = kept.pop("benign", None)
    if benign is not None and source.evidence.notes.get("benign rows") != rows_digest(benign):
        kept.pop("eval_benign", None)
        reporter.warn(
            f"{benign.path} less its held-out rows is not what the evidence was collected from, so no row is known to be unseen: the budget is "
            "not measured. Give eval_benign_data, or the benign_data, limit and holdout of the collection"
        )
    return kept


def _chosen(
    recipe: Recipe, session: Session, source: Source, data: Mapping[str, Dataset]
) -> tuple[Choice, Evaluation | None, Budget | None]:
    """The recipe's strength; of a KL budget the one that measurement confirms, where there are rows to measure on."""

    def choose(strength: Strength) -> Choice:
        patch, reads = source.filtered(recipe.pencil, strength)
        adapter, lost = session.merged(reads, patch.coordinates), None
        if recipe.rank is not None:
            adapter, lost = recompress(adapter, recipe.rank)
        return Choice(strength.kl_budget or 0.0, patch, for_output(adapter, recipe.model), lost)

    limit = recipe.strength.kl_budget
    if limit is None or "eval_benign" not in data:
        return choose(recipe.strength), None, None
    start = time.monotonic()
    evaluator = _evaluator(session, recipe, {"eval_benign": data["eval_benign"]})
    try:
        choice, known, budget = within(
            limit,
            lambda allowed: choose(replace(recipe.strength, kl_budget=allowed)),
            lambda choice: session.measure(evaluator, choice.adapter, f"{choice.allowed:.3g} nats", only_benign=True),
            data["eval_benign"],
        )
    except MergeError:
        raise
    except Exception as error:  # no measurement costs a merge
        session.reporter.warn(
            f"the budget could not be measured, so its prediction stands: {type(error).__name__}: {error}"
        )
        return choose(recipe.strength), None, None
    session.seconds["budget"] = time.monotonic() - start
    return choice, known, budget


def collect_to_file(
    recipe: Recipe,
    *,
    exact: bool = False,
    force: bool = False,
    reporter: Reporter | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
) -> sst.Evidence | None:
    """Read a recipe's data once and write the evidence to its output, a file; in a basis unless `exact`. None on ranks but the first."""
    reporter = reporter or Reporter()
    files = [p for p in (recipe.model, recipe.safety, recipe.task, *recipe.files.values()) if p is not None]
    with (
        continuing(recipe.output, checkpoint_every, resume) as continuity,
        output_file(recipe.output, force=force, inputs=files) if leader() else nullcontext(recipe.output) as unfinished,
    ):
        session = session_of(recipe, reporter)
        write = partial(own_rows, session, recipe, continuity=continuity, file=beside(recipe.output), force=force)
        source = open_source(recipe, session, load_data(recipe, session.tokenizer, write), continuity)
        evidence = source.evidence if exact else source.decisions
        if not leader():
            return None
        evidence.save(unfinished)
    return evidence


def describe(
    session: Session,
    recipe: Recipe,
    data: Mapping[str, Dataset],
    source: Source,
    space: sst.Subspace,
    patch: sst.Patch,
    adapter: Adapter,
) -> dict[str, Any]:
    """The report's facts, as JSON-able values; `report.write_report` turns them into files."""
    values, summary = space.values, adapter.summary()
    gain, cost = source.fishers(recipe.pencil.fishers)
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
        "evidence": _evidence_facts(source, recipe),
        "fisher": {
            "harm": _fisher_facts(gain, gain.counts),
            "benign": _fisher_facts(cost, source.decisions.cost.counts if recipe.from_evidence else cost.counts),
        },
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
            "parameter": patch.strength,
            "whole": _keeps_all(patch, space.values),
            "points": list(patch.points),
            "prediction": asdict(patch.prediction),
            "kept_energy": patch.kept,
        },
        "adapter": summary
        | {"notes": summary["notes"] + (check_fit(session.model, adapter) if session.loaded else [])},
        "seconds": {name: round(value, 2) for name, value in session.seconds.items()},
        "versions": versions(),
    }


def _keeps_all(patch: sst.Patch, values: torch.Tensor) -> bool:
    """Whether the filter keeps every direction that F_harm knows: a larger budget changes nothing."""
    if patch.filter == "top_k":
        return patch.parameter >= len(values)
    return patch.parameter <= 1e-3 * min(values[values > 0].tolist(), default=math.inf)


def calibration_point(patch: sst.Patch, measured: float) -> dict[str, float | None]:
    """Predicted beside measured benign KL, in nats per label token."""
    return {"parameter": patch.strength, "predicted_kl": patch.prediction.cost_per_label, "measured_kl": measured}


def _evaluator(session: Session, recipe: Recipe, data: Mapping[str, Dataset], *, forgiving: bool = False) -> Evaluator:
    return Evaluator(
        session.model,
        session.tokenizer,
        harmful=data.get("eval_harm"),
        benign=data.get("eval_benign"),
        reference=session.reference,
        tokens_per_batch=recipe.tokens_per_batch,
        reporter=session.reporter,
        forgiving=forgiving,
    )


def _evaluate(
    session: Session, recipe: Recipe, data: Mapping[str, Dataset], adapter: Adapter, known: Evaluation | None
) -> dict[str, Evaluation]:
    """known: what has been measured of the merged adapter on benign rows."""
    if not {"eval_harm", "eval_benign"} & data.keys():
        return {}
    start = time.monotonic()
    evaluator = _evaluator(session, recipe, data, forgiving=True)
    options: dict[str, Any] = {"generate_tokens": recipe.generate_tokens}
    results = {"no patch": evaluator(session.reference, label="no patch", **options)}
    for name, candidate, seen in (("plain addition", session.plain(1.0), None), ("merged", adapter, known)):
        measure = partial(session.measure, evaluator, candidate, name, known=seen, **options)
        results[name] = evaluator.attempt(name, measure)
    session.seconds["evaluate"] = time.monotonic() - start
    return results


def _evidence_facts(source: Source, recipe: Recipe) -> dict[str, Any] | None:
    if not recipe.from_evidence:
        return None
    evidence = source.decisions
    return {
        "file": str(recipe.evidence) if recipe.evidence is not None else None,
        "input_filter": recipe.input_filter,
        "guard": evidence.guard.counts.sequences,
        "tokens": {"harm": evidence.gain.moments.tokens, "benign": evidence.cost.moments.tokens},
        "basis": list(evidence.basis.mus) if evidence.basis is not None else None,
        "bytes": evidence.nbytes,
        "about": evidence.about,
    }


def _fisher_facts(fisher: sst.Fisher, counts: Any) -> dict[str, Any]:
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
