"""docs/report.md out of bench/results/*.csv: `python -m bench.report` (with --check: fail when the file differs)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from bench.common import ROOT
from bench.results import (
    FOLDER,
    Results,
    Row,
    fullest,
    is_gpu,
    milliseconds,
    percent,
    size,
    sources,
    table,
    times,
    value,
)  # fmt: skip
from bench.shapes import INPUT_RANK, SHAPES

TEMPLATE = ROOT / "bench" / "report.md.j2"
OUTPUT = ROOT / "docs" / "report.md"
LARGE = SHAPES["llama-2-7b"]
Find = Callable[..., Row | None]


@dataclass(frozen=True)
class Station:
    """The model that the report draws its conclusions from on one kind of machine."""

    title: str
    model: str
    gpu: bool

    def rows(self, results: Results, *stages: str) -> list[Row]:
        match = {"model": self.model, "rank": "16", "targets": "all-linear"}
        return [row for s in stages for row in results.all(lambda r: is_gpu(r) is self.gpu, stage=s, **match)]

    def find(self, results: Results, stage: str, start: str) -> Row | None:
        """The last timed row of a stage whose variant is `start`, or begins with it where it ends in a space."""
        fits = lambda v: v.startswith(start) if start.endswith(" ") else v == start  # noqa: E731
        return next((r for r in reversed(self.rows(results, stage)) if r["ms"] and fits(r["variant"])), None)


STATIONS = (Station("Llama-2-7B, GPU", "llama-2-7b", True), Station("llama-small, CPU", "llama-small", False))


@dataclass(frozen=True)
class Target:
    """What was asked for. `figure` gets the station's finder; `by_arithmetic` stands in for the 7B shape."""

    name: str
    bound: float
    write: Callable[[float | None], str]
    figure: Callable[[Find], float | None] = lambda _find: None
    at_least: bool = False
    by_arithmetic: float | None = None
    miss: str = ""

    def verdict(self, got: float | None) -> str:
        if got is None:
            return "open"
        return "met" if (got >= self.bound if self.at_least else got <= self.bound) else "missed"


def _pass(variant: str, column: str = "ratio", scale: float = 1.0) -> Callable[[Find], float | None]:
    def figure(find: Find) -> float | None:
        found = value(find("pass", variant), column)
        return None if found is None else max(0.0, found * scale)

    return figure


def _over(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _sum(*parts: float | None) -> float | None:
    return None if None in parts else sum(parts)  # type: ignore[arg-type]


def _reading(find: Find) -> float | None:
    """The sketched input pass over the training step beside it."""
    return _over(value(find("inputs", "sketch ")), value(find("inputs", "training step")))


def _ours(find: Find) -> float | None:
    return value(find("merge", "SST-Merge global: subspace + filter + export"))


def _core_space(find: Find) -> float | None:
    theirs = [value(find("merge", f"Core Space{kind}, {how}")) for kind in ("", " QR")
              for how in ("module by module", "stacked by shape")]  # fmt: skip
    best = min((ms for ms in theirs if ms is not None), default=None)
    return _over(_sum(best, value(find("export", "global, transform + concatenate + write"))), _ours(find))


MIB = 2.0**20
TARGETS = (
    Target("Fisher pass (core/full) over plain forward + backward", 1.05, times, _pass("core/full")),
    Target("core/full: memory above plain", 100 * MIB, size, _pass("core/full", "above_plain_mib", MIB)),
    Target("factor/diagonal over plain", 1.05, times, _pass("factor/diagonal"),
           miss="the moments of every module are a launch of their own"),
    Target("factor/diagonal: memory above plain", 200 * MIB, size, _pass("factor/diagonal", "above_plain_mib", MIB)),
    Target("factor/kronecker_lowrank l=64 over plain", 1.08, times, _pass("factor/kronecker_lowrank l=64"),
           miss="two sketches a module; modules of one input share theirs"),
    Target("factor/kronecker_lowrank l=64: memory above plain", 1024 * MIB, size,
           _pass("factor/kronecker_lowrank l=64", "above_plain_mib", MIB)),
    Target("Fisher pass and input pass over plain forward + backward", 1.05, times,
           lambda find: _sum(_pass("core/full")(find), _reading(find)),
           by_arithmetic=1 + LARGE.input_share(INPUT_RANK), miss="a forward pass is about half of a training step"),
    Target("GEVP + filter + export, all 224 modules, core space", 1000.0, milliseconds, _ours),
    Target("the same and the solve of the input filter", 1000.0, milliseconds,
           lambda find: _sum(_ours(find), value(find("inputs", "filter_inputs, sketch ")))),
    Target("Core Space merging + the same export, over ours", 0.5, times, _core_space, True,
           miss="a QR for every fold, whose metric is its own"),
    Target("PEFT dare_linear_svd over SST-Merge end to end", 5.0, times,
           lambda find: _over(value(find("merge", "PEFT dare_linear_svd")), value(find("end to end", "SST-Merge global"))),
           True, miss="passes grow with the width's square, SVDs with its cube"),
    Target("both Fishers, 256 + 256 rows, of dense K-FAC's state", 0.01, percent,
           by_arithmetic=LARGE.row_bytes(16, 256) / LARGE.kfac_bytes()),
    Target("moments of both input passes, of dense K-FAC's state", 0.01, percent,
           by_arithmetic=2 * LARGE.input_bytes(INPUT_RANK) / LARGE.kfac_bytes(),
           miss="ℓ = 117 would meet it; they are freed before the Fishers begin"),
)  # fmt: skip


def _targets(results: Results) -> dict[str, Any]:
    """Every target of the 7B shape on a GPU, measured or open, beside the same ratios of the scaled-down shape on a CPU."""
    body, misses, cited = [], [], []

    def finder(station: Station) -> Find:
        def find(stage: str, start: str) -> Row | None:
            cited.append(station.find(results, stage, start))
            return cited[-1]

        return find

    large, small = (finder(station) for station in STATIONS)
    for target in TARGETS:
        got, name = target.figure(large), target.name
        if got is None and target.by_arithmetic is not None:
            got, name = target.by_arithmetic, name + " (arithmetic)"
        there = target.figure(small) if target.write is times else None
        verdicts = target.verdict(got), target.verdict(there)
        shown = target.write(there) + f", {verdicts[1]}" * (there is not None)
        bound = f"{'≥' if target.at_least else '≤'} {target.write(target.bound)}"
        body.append([name, shown, target.write(got), bound, verdicts[0]])
        if "missed" in verdicts and target.miss:
            misses.append(f"- {target.name}{'' if verdicts[0] == 'missed' else ' (CPU)'}: {target.miss}.")
    head = ["all-linear, r = 16", "llama-small, CPU", "Llama-2-7B, GPU", "target", "7B"]
    return {"targets": table(head, body), "targets_sources": sources(cited), "misses": "\n".join(misses)}


def _stations(
    results: Results, name: str, lines: Callable[[Station], tuple[list[list[str]], list[Row]]], head: list[str]
):
    """One table for each station that has rows."""
    parts = []
    for station in STATIONS:
        body, rows = lines(station)
        if body:
            parts.append(f"**{station.title}**\n\n{table(head, body)}\n\n{sources(rows)}")
    return {name: "\n\n".join(parts) or "Not measured yet."}


def _passes(results: Results) -> dict[str, Any]:
    def lines(station: Station) -> tuple[list[list[str]], list[Row]]:
        rows = [r for r in station.rows(results, "pass", "inputs") if r["ms"] and not r["variant"].startswith("filter")]
        step = value(station.find(results, "inputs", "training step"))
        body = []
        for r in rows:
            ratio = value(r, "ratio") if r["stage"] == "pass" else _over(value(r), step)
            above = value(r, "above_plain_mib") if r["state_bytes"] else None
            name = r["variant"] if r["stage"] == "pass" else f"inputs: {r['variant']}"
            body.append(
                [
                    name,
                    f"{r['batch']} x {r['length']}",
                    milliseconds(value(r)),
                    milliseconds(value(r, "iqr_ms")),
                    times(ratio),
                    size(None if above is None else max(0.0, above) * MIB),
                    size(value(r, "state_bytes")),
                ]
            )
        return body, rows  # fmt: skip

    head = ["pass", "batch", "time", "IQR", "of the plain step", "memory above plain", "state"]
    return _stations(results, "passes", lines, head)


def _preparation(results: Results) -> dict[str, Any]:
    """The passes of a merge over its data, in training steps on the same rows."""
    body, cited = [], []
    for station in STATIONS:
        found = [station.find(results, *what) for what in
                 (("pass", "core/full"), ("inputs", "sketch "), ("inputs", "training step"))]  # fmt: skip
        if all(found):
            one, read = value(found[0], "ratio"), value(found[1]) / value(found[2])
            kind = "GPU" if station.gpu else "CPU"
            body.append([station.model, kind, *map(times, (one, read, one + read, 2 * one + read))])
            cited += found
    head = ["model", "machine", "Fisher pass", "input pass", "a row of refusals: both", "a benign row: two draws"]
    return {"preparation": table(head, body) if body else "Not measured yet.", "preparation_sources": sources(cited)}


def _solves(results: Results) -> dict[str, Any]:
    def lines(station: Station) -> tuple[list[list[str]], list[Row]]:
        rows = [
            r for r in station.rows(results, "gevp", "filter", "export") if r["ms"] and "one solve" not in r["variant"]
        ]
        body = [[r["variant"], *(milliseconds(value(r, c)) for c in ("ms", "iqr_ms", "floor_ms"))] for r in rows]
        return body, rows

    return _stations(results, "solves", lines, ["scope, what", "time", "IQR", "floor"])


def _merges(results: Results) -> dict[str, Any]:
    def lines(station: Station) -> tuple[list[list[str]], list[Row]]:
        rows = [r for r in station.rows(results, "merge", "end to end") if r["ms"]]
        rows.sort(key=lambda r: (r["stage"] != "merge", value(r)))
        ours = _ours(lambda *what: station.find(results, *what))
        named = lambda r: r["variant"] + ", end to end" * (r["stage"] != "merge")  # noqa: E731
        return [[named(r), milliseconds(value(r)), times(_over(value(r), ours)), r["basis"]] for r in rows], rows

    return _stations(results, "merges", lines, ["merge of all modules", "time", "of SST-Merge global", "basis"])


def _ops(results: Results) -> dict[str, Any]:
    """Every op at one size per machine: our time beside its floor, the torch form and what torch.compile makes of that."""
    body, cited = [], []
    for station in STATIONS:
        fits = lambda r, gpu=station.gpu: is_gpu(r) is gpu and r["file"].startswith("ops_") and r["model"] != ""  # noqa: E731
        rows = fullest(results.all(fits))
        forms = {(r["stage"], r["variant"]): value(r) for r in rows}
        for r in (r for r in rows if r["variant"] == "sst" and r["ms"]):
            others = (_over(forms.get((r["stage"], form)), value(r)) for form in ("torch", "torch.compile"))
            share = _over(value(r, "floor_ms"), value(r))
            body.append([r["stage"], f"{r['batch']} x {r['length']}, r = {r['rank']}, {r['model']}", milliseconds(value(r)),
                         milliseconds(value(r, "floor_ms")), "–" if share is None else f"{100 * share:.0f} %",
                         *map(times, others), "GPU" if station.gpu else "CPU"])  # fmt: skip
        cited += rows
    head = ["op", "size", "time", "floor", "share", "torch", "torch.compile", "machine"]
    return {"ops": table(head, body) if body else "Not measured yet.", "ops_sources": sources(cited)}


def _peers(results: Results) -> dict[str, Any]:
    """Other libraries on the same batches: what they take over the plain pass, and whether their values are ours."""
    rows = results.all(lambda r: r["file"].startswith("peers"))
    body = []
    for r in rows:
        above, error = value(r, "above_plain_mib"), value(r, "error")
        name = " ".join(filter(None, [r["variant"], r["note"] if r["ms"] else r["note"].split(" ")[0]]))
        body.append([r["stage"], name, milliseconds(value(r)), milliseconds(value(r, "iqr_ms")), times(value(r, "ratio")),
                     size(None if above is None else max(0.0, above) * MIB),
                     "–" if error is None else f"{error:.0e}" if error else "equal"])  # fmt: skip
    head = ["what", "library", "time", "IQR", "of the plain pass", "peak above", "difference"]
    return {"peers": table(head, body) if body else "Not measured yet.", "peers_sources": sources(rows)}


def _gates(results: Results) -> dict[str, Any]:
    """The worst errors of what was timed, and the ceilings its floors come from."""
    worst = lambda rows: f"{max(rows):.1e}" if rows else "not measured yet"  # noqa: E731
    errors = {s: worst([float(r["error"]) for r in results.all(stage=s) if r["error"] and r["model"] in SHAPES])
              for s in ("gate", "gevp")}  # fmt: skip
    found = {(r["device"], r["variant"]): r["note"] for r in results.all(stage="ceiling")}
    lines = [f"- {device}: {variant}, {note}" for (device, variant), note in sorted(found.items())]
    return {"errors": errors, "ceilings": "\n".join(lines) or "Not measured yet."}


def render(results: Results) -> str:
    """The report's text; a pure function of the tables."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    context: dict[str, Any] = {}
    for section in (_targets, _passes, _preparation, _solves, _merges, _ops, _peers, _gates):
        context |= section(results)
    return template.render(context)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail when the file is not what the tables give"
    )
    options = parser.parse_args(arguments)
    text = render(Results(options.results))
    if options.check:
        same = options.out.is_file() and options.out.read_text(encoding="utf-8") == text
        print(f"{options.out}: {'up to date' if same else 'differs: run python -m bench.report'}")
        return 0 if same else 1
    options.out.write_text(text, encoding="utf-8")
    print(f"{len(text.splitlines())} lines in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
