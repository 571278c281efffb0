"""What docs/report.md shows of passes over data: Fisher passes, input passes, importance passes, and the training step beside them."""

from __future__ import annotations

from typing import Any

from bench import estimates, importance
from bench.results import STATIONS, Results, Row, is_gpu, milliseconds, parts, size, sources, table, times, value
from bench.shapes import LARGE, SHAPES


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

    return {"passes": parts(results, build, "pass")}


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
    return {"inputs": parts(results, build, "inputs"), "inputs_arithmetic": table(head, lines)}


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


def _against_step(results: Results) -> dict[str, Any]:
    rows = [
        row for _, where in STATIONS for row in results.all(where, stage="pass") if row["ratio"] and row["rank"] == "16"
    ]
    body = [
        [
            f"{r['model']}, {r['targets']}",
            r["variant"],
            "GPU" if is_gpu(r) else "CPU",
            times(value(r, "ratio")),
            r["basis"],
        ]
        for r in rows
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
            "–" if not r["peak_mib"] else size(value(r, "peak_mib") * 2**20),
            r["note"],
        ]
        for r in rows
    ]
    verdicts = []
    for station, where in STATIONS:
        for name in SHAPES:
            found = {r["variant"]: r for r in results.all(where, stage="importance", model=name)}
            for what, vila, fila in (
                ("one accumulator", importance.VILA, importance.FILA),
                *(
                    (
                        f"public loops, sums on the {home}",
                        *(f"public loop of {who}, sums on the {home}" for who in ("VILA", "FILA")),
                    )
                    for home in ("host", "GPU")
                ),
            ):
                if vila in found and fila in found:
                    time, state = (value(found[fila], c) / value(found[vila], c) for c in ("ms", "state_bytes"))
                    verdicts.append([f"{name}, {station}", what, times(time), times(state)])
    shape = SHAPES["llama-2-7b"]
    weights, lora = (
        sum(f(p, q) for p, q in shape.modules().values()) for f in (lambda p, q: p * q, lambda p, q: 16 * (p + q))
    )
    work = shape.step_flops(8, 512, 16)
    facts = {
        "parameters": times(weights / lora),
        "operations": times((work + 8 * 512 * (2 * shape.weights - 6 * lora)) / work),
        "fila": size(2 * weights),
        "vila": size(2 * 2 * lora),
    }
    head = [
        "importance pass, one batch",
        "model",
        "machine",
        "time",
        "of VILA's",
        "state, whole model",
        "peak",
        "measured on",
    ]
    return {
        "importance": table(head, body) if body else "Not measured yet.",
        "importance_sources": sources(rows),
        "importance_verdict": table(["FILA over VILA", "with", "time", "state"], verdicts)
        if verdicts
        else "Not measured yet.",
        "importance_facts": facts,
    }


PASSES = (_passes, _inputs, _against_step, _preparation, _importance)
