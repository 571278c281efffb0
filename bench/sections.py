"""What docs/report.md shows of the measurements, one function per section: each takes the results and gives the template's values."""

from __future__ import annotations

from typing import Any

from bench import estimates
from bench.results import (
    STATIONS,
    Results,
    Row,
    fullest,
    is_gpu,
    milliseconds,
    parts,
    percent,
    size,
    sources,
    table,
    three,
    times,
    value,
)
from bench.shapes import LARGE, SHAPES


def _structures(results: Results) -> dict[str, Any]:
    gates = [row for row in results.all(stage="gate") if row["error"]]
    solved = [row for row in results.all(stage="gevp") if row["error"] and row["model"] in SHAPES]
    rows = results.all(lambda r: r["file"].startswith("structures"))
    rows = fullest(rows)
    worst = lambda found: f"at most {max(float(r['error']) for r in found):.1e}" if found else "not measured yet"  # noqa: E731
    body = [
        [
            f"{r['stage']}/{r['variant']}",
            r["note"],
            r["model"],
            r["rank"],
            r["length"],
            times(value(r, "ratio")),
            size(value(r, "state_bytes")),
        ]
        for r in rows
    ]
    head = ["structure", "options", "model", "r", "T", "over the bare step", "state"]
    return {
        "gate_error": worst(gates),
        "gevp_error": worst(solved),
        "structures": table(head, body) if body else "Not measured yet.",
        "structures_sources": sources(rows),
    }


def _ops(results: Results) -> dict[str, Any]:
    """Every op at one size per machine: our time beside its floor, the torch form and what torch.compile makes of that."""
    body, cited = [], []
    for _, where in STATIONS:
        rows = fullest(
            results.all(lambda r, where=where: where(r) and r["file"].startswith("ops_") and r["model"] != "")
        )
        forms = {(r["stage"], r["variant"]): r for r in rows}
        for row in (r for r in rows if r["variant"] == "sst"):
            ours, floor = value(row), value(row, "floor_ms")
            others = (value(forms.get((row["stage"], form))) for form in ("torch", "torch.compile"))
            body.append(
                [
                    row["stage"],
                    f"{row['batch']} x {row['length']}, r = {row['rank']}, {row['model']}",
                    milliseconds(ours),
                    milliseconds(floor),
                    "–" if ours is None or floor is None else f"{100 * floor / ours:.0f} %",
                    *(times(other / ours) if other and ours else "–" for other in others),
                    size((value(row, "peak_mib") or 0) * 2**20),
                    "–" if not row["error"] else f"{float(row['error']):.0e}",
                    "GPU" if is_gpu(row) else "CPU",
                ]
            )
        cited += rows
    head = ["op", "size", "time", "floor", "of the floor", "torch", "torch.compile", "peak", "error", "machine"]
    return {"ops": table(head, body) if body else "Not measured yet.", "ops_sources": sources(cited)}


def _solves(results: Results) -> dict[str, Any]:
    def build(rows: list[Row]) -> str:
        head = ["stage", "what", "time", "IQR", "floor", "peak memory", "error"]
        return table(head, [_solve_line(row) for row in rows])

    return {"solves": parts(results, build, "gevp", "filter", "export")}


def _solve_line(row: Row) -> list[str]:
    peak = value(row, "peak_mib")
    return [
        row["stage"],
        f"{row['variant']} ({row['note']})",
        milliseconds(value(row)),
        milliseconds(value(row, "iqr_ms")),
        milliseconds(value(row, "floor_ms")),
        "–" if peak is None else size(peak * 2**20),
        f"{float(row['error']):.0e}" if row["error"] else "–",
    ]


def _merges(results: Results) -> dict[str, Any]:
    def build(rows: list[Row]) -> str:
        ours = next((value(r) for r in rows if r["variant"].startswith("SST-Merge global")), None)
        ordered = sorted(rows, key=lambda r: (r["stage"] != "merge", r["ms"] == "", float(r["ms"] or 0)))
        body = []
        for r in ordered:
            name = r["variant"] + ("" if r["stage"] == "merge" else ", end to end")
            ratio = times(value(r) / ours) if ours and r["ms"] else "–"
            body.append([name, milliseconds(value(r)), ratio, r["basis"], r["note"] or "–"])
        return table(["merge of all modules", "time", "of SST-Merge global", "basis", "how"], body)

    return {"merges": parts(results, build, "merge", "end to end")}


def _kfac(results: Results) -> dict[str, Any]:
    rows = []
    for name in LARGE:
        shape = SHAPES[name]
        dense, fishers = shape.kfac_bytes(), estimates.row_bytes(shape, 16, 256)
        moments = 2 * estimates.input_bytes(shape, estimates.INPUT_RANK)
        rows.append(
            [name, size(dense), size(fishers), percent(fishers / dense), size(moments), percent(moments / dense)]
        )
    head = [
        "all-linear, r = 16",
        "dense K-FAC, one Fisher",
        "both Fishers, 256 + 256 rows",
        "share",
        "both input passes, l=512",
        "share",
    ]
    return {"kfac": table(head, rows)}


def _peers(results: Results) -> dict[str, Any]:
    """Other libraries on the same batches: what they take over the plain pass, and whether their values are ours."""
    rows = results.all(lambda r: r["file"].startswith("peers"))
    body = []
    for r in rows:
        above = value(r, "above_plain_mib")
        body.append(
            [
                r["stage"],
                " ".join(filter(None, [r["variant"], r["note"] if r["ms"] else r["note"].split(" ")[0]])),
                milliseconds(value(r)),
                milliseconds(value(r, "iqr_ms")),
                times(value(r, "ratio")),
                "–" if above is None else size(max(0.0, above) * 2**20),
                "–" if not r["error"] else f"{float(r['error']):.0e}" if float(r["error"]) else "equal",
                r["basis"],
            ]
        )
    head = ["what", "library", "time", "IQR", "over the plain pass", "peak above plain", "difference", "basis"]
    return {"peers": table(head, body) if body else "Not measured yet.", "peers_sources": sources(rows)}


def _scaling(results: Results) -> dict[str, Any]:
    rows = results.all(model="scaling")
    laws: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        laws.setdefault((row["device"], row["stage"], row["variant"].split("=")[0]), []).append(row)
    body = []
    for (device, op, name), points in laws.items():
        span = f"{points[0]['variant'].split('=')[1]} … {points[-1]['variant'].split('=')[1]}"
        spent = f"{milliseconds(value(points[0]))} … {milliseconds(value(points[-1]))}"
        exponent, expected = three(value(points[-1], "ratio")), points[-1]["note"].rsplit(" ", 1)[1]
        body.append([op, name, span, spent, exponent, expected, "GPU" if device.startswith("NVIDIA") else "CPU"])
    head = ["op", "in", "from … to", "time", "exponent", "arithmetic", "machine"]
    return {"scaling": table(head, body) if body else "Not measured yet.", "scaling_sources": sources(rows)}


def _ceilings(results: Results) -> dict[str, Any]:
    rows = {}
    for row in results.all(stage="ceiling"):
        rows[row["device"], row["variant"]] = row
    body = [[device, variant, row["note"]] for (device, variant), row in sorted(rows.items(), key=lambda item: item[0])]
    return {
        "ceilings": table(["machine", "what", "rate"], body) if body else "Not measured yet.",
        "ceilings_sources": sources(rows.values()),
    }


SECTIONS = (
    _structures,
    _ops,
    _solves,
    _merges,
    _kfac,
    _peers,
    _scaling,
    _ceilings,
)
