"""What is said of a patch and its prediction, in sentences that terminal, Markdown and page share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def foundation(prediction: Mapping[str, Any]) -> str:
    """What a predicted cost rests on, in words."""
    if prediction["held_out"]:
        return "on held-out rows (cross-fitting)"
    return "on the samples of the Fisher itself: the true cost may be a hundred times as large, measure it"


def unspent(report: Mapping[str, Any]) -> str:
    """A sentence where the KL budget is more than there is to spend it on, else nothing."""
    budget = report["recipe"]["kl_budget"]
    if budget is None or not report["patch"]["whole"]:
        return ""
    return f"the budget {budget:g} keeps the whole patch, its inputs filtered; a larger one changes nothing"


def facts(report: Mapping[str, Any]) -> list[str]:
    """How the patch was filtered and what was predicted of it, a line each."""
    patch, prediction, spectrum = report["patch"], report["patch"]["prediction"], report["subspace"]
    mu = patch.get("input_filter", report["recipe"]["input_filter"])
    inputs = f"A' = A X_harm (X_harm + {mu:g} X_benign)⁻¹ in A's place" if mu else "A as it is"
    strength = math.inf if patch["parameter"] is None else patch["parameter"]
    return [
        f"inputs: {inputs}",
        f"filter `{patch['filter']}` at {'k' if patch['filter'] == 'top_k' else 'μ'} = {strength:.4g}, "
        f"scope `{spectrum['scope']}`, {spectrum['directions']} directions, solved by: {spectrum['route']}",
        f"predicted benign cost {prediction['cost_per_label']:.4g} nats per label token, {foundation(prediction)}; "
        f"{prediction['in_sample_cost_per_label']:.4g} on the pencil's own rows; "
        f"{prediction['plain_cost_per_label']:.4g} for the whole patch with these inputs",
        *(note for note in [unspent(report)] if note),
        f"refusal gain kept {prediction['gain_kept']:.1%}; squared norm kept per module "
        f"{min(patch['kept_energy'].values()):.2g} to {max(patch['kept_energy'].values()):.2g} (above 1: moved further, "
        "along directions that cost little)",
        f"damping ε = {spectrum['epsilon']:.4g} ({spectrum['relative_damping']:g} · tr(F_benign)/n) in the {spectrum['metric']} metric, "
        f"{spectrum['folds']} folds",
    ]
