"""What docs/report.md concludes: targets met or missed, whole models, what fits on a card, what a study needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench import estimates
from bench.results import Results, Row, is_gpu, milliseconds, size, sources, table, three, times, value
from bench.shapes import LARGE, SHAPES

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
    "factor/kronecker_lowrank": "modules of one input share its sketch already; the L2 hit rate of `ncu` says whether X is read once",
    "GEVP": "the stage table of section (b) says where the time goes",
    "Core Space": "a fold has a metric, hence a QR, of its own; metric='frobenius' shares one among all folds, folds=2 halves them",
    "PEFT": "see the end-to-end table",
}


def _plan(name: str) -> str:
    return next(plan for start, plan in _PLANS.items() if name.startswith(start))


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


def _fastest_core_space(results: Results, where: Callable[[Row], bool], match: dict[str, str]) -> Row | None:
    rows = [r for r in results.all(where, stage="merge", **match) if r["variant"].startswith("Core Space") and r["ms"]]
    return min(rows, key=value, default=None)


def _mib(row: Row | None) -> float | None:
    above = value(row, "above_plain_mib")
    return None if above is None else max(0.0, above) * 2**20


def _over(above: Row | None, below: Row | None) -> float | None:
    return None if value(above) is None or value(below) is None else value(above) / value(below)


VERDICTS = (_targets, _models, _fits, _needs)
