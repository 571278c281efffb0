"""The report of a comparison: JSON, Markdown, and one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..io.output import output_file
from ..page import html, page_of_comparison

UNITS = (
    "NLL and KL in nats per label token; KL from base + task; rates from greedy answers by refusal phrases. Ratios: benign KL of "
    "plain addition at the same refusal NLL, or at the same share refused, over this one; above 1 the method is cheaper. Brackets: 95 % bootstrap over prompts."
)
COLUMNS = (
    "method",
    "strength",
    "refusal NLL",
    "refused",
    "benign KL",
    "benign NLL",
    "over-refusal",
    "ratio at equal NLL",
    "ratio at equal rate",
    "merge s",
    "data",
)


def write(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """report.json, report.md and compare.html, each replaced as a whole."""
    _replace(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    _replace(folder / "report.md", markdown(report))
    _replace(folder / "compare.html", html(page_of_comparison(report, rows)))


def markdown_table(report: Mapping[str, Any]) -> list[str]:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in report["rows"]:
        spans, star = row["intervals"], " *" if row["front"] else ""
        cells = (
            row["method"] + star, f"{row['strength']:g}", _span(spans["refusal_nll"], 3), _rate(row["refusal_rate"]),
            _span(spans["kl"], 4), _number(row["benign_nll"], 3), _rate(row["over_refusal"]), _span(spans["ratio"], 2),
            _span(spans.get("rate_ratio", (None,) * 3), 2), _number(row["merge_seconds"], 2), ", ".join(row["needs"]) or "none",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(report: Mapping[str, Any]) -> str:
    nll, kl = report["context"]["corner"]
    parts = [
        "# Comparison of merging methods",
        "",
        *markdown_table(report),
        "",
        f"* not dominated by any other row. {UNITS}",
        "",
    ]
    parts += ["## Dominated area", "", f"Share of the rectangle up to refusal NLL {nll:.3f} (no patch) and benign KL {kl:.4f} (plain addition at its strongest).", ""]  # fmt: skip
    parts += ["| method | area | what is computed | source |", "| --- | --- | --- | --- |"]
    ranked = sorted(report["methods"], key=lambda m: -(m["hypervolume"][0] or 0))
    parts += [
        f"| {m['name']} | {_span(m['hypervolume'], 3)} | {m['variant']}; strength: {m['strength']} | {m['source']} |"
        for m in ranked
    ]
    if report["refused"]:
        parts += [
            "",
            "## Not run",
            "",
            *(f"- {r['method']} {r['strength']:g}: {r['error']}" for r in report["refused"]),
        ]
    return "\n".join([*parts, "", "With a chart and answers: [compare.html](compare.html), one file.", ""])


def _replace(path: Path, text: str) -> None:
    with output_file(path, force=True) as partial:
        partial.write_text(text, encoding="utf-8")


def _span(values: Sequence[float | None], digits: int) -> str:
    value, low, high = values
    if value is None:
        return "–"
    return _number(value, digits) + (f" [{_number(low, digits)}, {_number(high, digits)}]" if low is not None else "")


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:z.{digits}f}"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
