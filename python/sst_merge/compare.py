"""`sst-merge compare`: methods × strengths → held-out evaluation → what each buys at equal refusal.

A comparison is a recipe with three more entries:

    methods: [sst, ties, tsv-m]            names in `sst_merge.methods`; "no patch" and "plain" are always there
    strengths: {ties: [0.3, 1.0]}          instead of a method's own sweep
    eval_safe_data: safe.jsonl             safe prompts that sound dangerous, for the over-refusal rate

Every measured configuration is one file in OUTPUT/rows, named by a digest of all that it depends on: a killed run
continues, a changed recipe measures what changed, and equal configurations are never measured twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sst_kernels

from .adapters import Adapter
from .data import Dataset, load_dataset
from .errors import MergeError, RecipeError
from .evaluate import Evaluator
from .methods import Evidence, Inputs, Method, find
from .pareto import Resample, equal_refusal, hypervolume, non_dominated
from .pipeline import load_data
from .progress import Reporter
from .recipe import Recipe, read_yaml
from .session import Session, open_session

ALWAYS = ("no patch", "plain")
DEFAULT = (
    "sst",
    "sst-module",
    "diagonal-sst",
    "fisher-average",
    "regmean",
    "ties",
    "dare-linear",
    "tsv-m",
    "random-subspace",
)
NUMBERS = ("refusal_nll", "refusal_rate", "benign_kl", "benign_nll", "over_refusal")


@dataclass(frozen=True)
class Plan:
    """What is compared: the recipe of the inputs, and (method, strengths) in order."""

    recipe: Recipe
    sweeps: tuple[tuple[Method, tuple[float, ...]], ...]
    safe_data: Path | None = None

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> Plan:
        """Read a comparison. Raises RecipeError for unknown methods, strengths that are no lists, or missing evaluation data."""
        values = {**read_yaml(path), **overrides}
        names, strengths, safe = (values.pop(key, None) for key in ("methods", "strengths", "eval_safe_data"))
        names, strengths = list(DEFAULT) if names is None else names, strengths or {}
        if not isinstance(names, list) or not isinstance(strengths, dict):
            raise RecipeError(f"{path}: expected methods: [name, …] and strengths: {{name: [number, …]}}")
        for name, given in strengths.items():
            if not isinstance(given, list) or not all(isinstance(s, int | float) for s in given) or not given:
                raise RecipeError(f"{path}: strengths of {name}: expected a list of numbers, got {given!r}")
        recipe = Recipe.parse(values, where=str(path))
        if recipe.eval_harm_data is None or recipe.eval_benign_data is None:
            raise RecipeError(
                f"{path}: a comparison needs eval_harm_data and eval_benign_data, apart from the fitting data"
            )
        methods = [find(name) for name in dict.fromkeys([*ALWAYS, *names])]
        for name in strengths:
            find(name)
        sweeps = tuple((m, tuple(map(float, strengths.get(m.name, m.strengths)))) for m in methods)
        return cls(recipe, sweeps, Path(path).parent / safe if safe else None)


@dataclass
class _Bench:
    """The open session with its evaluators, and where rows are kept."""

    plan: Plan
    session: Session
    data: Mapping[str, Dataset]
    folder: Path
    inputs: Inputs
    evaluator: Evaluator
    safe: Evaluator | None
    facts: dict[str, Any] = field(default_factory=dict)

    def row(self, method: Method, strength: float) -> dict[str, Any]:
        file = self.folder / f"{self._digest(method, strength)}.json"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        row = {"method": method.name, "strength": strength, "needs": list(method.needs)}
        try:
            start = time.perf_counter()
            adapter = method.merge(self.inputs, strength)
            row |= {
                "merge_seconds": time.perf_counter() - start,
                **self._measure(adapter, f"{method.name} {strength:g}"),
            }
        except MergeError as error:
            return row | {"error": str(error)}
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(row), encoding="utf-8")
        os.replace(partial, file)
        return row

    def _measure(self, adapter: Adapter, label: str) -> dict[str, Any]:
        recipe, device = self.plan.recipe, next(self.session.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        result = self.session.measure(self.evaluator, adapter, label, generate_tokens=recipe.generate_tokens)
        row: dict[str, Any] = {**result.summary(), "prompts": result.prompts, "over_refusal": None}
        if self.safe is not None and recipe.generate_tokens:
            safe = self.session.measure(self.safe, adapter, f"{label}: safe", generate_tokens=recipe.generate_tokens)
            row["over_refusal"] = safe.refusal_rate
            row["prompts"] = [*result.prompts, *({**p, "set": "safe"} for p in safe.prompts)]
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return row | {
            "evaluation_seconds": time.perf_counter() - start,
            "peak_bytes": peak,
            "parameters": adapter.parameters,
        }

    def _digest(self, method: Method, strength: float) -> str:
        return _digest(self.facts | {"method": method.name, "variant": method.variant, "strength": strength})


def compare(plan: Plan, *, reporter: Reporter | None = None) -> dict[str, Any]:
    """Run a comparison, or the rest of it, and write its report. Returns the report (see `summarise`).

    Raises MergeError for unusable inputs. A method that refuses its inputs becomes a row with its reason.
    """
    from .compare_report import write

    recipe, reporter = plan.recipe, reporter or Reporter()
    folder = Path(recipe.output)
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    bench = _open(plan, folder / "rows", reporter)
    rows = []
    for method, strength in _configurations(plan):
        rows.append(bench.row(method, strength))
        reporter.say(_line(rows[-1]))
    report = summarise(plan, rows, bench.data)
    write(report, rows, folder)
    return report


def summarise(
    plan: Plan, rows: Sequence[Mapping[str, Any]], data: Mapping[str, Dataset], *, draws: int = 1000
) -> dict[str, Any]:
    """The comparison without its prompts: `rows` with intervals and ratios, `methods` with dominated areas, `context`."""
    good = [r for r in rows if "error" not in r]
    points = [_sums(r, data) for r in good]
    resample = Resample(len(points[0][0]), len(points[0][1]), draws=draws, seed=plan.recipe.seed)
    curves = {
        name: _curve(good, points, lambda r, n=name: r["method"] in (n, "no patch"))
        for name in {r["method"]: 0 for r in good}
    }
    plain = _curve(good, points, lambda r: r["method"] == "plain")
    start = next(r for r in good if r["method"] == "no patch")
    corner = (start["refusal_nll"], max((r["benign_kl"] for r in good if r["method"] == "plain"), default=0.0) or 1.0)
    front = non_dominated(*(np.array([r[k] for r in good]) for k in ("refusal_nll", "benign_kl")))
    described = []
    for row, point, best in zip(good, points, front.tolist()):
        found = equal_refusal(point, plain, resample)
        numbers = {k: row.get(k) for k in (*NUMBERS, "merge_seconds", "evaluation_seconds", "peak_bytes", "parameters")}
        described.append({"method": row["method"], "strength": row["strength"], "needs": row["needs"], "front": best, **numbers, "intervals": {k: _finite(v) for k, v in found.items()}})  # fmt: skip
    return {
        "schema": 1,
        "rows": described,
        "refused": [dict(r) for r in rows if "error" in r],
        "methods": [
            {"name": m.name, "source": m.source, "variant": m.variant, "strength": m.strength, "needs": list(m.needs)}
            | {"hypervolume": _finite(hypervolume(curves[m.name], corner, resample))}
            for m, _ in plan.sweeps
            if m.name in curves
        ],
        "context": {
            "corner": list(corner),
            "bootstrap": draws,
            "recipe": plan.recipe.model_dump(mode="json"),
            "data": {name: d.summary() for name, d in data.items()},
            "versions": {"sst_kernels": sst_kernels.__version__, "torch": torch.__version__},
        },
    }


def _open(plan: Plan, folder: Path, reporter: Reporter) -> _Bench:
    recipe = plan.recipe
    session = open_session(
        recipe.model, recipe.safety, recipe.task, dtype=recipe.dtype, device=recipe.device, reporter=reporter
    )
    data = dict(load_data(recipe, session.tokenizer))
    if plan.safe_data is not None:
        data["eval_safe"] = load_dataset(
            plan.safe_data, session.tokenizer, max_length=recipe.max_length, limit=recipe.limit
        )
    common: dict[str, Any] = {
        "reference": session.reference,
        "tokens_per_batch": recipe.tokens_per_batch,
        "reporter": reporter,
    }
    evidence = Evidence(session, data["harm"], data["benign"], recipe.tokens_per_batch, recipe.label_draws, recipe.seed)
    facts = {
        "version": sst_kernels.__version__,
        "model": recipe.model,
        "adapters": [session.safety.sha256, session.task.sha256 if session.task is not None else ""],
        "data": {name: (d.sha256, len(d)) for name, d in data.items()},
        "settings": [
            recipe.dtype,
            recipe.seed,
            recipe.max_length,
            recipe.generate_tokens,
            recipe.label_draws,
            recipe.rank,
        ],
    }
    return _Bench(
        plan, session, data, folder,
        Inputs(session.task, session.safety, evidence, recipe.rank, recipe.seed),
        Evaluator(session.model, session.tokenizer, harmful=data["eval_harm"], benign=data["eval_benign"], **common),
        Evaluator(session.model, session.tokenizer, harmful=data["eval_safe"], **common) if "eval_safe" in data else None,
        facts,
    )  # fmt: skip


def _configurations(plan: Plan) -> Iterator[tuple[Method, float]]:
    return ((method, strength) for method, strengths in plan.sweeps for strength in strengths)


def _sums(row: Mapping[str, Any], data: Mapping[str, Dataset]) -> tuple[np.ndarray, np.ndarray]:
    """Per-prompt sums and label counts of one row: harm [N, 2], benign [M, 2], ordered by line."""
    out = []
    for kind, name, key in (("harmful", "eval_harm", "refusal_nll"), ("benign", "eval_benign", "benign_kl")):
        labels = {e.line: e.labels for e in data[name].examples}
        mine = sorted((p["line"], p[key]) for p in row["prompts"] if p["set"] == kind)
        out.append(np.array([(value * labels[line], labels[line]) for line, value in mine]))
    return out[0], out[1]


def _curve(rows: Sequence[Mapping[str, Any]], points: list, member: Any) -> tuple[np.ndarray, np.ndarray]:
    chosen = [p for r, p in zip(rows, points) if member(r)]
    return np.stack([p[0] for p in chosen]), np.stack([p[1] for p in chosen])


def _finite(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values]


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _line(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"{row['method']} {row['strength']:g}: refused: {row['error']}"
    return (
        f"{row['method']} {row['strength']:g}: refusal NLL {row['refusal_nll']:.3f}, benign KL {row['benign_kl']:.4f}"
    )
