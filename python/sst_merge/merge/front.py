"""The measured front: a few strengths from the whole patch down, what each costs and refuses, and the way from a point to its adapter."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import MergeError
from ..evaluate import Evaluation
from ..io.data import Dataset
from ..recipe import Recipe, read_yaml
from .trust import Choice, Trial, kl_interval, rate_interval

POINTS = 6
_STEP = 4.0  # of predicted KL between neighbours: from the whole patch down to a thousandth of its cost
# What a point does not take from the recipe that measured it.
_OTHERS = (
    "harm_data", "benign_data", "self_benign", "safe_data", "eval_harm_data", "eval_benign_data", "eval_safe_data", "eval_task_data", "kl_budget", "target_refusal", "mu", "k", "sweep", "output",
)  # fmt: skip


def sweep(choose: Callable[[float], Choice], measure: Callable[[Choice], Trial]) -> list[Trial]:
    """`POINTS` strengths, the whole patch first."""
    whole = choose(math.inf)
    allowed = whole.patch.prediction.cost_per_label
    choices = [whole, *(choose(allowed / _STEP**i) for i in range(1, POINTS))]
    return [measure(choice) for choice in choices if choice.patch.prediction.cost_per_label > 0]


def knee(trials: Sequence[Trial], nothing: Evaluation) -> Trial:
    """The strength at the knee: the point farthest above the line from no patch to the one that refuses most at the least KL.

    KL and rate are both taken as shares of that line's. Where no strength refuses more than no patch does, the one of least KL.
    """
    start = nothing.refusal_rate
    most = max(t.found.refusal_rate for t in trials)
    end = min((t for t in trials if t.found.refusal_rate == most), key=lambda t: t.found.benign_kl)
    rise, run = most - start, end.found.benign_kl
    if not rise > 0 or not run > 0:
        return min(trials, key=lambda t: t.found.benign_kl)
    below = [t for t in trials if t.found.benign_kl <= run]
    return max(
        below, key=lambda t: ((t.found.refusal_rate - start) / rise - t.found.benign_kl / run, -t.found.benign_kl)
    )


def described(
    trials: Sequence[Trial], chosen: Trial, rows: Dataset | None, recipe: Recipe, *, evidence: bool
) -> list[dict[str, Any]]:
    """The front for the report, from the weakest on; docs/cli.md says what the entries are.

    evidence: whether the output holds the evidence that a point's adapter is made from.
    """
    distinct = {(t.choice.patch.parameter, t.choice.pencil): t for t in [*trials, chosen]}
    points = []
    for number, trial in enumerate(sorted(distinct.values(), key=lambda t: _cost(t)), 1):
        patch = trial.choice.patch
        kl, kl_low, kl_high = kl_interval(trial.found, rows)
        refused, refused_low, refused_high, _ = rate_interval(trial.found)
        price = trial.choice.pencil.fishers.input_filter if trial.choice.pencil is not None else recipe.input_filter
        points.append(
            {
                "allowed": _number(trial.choice.allowed),
                "predicted_kl": patch.prediction.cost_per_label,
                "kl": kl,
                "kl_low": kl_low,
                "kl_high": kl_high,
                "refused": refused,
                "refused_low": refused_low,
                "refused_high": refused_high,
                "refusal_nll": _number(trial.found.refusal_nll),
                "over_refusal": _number(trial.found.over_refusal),
                "filter": patch.filter,
                "parameter": patch.strength,
                "input_filter": price,
                "whole": trial.choice.whole,
                "chosen": trial is chosen,
                "command": command(recipe, number, evidence, patch.filter, patch.strength, price),
            }
        )
    return points


def command(
    recipe: Recipe, number: int, evidence: bool, filter: str, parameter: float | None, input_filter: float
) -> str | None:
    """What makes the adapter of a point; without evidence that is another reading. None where nothing is kept."""
    if parameter is None:
        return None
    output = str(recipe.output)
    words = ["sst-merge", "merge", "--evidence", f"{output}/evidence.safetensors", "--pick", str(number)]
    if not evidence:
        strength = ["--k" if filter == "top_k" else "--mu", repr(parameter)]
        words = [
            "sst-merge",
            "merge",
            "--config",
            f"{output}/recipe.yml",
            "--input-filter",
            repr(input_filter),
            *strength,
        ]
    return shlex.join([*words, "--output", f"{output}-{number}"])


def picked(evidence: Path, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Recipe entries that make point `number` (from 1 on) of the front beside an evidence file, and that front with the point chosen.

    Raises MergeError where there is no report, no front, no such point or no recipe beside them.
    """
    path = Path(evidence).parent / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        front = report.get("front") or []
    except (OSError, ValueError, AttributeError) as error:
        raise MergeError(
            f"--pick: {path} cannot be read ({type(error).__name__}); give --evidence the file in the output of a merge with --sweep"
        ) from error
    if not front:
        raise MergeError(f"--pick: {path} has no front; merge with --sweep, which measures one")
    if not 1 <= number <= len(front):
        raise MergeError(f"--pick: the front of {path} has the points 1 to {len(front)}, not {number}")
    point = front[number - 1]
    if point["parameter"] is None:
        raise MergeError(f"--pick: point {number} of {path} keeps nothing of the patch")
    recipe = read_yaml(path.with_name("recipe.yml"))  # its paths are absolute
    entries = {name: value for name, value in recipe.items() if name not in _OTHERS}
    entries |= {"evidence": str(evidence), "filter": point["filter"], "input_filter": point["input_filter"]}
    entries["k" if point["filter"] == "top_k" else "mu"] = point["parameter"]
    return entries, [{**p, "chosen": i == number} for i, p in enumerate(front, 1)]


def _cost(trial: Trial) -> float:
    kl = trial.found.benign_kl
    return kl if math.isfinite(kl) else trial.choice.patch.prediction.cost_per_label


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None
