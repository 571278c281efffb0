"""What docs/report.md shows of the measurements, one function per section: each takes the results and gives the template's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench import estimates
from bench.results import Results, Row, fullest, is_gpu, milliseconds, size, sources, table, three, times, value
from bench.shapes import LARGE, SHAPES

STATIONS: tuple[tuple[str, Callable[[Row], bool]], ...] = (("GPU", is_gpu), ("CPU", lambda row: not is_gpu(row)))


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


def _parts(results: Results, build: Callable[[list[Row]], str], *stages: str) -> list[dict[str, str]]:
    """One table per model, rank and targets over the rows of `stages`, GPU first."""
    parts, order = [], list(SHAPES)
    for _, where in STATIONS:
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for row in (row for stage in stages for row in results.all(where, stage=stage)):
            if row["model"] in SHAPES:
                groups.setdefault((row["model"], row["rank"], row["targets"]), []).append(row)
        for key in sorted(groups, key=lambda k: (order.index(k[0]), k[2], k[1] != "16", int(k[1] or 0))):
            title = f"{key[0]}, {key[2]}, r = {key[1]} ({'GPU' if is_gpu(groups[key][0]) else 'CPU'})"
            parts.append({"title": title, "table": build(groups[key]), "sources": sources(groups[key])})
    return parts


def _passes(results: Results) -> dict[str, Any]:
    def build(rows: list[Row]) -> str:
        head = [
            "pass",
            "batch",
            "time",
            "IQR",
            "plain beside it",
            "ratio",
            "above plain",
            "state",
            "floor",
            "launches",
            "waits",
            "basis",
        ]
        return table(head, [_pass_line(row) for row in rows])

    return {"passes": _parts(results, build, "pass")}


def _pass_line(row: Row) -> list[str]:
    above = value(row, "above_plain_mib")
    plain = row["variant"].startswith("plain")
    return [
        row["variant"],
        f"{row['batch']} x {row['length']}",
        milliseconds(value(row)),
        milliseconds(value(row, "iqr_ms")),
        milliseconds(value(row, "plain_ms")),
        times(value(row, "ratio")),
        "–" if above is None else size(max(0.0, above) * 2**20),
        size(value(row, "state_bytes")),
        milliseconds(value(row, "floor_ms")) + ("" if plain or not row["floor_ms"] else " (added)"),
        row["launches"] or "–",
        row["syncs"] or "–",
        row["basis"],
    ]


def _inputs(results: Results) -> dict[str, Any]:
    """The input pass: measured beside a forward pass and a training step, its filter, and the arithmetic of the large shapes."""

    def build(rows: list[Row]) -> str:
        named = {r["variant"]: r for r in rows}
        step = value(named.get("training step"))
        head = ["what", "batch", "time", "IQR", "of the forward pass", "of the training step", "state, one side", "above the pass",
                "floor", "basis"]  # fmt: skip
        return table(head, [_input_line(row, step) for row in rows if row["ms"]])

    lines = []
    for name in LARGE:
        shape = SHAPES[name]
        forward = shape.forward_flops(8, 512, 16) / (8 * 512)
        for columns in (estimates.INPUT_RANK, None):
            added = estimates.input_flops(shape, columns)
            lines.append([
                f"{name}, {'whole' if columns is None else f'sketch l={columns}'}",
                size(estimates.input_bytes(shape, columns)),
                f"{added / 1e9:.2f} G",
                f"{100 * added / forward:.0f} %",
                times(estimates.input_share(shape, columns)),
            ])  # fmt: skip
    head = [
        "all-linear",
        "state, one side",
        "operations per token",
        "of the forward pass",
        "input pass, of the training step",
    ]
    return {"inputs": _parts(results, build, "inputs"), "inputs_arithmetic": table(head, lines)}


def _input_line(row: Row, step: float | None) -> list[str]:
    above, solve = value(row, "above_plain_mib"), row["variant"].startswith("filter_inputs")
    share = None if step is None or row["variant"] == "training step" else value(row) / step
    return [
        row["variant"] + (", both sides" if solve else ""),
        f"{row['batch']} x {row['length']}" if row["batch"] else "–",
        milliseconds(value(row)),
        milliseconds(value(row, "iqr_ms")),
        times(value(row, "ratio")),
        "–" if solve else times(share),
        "–" if solve else size(value(row, "state_bytes")),
        "–" if above is None else size(max(0.0, above) * 2**20),
        milliseconds(value(row, "floor_ms")) + (" (added)" if row["state_bytes"] and row["floor_ms"] else ""),
        row["basis"],
    ]


def _solves(results: Results) -> dict[str, Any]:
    def build(rows: list[Row]) -> str:
        head = ["stage", "what", "time", "IQR", "floor", "peak memory", "error"]
        return table(head, [_solve_line(row) for row in rows])

    return {"solves": _parts(results, build, "gevp", "filter", "export")}


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

    return {"merges": _parts(results, build, "merge", "end to end")}


def _kfac(results: Results) -> dict[str, Any]:
    rows = []
    for name in LARGE:
        shape = SHAPES[name]
        ours = estimates.row_bytes(shape, 16, 256)
        rows.append([name, size(shape.kfac_bytes()), size(ours), f"{100 * ours / shape.kfac_bytes():.2f} %"])
    return {
        "kfac": table(["all-linear, r = 16", "dense K-FAC, one Fisher", "SST-Merge, 256 + 256 rows", "share"], rows)
    }


def _against_step(results: Results) -> dict[str, Any]:
    rows = [
        row for _, where in STATIONS for row in results.all(where, stage="pass") if row["ratio"] and row["rank"] == "16"
    ]
    body = [
        [r["model"], r["variant"], "GPU" if is_gpu(r) else "CPU", times(value(r, "ratio")), r["basis"]] for r in rows
    ]
    head = ["model", "Fisher pass", "machine", "of the plain step", "basis"]
    return {"against_step": table(head, body) if body else "Not measured yet.", "against_step_sources": sources(rows)}


def _preparation(results: Results) -> dict[str, Any]:
    """The passes of a merge over its data, in training steps on the same rows."""
    body, cited = [], []
    for where_name, where in STATIONS:
        for name in SHAPES:
            match = {"model": name, "rank": "16", "targets": "all-linear"}
            fisher, step = (
                results.one(where, stage=stage, variant=variant, **match)
                for stage, variant in (("pass", "core/full"), ("inputs", "training step"))
            )
            reading = next(
                (r for r in results.all(where, stage="inputs", **match) if r["variant"].startswith("sketch")), None
            )
            if not (fisher and step and reading):
                continue
            one, read = value(fisher, "ratio"), value(reading) / value(step)
            body.append([name, where_name, times(one), times(read), times(one + read), times(2 * one + read)])
            cited += [fisher, reading, step]
    head = ["model", "machine", "Fisher pass", "input pass", "a row of refusals: both", "a benign row: two draws"]
    return {
        "preparation": table(head, body) if body else "Not measured yet.",
        "preparation_sources": sources(cited),
    }


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


def _importance(results: Results) -> dict[str, Any]:
    rows = [row for _, where in STATIONS for row in results.all(where, stage="importance")]
    body = [
        [
            r["variant"],
            r["model"],
            "GPU" if is_gpu(r) else "CPU",
            milliseconds(value(r)),
            times(value(r, "ratio")),
            size(value(r, "state_bytes")),
            r["note"],
        ]
        for r in rows
    ]
    verdicts = []
    for name, where in STATIONS:
        found = {r["variant"]: r for r in results.all(where, stage="importance")}
        vila, fila = (next((r for v, r in found.items() if v.endswith(end)), None) for end in ("(VILA)", "(FILA)"))
        if vila and fila:
            memory = value(fila, "state_bytes") / value(vila, "state_bytes")
            verdicts.append(
                f"{name} ({vila['model']}): the importance over all weights takes {times(value(fila, 'ratio'))} the time and "
                f"{times(memory)} the state of the one over the LoRA pair"
            )
    text = (
        "With equal accumulators the gap in memory is the ratio of parameters, and the gap in time is a fraction of a step: "
        + "; ".join(verdicts) + ". The rest of the published factors is the accumulator, not the method."
        if verdicts
        else ""
    )  # fmt: skip
    head = ["importance pass, one batch", "model", "machine", "time", "of VILA's", "state, whole model", "measured on"]
    return {
        "importance": table(head, body) if body else "Not measured yet.",
        "importance_sources": sources(rows),
        "importance_verdict": text,
    }


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
    _passes,
    _inputs,
    _solves,
    _merges,
    _kfac,
    _against_step,
    _preparation,
    _peers,
    _importance,
    _scaling,
    _ceilings,
)
