"""What a run found, written for people and programs: report.json, report.md, report.html, and the adapter's model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .page import html, page_of_merge
from .page.facts import facts, foundation
from .recipe import DEFAULT_BUDGET, STRENGTHS


def write_report(
    report: Mapping[str, Any], folder: Path, records: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> None:
    """Write `report.json`, `report.md`, `report.html` and `README.md` (the model card) into an existing folder.

    records: per evaluation its prompts (`Evaluation.prompts`), for the page's answers.
    """
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(html(page_of_merge(report, records or {})), encoding="utf-8")
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


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """A header and rows on stdout."""
    header, *body = rows
    shown = Table(box=None, pad_edge=False)
    for i, name in enumerate(header):
        shown.add_column(name, justify="right" if i else "left", overflow="fold", min_width=len(name) if i else 8)
    for row in body:
        shown.add_row(*row)
    _console().print(shown)


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
    print_rows([row[:5] for row in (header, *body)])
    if len(header) <= 5:
        return
    more = Table(box=None, pad_edge=False)
    for i, name in enumerate(["", *(row[0] for row in body)]):
        more.add_column(name, justify="right" if i else "left", overflow="fold")
    for place in range(5, len(header)):
        more.add_row(header[place], *(row[place] for row in body))
    _console().print(more)


def _console() -> Console:
    return Console(highlight=False, markup=False, emoji=False, width=max(88, Console().width))


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    parts = ["# SST-Merge report", "", "With charts, answers and examples: [report.html](report.html), one file.", ""]
    if report.get("evaluation"):
        parts += [*_markdown_table(table(report["evaluation"])), "", _UNITS, ""]
    if report.get("measured"):
        parts += ["## Measured on rows that were held out", "", f"{report['measured']['words']}.", ""]
        rows = [["line", "KL per token", "prompt"]]
        for r in report["measured"]["worst"]:
            rows.append([str(r["line"]), f"{r['benign_kl']:.4g}", _cell(r.get("prompt", ""))])
        parts += ["Benign rows that moved most:", "", *_markdown_table(rows), ""] if len(rows) > 1 else []
    if report.get("front"):
        parts += ["## The front", "", *_markdown_table(front_table(report["front"])), "", *_commands(report["front"])]
    parts += ["## The patch", "", *(f"- {fact}" for fact in facts(report))]
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
    return "\n".join(parts)


def spent(report: Mapping[str, Any]) -> str:
    """What became of what was asked for, in a sentence for the terminal and the card."""
    if report.get("measured"):
        return report["measured"]["words"]
    for number, point in enumerate(report.get("front") or [], 1):
        if point["chosen"]:
            rate = (
                ""
                if point["refused"] is None
                else f", {point['refused']:.0%} refused ({point['refused_low']:.0%} to {point['refused_high']:.0%})"
            )
            return (
                f"point {number} of a measured front: benign KL {point['kl']:.4g} ({point['kl_low']:.4g} to {point['kl_high']:.4g}) nats per label "
                f"token{rate}, as measured with the front"
            )
    prediction = report["patch"]["prediction"]
    text = f"predicted benign KL {prediction['cost_per_label']:.4g} nats per label token, {foundation(prediction)}; not measured"
    if all(report["recipe"].get(name) is None for name in STRENGTHS):
        text += f"; budget {DEFAULT_BUDGET:g}, since nothing was asked for"
    return text


def front_table(front: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows of a measured front; → marks the point that was chosen."""

    def span(p: Mapping[str, Any], name: str, form: str) -> str:
        if p[name] is None:
            return "–"
        return f"{p[name]:{form}} ({p[name + '_low']:{form}} to {p[name + '_high']:{form}})"

    rows = [["", "benign KL", "predicted", "refused", "refusal NLL", "over-refusal"]]
    for number, p in enumerate(front, 1):
        others = (
            "–" if p["refusal_nll"] is None else f"{p['refusal_nll']:.3f}",
            "–" if p["over_refusal"] is None else f"{p['over_refusal']:.0%}",
        )
        name = f"→ {number}" if p["chosen"] else str(number)
        rows.append([name, span(p, "kl", ".3g"), f"{p['predicted_kl']:.3g}", span(p, "refused", ".0%"), *others])
    return rows


def _commands(front: Sequence[Mapping[str, Any]]) -> list[str]:
    """The commands that make the points' adapters."""
    lines = [p["command"] for p in front if p["command"]]
    return ["Another point's adapter, in seconds:", "", *(f"    {line}" for line in lines), ""] if lines else []


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

{commands(base, recipe["output"], max(report["adapter"]["ranks"]), report["adapter"]["heads"])}

{evaluation}
{spent(report)}.

## Made from

- task adapter: `{_folders(recipe["task"])}`
- safety adapter: `{_folders(recipe["safety"])}`
- recipe: `recipe.yml`, run it again with `sst-merge merge --config recipe.yml`
- everything else: `report.html` with charts and answers, `report.md`, `report.json`

Refusal is measured on the prompts named in the report. It is no guarantee for other prompts, languages or attacks.
"""


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
