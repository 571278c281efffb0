"""The pictures of README and report from bench/results: `python -m bench.plot` writes docs/images/*.svg."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.ticker

matplotlib.use("svg")
import matplotlib.pyplot as plt

from bench.common import ROOT
from bench.results import Results, Row, fullest, is_gpu, value

BLUE, GREY, ORANGE = "#2563a8", "#9aa3ad", "#d9822b"
STYLE = {
    "svg.hashsalt": "sst-kernels",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def passes(results: Results) -> plt.Figure | None:
    """Fisher passes over the plain training step; the GPU's where they were measured, else the CPU's."""
    rows = _preferred(
        results, lambda r: bool(r["ratio"]) and "checkpointing" not in r["variant"], stage="pass", rank="16"
    )
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(8.4, 0.32 * len(rows) + 0.9))
    names, ratios = [r["variant"] for r in rows], [value(r, "ratio") for r in rows]
    axis.barh(names, ratios, color=[BLUE if n.startswith("core") else GREY for n in names])
    axis.axvline(1, color="black", lw=0.8)
    for y, ratio in enumerate(ratios):
        axis.text(ratio, y, f" {ratio:.2f}x", va="center")
    axis.invert_yaxis()
    axis.set_xlabel("time of a batch with the Fisher hooked in, over the plain training step")
    axis.set_title(_where(rows[0]), fontsize=8, loc="left")
    return figure


def merges(results: Results) -> plt.Figure | None:
    """Merging all modules of a model, by method, on a logarithmic axis."""
    rows = _preferred(results, lambda r: bool(r["ms"]), stage="merge", rank="16", targets="all-linear")
    if not rows:
        return None
    rows.sort(key=value)
    figure, axis = plt.subplots(figsize=(8.4, 0.28 * len(rows) + 0.9))
    names = [r["variant"].removesuffix(": subspace + filter + export") + _MARKS.get(r["basis"], "") for r in rows]
    axis.barh(names, [value(r) / 1e3 for r in rows], color=[BLUE if n.startswith("SST") else GREY for n in names])
    axis.set_xscale("log")
    axis.invert_yaxis()
    axis.set_xlabel("seconds for all modules, gradients not included (* scaled from a part, ** partly estimated)")
    axis.set_title(_where(rows[0]), fontsize=8, loc="left")
    return figure


def scaling(results: Results) -> plt.Figure | None:
    """Time against one quantity at a time, with the fitted power laws."""
    rows = results.all(model="scaling")
    laws: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        laws.setdefault(row["stage"], {}).setdefault(row["variant"].split("=")[0], []).append(row)
    if not laws:
        return None
    figure, axes = plt.subplots(2, 3, figsize=(8.4, 5), squeeze=False)
    for axis, (op, by_name) in zip(axes.flat, laws.items()):
        for name, points in by_name.items():
            x = [float(p["variant"].split("=")[1]) for p in points]
            axis.loglog(
                x, [value(p) for p in points], marker="o", ms=3, label=f"{name}^{value(points[0], 'ratio'):.2f}"
            )
        axis.set_title(op, fontsize=9)
        axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.legend(fontsize=7, frameon=False)
    figure.supylabel("ms")
    return figure


def structures(results: Results) -> plt.Figure | None:
    """State against overhead of every structure."""
    rows = [r for r in results.rows if r["file"].startswith("structures") and r["ratio"] and r["state_bytes"]]
    if not rows:
        return None
    last = fullest(rows)
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    for row in last:
        x, y = value(row, "state_bytes") / 2**20, value(row, "ratio")
        axis.scatter(x, y, color=BLUE if row["stage"] == "core" else ORANGE, s=18)
        axis.annotate(f"{row['stage']}/{row['variant']}", (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axis.set_xscale("log")
    axis.set_xlabel("state, MiB")
    axis.set_ylabel("time over the bare step")
    axis.set_title(_where(last[0]), fontsize=8, loc="left")
    return figure


_MARKS = {"scaled": " *", "estimated": " **"}

FIGURES: dict[str, Callable[[Results], plt.Figure | None]] = {
    "passes": passes, "merges": merges, "scaling": scaling, "structures": structures,
}  # fmt: skip


def _preferred(results: Results, keep: Callable[[Row], bool], **match: str) -> list[Row]:
    """Rows of the 7B model on a GPU, or of the scaled-down one on a CPU where there are none."""
    gpu = results.all(lambda r: is_gpu(r) and keep(r), model="llama-2-7b", **match)
    return gpu or results.all(lambda r: not is_gpu(r) and keep(r), model="llama-tiny", **match)


def _where(row: Row) -> str:
    return f"{row['model']}, r = {row['rank']}; {row['device']}; commit {row['commit']}, {row['date']}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results()
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw(results)
            if figure is not None:
                figure.savefig(options.out / f"{name}.svg", metadata={"Date": None})
                plt.close(figure)
                print(options.out / f"{name}.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
