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
NAMES = {
    "sst-soft": "SST soft",
    "plain": "plain addition",
    "diagonal": "diagonal SST",
    "random-subspace": "random subspace",
}


def read(path: Path) -> list[Row]:
    """Rows without errors, numbers as floats (NaN where empty)."""
    words = {"pair", "stage", "method", "scope", "gain_point", "gain_labels", "cost_labels", "error", "device", "driver", "versions", "commit", "date"}  # fmt: skip
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{k: v if k in words else float(v or "nan") for k, v in r.items()} for r in csv.DictReader(file)]
    return [r for r in rows if not r["error"]]


def name(row: Row) -> str:
    """How a row's method is called in plots and tables."""
    method = NAMES.get(row["method"], row["method"])
    if row["stage"] == "calibration":
        return f"SST soft, KL budgets, {row['scope']}, F_harm {row['gain_point']}"
    if row["method"] == "sst-soft":
        gain = "" if row["gain_labels"] == "data" else ", F_harm from probes"
        return f"{method}, {row['scope']}{gain}"
    return (
        method
        if math.isnan(row["damping"]) or row["damping"] in (0.0, 3.0)
        else f"{method}, damping {row['damping']:g}"
    )


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    out: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        out[key(row)].append(row)
    return out


def pareto(rows: Sequence[Row], pair: str, path: Path) -> None:
    """Refusal NLL against benign KL of whole curves."""
    chosen = [
        r
        for r in rows
        if r["pair"] == pair and r["stage"] in ("plain", "calibration", "main", "newton", "scope") and r["kl"] > 0
    ]
    figure, axes = _axes("refusal NLL, nats per token", "benign KL, nats per token", pair, size=(7.2, 4.6))
    for label, points in grouped(chosen, name).items():
        points.sort(key=lambda r: r["refusal_nll"])
        x, y = ([r[k] for r in points] for k in ("refusal_nll", "kl"))
        low, high = ([abs(r[k] - r["kl"]) for r in points] for k in ("kl_lo", "kl_hi"))
        style = {"color": "black", "linewidth": 2} if label == "plain addition" else {}
        axes.errorbar(x, y, yerr=(low, high), fmt="o-", markersize=3, capsize=2, label=label, **style)
    axes.set_yscale("log")
    axes.legend(fontsize=7)
    figure.savefig(path)


def sweep(rows: Sequence[Row], stage: str, field: str, series: Callable[[Row], str], title: str, path: Path) -> None:
    """The ratio at equal refusal against one knob, with its interval."""
    chosen = [r for r in rows if r["stage"] == stage and math.isfinite(r["ratio"]) and math.isfinite(r[field])]
    if not chosen:
        return
    figure, axes = _axes(title, "plain KL / SST KL at equal refusal", "")
    for label, points in grouped(chosen, series).items():
        points.sort(key=lambda r: r[field])
        x, y = ([r[k] for r in points] for k in (field, "ratio"))
        low, high = ([abs(r[k] - r["ratio"]) for r in points] for k in ("ratio_lo", "ratio_hi"))
        axes.errorbar(x, y, yerr=(low, high), fmt="o-", markersize=3, capsize=2, label=label)
    axes.set_xscale("log")
    axes.legend(fontsize=7)
    figure.savefig(path)


def calibration(rows: Sequence[Row], path: Path) -> None:
    """Predicted (unseen rows, both scopes) against measured KL: plain addition and the filtered patches."""
    figure, axes = _axes("measured benign KL", "predicted benign KL", "nats per token", size=(5.2, 4.4))
    filtered = [r for r in rows if r["kl"] > 0 and r["method"] != "plain"]
    for label, part in (
        ("plain addition", [r for r in rows if r["method"] == "plain" and r["kl"] > 0]),
        ("filtered", filtered),
    ):
        for field, mark in (("predicted_global", "o"), ("predicted_module", "x")):
            axes.plot(
                [r["kl"] for r in part],
                [r[field] for r in part],
                mark,
                markersize=3.5,
                label=f"{label}, {field.removeprefix('predicted_')}",
            )
    ends = [r["kl"] for r in rows if r["kl"] > 0]
    if ends:
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize=7)
    figure.savefig(path)


def table(rows: Sequence[Row]) -> list[str]:
    """One line per configuration, best ratio first within a pair and stage."""
    lines = []
    for (pair, stage), part in grouped(rows, lambda r: (r["pair"], r["stage"])).items():
        lines += ["", f"### {pair}: {stage}", "", "| method | F_harm | rows harm + benign | damping | refusal NLL | benign KL | ratio | predicted / measured | refused | over-refusal |", "|" + " --- |" * 10]  # fmt: skip
        for r in sorted(
            part, key=lambda r: (r["target"] if math.isfinite(r["target"]) else r["strength"], -_low(r["ratio"]))
        ):
            gain = f"{r['gain_point']}, {r['gain_labels']}" if r["gain_point"] else "–"
            cells = (
                name(r) + (f" α = {r['strength']:g}" if r["method"] == "plain" else ""), gain,
                f"{_n(r['harm_rows'], 'all')} + {_n(r['benign_rows'], '–')}", f"{r['damping']:g}",
                f"{r['refusal_nll']:.3f}", f"{r['kl']:.4f}", _interval(r), _n(r["predicted_global"] / r["kl"] if r["kl"] > 0 else math.nan, "–", 2),
                _percent(r["refusal_rate"]), _percent(r["over_refusal"]),
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _axes(x: str, y: str, title: str, size: tuple[float, float] = (5.2, 3.4)) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.set(xlabel=x, ylabel=y, title=title)
    return figure, axes


def _interval(r: Row) -> str:
    return "–" if math.isnan(r["ratio"]) else f"{r['ratio']:.1f} [{r['ratio_lo']:.1f}, {r['ratio_hi']:.1f}]"


def _n(value: float, missing: str, digits: int = 0) -> str:
    return missing if math.isnan(value) else f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def _low(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    rows = read(source)
    for pair in dict.fromkeys(r["pair"] for r in rows):
        pareto(rows, pair, folder / f"pareto_{pair.replace('+', '_')}.png")
    size = [r for r in rows if r["stage"] == "size"]
    both = [r for r in size if math.isfinite(r["harm_rows"]) and math.isfinite(r["benign_prompts"])]
    sweep(
        [r for r in size if r not in both and math.isfinite(r["harm_rows"])],
        "size",
        "harm_rows",
        name,
        "harmful rows",
        folder / "harm_rows.png",
    )
    sweep([r for r in size if r not in both and math.isnan(r["harm_rows"])], "size", "benign_rows", lambda r: "fewer draws" if math.isfinite(r["draws"]) else "fewer prompts", "benign rows", folder / "benign_rows.png")  # fmt: skip
    sweep(both, "size", "harm_rows", name, "rows of each Fisher", folder / "rows.png")
    sweep(rows, "damping", "damping", name, "relative damping", folder / "damping.png")
    sweep(rows, "labels", "benign_rows", lambda r: f"labels: {r['cost_labels']}", "benign rows", folder / "labels.png")
    calibration(rows, folder / "calibration.png")
    machines = sorted({f"{r['device']}, {r['versions']}, commit {r['commit']}, {r['date']}" for r in rows})
    (folder / "tables.md").write_text(
        "\n".join(["# Rows of the quality study", "", *(f"- {m}" for m in machines), *table(rows), ""]),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
