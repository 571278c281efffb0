"""docs/report.md out of bench/results/*.csv: `python -m bench.report` (with --check: fail when the file differs)."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
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
    is_gpu,
    milliseconds,
    percent,
    size,
    sources,
    table,
    times,
    value,
)  # fmt: skip
from bench.shapes import INPUT_RANK, SHAPES, Shape

TEMPLATE = ROOT / "bench" / "report.md.j2"
OUTPUT = ROOT / "docs" / "report.md"
LARGE, LARGER, SMALL = (SHAPES[name] for name in ("llama-2-7b", "llama-2-13b", "llama-small"))
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


def _strict(row: Row, rows: list[Row]) -> str:
    """A reading over the plain step whose logits are computed at labels alone, on the same batch."""
    bound, side = READINGS[row["variant"]][0], "benign" if "benign" in row["variant"] else "harm"
    same = [r for r in rows if r["variant"] == f"plain, logits at labels, {side}" and r["model"] == row["model"]]
    return verdict(over(value(row), value(same[0])) if same else None, bound)


def _timed(stages: tuple[str, ...], rows: list[Row]) -> list[Row]:
    return [r for r in rows if headline(r) and r["ms"] and r["stage"] in stages
            and "one solve" not in r["variant"]]  # fmt: skip


def _of(stage: str, rows: list[Row]) -> list[Row]:
    return [r for r in rows if r["stage"] == stage and r["ms"]]


def _by_time(rows: list[Row]) -> list[Row]:
    return sorted(_timed(("merge", "end to end"), rows), key=lambda r: (r["stage"] != "merge", value(r)))


def _named(row: Row) -> str:
    return row["variant"] + ", end to end" * (row["stage"] != "merge")


TIME = cell(milliseconds, "ms")
# Name: the files, which of their rows of one machine are shown, which of those have a line, and the columns.
TABLES: dict[str, tuple[str | tuple[str, ...], Callable[[list[Row]], list[Row]], Callable[[Row], bool], dict[str, Cell]]] = {
    "readings": (("llm", "evidence"), partial(_of, "evidence"), lambda r: not r["variant"].startswith("plain"), {
        "reading": lambda r, _: r["variant"].removeprefix("evidence, "),
        "model, batch": lambda r, _: f"{r['model']}, {r['batch']} x {r['length']}", "time": TIME,
        "target": lambda r, _: f"≤ {times(READINGS[r['variant']][0])}",
        "of the plain step": lambda r, _: verdict(value(r, "ratio"), READINGS[r["variant"]][0]),
        "of the stricter one": _strict,
    }),
    "merges": ("llm", _by_time, lambda r: not re.search("module by module| QR|module, end", _named(r)), {
        "merge of all modules": lambda r, _: _named(r), "time": TIME,
        "of SST-Merge global": beside(times, lambda _, other: other["variant"].startswith("SST-Merge global: ")),
        "basis": lambda r, _: r["basis"],
    }),
    "peers": ("peers", lambda rows: rows, lambda _: True, {
        "what": lambda r, _: r["stage"],
        "library": lambda r, _: f"{r['variant']} {r['note'] if r['ms'] else r['note'].split(' ')[0]}".strip(),
        "time": TIME, "of the plain pass": cell(times, "ratio"),
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
    """The worst errors of what was timed."""
    worst = lambda rows: f"{max(rows):.1e}" if rows else "not measured yet"  # noqa: E731
    return {"errors": {s: worst([float(r["error"]) for r in results.all(stage=s) if r["error"] and r["model"] in SHAPES])
                       for s in ("gate", "gevp")}}  # fmt: skip


def _verdict(results: Results) -> dict[str, Any]:
    """What the first paragraphs say: the 7B shape's ratios where a GPU has measured them, else the small one's."""
    found: list[Row] = []
    gpu = finder(results, True, found)("pass", "core/full") is not None
    find = finder(results, gpu, found)
    ours = _ours(find)
    share = lambda stage, name: times(over(value(find(stage, name)), ours))  # noqa: E731
    svd = [over(value(find("merge", f"PEFT {name}")), ours) for name in ("svd", "dare_linear_svd", "ties_svd")]
    known = [x for x in svd if x is not None]
    decision = results.one(stage="decision", variant="condensed: filter(mu) + subspace() + soft(kl_budget)")
    whole = over(value(find("end to end", "SST-Merge global")), value(find("merge", "PEFT dare_linear_svd")))
    return {
        "pass_share": times(_ratio("core/full", find)),
        "pass_model": LARGE.name if gpu else SMALL.name,
        "kfac_share": share("merge", "dense K-FAC pencils"),
        "svd_share": f"{times(min(known))} to {times(max(known))}" if known else "–",
        "core_space_share": share("merge", "Core Space, stacked by shape"),
        "end_to_end_share": times(whole),
        "decision": milliseconds(value(decision)),
        "rows_7b": size(LARGE.row_bytes(16, 256)),
        "kfac_7b": size(LARGE.kfac_bytes()),
        "read_7b": times(LARGE.reading_share(INPUT_RANK)),
        "draws_7b": times(LARGE.reading_share(INPUT_RANK, 2)),
        "evidence_7b": size(LARGE.evidence_bytes(16, 768)),
        "evidence_13b": size(LARGER.evidence_bytes(16, 768)),
    }


SIZES: dict[str, Callable[[Shape], str]] = {
    "LoRA modules": lambda s: str(len(s.modules())),
    "core coordinates": lambda s: f"{16**2 * len(s.modules()):,}".replace(",", " "),
    "forward and backward, per token": lambda s: f"{s.step_flops(8, 512, 16) / 4096 / 1e9:.1f} GFLOP",
    "one reading, one loss, of a step": lambda s: times(s.reading_share(INPUT_RANK)),
    "one reading, two label draws, of a step": lambda s: times(s.reading_share(INPUT_RANK, 2)),
    "evidence of 256 + 512 rows, exact": lambda s: size(s.evidence_bytes(16, 768)),
    f"moments of both sides, sketches of {INPUT_RANK} columns": lambda s: size(2 * s.input_bytes(INPUT_RANK)),
    "both Fishers in core space, 256 + 256 rows": lambda s: size(s.row_bytes(16, 256)),
    "dense K-FAC's factors": lambda s: size(s.kfac_bytes()),
}


def _sizes(_: Results) -> dict[str, Any]:
    body = [[name, *(write(shape) for shape in (LARGE, LARGER))] for name, write in SIZES.items()]
    return {"sizes": table(["", "Llama-2-7B", "Llama-2-13B"], body)}


def render(results: Results) -> str:
    """The report's text; a pure function of the tables."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    sections = (_verdict, _targets, _sizes, _tables, _gates)
    context = {key: text for section in sections for key, text in section(results).items()}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(context)
    return "\n".join(line if line.startswith("|") else fill(line) for line in text.split("\n"))


def fill(line: str) -> str:
    """A line of prose within 120 columns."""
    after = "  " * line.startswith("- ")
    return textwrap.fill(line, 120, subsequent_indent=after, break_long_words=False, break_on_hyphens=False) or line


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
