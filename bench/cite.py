"""Figures in prose that stay equal to the table rows they come from.

    <!-- bench: model=llama-2-7b stage=pass variant=core/full | ratio -->1.02<!-- /bench -->

names a row of bench/results by its columns, then a column and optionally a factor (`| ms * 0.001`); the text between the comments is the
number, at whatever precision it is written. `device=` matches a part of the name. `python -m bench.cite FILE...` checks, `--write`
fills the numbers in at the precision they have (three significant digits where there was none).
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.results import Results, three

MARK = re.compile(r"<!-- bench: (?P<query>[^|>]*)\|(?P<column>[^>]*?)-->(?P<text>[^<]*)<!-- /bench -->")


@dataclass(frozen=True)
class Citation:
    """One marked figure: which row and column it cites, and what is written."""

    query: str
    column: str
    factor: float
    text: str

    def expected(self, results: Results) -> float:
        """The number the tables hold. ValueError when no row, or an empty cell, answers."""
        match = dict(part.split("=", 1) for part in shlex.split(self.query))
        device = match.pop("device", "")
        row = results.one(lambda r: device in r["device"], **match)
        if row is None or not row[self.column]:
            raise ValueError(f"no row of bench/results has {self.query!r} with a value in {self.column!r}")
        return float(row[self.column]) * self.factor

    def agrees(self, results: Results) -> bool:
        """Whether the written number is the table's, rounded to the digits written."""
        digits = len(self.text.strip().partition(".")[2])
        return abs(float(self.text) - self.expected(results)) <= 0.5000001 * 10.0**-digits


def citations(text: str) -> list[Citation]:
    """All marked figures of a Markdown text."""
    return [_citation(match) for match in MARK.finditer(text)]


def rewritten(text: str, results: Results) -> str:
    """The text with every marked figure taken from the tables."""

    def replace(match: re.Match[str]) -> str:
        expected, old = _citation(match).expected(results), match["text"].strip()
        new = f"{expected:.{len(old.partition('.')[2])}f}" if old else three(expected)
        return match[0].replace(f"-->{match['text']}<!--", f"-->{new}<!--")

    return MARK.sub(replace, text)


def _citation(match: re.Match[str]) -> Citation:
    column, _, factor = match["column"].partition("*")
    return Citation(match["query"].strip(), column.strip(), float(factor or 1), match["text"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    results, wrong = Results(), 0
    for path in options.files:
        text = path.read_text(encoding="utf-8")
        if options.write:
            path.write_text(rewritten(text, results), encoding="utf-8")
            continue
        for cited in citations(text):
            if not cited.agrees(results):
                wrong += 1
                print(
                    f"{path}: {cited.text} but the tables hold {cited.expected(results):.6g} ({cited.query} | {cited.column})"
                )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
