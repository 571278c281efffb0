"""Plots and tables of the quality study: `python bench/quality_plot.py bench/results/quality.csv docs/quality`.

One small plot per question, and `tables.md` with the rows behind them: every figure in docs/quality.md comes from here.
"""

from __future__ import annotations

import csv
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

Row = dict[str, Any]
WORDS = {"pair", "stage", "method", "scope", "metric", "filter", "gain_point", "cost_labels", "error", "device", "driver", "versions", "commit", "date"}  # fmt: skip
CHOSEN_AT = 0.004  # the KL budget at which single choices are compared
DEFAULTS = {"input_filter": 3.0, "input_rank": 512.0, "scope": "global", "metric": "kronecker", "filter": "soft", "gain_point": "reference", "opening": 3.0, "cost_labels": "model", "damping": 1.0}  # fmt: skip


def read(path: Path) -> list[Row]:
    """Rows without errors, numbers as floats (NaN where empty)."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{k: v if k in WORDS else float(v or "nan") for k, v in r.items()} for r in csv.DictReader(file)]
    return [r for r in rows if not r["error"]]


def name(row: Row) -> str:
    """A method, and in what it differs from the library's defaults."""
    if row["method"] == "plain":
        return "plain addition"
    if row["method"] != "sst":
        return str(row["method"])
    differs = [_differs(key, row[key]) for key, default in DEFAULTS.items() if row[key] != default]
    if math.isnan(row["input_filter"]):
        differs = ["reads as they are", *differs[2:]]
    return "SST" + (f", {', '.join(differs)}" if differs else "")


def _differs(key: str, value: Any) -> str:
    words = {
        "input_filter": "input filter",
        "input_rank": "rank of inputs",
        "gain_point": "F_harm at",
        "opening": "first words x",
        "damping": "damping",
        "cost_labels": "labels:",
        "scope": "scope",
        "metric": "",
    }
    text = ("all" if math.isnan(value) else f"{value:g}") if isinstance(value, float) else f"{value}"
    return f"{words.get(key, '')} {text}{' metric' if key == 'metric' else ''}".strip()


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    out: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        out[key(row)].append(row)
    return out


def pareto(rows: Sequence[Row], pair: str, path: Path) -> None:
    """Benign KL of whole curves against refusal NLL, and against the share of refused prompts."""
    stages = ("plain", "main", "reads", "metric", "scope")
    chosen = [r for r in rows if r["pair"] == pair and r["stage"] in stages and r["kl"] > 0]
    figure = Figure(figsize=(10.4, 4.6), layout="constrained", dpi=110)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, field, title in zip(
        panels, ("refusal_nll", "refusal_rate"), ("refusal NLL, nats per token", "share of harmful prompts refused")
    ):
        axes.grid(alpha=0.3)
        axes.set(xlabel=title, yscale="log")
        for label, curve in grouped(chosen, name).items():
            points = sorted((r for r in curve if math.isfinite(r[field])), key=lambda r: r[field])
            x, y = ([r[k] for r in points] for k in (field, "kl"))
            low, high = ([abs(r[k] - r["kl"]) for r in points] for k in ("kl_lo", "kl_hi"))
            style = {"color": "black", "linewidth": 2} if label == "plain addition" else {}
            axes.errorbar(x, y, yerr=(low, high), fmt="o-", markersize=3, capsize=2, label=label, **style)
    panels[0].set_ylabel("benign KL, nats per token")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    figure.suptitle(pair)
    figure.savefig(path)


def choices(rows: Sequence[Row], path: Path) -> None:
    """One small panel per question: the ratio at equal refusal NLL, with its interval, for every answer that was measured."""
    at = [r for r in rows if r["method"] == "sst" and r["strength"] == CHOSEN_AT and math.isfinite(r["ratio"])]
    stages = grouped(at, lambda r: r["stage"])
    default = stages["main"]
    as_is = [r for r in stages["reads"] if math.isnan(r["input_filter"])]
    size = [r for r in stages["size"] if r["metric"] == "kronecker"]
    panels: dict[str, list[tuple[str, Row]]] = {}
    for title, part, key, text in (
        ("reads: price of benign inputs", default + [r for r in stages["reads"] if r["input_rank"] != 128], "input_filter", "{:g}"),
        ("damping", default + stages["damping"], "damping", "{:g}"),
        ("metric of the damping", default + stages["metric"], "metric", "{}"),
        ("pencils", default + [r for r in stages["scope"] if r["metric"] == "kronecker"], "scope", "{}"),
        ("filter", default + stages["filters"], "filter", "{}"),
        ("harmful prompts", default + [r for r in size if math.isnan(r["benign_prompts"]) and r["draws"] == 2], "harm_rows", "{:g} rows"),
        ("benign prompts", default + [r for r in size if math.isnan(r["harm_prompts"])], "benign_rows", "{:g} rows"),
        ("prompts of either kind, one draw", [r for r in size if math.isfinite(r["harm_prompts"] + r["benign_prompts"])], "benign_prompts", "{:g}"),
        ("first words (reads as they are)", as_is + stages["opening"], "opening", "× {:g}"),
        ("F_harm taken at (reads as they are)", as_is + stages["points"], "gain_point", "{}"),
    ):  # fmt: skip
        if len(part) > 1:
            part = sorted(part, key=lambda r: r[key] if isinstance(r[key], str) or r[key] == r[key] else -math.inf)
            panels[title] = [("none" if r[key] != r[key] else text.format(r[key]), r) for r in part]
    if not panels:
        return
    across = 5
    figure = Figure(figsize=(2.7 * across, 2.5 * math.ceil(len(panels) / across)), layout="constrained", dpi=110)
    every = figure.subplots(math.ceil(len(panels) / across), across, sharey=True, squeeze=False)
    for axes, (title, points) in zip(every.flat, panels.items()):
        y = [r["ratio"] for _, r in points]
        low, high = ([abs(r[k] - r["ratio"]) for _, r in points] for k in ("ratio_lo", "ratio_hi"))
        axes.errorbar(range(len(points)), y, yerr=(low, high), fmt="o", markersize=4, capsize=3)
        for x, (_, r) in enumerate(points):
            if r["stage"] == "main":
                axes.plot(x, r["ratio"], "o", color="black", markersize=5, zorder=3)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(points)), [label for label, _ in points], fontsize=7)
        axes.set_xlim(-0.5, len(points) - 0.5)
        axes.set_title(title, fontsize=8)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    for axes in every.flat[len(panels) :]:
        axes.set_visible(False)
    figure.supylabel("plain KL / SST KL at equal refusal NLL", fontsize=8)
    figure.suptitle(f"KL budget {CHOSEN_AT:g}; black: the default", fontsize=9)
    figure.savefig(path)


def calibration(rows: Sequence[Row], path: Path) -> None:
    """Predicted against measured KL: held-out rows of the pencil, and the quadratic on rows that no pencil has seen."""
    figure, axes = _axes("measured benign KL", "predicted benign KL", "nats per token", size=(5.2, 4.4))
    for label, field, part in (
        ("SST, held-out rows", "predicted", [r for r in rows if r["method"] == "sst"]),
        ("SST, unseen rows, modules coupled", "unseen_global", [r for r in rows if r["method"] == "sst"]),
        ("plain addition, modules coupled", "unseen_global", [r for r in rows if r["method"] == "plain"]),
        ("plain addition, modules apart", "unseen_module", [r for r in rows if r["method"] == "plain"]),
    ):
        points = [(r["kl"], r[field]) for r in part if r["kl"] > 0]
        axes.plot([x for x, _ in points], [y for _, y in points], "o", markersize=3, label=label)
    ends = [r["kl"] for r in rows if r["kl"] > 0]
    if ends:
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize=7)
    figure.savefig(path)


def table(rows: Sequence[Row]) -> list[str]:
    """One line per row, in the order they were measured in."""
    lines = []
    heads = ("method", "strength", "rows harm + benign", "refusal NLL", "benign KL", "plain at that NLL", "ratio (95 %)", "ratio at equal rate", "predicted / measured", "‖ΔW'‖/‖ΔW‖", "refused", "over-refusal")  # fmt: skip
    for (pair, stage), part in grouped(rows, lambda r: (r["pair"], r["stage"])).items():
        lines += ["", f"### {pair}: {stage}", "", f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        for r in part:
            ratio = "–" if math.isnan(r["ratio"]) else f"{r['ratio']:.1f} ({r['ratio_lo']:.1f}–{r['ratio_hi']:.1f})"
            rate = (
                "–"
                if math.isnan(r["rate_ratio"])
                else f"{r['rate_ratio']:.1f} ({r['rate_ratio_lo']:.1f}–{r['rate_ratio_hi']:.1f})"
            )
            cells = (
                name(r), f"{r['strength']:g}", f"{_n(r['harm_rows'], 0)} + {_n(r['benign_rows'], 0)}", f"{r['refusal_nll']:.3f}",
                f"{r['kl']:.4f}", _n(r["plain_kl"], 4), ratio, rate, _n(r["predicted"] / r["kl"] if r["kl"] > 0 else math.nan, 2),
                _n(r["norm"], 2), _percent(r["refusal_rate"]), _percent(r["over_refusal"]),
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _axes(x: str, y: str, title: str, size: tuple[float, float] = (5.2, 3.4)) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.set(xlabel=x, ylabel=y, title=title)
    return figure, axes


def _n(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    rows = read(source)
    for pair in dict.fromkeys(r["pair"] for r in rows if r["method"] == "sst"):
        pareto(rows, pair, folder / f"pareto_{pair.replace('+', '_')}.png")
    calibration(rows, folder / "calibration.png")
    choices([r for r in rows if r["pair"] == rows[0]["pair"]], folder / "choices.png")
    machines = sorted({f"{r['device']}, {r['versions']}, commit {r['commit']}, {r['date']}" for r in rows})
    (folder / "tables.md").write_text(
        "\n".join(["# Rows of the quality study", "", *(f"- {m}" for m in machines), *table(rows), ""]),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
