"""The merge itself: one reading of the data → filtered patch → adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sst_kernels as sst
from sst_kernels.env import versions

from ..errors import RecipeError
from ..evaluate import Evaluation, Evaluator, write_prompts
from ..io.adapters import Adapter, write_adapter
from ..io.data import Dataset, load_dataset, rendered_example
from ..io.fit import check_fit
from ..io.models import model_folder
from ..io.output import check_output, output_file, output_folder
from ..io.paths import expanded
from ..io.serving import export
from ..progress import Reporter
from ..recipe import SAFE, Recipe, summands
from ..report import write_report
from ..run.checkpoints import continuing
from ..run.collect import rows_digest
from ..run.launch import leader
from ..run.memory import check_pencil
from ..run.own_prompts import FEW, OWN, beside, joined, own_rows
from ..session import Session, open_session
from ..specs import Pencil
from .decide import MEASURED, Decision, decide, evaluator_of, keeps_all
from .findings import about_refusing, findings, heed
from .front import described
from .source import Source, load_evidence
from .trust import Budget, hold_out

_MATCHED = 1.15  # ratio of two KLs that are called equal
EVIDENCE = "evidence.safetensors"  # in the output: for other strengths, filters and scopes in seconds


def session_of(
    recipe: Recipe, reporter: Reporter, *, weights: bool = True, loaded: tuple[Any, Any] | None = None
) -> Session:
    """The model and adapters of a recipe; the model on meta tensors without `weights`. loaded: model and tokenizer, where they are at hand."""
    return open_session(
        recipe.model, recipe.safety, recipe.task, dtype=recipe.dtype, device=recipe.device, quantization=recipe.quantization,
        weights=weights, loaded=loaded, reporter=reporter,
    )  # fmt: skip


def load_data(
    recipe: Recipe, tokenizer: Any, write: Callable[[Dataset, int], Dataset] | None = None
) -> dict[str, Dataset]:
    """The recipe's data files, tokenised, with benign rows that `write(harm, count)` adds where the recipe wants some. Raises DataError."""
    given = {
        name: load_dataset(path, tokenizer, **recipe.reading | ({"skip_bad_lines": True} if path == SAFE else {}))
        for name, path in recipe.files.items()
    }
    if write is not None and recipe.self_benign:
        given["benign"] = joined(given.get("benign"), write(given["harm"], recipe.self_benign))
    return hold_out(given, recipe.holdout, recipe.folds if recipe.keeps_rows else 1)


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
    front: Sequence[Mapping[str, Any]] | None = None,
    exports: Sequence[str] = (),
    yes: bool = False,
    loaded: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Run a recipe: write the merged adapter with report, model card, recipe and evidence; return the report.

    Inputs that are likely a mistake (`findings`) end it before the first pass, unless `yes`. `exports`: "full" and "gguf-lora", beside the
    adapter (`serving.export`). loaded: model and tokenizer, where they are at hand. front: one that was measured earlier, of which this
    recipe makes the point that is `chosen` (`front.picked`).

    `checkpoint_every` batches the reading is saved beside the output, and `resume` goes on from there. Under torchrun all ranks
    share the reading and the solves; the first one evaluates, writes and returns the report, the others return {}. The adapter is
    written before it is measured: an evaluation that fails is a line in the report.

    Raises MergeError (with what to do) for unusable inputs; nothing is left under the output's name unless all went well.
    """
    reporter = reporter or Reporter()
    leading = leader()
    if exports and recipe.model is None:
        raise RecipeError(f"model: is required for --export {exports[0]}")
    if leading:
        check_output(recipe.output, force=force)
    with (
        continuing(recipe.output, checkpoint_every, resume) as continuity,
        output_folder(recipe.output, force=force) if leading else nullcontext(recipe.output) as folder,
    ):
        session = session_of(recipe, reporter, loaded=loaded)
        write = partial(own_rows, session, recipe, continuity=continuity, file=folder / OWN if leading else None)
        data = load_data(recipe, session.tokenizer, write) if recipe.files else {}
        for name, dataset in data.items():
            reporter.say("\n".join([f"{name}: {dataset.kind}", *dataset.notes]))
            reporter.detail(f"{name}, as the model sees it, labels marked:\n{rendered_example(dataset)}")
        if recipe.evidence is None and not recipe.self_benign and len(data["benign"]) < FEW:
            reporter.say(f"benign: {len(data['benign'])} rows are few; --self-benign 200 lets the model write more")
        told = heed(findings(recipe, session, data), reporter, yes=yes)
        if "harm" in data:
            told += heed(about_refusing(session, data["harm"], recipe.tokens_per_batch), reporter, yes=yes)
        examples = {name: d.example for name, d in data.items()}
        if recipe.evidence is not None:
            data = _seen_by_nobody(data, source := open_source(recipe, session, {}), reporter)
        else:
            check_folds(recipe, data)
            check_pencil(recipe, session.safety, data, next(session.model.parameters()).device)
            source = open_source(recipe, session, data, continuity)
        # A judge that is not there, or prompts too long when put differently, are told before the passes.
        evaluator = evaluator_of(session, recipe, data, forgiving=True) if leading and MEASURED & data.keys() else None
        source.subspace(recipe.pencil)
        if not leading:
            return {}
        decision = decide(recipe, session, source, data)
        chosen, adapter, lost = decision.choice, decision.choice.adapter, decision.choice.lost
        write_adapter(adapter, folder)
        (folder / "recipe.yml").write_text(recipe.to_yaml(), encoding="utf-8")
        if keep_evidence and recipe.from_evidence:
            source.decisions.save(folder / EVIDENCE)
        report = describe(session, recipe, data, source, chosen.pencil or recipe.pencil, chosen.patch, adapter)
        report["examples"], report["warnings"] = examples, told
        report["measured"] = decision.outcome.summary() if decision.outcome is not None else None
        report["budget"] = report["measured"] if isinstance(decision.outcome, Budget) else None
        if decision.front and decision.chosen is not None:
            keeps = keep_evidence and recipe.from_evidence
            report["front"] = described(
                decision.front, decision.chosen, data.get("eval_benign"), recipe, evidence=keeps
            )
        elif front is not None:
            report["front"] = list(front)
        report["recompression"] = lost.summary() if lost is not None else None
        evaluations = _evaluate(session, recipe, evaluator, decision)
        report["evaluation"] = {name: e.summary() for name, e in evaluations.items()}
        report["failed_evaluations"] = {name: e.failed for name, e in evaluations.items() if e.failed}
        report["seconds"] = {name: round(value, 2) for name, value in session.seconds.items()}
        measured = report["evaluation"].get("merged", {}).get("benign_kl")
        if measured is not None:
            report["calibration"] = [calibration_point(chosen.patch, measured)]
        if evaluations:
            write_prompts(folder / "prompts.json", evaluations)
        report["exports"], report["failed_exports"] = _exported(exports, session, adapter, folder, recipe)
        write_report(report, folder, {name: e.prompts for name, e in evaluations.items()})
    return report


def _exported(
    kinds: Sequence[str], session: Session, adapter: Adapter, folder: Path, recipe: Recipe
) -> tuple[dict[str, str], dict[str, str]]:
    if not kinds:
        return {}, {}
    base = str(model_folder(recipe.model or "").absolute())
    return export(
        kinds, adapter, folder, expanded(recipe.output).absolute(), base, lambda: (session.model, session.tokenizer)
    )


def _seen_by_nobody(data: Mapping[str, Dataset], source: Source, reporter: Reporter) -> dict[str, Dataset]:
    """The data without those that evidence stands for; rows that were held out of it stay, to measure on."""
    kept = dict(data)
    for side in ("harm", "benign"):
        rows = kept.pop(side, None)
        if rows is not None and source.evidence.notes.get(f"{side} rows") != rows_digest(rows):
            kept.pop(f"eval_{side}", None)
            what = "the budget is" if side == "benign" else "refusal is"
            reporter.warn(
                f"{rows.path} less its held-out rows is not what the evidence was collected from, so no row is known to be unseen: {what} not "
                f"measured. Give eval_{side}_data, or the {side}_data, limit and holdout of the collection"
            )
    return kept


def collect_to_file(
    recipe: Recipe,
    *,
    exact: bool = False,
    force: bool = False,
    reporter: Reporter | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    yes: bool = False,
) -> sst.Evidence | None:
    """Read a recipe's data once and write the evidence to its output, a file; in a basis unless `exact`. None on ranks but the first.

    Inputs that are likely a mistake end it before the reading, unless `yes`.
    """
    reporter = reporter or Reporter()
    adapters = [folder for given in (recipe.safety, recipe.task) if given is not None for folder in summands(given)]
    files = [p for p in (recipe.model, *adapters, *recipe.files.values()) if p is not None]
    with (
        continuing(recipe.output, checkpoint_every, resume) as continuity,
        output_file(recipe.output, force=force, inputs=files) if leader() else nullcontext(recipe.output) as unfinished,
    ):
        session = session_of(recipe, reporter)
        write = partial(own_rows, session, recipe, continuity=continuity, file=beside(recipe.output), force=force)
        data = load_data(recipe, session.tokenizer, write)
        heed(findings(recipe, session, data), reporter, yes=yes)
        heed(about_refusing(session, data["harm"], recipe.tokens_per_batch), reporter, yes=yes)
        source = open_source(recipe, session, data, continuity)
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
    pencil: Pencil,
    patch: sst.Patch,
    adapter: Adapter,
) -> dict[str, Any]:
    """The report's facts, as JSON-able values; `report.write_report` turns them into files."""
    space = source.subspace(pencil)
    values, summary = space.values, adapter.summary()
    gain, cost = source.fishers(pencil.fishers)
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
            "unseen": space.unseen,
            "soft_path": {"mu": path.tolist(), "predicted_kl": curve.tolist()},
        },
        "patch": {
            "filter": patch.filter,
            "parameter": patch.strength,
            "whole": keeps_all(patch, space.values),
            "input_filter": pencil.fishers.input_filter,
            "points": list(patch.points),
            "prediction": asdict(patch.prediction),
            "kept_energy": patch.kept,
        },
        "adapter": summary
        | {"notes": summary["notes"] + (check_fit(session.model, adapter) if session.loaded else [])},
        "seconds": {name: round(value, 2) for name, value in session.seconds.items()},
        "versions": versions(),
    }


def calibration_point(patch: sst.Patch, measured: float) -> dict[str, float | None]:
    """Predicted beside measured benign KL, in nats per label token."""
    return {"parameter": patch.strength, "predicted_kl": patch.prediction.cost_per_label, "measured_kl": measured}


def _evaluate(
    session: Session, recipe: Recipe, evaluator: Evaluator | None, decision: Decision
) -> dict[str, Evaluation]:
    if evaluator is None:
        return {}
    start = time.monotonic()
    options: dict[str, Any] = {"generate_tokens": recipe.generate_tokens}
    results = {"no patch": evaluator(session.reference, label="no patch", known=decision.nothing, **options)}
    for name, candidate, seen in (
        ("plain addition", session.plain(1.0), None),
        ("merged", decision.choice.adapter, decision.known),
    ):
        measure = partial(session.measure, evaluator, candidate, name, known=seen, **options)
        results[name] = evaluator.attempt(name, measure)
    kl, whole = results["merged"].benign_kl, results["plain addition"].benign_kl
    if evaluator.benign is not None and _MATCHED * kl < whole and kl > 0:  # not where either could not be measured
        name, known = _plain_of_equal_kl(session, evaluator, kl, whole)
        measure = partial(session.measure, evaluator, session.plain(float(name)), f"α = {name}", known=known, **options)
        results[f"plain addition, α = {name}"] = known if known.failed else evaluator.attempt(f"α = {name}", measure)
        results["merged"] = results.pop("merged")  # the last row of the table
    session.seconds["evaluate"] = time.monotonic() - start
    return results


def _plain_of_equal_kl(session: Session, evaluator: Evaluator, target: float, whole: float) -> tuple[str, Evaluation]:
    """The α, in two digits, at which plain addition has about the benign KL `target`, and what was measured there; `whole` is its KL at α = 1.

    What users would do without this package: the fair row beside a merge. KL grows as about α²; each step takes the last exponent.
    """
    (alpha, kl), power = (1.0, whole), 2.0
    for _ in range(3):
        name = f"{alpha * (target / kl) ** (1 / power):.2g}"
        at = partial(session.measure, evaluator, session.plain(float(name)), f"α = {name}", only_benign=True)
        found = evaluator.attempt(f"α = {name}", at)
        if not found.benign_kl > 0 or max(found.benign_kl / target, target / found.benign_kl) <= _MATCHED:
            break
        if float(name) != alpha and found.benign_kl != kl:
            power = min(max(math.log(found.benign_kl / kl) / math.log(float(name) / alpha), 1.0), 4.0)
        alpha, kl = float(name), found.benign_kl
    return name, found


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
