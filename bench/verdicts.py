"""What docs/report.md concludes: targets met or missed, whole models, what fits on a card, what a study needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench import estimates
from bench.results import Results, Row, is_gpu, milliseconds, percent, size, sources, table, three, times, value
from bench.shapes import LARGE, SHAPES

HEADLINE = {"model": "llama-2-7b", "rank": "16", "targets": "all-linear"}


def _targets(results: Results) -> dict[str, Any]:
    """Every target of the 7B shape on a GPU, measured or open, beside the same ratios of the scaled-down shape on a CPU."""
    large, cited = _figures(results, is_gpu, HEADLINE)
    small, also_cited = _figures(results, lambda row: not is_gpu(row), HEADLINE | {"model": "llama-small"})
    shape = SHAPES["llama-2-7b"]
    both = 1 + estimates.input_share(shape, estimates.INPUT_RANK)
    targets = {
        "fisher": ("Fisher pass (core/full) over plain forward + backward", 1.05, times),
        "fisher mib": ("core/full: memory above plain", 100 * 2**20, size),
        "diagonal": ("factor/diagonal over plain", 1.05, times),
        "diagonal mib": ("factor/diagonal: memory above plain", 200 * 2**20, size),
        "streamed": ("factor/kronecker_lowrank l=64 over plain", 1.08, times),
        "streamed mib": ("factor/kronecker_lowrank l=64: memory above plain", 2**30, size),
        "both": ("Fisher pass and input pass over plain forward + backward", 1.05, times),
        "solve": ("GEVP + filter + export, all 224 modules, core space", 1000.0, milliseconds),
        "solves": ("the same and the solve of the input filter", 1000.0, milliseconds),
        "core space": ("Core Space merging + the same export, over ours (at least)", 0.5, times),
        "peft": ("PEFT dare_linear_svd over SST-Merge end to end (at least)", 5.0, times),
        "state": ("state of both Fishers, 256 + 256 rows, of dense K-FAC's (arithmetic)", 0.01, percent),
        "moments": (
            "moments of both input passes, freed before the Fishers, of dense K-FAC's (arithmetic)",
            0.01,
            percent,
        ),
    }
    large["state"] = estimates.row_bytes(shape, 16, 256) / shape.kfac_bytes()
    large["moments"] = 2 * estimates.input_bytes(shape, estimates.INPUT_RANK) / shape.kfac_bytes()
    if large["both"] is None:
        large["both"], targets["both"] = both, (targets["both"][0] + " (at least, by arithmetic)", 1.05, times)
    rows, misses = [], []
    for key, (name, bound, write) in targets.items():
        at_least = name.endswith("(at least)")
        name = name.removesuffix(" (at least)")
        cells = []
        for figures, ratios_only in ((small, True), (large, False)):
            got = figures.get(key)
            if ratios_only and write is not times:
                got = None
            met = got is not None and (got >= bound if at_least else got <= bound)
            cells.append(("–" if got is None else write(got), "open" if got is None else "met" if met else "missed"))
        (there, verdict_there), (here, verdict) = cells
        if verdict_there != "open":
            there += f", {verdict_there}"
        rows.append([name, there, here, f"{'≥' if at_least else '≤'} {write(bound)}", verdict])
        if "missed" in (verdict, verdict_there):
            where = "" if verdict == "missed" else " (on the CPU)"
            misses.append(f"- {name}{where}: {_PLANS[key.split(' ')[0]]}")
    head = ["all-linear, r = 16", "llama-small, CPU", "Llama-2-7B, GPU", "target", "verdict for 7B"]
    return {
        "targets": table(head, rows),
        "targets_sources": sources([*cited, *also_cited]),
        "misses": "\n".join(misses),
    }


def _figures(
    results: Results, where: Callable[[Row], bool], match: dict[str, str]
) -> tuple[dict[str, float | None], list[Row | None]]:
    """What the targets are about, of one model on one kind of machine, and the rows it comes from."""
    find = lambda stage, variant: results.one(where, stage=stage, variant=variant, **match)  # noqa: E731
    merged, dare = find("merge", "SST-Merge global: subspace + filter + export"), find("merge", "PEFT dare_linear_svd")
    whole, core = find("end to end", "SST-Merge global"), _fastest_core_space(results, where, match)
    export = find("export", "global, transform + concatenate + write")
    passes = {
        "fisher": find("pass", "core/full"),
        "diagonal": find("pass", "factor/diagonal"),
        "streamed": find("pass", "factor/kronecker_lowrank l=64"),
    }
    reading, filtering, step = _input_rows(results, where, match)
    ours, fisher = value(merged), value(passes["fisher"], "ratio")
    theirs = (value(core) or 0) + (value(export) or 0)
    figures = {name: value(row, "ratio") for name, row in passes.items()}
    figures |= {f"{name} mib": _mib(row) for name, row in passes.items()}
    figures |= {
        "both": fisher + value(reading) / value(step) if fisher and reading and step else None,
        "solve": ours,
        "solves": ours + value(filtering) if ours and filtering else None,
        "core space": theirs / ours if ours and core else None,
        "peft": _over(dare, whole),
    }
    return figures, [*passes.values(), merged, core, dare, whole, reading, filtering, step]


def _input_rows(
    results: Results, where: Callable[[Row], bool], match: dict[str, str]
) -> tuple[Row | None, Row | None, Row | None]:
    """The sketched input pass, the solve of its filter, and the training step measured beside it."""
    rows = [row for row in results.all(where, stage="inputs", **match) if row["ms"]]
    last = lambda start: next((row for row in reversed(rows) if row["variant"].startswith(start)), None)  # noqa: E731
    return last("sketch"), last("filter_inputs, sketch"), last("training step")


_PLANS = {
    "fisher": "the added time stands against its own floor in section (b); the hooks' launches are the rest",
    "diagonal": "the moments are summed per module; one launch per shape, as core_outer has, removes the launches",
    "streamed": "modules of one input share its sketch already; the L2 hit rate of `ncu` says whether X is read once",
    "both": "a forward pass is about half of a training step, so no kernel meets this; `input_filter: 0` leaves the input pass out, and "
    "`--limit` reads fewer rows; inputs of a quarter of the prompts cost 1.4 times the benign KL at equal NLL, and nothing at equal refusal rate (quality.md)",
    "solve": "the stage table of section (b) says where the time goes",
    "solves": "nearly all of it is products of d·ℓ² and Cholesky factors of order ℓ and 2ℓ, input after input; inputs of one width could be stacked",
    "moments": "the target would allow ℓ = 117; on a 135M model ℓ = 128 cost 1.5 times the benign KL ([fisher.md](fisher.md#what-a-patch-reads)). It is a "
    "peak before the Fishers, and fits beside the weights (section (d))",
    "core": "a fold has a metric, hence a QR, of its own; metric='frobenius' shares one among all folds, folds=2 halves them",
    "peft": "nearly all of it is passes over data, which grow with the square of the width; SVDs grow with the cube, so the width of the "
    "model decides",
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
            match = {"model": name, "rank": "16", "targets": "all-linear"}
            reading, filtering, _ = _input_rows(results, is_gpu, match)
            reads = estimates.INPUT_BATCHES * value(reading) + value(filtering) if reading and filtering else None
            whole = (
                None
                if step is None or total is None or reads is None
                else reads + estimates.FISHER_BATCHES * step + total
            )
            cited += [plain, full, frozen, solve, reading, filtering]
            peak = value(full, "peak_mib") or value(frozen, "peak_mib")
            peak = None if peak is None else peak * 2**20 + estimates.weight_bytes(SHAPES[name])
            body.append(
                [
                    name + suffix,
                    milliseconds(value(plain)),
                    times(value(full, "ratio")),
                    times(value(frozen, "ratio")),
                    milliseconds(reads),
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
        "input passes + their filter",
        "solve + filter + export",
        "256 + 256 sequences, whole",
        "peak with weights",
    ]
    return {
        "models": table(head, body) if body else "Not measured yet.",
        "models_sources": sources(cited) if body else "",
        "models_arithmetic": _arithmetic(),
        "rate": f"{estimates.RATE / 1e12:.0f} TFLOP/s",
    }


def _arithmetic() -> str:
    """The passes of a merge of 256 + 256 sequences at an assumed rate."""
    body = []
    for name in LARGE:
        shape = SHAPES[name]
        step = estimates.step_ms(shape)
        reading, fishers = estimates.INPUT_BATCHES * estimates.input_ms(shape), estimates.FISHER_BATCHES * step
        peak = estimates.weight_bytes(shape) + max(
            estimates.input_peak(shape, estimates.INPUT_RANK),
            estimates.row_bytes(shape, 16, 256)
            + max(estimates.activation_bytes(shape, 8, 512), estimates.solve_bytes(shape, 16, 256)),
        )
        spent = (step, reading, fishers, reading + fishers)
        body.append([name, *map(milliseconds, spent), size(peak)])
    head = ["model, r = 16", "training step 8 x 512", "input passes", "Fisher passes", "both", "peak with weights"]
    return table(head, body)


def _fits(results: Results) -> dict[str, Any]:
    rows = []
    for name in LARGE:
        for rank in (8, 16, 32, 64):
            cells = [f"{estimates.most_samples(SHAPES[name], rank, gib):,}".replace(",", " ") for gib in (24, 40, 80)]
            rows.append(
                [f"{name}, r = {rank}", f"{estimates.coordinates(SHAPES[name], rank):,}".replace(",", " "), *cells]
            )
    reads = []
    for name in LARGE:
        for columns in (estimates.INPUT_RANK, None):
            fits = ["yes" if estimates.fits_inputs(SHAPES[name], columns, gib) else "no" for gib in (24, 40, 80)]
            kept = "whole" if columns is None else f"sketch l={columns}"
            reads.append([f"{name}, {kept}", size(estimates.input_peak(SHAPES[name], columns)), *fits])
    return {
        "fits": table(["model", "n", "24 GB", "40 GB", "80 GB"], rows),
        "fits_inputs": table(["input pass", "beside the weights", "24 GB", "40 GB", "80 GB"], reads),
    }


def _needs(results: Results) -> dict[str, Any]:
    study = estimates.Study()
    plain = results.one(is_gpu, stage="pass", variant="plain", **HEADLINE)
    fisher = results.one(is_gpu, stage="pass", variant="core/full frozen", **HEADLINE) or plain
    reading, _, _ = _input_rows(results, is_gpu, HEADLINE)
    shape = SHAPES["llama-2-7b"]
    store = study.models * study.tasks * study.seeds
    adapter = 2 * 4 * 16 * sum(p + q for p, q in shape.modules().values())
    measured = plain is not None and reading is not None
    steps = [value(plain), value(fisher), value(reading)]
    if not measured:
        steps = [estimates.step_ms(shape), estimates.step_ms(shape), estimates.input_ms(shape)]
    hours = study.hours(*steps)
    rows = [[part, f"{three(h)} GPU hours"] for part, h in hours.items()]
    rows.append(["in total, on one GPU", f"{three(sum(hours.values()))} GPU hours"])
    rows += [
        ["models in bfloat16", size(sum(estimates.weight_bytes(SHAPES[n]) for n in LARGE[:2]))],
        ["Fishers, 512 + 1 024 rows each run", size(store * estimates.row_bytes(shape, 16, 768))],
        ["merged adapters, rank 32 in float32", size(study.merges * adapter)],
        [
            "data",
            "refusals and harmful prompts (AdvBench 520, HarmBench 400), benign instructions (10 000), GSM8K (7 473 + 1 319)",
        ],
    ]
    basis = (
        "the measured step" if measured else f"a step at {estimates.RATE / 1e12:.0f} TFLOP/s (assumed, not measured)"
    )
    note = (
        f"Estimated. The hours take {basis} of Llama-2-7B for both models, and "
        f"{study.generated_per_second:.0f} generated tokens per second and GPU (assumed)."
    )
    if measured:
        note += " " + sources([plain, fisher, reading])
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
