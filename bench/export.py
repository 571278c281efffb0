"""Tables out of measurements: `python -m bench.export benchmark RUN.json --out FILE.csv`, `ncu RAW.csv... --out FILE.csv`, `show FILE.csv`."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from bench.common import COLUMNS, ROOT

NCU_COLUMNS = {
    "gpu__time_duration.sum": "time_us",
    "dram__bytes.sum": "dram_mb",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "lts__t_sector_hit_rate.pct": "l2_hit_percent",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor_percent",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}
_UNITS = {
    "ns": 1e-3,
    "us": 1.0,
    "usecond": 1.0,
    "ms": 1e3,
    "nsecond": 1e-3,
    "msecond": 1e3,
    "byte": 1e-6,
    "Kbyte": 1e-3,
    "Mbyte": 1.0,
    "Gbyte": 1e3,
}


def from_benchmark(path: Path) -> list[dict[str, Any]]:
    """Rows of a pytest-benchmark JSON file: `extra_info` holds the table's columns, the statistics the times."""
    rows = []
    for entry in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
        stats, extra = entry["stats"], entry["extra_info"]
        row = dict.fromkeys(COLUMNS, "")
        row |= {"ms": f"{1e3 * stats['median']:.6g}", "iqr_ms": f"{1e3 * stats['iqr']:.6g}", "runs": stats["rounds"]}
        row |= {key: value for key, value in extra.items() if key in COLUMNS}
        rows.append(row)
    return rows


def from_ncu(paths: list[Path]) -> list[dict[str, Any]]:
    """One row per kernel of `ncu --csv --page raw` logs, equal kernels averaged in order of first launch."""
    kernels: dict[tuple[str, str], list[dict[str, float]]] = {}
    for path in paths:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith('"')]
        table = list(csv.reader(io.StringIO("\n".join(lines))))
        if len(table) < 3:
            continue
        head, units = table[0], table[1]
        for values in table[2:]:
            cells = dict(zip(head, zip(values, units)))
            name = re.sub(r"<.*", "", cells["Kernel Name"][0].replace("void ", "")).split("(")[0].split("::")[-1][:60]
            numbers = {}
            for metric, column in NCU_COLUMNS.items():
                value, unit = cells.get(metric, ("", ""))
                if value:
                    numbers[column] = float(value.replace(",", "")) * _UNITS.get(unit, 1.0)
            kernels.setdefault((path.stem.removeprefix("ncu_raw_"), name), []).append(numbers)
    rows = []
    for (stage, name), launches in kernels.items():
        row: dict[str, Any] = {"stage": stage, "kernel": name, "launches": len(launches)}
        for column in dict.fromkeys(NCU_COLUMNS.values()):
            values = [launch[column] for launch in launches if column in launch]
            row[column] = f"{sum(values) / len(values):.4g}" if values else ""
        rows.append(row)
    return rows


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """One CSV file with the columns of the rows."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def show(path: Path) -> None:
    """The rows of a table, short."""
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            cells = [
                f"{row['model'][:12]:12} {row['rank'] or '':>3} {row['stage'][:10]:10} {row['variant'][:46]:46} {row['ms']:>9}"
            ]
            cells += [
                f"{key}={row[key]}" for key in ("ratio", "floor_ms", "above_plain_mib", "launches", "syncs") if row[key]
            ]
            cells += [row["basis"]] if row["basis"] not in ("measured", "") else []
            print(" ".join(cells) + (f" [{row['note'][:60]}]" if row["basis"] in ("failed", "out of memory") else ""))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("benchmark", "ncu", "show"))
    parser.add_argument("inputs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "benchmark.csv")
    options = parser.parse_args(arguments)
    if options.what == "show":
        for path in options.inputs:
            show(path)
        return 0
    rows = from_ncu(options.inputs) if options.what == "ncu" else [r for p in options.inputs for r in from_benchmark(p)]
    write(rows, options.out)
    print(f"{len(rows)} rows in {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
