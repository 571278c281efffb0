"""The demo: shipped adapters and prompts, a real model, and SST-Merge beside plain addition at the same benign KL."""

from __future__ import annotations

import importlib.resources
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .evaluate import Evaluation, Evaluator, write_prompts
from .io.adapters import Adapter, write_adapter
from .io.output import output_folder
from .io.smollm2 import WHEEL
from .merge import pipeline
from .merge.source import Source
from .progress import Reporter
from .recipe import Recipe
from .report import print_table, write_report

ALPHAS = (0.2, 0.3, 0.5, 1.0)
BUDGETS = (0.0005, 0.002, 0.01)  # nats per label token: three strengths of one reading
MATCHED = (0.2,)  # the α of plain addition whose measured benign KL SST is given as well
TOLERANCE = 0.1
TASKS = 40  # word problems that are solved by every adapter


def run(
    output: Path,
    given: dict[str, Any] | None = None,
    *,
    force: bool = False,
    reporter: Reporter,
) -> dict[str, Any]:
    """Run the demo into `output` and return its report; the last matched adapter is the one written. `given`: seed, device, dtype."""
    start = time.monotonic()
    shipped = importlib.resources.files("sst_merge") / "demo_data"
    with importlib.resources.as_file(shipped) as data, output_folder(output, force=force) as folder:
        recipe = Recipe.parse(
            {
                "model": WHEEL,
                "task": data / "task",
                "safety": data / "safety",
                "harm_data": data / "harmful_fisher.jsonl",
                "benign_data": data / "benign_fisher.jsonl",
                "eval_harm_data": data / "harmful_eval.jsonl",
                "eval_benign_data": data / "benign_eval.jsonl",
                "eval_task_data": data / "task_eval.jsonl",
                "task_tokens": 32,
                "output": output,
                "generate_tokens": 12,  # refusals start with their phrase
                **(given or {}),
            }
        )
        report, evaluations, adapter = _run(recipe, folder, reporter)
        write_adapter(adapter, folder)
        write_prompts(folder / "prompts.json", evaluations)
        (folder / "recipe.yml").write_text(recipe.to_yaml(), encoding="utf-8")
        write_report(report, folder, {name: e.prompts for name, e in evaluations.items()})
    print_table(report["evaluation"])
    kls = ", ".join(f"{p['predicted_kl']:.3f} / {p['measured_kl']:.3f}" for p in report["calibration"])
    print(f"\nbenign KL of SST, predicted on held-out rows / measured: {kls}")
    print(f"adapter   {output.absolute()}   (PeftModel.from_pretrained loads it)")
    print(f"report    {output.absolute() / 'report.html'}: chart, answers and commands; every prompt in prompts.json")
    print(f"took      {time.monotonic() - start:.0f} s")
    return report


def _run(recipe: Recipe, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], dict[str, Evaluation], Adapter]:
    reporter.say("SST-Merge demo: SmolLM2-135M-Instruct, a word-problem adapter, a refusal adapter", "bold")
    session = pipeline.session_of(recipe, reporter)
    data = pipeline.load_data(recipe, session.tokenizer)
    source = pipeline.open_source(recipe, session, data)
    source.decisions  # noqa: B018 (one reading of the data; all that follows takes no more of the model than measuring does)
    start = time.monotonic()
    adapters = {f"SST, {budget:g} nats predicted": _chosen(source, recipe, budget) for budget in BUDGETS}
    session.seconds["decide"] = time.monotonic() - start
    reporter.say(f"{len(BUDGETS)} strengths chosen from the evidence in {session.seconds['decide']:.1f} s")
    start = time.monotonic()
    evaluator = Evaluator(
        session.model,
        session.tokenizer,
        harmful=data["eval_harm"],
        benign=data["eval_benign"],
        task=data["eval_task"][:TASKS],
        task_tokens=recipe.task_tokens,
        reference=session.reference,
        reporter=reporter,
    )
    options: dict[str, Any] = {"generate_tokens": recipe.generate_tokens}
    evaluations = {"no patch": evaluator(session.reference, label="no patch", **options)}
    for alpha in ALPHAS:
        name = f"plain addition, α = {alpha:g}"
        evaluations[name] = session.measure(evaluator, session.plain(alpha), f"plain α = {alpha:g}", **options)
    points = []
    for name, (patch, adapter) in adapters.items():
        evaluations[name] = session.measure(evaluator, adapter, name, **options)
        points.append(pipeline.calibration_point(patch, evaluations[name].benign_kl))
    for alpha in MATCHED:
        target = evaluations[f"plain addition, α = {alpha:g}"].benign_kl
        patch, adapter, known = _match(source, recipe, evaluator, target, f"SST ≙ α = {alpha:g}")
        result = session.measure(evaluator, adapter, f"SST ≙ α = {alpha:g}", known=known, **options)
        evaluations[f"SST, KL matched to α = {alpha:g}"] = result
        points.append(pipeline.calibration_point(patch, result.benign_kl))
    session.seconds["evaluate"] = time.monotonic() - start
    assert MATCHED, "the last matched patch is the one written"
    report = pipeline.describe(session, recipe, data, source, recipe.pencil, patch, adapter)
    report["evaluation"] = {name: e.summary() for name, e in evaluations.items()}
    report["calibration"] = points
    source.decisions.save(folder / pipeline.EVIDENCE)
    return report, evaluations, adapter


def _chosen(source: Source, recipe: Recipe, budget: float) -> tuple[Any, Adapter]:
    patch, reads = source.filtered(recipe.pencil, replace(recipe.strength, kl_budget=budget))
    return patch, source.session.merged(reads, patch.coordinates)


def _match(
    source: Source, recipe: Recipe, evaluator: Evaluator, target: float, label: str, trials: int = 6
) -> tuple[Any, Adapter, Evaluation]:
    """The soft-filtered patch whose *measured* benign KL is the target within `TOLERANCE`: proportional steps, halved between
    a budget that was too small and one that was too large."""
    budget, tried = target, []
    for _ in range(trials):
        patch, adapter = _chosen(source, recipe, budget)
        known = source.session.measure(evaluator, adapter, label, only_benign=True)
        measured = known.benign_kl
        tried.append((math.log(budget), math.log(max(measured, 1e-12)), patch, adapter, known))
        if abs(measured / target - 1) <= TOLERANCE:
            break
        below = max((b for b, kl, *_ in tried if kl < math.log(target)), default=None)
        above = min((b for b, kl, *_ in tried if kl > math.log(target)), default=None)
        if below is not None and above is not None:
            budget = math.exp((below + above) / 2)
        else:
            spent = patch.prediction.cost_per_label or budget  # all there is may be less than the budget
            budget = spent * target / max(measured, 1e-12)
    best = min(tried, key=lambda t: abs(t[1] - math.log(target)))
    return best[2:]
