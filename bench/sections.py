"""The tables of docs/report.md, one function per section: each takes the results and gives the template's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench import estimates
from bench.results import Results, Row, fullest, is_gpu, milliseconds, size, sources, table, three, times, value
from bench.shapes import SHAPES

LARGE = ("llama-2-7b", "llama-3.1-8b", "qwen2.5-7b", "llama-2-13b")
STATIONS: tuple[tuple[str, Callable[[Row], bool]], ...] = (("GPU", is_gpu), ("CPU", lambda row: not is_gpu(row)))
HEADLINE = {"model": "llama-2-7b", "rank": "16", "targets": "all-linear"}


def _targets(results: Results) -> dict[str, Any]:
    """Every target of the 7B shape, measured or open."""
    find = lambda stage, variant: results.one(is_gpu, stage=stage, variant=variant, **HEADLINE)  # noqa: E731
    merged, dare = find("merge", "SST-Merge global: subspace + filter + export"), find("merge", "PEFT dare_linear_svd")
    whole, core = find("end to end", "SST-Merge global"), _fastest_core_space(results, is_gpu, HEADLINE)
    export = results.one(is_gpu, stage="export", variant="global, transform + concatenate + write", **HEADLINE)
    full, diagonal, streamed = (
        find("pass", name) for name in ("core/full", "factor/diagonal", "factor/kronecker_lowrank l=64")
    )
    ours, theirs = value(merged), (value(core) or 0) + (value(export) or 0)
    share = estimates.row_bytes(SHAPES["llama-2-7b"], 16, 256) / SHAPES["llama-2-7b"].kfac_bytes()
    lines = [
        ("Fisher pass (core/full) over plain forward + backward", value(full, "ratio"), 1.05, times),
        ("core/full: memory above plain", _mib(full), 100 * 2**20, size),
        ("factor/diagonal over plain", value(diagonal, "ratio"), 1.05, times),
        ("factor/diagonal: memory above plain", _mib(diagonal), 200 * 2**20, size),
        ("factor/kronecker_lowrank l=64 over plain", value(streamed, "ratio"), 1.08, times),
        ("factor/kronecker_lowrank l=64: memory above plain", _mib(streamed), 2**30, size),
        ("GEVP + filter + export, all 224 modules, core space", ours, 1000.0, milliseconds),
        ("Core Space merging + the same export, over ours (at least)", ours and core and theirs / ours, 0.5, times),
        ("PEFT dare_linear_svd over SST-Merge end to end (at least)", _over(dare, whole), 5.0, times),
        ("state, 256 + 256 rows, of dense K-FAC's (arithmetic)", share, 0.01, lambda x: f"{100 * x:.2f} %"),
    ]
    rows, misses = [], []
    for name, got, bound, write in lines:
        at_least = name.endswith("(at least)")
        met = got is not None and (got >= bound if at_least else got <= bound)
        verdict = "open" if got is None else "met" if met else "missed"
        sign = "≥" if at_least else "≤"
        rows.append(
            [name.removesuffix(" (at least)"), "–" if got is None else write(got), f"{sign} {write(bound)}", verdict]
        )
        if verdict == "missed":
            misses.append(name)
    cited = [full, diagonal, streamed, merged, core, dare, whole]
    return {
        "targets": table(["Llama-2-7B, all-linear, r = 16", "measured", "target", "verdict"], rows),
        "targets_sources": sources(cited),
        "misses": "\n".join(f"- {name}: {_plan(name)}" for name in misses),
    }


_PLANS = {
    "Fisher pass": "the added time stands against its own floor in section (b); the hooks' launches are the rest",
    "core/full: memory": "row buffers and the kept r-vectors of one batch are the whole of it; smaller batches bound it",
    "factor/diagonal": "the moments are summed per module; one launch per shape, as core_outer has, removes the launches",
    "factor/kronecker_lowrank": "q, k, v and gate, up read one input each: sketching it once saves 40 % of the reads",
    "GEVP": "the stage table of section (b) says where the time goes",
    "Core Space": "a fold has a metric, hence a QR, of its own; metric='frobenius' shares one among all folds, folds=2 halves them",
    "PEFT": "see the end-to-end table",
}


def _plan(name: str) -> str:
    return next(plan for start, plan in _PLANS.items() if name.startswith(start))


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


def _models(results: Results) -> dict[str, Any]:
    body, cited = [], []
    for name in LARGE:
        for suffix in ("", ", checkpointing"):
            plain, full, frozen = (
                results.one(is_gpu, stage="pass", model=name, rank="16", targets="all-linear", variant=variant + suffix)
                for variant in ("plain", "core/full", "core/full frozen")
            )
            if plain is None:
                continue
            solve = results.one(
                is_gpu, stage="merge", model=name, rank="16", targets="all-linear",
                variant="SST-Merge global: subspace + filter + export",
            )  # fmt: skip
            step, total = value(frozen) or value(full), value(solve)
            whole = None if step is None or total is None else 64 * step + total
            cited += [plain, full, frozen, solve]
            peak = value(full, "peak_mib") or value(frozen, "peak_mib")
            peak = None if peak is None else peak * 2**20 + estimates.weight_bytes(SHAPES[name])
            body.append(
                [
                    name + suffix,
                    milliseconds(value(plain)),
                    times(value(full, "ratio")),
                    times(value(frozen, "ratio")),
                    milliseconds(total),
                    milliseconds(whole),
                    size(peak),
                ]
            )
    head = [
        "model, r = 16",
        "plain step 8 x 512",
        "core/full",
        "core/full frozen",
        "solve + filter + export",
        "256 + 256 sequences, whole",
        "peak with weights",
    ]
    return {"models": table(head, body) if body else "Not measured yet.", "models_sources": sources(cited)}


def _fits(results: Results) -> dict[str, Any]:
    rows = []
    for name in LARGE:
        for rank in (8, 16, 32, 64):
            cells = [f"{estimates.most_samples(SHAPES[name], rank, gib):,}".replace(",", " ") for gib in (24, 40, 80)]
            rows.append(
                [f"{name}, r = {rank}", f"{estimates.coordinates(SHAPES[name], rank):,}".replace(",", " "), *cells]
            )
    return {"fits": table(["model", "n", "24 GB", "40 GB", "80 GB"], rows)}


def _needs(results: Results) -> dict[str, Any]:
    study = estimates.Study()
    plain = results.one(is_gpu, stage="pass", variant="plain", **HEADLINE)
    fisher = results.one(is_gpu, stage="pass", variant="core/full frozen", **HEADLINE) or plain
    shape = SHAPES["llama-2-7b"]
    store = study.models * study.tasks * study.seeds
    adapter = 2 * 4 * 16 * sum(p + q for p, q in shape.modules().values())
    rows = []
    if plain is not None:
        hours = study.hours(value(plain), value(fisher))
        rows = [[part, f"{three(h)} GPU hours"] for part, h in hours.items()]
        rows.append(["in total, on one GPU of this kind", f"{three(sum(hours.values()))} GPU hours"])
    else:
        rows.append(["GPU hours", "open: needs the measured step"])
    rows += [
        ["models in bfloat16", size(sum(estimates.weight_bytes(SHAPES[n]) for n in LARGE[:2]))],
        ["Fishers, 512 + 1 024 rows each run", size(store * estimates.row_bytes(shape, 16, 768))],
        ["merged adapters, rank 32 in float32", size(study.merges * adapter)],
        [
            "data",
            "refusals and harmful prompts (AdvBench 520, HarmBench 400), benign instructions (10 000), GSM8K (7 473 + 1 319)",
        ],
    ]
    note = (
        "Estimated. The hours take the measured step of Llama-2-7B for both models, and "
        f"{study.generated_per_second:.0f} generated tokens per second and GPU. " + sources([plain, fisher])
    )
    return {"needs": table(["what", "how much"], rows), "needs_note": note}


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


def _fastest_core_space(results: Results, where: Callable[[Row], bool], match: dict[str, str]) -> Row | None:
    rows = [r for r in results.all(where, stage="merge", **match) if r["variant"].startswith("Core Space") and r["ms"]]
    return min(rows, key=value, default=None)


def _mib(row: Row | None) -> float | None:
    above = value(row, "above_plain_mib")
    return None if above is None else max(0.0, above) * 2**20


def _over(above: Row | None, below: Row | None) -> float | None:
    return None if value(above) is None or value(below) is None else value(above) / value(below)


SECTIONS = (
    _targets,
    _structures,
    _passes,
    _solves,
    _merges,
    _kfac,
    _against_step,
    _peers,
    _importance,
    _models,
    _fits,
    _needs,
    _scaling,
    _ceilings,
)
