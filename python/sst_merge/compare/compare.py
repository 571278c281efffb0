"""`sst-merge compare`: methods × strengths → held-out evaluation → what each buys at equal refusal.

Every measured configuration is one file in OUTPUT/rows, named by a digest of all that it depends on: a killed run
continues, a changed recipe measures what changed, equal configurations are never measured twice, and a damaged row is
measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sst_kernels
from sst_kernels.env import versions

from ..errors import MergeError, OutputError, headlined
from ..evaluate import Evaluator
from ..io.adapters import Adapter
from ..io.data import Dataset
from ..io.output import check_output, output_file
from ..io.paths import expanded
from ..io.wrappers import WRAPPERS
from ..merge.decide import evaluator_of
from ..merge.pipeline import load_data, open_source, session_of
from ..methods import Inputs, Method
from ..progress import Reporter
from ..run.collect import model_digest
from ..run.own_prompts import OWN, own_rows
from ..session import Session
from .pareto import Resample, equal_refusal, hypervolume, non_dominated
from .recipe import ALWAYS, OF_METHODS, Comparison

NUMBERS = (
    "refusal_nll", "refusal_rate", "judge_refused", "classifier_refused", "benign_kl", "first_token_kl", "benign_nll", "over_refusal",
    "judge_over_refusal", "classifier_over_refusal", "task_accuracy", "robust_refused",
)  # fmt: skip
SETTINGS = ("dtype", "seed", "generate_tokens", "task_tokens", "tokens_per_batch", "rank", "judge")


@dataclass
class _Bench:
    """The open session with its evaluator, and where rows are kept.

    `facts` are what every row depends on, `fitting` what those of methods that look at data do beside it.
    """

    recipe: Comparison
    session: Session
    data: Mapping[str, Dataset]
    folder: Path
    inputs: Inputs
    evaluator: Evaluator
    facts: dict[str, Any] = field(default_factory=dict)
    fitting: dict[str, Any] = field(default_factory=dict)

    def row(self, method: Method, strength: float) -> dict[str, Any]:
        """One configuration, measured or read; where a method refuses its inputs, {"error": the reason}."""
        file = self.folder / f"{self._digest(method, strength)}.json"
        kept = _read(file, self.session.reporter)
        if kept is not None:
            return kept
        row = {"method": method.name, "strength": strength, "needs": list(method.needs)}
        try:
            start = time.perf_counter()
            with headlined("cannot be merged"):
                adapter = method.merge(self.inputs, strength)
            seconds = time.perf_counter() - start
            row |= {"merge_seconds": seconds, **self._measure(adapter, f"{method.name} {strength:g}")}
        except MergeError as error:
            return row | {"error": str(error)}
        with output_file(file, force=True) as partial:
            partial.write_text(json.dumps({"seal": _seal(file, row), "row": row}, allow_nan=False), encoding="utf-8")
        return row

    def _measure(self, adapter: Adapter, label: str) -> dict[str, Any]:
        recipe, device = self.recipe, next(self.session.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        result = self.session.measure(self.evaluator, adapter, label, generate_tokens=recipe.generate_tokens)
        if not all(map(math.isfinite, (result.refusal_nll, result.benign_nll, result.benign_kl))):
            raise MergeError("the merged model predicts no finite probabilities; take a smaller strength")
        row: dict[str, Any] = {**result.summary(), "prompts": result.prompts}
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return row | {
            "evaluation_seconds": time.perf_counter() - start,
            "peak_bytes": peak,
            "parameters": adapter.parameters,
        }

    def _digest(self, method: Method, strength: float) -> str:
        facts = self.facts | (self.fitting if method.needs else {})
        return _digest(facts | {"method": method.name, "variant": method.variant, "strength": strength})


def compare(recipe: Comparison, *, reporter: Reporter | None = None) -> dict[str, Any]:
    """Run a comparison, or the rest of it, and write its report. Returns the report (see `summarise`).

    A method that refuses its inputs becomes a row with its reason. Raises MergeError for unusable inputs and outputs, and when
    the unpatched model or plain addition, beside which all else is read, cannot be measured.
    """
    from .report import write

    reporter = reporter or Reporter()
    folder = _claim(recipe.output)
    bench = _open(recipe, folder / "rows", reporter)
    rows: list[dict[str, Any]] = []
    for method, strengths in recipe.sweeps:
        for strength in strengths:
            rows.append(bench.row(method, strength))
            reporter.say(_line(rows[-1]))
        if method.name in ALWAYS and all("error" in r for r in rows[-len(strengths) :]):
            raise MergeError(f"nothing can be compared without {method.name!r}: {rows[-1]['error']}")
    report = summarise(recipe, rows, bench.data)
    write(report, rows, folder)
    return report


def summarise(
    recipe: Comparison, rows: Sequence[Mapping[str, Any]], data: Mapping[str, Dataset], *, draws: int = 1000
) -> dict[str, Any]:
    """The comparison without its prompts: `rows` with intervals and ratios, `methods` with dominated areas, `context`."""
    good = [r for r in rows if "error" not in r]
    points = [_sums(r, data) for r in good]
    resample = Resample(len(points[0][0]), len(points[0][1]), draws=draws, seed=recipe.seed)
    curves = {
        name: _curve(good, points, lambda r, n=name: r["method"] in (n, "no patch"))
        for name in {r["method"]: 0 for r in good}
    }
    plain = _curve(good, points, lambda r: r["method"] == "plain")
    answered = [(_refused(r), benign) for r, (_, benign) in zip(good, points)] if recipe.generate_tokens else None
    plain_rates = _curve(good, answered, lambda r: r["method"] == "plain") if answered else None
    start = next(r for r in good if r["method"] == "no patch")
    corner = (start["refusal_nll"], max((r["benign_kl"] for r in good if r["method"] == "plain"), default=0.0) or 1.0)
    front = non_dominated(*(np.array([r[k] for r in good]) for k in ("refusal_nll", "benign_kl")))
    described = []
    for number, (row, point, best) in enumerate(zip(good, points, front.tolist())):
        found = equal_refusal(point, plain, resample)
        if answered is not None and plain_rates is not None:
            found["rate_ratio"] = equal_refusal(answered[number], plain_rates, resample)["ratio"]
        numbers = {k: row.get(k) for k in (*NUMBERS, "merge_seconds", "evaluation_seconds", "peak_bytes", "parameters")}
        described.append({"method": row["method"], "strength": row["strength"], "needs": row["needs"], "front": best, **numbers, "intervals": {k: _finite(v) for k, v in found.items()}})  # fmt: skip
    return {
        "schema": 1,
        "rows": described,
        "refused": [dict(r) for r in rows if "error" in r],
        "methods": [
            {"name": m.name, "source": m.source, "variant": m.variant, "strength": m.strength, "needs": list(m.needs)}
            | {"hypervolume": _finite(hypervolume(curves[m.name], corner, resample))}
            for m, _ in recipe.sweeps
            if m.name in curves
        ],
        "context": {
            "corner": list(corner),
            "bootstrap": draws,
            "recipe": recipe.model_dump(mode="json", exclude=OF_METHODS),
            "data": {name: d.summary() for name, d in data.items()},
            "versions": versions(),
        },
    }


def _claim(output: Path) -> Path:
    """The output folder: new, empty, or that of an earlier comparison. Raises OutputError."""
    folder = expanded(output).absolute()
    if not os.path.isdir(folder / "rows"):
        if os.path.isdir(folder) and os.listdir(folder):
            raise OutputError(f"{folder}: holds something else than an earlier comparison; choose another output")
        check_output(folder, force=False)
    return folder


def _open(recipe: Comparison, folder: Path, reporter: Reporter) -> _Bench:
    session = session_of(recipe, reporter)
    write = partial(own_rows, session, recipe, file=folder.parent / OWN, force=True)
    data = load_data(recipe, session.tokenizer, write)
    for fitted, other in (("harm", "eval_harm"), ("benign", "eval_benign"), ("safe", "eval_safe")):
        if {fitted, other} <= data.keys() and (
            seen := {e.prompt for e in data[fitted]} & {e.prompt for e in data[other]}
        ):
            reporter.warn(f"{len(seen)} prompts of {other}_data are in {fitted}_data too: not held out")
    hashes = {name: _digest([(e.line, e.tokens, e.prompt_tokens) for e in d]) for name, d in data.items()}
    facts = {
        "version": sst_kernels.__version__,
        "model": model_digest(session.model),
        "adapters": [session.safety.sha256, session.task.sha256 if session.task is not None else ""],
        "data": {name: digest for name, digest in hashes.items() if name.startswith("eval_")},
        "settings": {n: getattr(recipe, n) for n in SETTINGS}
        | {"wrappers": repr(WRAPPERS if recipe.robustness else {})},
        "numbers": NUMBERS,
    }
    fitting = {
        "fitted on": [hashes.get(name) for name in ("harm", "benign", "safe")]
        if recipe.evidence is None
        else file_digest(recipe.evidence),
        "fitted with": [repr(recipe.collection), repr(recipe.pencil)],
    }
    source = open_source(recipe, session, data)
    return _Bench(
        recipe, session, data, folder,
        Inputs(session.task, session.safety, source, recipe.pencil, recipe.rank, recipe.seed),
        evaluator_of(session, recipe, data), facts, fitting,
    )  # fmt: skip


def _read(file: Path, reporter: Reporter) -> dict[str, Any] | None:
    """The row in a file; None where there is none, or what stands there is not what was written under that name."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["seal"] == _seal(file, kept["row"]):
            return kept["row"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    reporter.warn(f"{file}: damaged, so it is measured again")
    return None


def _seal(file: Path, row: Any) -> str:
    return _digest([file.name, row])


def _sums(row: Mapping[str, Any], data: Mapping[str, Dataset]) -> tuple[np.ndarray, np.ndarray]:
    """Per-prompt sums and label counts of one row: harm [N, 2], benign [M, 2], ordered by line."""
    out = []
    for kind, name, key in (("harmful", "eval_harm", "refusal_nll"), ("benign", "eval_benign", "benign_kl")):
        labels = {e.line: e.labels for e in data[name].examples}
        mine = sorted((p["line"], p[key]) for p in row["prompts"] if p["set"] == kind)
        out.append(np.array([(value * labels[line], labels[line]) for line, value in mine]))
    return out[0], out[1]


def _refused(row: Mapping[str, Any]) -> np.ndarray:
    """(not refused, 1) of each harmful prompt [N, 2], ordered by line: its mean falls as refusal grows, as the NLL does."""
    answers = sorted((p["line"], p["refused"]) for p in row["prompts"] if p["set"] == "harmful")
    return np.array([(1.0 - refused, 1.0) for _, refused in answers])


def _curve(rows: Sequence[Mapping[str, Any]], points: list, member: Any) -> tuple[np.ndarray, np.ndarray]:
    chosen = [p for r, p in zip(rows, points) if member(r)]
    return np.stack([p[0] for p in chosen]), np.stack([p[1] for p in chosen])


def _finite(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _line(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"{row['method']} {row['strength']:g}: refused: {row['error']}"
    return (
        f"{row['method']} {row['strength']:g}: refusal NLL {row['refusal_nll']:.3f}, benign KL {row['benign_kl']:.4f}"
    )
