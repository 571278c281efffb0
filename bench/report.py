"""docs/report.md out of bench/results/*.csv: `python -m bench.report` (with --check: fail when the file differs)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jinja2

from bench.common import ROOT
from bench.estimates import Study
from bench.results import FOLDER, Results
from bench.sections import SECTIONS
from bench.sections_passes import PASSES
from bench.verdicts import VERDICTS

TEMPLATE = ROOT / "bench" / "report.md.j2"
OUTPUT = ROOT / "docs" / "report.md"


def render(results: Results) -> str:
    """The report's text; a pure function of the tables."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    context: dict[str, Any] = {"study": Study()}
    for section in (*SECTIONS, *PASSES, *VERDICTS):
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
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(f"{len(text.splitlines())} lines in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
