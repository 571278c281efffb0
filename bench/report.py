"""docs/report.md out of bench/results/*.csv: `python -m bench.report` (with --check: fail when the file differs)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
LARGE, SMALL = SHAPES["llama-2-7b"], SHAPES["llama-small"]
MIB = 2.0**20
Find = Callable[[str, str], Row | None]
Cell = Callable[[Row, list[Row]], str]


def headline(row: Row) -> bool:
    """Whether a row is of the model that the report draws its conclusions from: the 7B shape on a GPU, a small one on a CPU."""
    model = LARGE.name if is_gpu(row) else SMALL.name
    return (row["model"], row["rank"], row["targets"]) == (model, "16", "all-linear")


def finder(results: Results, gpu: bool, cited: list[Row]) -> Find:
    """Finds the last timed row of a stage whose variant begins as given, or is that where it is one whole; notes what it found."""
    rows = [row for row in results.all(headline) if row["ms"] and is_gpu(row) is gpu]

    def find(stage: str, start: str) -> Row | None:
        named = [row for row in rows if row["stage"] == stage and row["variant"].startswith(start)]
        found = [row for row in named if row["variant"] == start] or named
        cited.extend(found[-1:])
        return found[-1] if found else None

    return find


def over(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def total(*parts: float | None) -> float | None:
    return None if None in parts else sum(parts)  # type: ignore[arg-type]


def _ratio(variant: str, find: Find) -> float | None:
    return value(find("pass", variant), "ratio")


def _memory(variant: str, find: Find) -> float | None:
    above = value(find("pass", variant), "above_plain_mib")
    return None if above is None else max(0.0, above) * MIB


def _evidence(variant: str, find: Find) -> float | None:
    return value(find("evidence", variant), "ratio")


def _folds(find: Find) -> float | None:
    row = find("gevp", "global, subspace() with 4 held-out folds")
    return over(value(row), value(row, "floor_ms"))


def _ours(find: Find) -> float | None:
    return value(find("merge", "SST-Merge global: subspace + filter + export"))


def _core_space(find: Find) -> float | None:
    names = [f"Core Space{kind}, {how}" for kind in ("", " QR") for how in ("module by module", "stacked by shape")]
    best = min((ms for name in names if (ms := value(find("merge", name))) is not None), default=None)
    return over(total(best, value(find("export", "global, transform + concatenate + write"))), _ours(find))


@dataclass(frozen=True)
class Target:
    """What was asked for. `figure` takes it from a machine's rows; `by_arithmetic` stands in for the 7B shape."""

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


STREAMED = "factor/kronecker_lowrank l=64"
# What a reading may cost over the plain step, the share of it by arithmetic for the 7B shape, and why it costs more where it does.
READINGS = {
    "evidence, harm, one loss": (1.15, LARGE.reading_share(INPUT_RANK), ""),
    "evidence, harm, opening and rest": (
        1.15,
        LARGE.reading_share(INPUT_RANK, 2),
        "two losses are two backward passes",
    ),
    "evidence, benign, 2 draws": (1.75, LARGE.reading_share(INPUT_RANK, 2), ""),
    "Fisher pass alone at the reference": (0.98, None, ""),
}
SECOND = 1000.0  # what a decision may cost
TARGETS = (
    Target("Fisher pass (core/full) over plain forward + backward", 1.05, times, partial(_ratio, "core/full")),
    Target("core/full: memory above plain", 100 * MIB, size, partial(_memory, "core/full")),
    Target("factor/diagonal over plain", 1.05, times, partial(_ratio, "factor/diagonal"),
           miss="the moments of every module are a launch of their own"),
    Target("factor/diagonal: memory above plain", 200 * MIB, size, partial(_memory, "factor/diagonal")),
    Target(f"{STREAMED} over plain", 1.08, times, partial(_ratio, STREAMED),
           miss="two sketches a module; modules of one input share theirs"),
    Target(f"{STREAMED}: memory above plain", 1024 * MIB, size, partial(_memory, STREAMED)),
    *(Target(f"{name} over plain", bound, times, partial(_evidence, name), by_arithmetic=share, miss=miss)
      for name, (bound, share, miss) in READINGS.items()),
    Target("subspace() with 4 held-out folds over its floor", 3.0, times, _folds, miss="each fold has coordinates of its own to change into: products and copies, then five eigenproblems"),
    Target("GEVP + filter + export, all 224 modules, core space", 1000.0, milliseconds, _ours),
    Target("the same and the solve of the input filter", 1000.0, milliseconds,
           lambda find: total(_ours(find), value(find("decision", "filter(mu)")))),
    Target("Core Space merging + the same export, over ours", 0.5, times, _core_space, True,
           miss="a QR for every fold, whose metric is its own"),
    Target("PEFT dare_linear_svd over SST-Merge end to end", 5.0, times,
           lambda find: over(value(find("merge", "PEFT dare_linear_svd")), value(find("end to end", "SST-Merge global"))),
           True, miss="passes grow with the width's square, SVDs with its cube"),
    Target("both Fishers, 256 + 256 rows, of dense K-FAC's state", 0.01, percent,
           by_arithmetic=LARGE.row_bytes(16, 256) / LARGE.kfac_bytes()),
    Target("moments of both input passes, of dense K-FAC's state", 0.01, percent,
           by_arithmetic=2 * LARGE.input_bytes(INPUT_RANK) / LARGE.kfac_bytes(),
           miss="ℓ = 115 would meet it"),
)  # fmt: skip


def _targets(results: Results) -> dict[str, Any]:
    """Every target of the 7B shape on a GPU, measured or open, beside the same ratios of the scaled-down shape on a CPU."""
    body, misses, cited = [], [], []
    large, small = (finder(results, gpu, cited) for gpu in (True, False))
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


def cell(write: Callable[[float | None], str], column: str, scale: float = 1.0) -> Cell:
    """A cell that writes a column; what lies below zero is noise."""
    return lambda row, _rows: write(None if (x := value(row, column)) is None else max(0.0, x * scale))


def beside(write: Callable[[float | None], str], fits: Callable[[Row, Row], bool], inverse: bool = False) -> Cell:
    """A cell that writes a row's time over that of the first row of its table that fits it, or the inverse."""

    def written(row: Row, rows: list[Row]) -> str:
        pair = value(row), next((value(other) for other in rows if fits(row, other)), None)
        return write(over(*(pair[::-1] if inverse else pair)))

    return written


def _difference(row: Row, _rows: list[Row]) -> str:
    error = value(row, "error")
    return "–" if error is None else f"{error:.0e}" if error else "equal"


def verdict(share: float | None, bound: float) -> str:
    return times(share) + ("" if share is None else ", met" if share <= bound else ", missed")


def _within_a_second(row: Row, _rows: list[Row]) -> str:
    ms = float(row["ms"])
    judged = row["variant"] != "condense()" and row["basis"] == "measured"  # condensing is no decision
    return milliseconds(ms) + (", met" if ms <= SECOND else ", missed") * judged


def _strict(row: Row, rows: list[Row]) -> str:
    """A reading over the plain step whose logits are computed at labels alone, on the same batch."""
    bound, side = READINGS[row["variant"]][0], "benign" if "benign" in row["variant"] else "harm"
    same = [r for r in rows if r["variant"] == f"plain, logits at labels, {side}" and r["model"] == row["model"]]
    return verdict(over(value(row), value(same[0])) if same else None, bound)


def _sized(rows: list[Row]) -> list[Row]:
    return fullest([row for row in rows if row["model"]])


def _timed(stages: tuple[str, ...], rows: list[Row]) -> list[Row]:
    return [r for r in rows if headline(r) and r["ms"] and r["stage"] in stages
            and "one solve" not in r["variant"]]  # fmt: skip


def _of(stage: str, rows: list[Row]) -> list[Row]:
    return [r for r in rows if r["stage"] == stage and r["ms"]]


def _by_time(rows: list[Row]) -> list[Row]:
    return sorted(_timed(("merge", "end to end"), rows), key=lambda r: (r["stage"] != "merge", value(r)))


TIME, FLOOR = cell(milliseconds, "ms"), cell(milliseconds, "floor_ms")
IQR: Cell = lambda r, _: "–" if r["runs"] == "1" else milliseconds(value(r, "iqr_ms"))  # noqa: E731
# Name: the files, which of their rows of one machine are shown, which of those have a line, and the columns.
TABLES: dict[str, tuple[str | tuple[str, ...], Callable[[list[Row]], list[Row]], Callable[[Row], bool], dict[str, Cell]]] = {
    "passes": ("llm", partial(_timed, ("pass",)), lambda _: True, {
        "pass": lambda r, _: r["variant"],
        "batch": lambda r, _: f"{r['batch']} x {r['length']}", "time": TIME, "IQR": IQR, "of the plain step": cell(times, "ratio"),
        "memory above": lambda r, _: cell(size, "above_plain_mib", MIB)(r, _) if r["state_bytes"] else "–",
        "state": cell(size, "state_bytes"),
    }),
    "readings": (("llm", "evidence"), partial(_of, "evidence"), lambda r: not r["variant"].startswith("plain"), {
        "reading": lambda r, _: r["variant"].removeprefix("evidence, "),
        "model, batch": lambda r, _: f"{r['model']}, {r['batch']} x {r['length']}", "time": TIME, "IQR": IQR,
        "target": lambda r, _: f"≤ {times(READINGS[r['variant']][0])}",
        "of the plain step": lambda r, _: verdict(value(r, "ratio"), READINGS[r["variant"]][0]),
        "of the stricter one": _strict,
    }),
    "decisions": (("llm", "evidence"), partial(_of, "decision"), lambda _: True, {
        "decision": lambda r, _: r["variant"], "model": lambda r, _: r["model"], "rows": lambda r, _: r["note"].split(" rows")[0],
        "time": _within_a_second, "IQR": IQR, "evidence": cell(size, "state_bytes"), "basis": lambda r, _: r["basis"],
    }),
    "solves": ("llm", partial(_timed, ("gevp", "filter", "export")), lambda _: True, {
        "scope, what": lambda r, _: r["variant"], "time": TIME, "IQR": IQR, "floor": FLOOR,
    }),
    "merges": ("llm", _by_time, lambda _: True, {
        "merge of all modules": lambda r, _: r["variant"] + ", end to end" * (r["stage"] != "merge"), "time": TIME,
        "of SST-Merge global": beside(times, lambda _, other: other["variant"].startswith("SST-Merge global: ")),
        "basis": lambda r, _: r["basis"],
    }),
    "ops": ("ops_", _sized, lambda r: r["variant"] == "sst", {
        "op": lambda r, _: r["stage"], "size": lambda r, _: f"{r['batch']} x {r['length']}, r = {r['rank']}, {r['model']}",
        "time": TIME, "floor": FLOOR,
        "share": lambda r, _: "–" if (share := over(value(r, "floor_ms"), value(r))) is None else f"{100 * share:.0f} %",
    } | {form: beside(times, lambda r, other, form=form: (other["stage"], other["variant"]) == (r["stage"], form), True)
         for form in ("torch", "torch.compile")}),
    "peers": ("peers", lambda rows: rows, lambda _: True, {
        "what": lambda r, _: r["stage"],
        "library": lambda r, _: f"{r['variant']} {r['note'] if r['ms'] else r['note'].split(' ')[0]}".strip(),
        "time": TIME, "IQR": IQR, "of the plain pass": cell(times, "ratio"),
        "peak above": cell(size, "above_plain_mib", MIB), "difference": _difference,
    }),
}  # fmt: skip


def _tables(results: Results) -> dict[str, Any]:
    """Each of TABLES for every machine that has rows."""
    texts = {}
    for name, (files, pick, shown, columns) in TABLES.items():
        parts = []
        for gpu in (True, False):
            rows = pick(results.all(lambda r, gpu=gpu, files=files: is_gpu(r) is gpu and r["file"].startswith(files)))
            body = [[write(row, rows) for write in columns.values()] for row in rows if shown(row)]
            if body:
                models = {row["model"] for row in rows}
                title = f"**{models.pop()}**\n\n" if len(models) == 1 else ""
                parts.append(f"{title}{table(list(columns), body)}\n\n{sources(rows)}")
        texts[name] = "\n\n".join(parts) or "Not measured yet."
    return texts


def _gates(results: Results) -> dict[str, Any]:
    """The worst errors of what was timed, and the ceilings its floors come from."""
    worst = lambda rows: f"{max(rows):.1e}" if rows else "not measured yet"  # noqa: E731
    errors = {s: worst([float(r["error"]) for r in results.all(stage=s) if r["error"] and r["model"] in SHAPES])
              for s in ("gate", "gevp")}  # fmt: skip
    found = {(r["device"], r["variant"]): r["note"] for r in results.all(stage="ceiling")}
    lines = [f"- {device}: {variant}, {note}" for (device, variant), note in sorted(found.items())]
    return {
        "errors": errors,
        "ceilings": "\n".join(lines) or "Not measured yet.",
        "large_evidence": size(LARGE.evidence_bytes(16, 768)),
    }


def render(results: Results) -> str:
    """The report's text; a pure function of the tables."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    sections = (_targets, _tables, _gates)
    context = {key: text for section in sections for key, text in section(results).items()}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(context)


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
