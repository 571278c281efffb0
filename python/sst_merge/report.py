"""What a run found, written for people and programs: report.json, report.md, plots, and the adapter's model card."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PLOTS = {
    "spectrum.png": "λ, the safety efficiency of every direction (refusal gain per benign cost), in descending order",
    "energy.png": "share of the patch's squared norm that the filter kept, per layer and module",
    "calibration.png": "benign KL predicted along the filter path, and as measured",
}


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write `report.json`, `report.md`, the plots and `README.md` (the model card) into an existing folder."""
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_plots(report, folder)
    text = markdown(report)
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")


# What is measured: its heading, and how a number is written. Those from the fifth on stand in tables where something was measured.
MEASURES = {
    "refusal_nll": ("refusal NLL ↓", ".3f"),
    "refusal_rate": ("refusal rate ↑", ".0%"),
    "benign_kl": ("benign KL ↓", ".4f"),
    "benign_nll": ("benign NLL ↓", ".3f"),
    "judge_refused": ("by log-odds ↑", ".0%"),
    "classifier_refused": ("by classifier ↑", ".0%"),
    "over_refusal": ("over-refusal ↓", ".0%"),
    "first_token_kl": ("first-token KL ↓", ".4f"),
    "task_accuracy": ("task accuracy ↑", ".0%"),
}


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows of the evaluation table: one row per adapter, one column per measure, and per wrapper of harmful prompts."""
    columns = [
        key
        for place, key in enumerate(MEASURES)
        if place < 4 or any(values.get(key) is not None for values in rows.values())
    ]
    wrappers = list(dict.fromkeys(name for values in rows.values() for name in values.get("robust_refused") or {}))
    head = ["", *(MEASURES[key][0] for key in columns), *(f"refused, {name} ↑" for name in wrappers)]
    body = [
        [
            name,
            *(_number(values.get(key), MEASURES[key][1]) for key in columns),
            *(_number((values.get("robust_refused") or {}).get(wrapper), ".0%") for wrapper in wrappers),
        ]
        for name, values in rows.items()
    ]
    return [head, *body]


def print_table(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The evaluation table on stdout; where it has many columns, those from the fifth on stand below, a measure a line."""
    header, *body = table(rows)
    shown, more = Table(box=None, pad_edge=False), Table(box=None, pad_edge=False)
    for i, name in enumerate(header[:5]):
        shown.add_column(name, justify="right" if i else "left", overflow="fold", min_width=len(name) if i else 8)
    for row in body:
        shown.add_row(*row[:5])
    for i, name in enumerate(["", *(row[0] for row in body)]):
        more.add_column(name, justify="right" if i else "left", overflow="fold")
    for place in range(5, len(header)):
        more.add_row(header[place], *(row[place] for row in body))
    console = Console(highlight=False, markup=False, emoji=False, width=max(88, Console().width))
    console.print(shown)
    if len(header) > 5:
        console.print(more)


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
    return f"the budget {budget:g} keeps all that F_harm knows of the patch; a larger one changes nothing"


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    patch, prediction, spectrum = report["patch"], report["patch"]["prediction"], report["subspace"]
    parts = ["# SST-Merge report", ""]
    if report.get("evaluation"):
        parts += [*_markdown_table(table(report["evaluation"])), "", _UNITS, ""]
    if report.get("budget"):
        parts += ["## The budget", "", f"{report['budget']['words']}.", "", "Benign rows that moved most:", ""]
        rows = [["line", "KL per token", "prompt"]]
        for r in report["budget"]["worst"]:
            rows.append([str(r["line"]), f"{r['benign_kl']:.4g}", _cell(r.get("prompt", ""))])
        parts += [*_markdown_table(rows), ""]
    mu = report["recipe"]["input_filter"]
    inputs = f"A' = A X_harm (X_harm + {mu:g} X_benign)⁻¹ in A's place" if mu else "A as it is"
    strength = math.inf if patch["parameter"] is None else patch["parameter"]
    parts += [
        "## The patch",
        "",
        f"- inputs: {inputs}",
        f"- filter `{patch['filter']}` at {'k' if patch['filter'] == 'top_k' else 'μ'} = {strength:.4g}, "
        f"scope `{spectrum['scope']}`, {spectrum['directions']} directions, solved by: {spectrum['route']}",
        f"- predicted benign cost {prediction['cost_per_label']:.4g} nats per label token, {foundation(prediction)}; "
        f"{prediction['in_sample_cost_per_label']:.4g} on the pencil's own rows; "
        f"{prediction['plain_cost_per_label']:.4g} for the whole patch with these inputs",
        *(f"- {note}" for note in [unspent(report)] if note),
        f"- refusal gain kept {prediction['gain_kept']:.1%}; squared norm kept per module "
        f"{min(patch['kept_energy'].values()):.2g} to {max(patch['kept_energy'].values()):.2g} (above 1: moved further, "
        "along directions that cost little)",
        f"- damping ε = {spectrum['epsilon']:.4g} ({spectrum['relative_damping']:g} · tr(F_benign)/n) in the {spectrum['metric']} metric, "
        f"{spectrum['folds']} folds",
    ]
    for point in report.get("calibration", []):
        parts.append(
            f"- benign KL predicted {point['predicted_kl']:.4g}, measured {point['measured_kl']:.4g} nats per label token"
        )
    parts += ["", "## Fisher passes", ""]
    rows = [["", "point", "labels", "structure", "sequences", "tokens", "label tokens"]]
    for name, f in report["fisher"].items():
        keys = ("point", "label_source", "structure", "sequences", "tokens", "label_tokens")
        rows.append([name, *(str(f.get(key, "–")) for key in keys)])
    parts += [*_markdown_table(rows), "", "## Inputs", ""]
    for name, values in report["inputs"]["data"].items():
        parts.append(
            f"- {name}: `{values['path']}`, {values['sequences']} sequences, {values['truncated']} truncated, "
            f"sha256 `{values['sha256'][:16]}`"
        )
    for name in ("safety", "task"):
        adapter = report["inputs"][name]
        if adapter:
            parts.append(
                f"- {name} adapter: `{adapter['path']}`, {adapter['modules']} modules, ranks {adapter['ranks']}, "
                f"sha256 `{adapter['sha256'][:16]}`"
            )
    merged, lost = report["adapter"], report.get("recompression")
    parts += ["", "## Output", "", f"- {merged['modules']} modules, ranks {merged['ranks']}"]
    if lost:
        parts.append(
            f"- recompressed to rank {lost['rank']}: ‖ΔW − ΔW'‖/‖ΔW‖ = {lost['relative_error']:.3g}, "
            f"worst {lost['worst_error']:.3g} in {lost['worst_module']}"
        )
    else:
        parts.append("- ΔW = task + filtered patch exactly, by concatenation")
    parts += [f"- note: {note}" for note in merged["notes"]]
    seconds = ", ".join(f"{name} {value:g} s" for name, value in report["seconds"].items())
    parts += [f"- time: {seconds}", f"- versions: {', '.join(f'{k} {v}' for k, v in report['versions'].items())}", ""]
    parts += [f"![{text}]({name})\n\n*{text}*\n" for name, text in PLOTS.items()]
    return "\n".join(parts)


def spent(report: Mapping[str, Any]) -> str:
    """What became of the KL budget, in a sentence for the terminal and the card."""
    if report.get("budget"):
        return report["budget"]["words"]
    prediction = report["patch"]["prediction"]
    return f"predicted benign KL {prediction['cost_per_label']:.4g} nats per label token, {foundation(prediction)}; not measured"


def _folders(given: Any) -> str:
    """An adapter entry of a recipe, in a line."""
    if isinstance(given, Mapping):
        return " + ".join(f"{weight:g} · {folder}" for folder, weight in given.items())
    return given or "none"


def _cell(text: str, width: int = 80) -> str:
    """Text for a cell of a Markdown table, in one line."""
    plain = " ".join(text.split()).replace("|", "\\|")
    return plain if len(plain) <= width else plain[: width - 1] + "…"


def model_card(report: Mapping[str, Any]) -> str:
    """README.md of the adapter folder, with the front matter that model hubs read."""
    from .io.serving import commands

    recipe, base = report["recipe"], report["adapter"]["base_model"] or report["recipe"]["model"]
    title = "Task adapter with a safety patch, merged" if report["inputs"]["task"] else "Safety patch, filtered"
    evaluation = ""
    if report.get("evaluation"):
        evaluation = "\n".join(["## Measured", "", *_markdown_table(table(report["evaluation"])), "", _UNITS, ""])
    return f"""---
base_model: {base}
library_name: peft
tags: [lora, peft, sst-merge, safety]
---

# {title} by SST-Merge

A LoRA adapter for `{base}`: {"the task adapter plus " if report["inputs"]["task"] else ""}those directions of a safety
adapter that buy much refusal per unit of change in benign behaviour.

## Use it

{commands(base, recipe["output"], max(report["adapter"]["ranks"]))}

{evaluation}
{spent(report)}.

## Made from

- task adapter: `{_folders(recipe["task"])}`
- safety adapter: `{_folders(recipe["safety"])}`
- recipe: `recipe.yml`, run it again with `sst-merge merge --config recipe.yml`
- everything else: `report.md`, `report.json`

Refusal is measured on the prompts named in the report. It is no guarantee for other prompts, languages or attacks.
"""


def write_plots(report: Mapping[str, Any], folder: Path) -> None:
    """The plots named in `PLOTS`, as PNG."""
    import matplotlib

    with matplotlib.rc_context({"figure.dpi": 120, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}):
        _spectrum(report, folder / "spectrum.png")
        _energy(report["patch"]["kept_energy"], folder / "energy.png")
        _calibration(report, folder / "calibration.png")


def _figure(width: float = 6.0, height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _spectrum(report: Mapping[str, Any], path: Path) -> None:
    figure, axes = _figure()
    values, patch = report["subspace"]["lambda"], report["patch"]
    axes.semilogy(range(1, len(values) + 1), values, ".-", markersize=3)
    if patch["filter"] == "top_k":
        axes.axvline(patch["parameter"], color="tab:red", linestyle="--", label=f"k = {patch['parameter']:g}")
    elif patch["parameter"]:
        axes.axhline(patch["parameter"], color="tab:red", linestyle="--", label=f"μ = {patch['parameter']:.3g}")
    axes.set(xlabel="direction", ylabel="λ, gain per cost", title="Safety efficiency")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path)


def _energy(kept: Mapping[str, float], path: Path) -> None:
    layers, kinds, cells = energy_grid(kept)
    figure, axes = _figure(6.0, max(2.5, 0.17 * len(layers) + 1.2))
    axes.grid(False)
    image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0)
    axes.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    axes.set(ylabel="layer", title="‖ΔW'‖² / ‖ΔW‖² of the patch")
    figure.colorbar(image)
    figure.savefig(path)


def energy_grid(kept: Mapping[str, float]) -> tuple[list[str], list[str], list[list[float]]]:
    """Kept energy as a table: layer numbers, module kinds (what follows the number, its last part where that is unique), NaN where
    a layer lacks a kind."""
    places = {}
    for name, value in kept.items():
        number = re.search(r"\.(\d+)\.", name)
        places[(number[1], name[number.end() :]) if number else ("–", name)] = value
    layers = list(dict.fromkeys(layer for layer, _ in places))
    kinds = list(dict.fromkeys(kind for _, kind in places))
    lasts = [kind.rsplit(".", 1)[-1] for kind in kinds]
    shown = [last if lasts.count(last) == 1 else kind for last, kind in zip(lasts, kinds)]
    return layers, shown, [[places.get((layer, kind), float("nan")) for kind in kinds] for layer in layers]


def _calibration(report: Mapping[str, Any], path: Path) -> None:
    figure, axes = _figure()
    curve, patch = report["subspace"]["soft_path"], report["patch"]
    axes.loglog(curve["mu"], curve["predicted_kl"], label="soft filter, predicted")
    points = report.get("calibration", [])
    if points and patch["filter"] != "top_k":
        axes.loglog([p["parameter"] for p in points], [p["measured_kl"] for p in points], "o", label="measured")
        axes.loglog([p["parameter"] for p in points], [p["predicted_kl"] for p in points], "x", label="its prediction")
    axes.set(
        xlabel="μ (smaller keeps more of the patch)", ylabel="benign KL, nats per label token", title="Benign cost"
    )
    axes.legend()
    figure.savefig(path)


_UNITS = (
    "NLL and KL in nats per label token (teacher-forced); KL is from the reference, the model without the patch; "
    "refusal rate by keywords in greedy answers. By log-odds: the openings of refusals together are likelier than the opening of the "
    "reference's own answer. Over-refusal: refusal rate on safe prompts. First-token KL: mean over benign prompts."
)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]
