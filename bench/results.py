"""The committed measurements, read back: which row answers a question, and how a number is written."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.common import COLUMNS, ROOT

FOLDER = ROOT / "bench" / "results"
Row = dict[str, str]


def is_gpu(row: Row) -> bool:
    return row["device"].startswith("NVIDIA")


class Results:
    """All tables of a folder that have the columns of `bench.common`, file by file in name order, rows in file order."""

    def __init__(self, folder: Path = FOLDER):
        self.rows: list[Row] = []
        for path in sorted(folder.glob("*.csv")):
            rows = read(path)
            if rows and {"stage", "variant", "ms", "device"} <= rows[0].keys():
                self.rows += [dict.fromkeys(COLUMNS, "") | row | {"file": path.name} for row in rows]

    def all(self, where: Callable[[Row], bool] | None = None, **match: str) -> list[Row]:
        """Matching rows; of several with the same subject the last one with a time stands, in the first one's place."""
        found: dict[tuple[str, ...], Row] = {}
        for row in self.rows:
            if (where is None or where(row)) and all(row[column] == wanted for column, wanted in match.items()):
                subject = ("device", "stage", "model", "targets", "rank", "batch", "length", "variant")
                key = tuple(row[column] for column in subject)
                if row["ms"] or key not in found:
                    found[key] = row
        return list(found.values())

    def one(self, where: Callable[[Row], bool] | None = None, **match: str) -> Row | None:
        """The last matching row that holds a time, or None."""
        rows = [row for row in self.all(where, **match) if row["ms"]]
        return rows[-1] if rows else None


def read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def value(row: Row | None, column: str = "ms") -> float | None:
    """The number of a cell, or None."""
    return float(row[column]) if row is not None and row[column] else None


def milliseconds(ms: float | None) -> str:
    """A duration with three significant digits in the unit that suits it."""
    if ms is None:
        return "–"
    for limit, unit, scale in ((1.0, "µs", 1e3), (1e3, "ms", 1.0), (6e5, "s", 1e-3), (float("inf"), "min", 1 / 6e4)):
        if ms < limit:
            return f"{three(ms * scale)} {unit}"
    raise AssertionError(ms)


def size(count: float | None) -> str:
    """Bytes in the binary unit that suits them."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{three(count)} {unit}"
        count /= 1024
    raise AssertionError(count)


def three(x: float) -> str:
    """Three significant digits without an exponent."""
    x = float(f"{x:.3g}")
    return f"{x:.{max(0, 2 - _magnitude(x))}f}"


def times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{three(ratio)}x"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def sources(rows: Iterable[Row | None]) -> str:
    """Machine, commits and dates of rows, as every table of the report states them."""
    machines: dict[tuple[str, str], dict[str, dict[str, None]]] = {}
    for row in rows:
        if row is not None:
            facts = machines.setdefault((row["device"], row["driver"]), {"commit": {}, "date": {}, "file": {}})
            for key, seen in facts.items():
                seen[row[key]] = None
    lines = []
    for (device, driver), facts in machines.items():
        driver = f" (driver {driver})" if driver else ""
        commits, dates, files = (", ".join(facts[key]) for key in ("commit", "date", "file"))
        lines.append(f"{device}{driver}; commit {commits}; {dates}; {files}")
    return "Measured on: " + " · ".join(lines) + "." if lines else "Not measured yet."


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; first column left, the others right."""
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---", *["---:"] * (len(head) - 1)]) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _magnitude(x: float) -> int:
    return 0 if x == 0 else int(f"{abs(x):e}".split("e")[1])
