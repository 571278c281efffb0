"""SST-Merge at the true shapes of large models: `python -m bench.llm --help`.

Stages in order of importance; each row goes to the CSV as soon as it is measured, so that a run under `timeout` leaves what it has.
A stage that fails leaves a row `failed`, and the next one runs.
"""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common import Recorder, free, measure_ceilings

import torch  # isort: skip
from bench import gates, merging, passes
from bench.shapes import INPUT_RANK, SHAPES

STAGES = ("passes", "inputs", "merge", "peers")
# Model, batch, length, rows of each Fisher, columns of the sketch of inputs: the last shrinks with the width, as all else does.
SCALES = {
    "tiny": ("llama-tiny", 4, 64, 32, 32),
    "small": ("llama-small", 4, 128, 64, 64),
    "full": ("llama-2-7b", 8, 512, 256, INPUT_RANK),
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device, record = options.device, Recorder(options.out, options.device, model=options.model)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    shape, where = SHAPES[options.model], {"rank": options.rank, "targets": options.targets, "device": device}
    record("gate", "Fisher passes against one backward per sample", error=gates.fisher_gate(device))
    ceilings, ceilings64 = (measure_ceilings(device, kind, record) for kind in (dtype, torch.float64))
    free(device)
    at = passes.Setting(
        shape, batch=options.batch, length=options.length, dtype=dtype, repeats=options.repeats,
        checkpointing=options.checkpointing, **where,
    )  # fmt: skip
    spent: dict[str, Any] = {}

    def read_inputs() -> tuple[float, float]:
        read = passes.input_passes(at, record, ceilings, options.input_rank)
        free(device)
        solved = passes.input_filters(at, record, options.input_rank)
        if options.scale == "small":  # the solve of one layer of the true width fits any machine
            large = replace(at, shape=SHAPES["llama-2-7b"], repeats=1)
            passes.input_filters(large, Recorder(options.out, device, model=large.shape.name), INPUT_RANK)
        name = passes.name_of(options.input_rank)
        return read[name], solved[name]

    def merge() -> None:
        for scope in ("global", "module"):
            total = merging.sst_stages(
                shape, record, ceilings64, samples=options.samples, scope=scope, repeats=options.repeats, **where
            )
            names = ("core/full frozen", "core/full frozen, sampled labels at S=0")
            if all(name in spent.get("passes", ()) for name in names):
                batches = -(-options.samples // options.batch)
                both = batches * sum(spent["passes"][name] for name in names)
                record_whole(record, scope, batches, both, total, spent.get("inputs"), **at.columns)
        merging.factored_merges(shape, record, **where)
        merging.peft_merges(shape, record, methods=("dare_linear", "dare_linear_svd"), **where)

    def peers() -> None:
        merging.dense_merges(shape, record, **where)
        merging.kfac_pencils(shape, record, **where)
        merging.peft_merges(shape, record, methods=("svd", "ties_svd"), **where)

    stages: dict[str, Callable[[], Any]] = {
        "passes": lambda: passes.fisher_passes(at, record, ceilings), "inputs": read_inputs, "merge": merge, "peers": peers,
    }  # fmt: skip
    failures = 0
    for name in options.stages:
        try:
            spent[name] = stages[name]()
        except Exception as problem:
            traceback.print_exc()
            record("error", name, basis="failed", note=f"{type(problem).__name__}: {str(problem)[:200]}")
            failures += 1
        free(device)
    print(f"{len(record.rows)} rows in {options.out}, {failures} failure(s)", flush=True)
    return 1 if failures else 0


def record_whole(
    record: Recorder, scope: str, batches: int, fisher_ms: float, merge_ms: float,
    input_ms: tuple[float, float] | None, **columns: Any,
) -> None:  # fmt: skip
    """End-to-end rows out of measured parts: without the input filter, and with it where it was measured."""
    whole = f"2 x {batches} Fisher batches {fisher_ms:.0f} ms + solve, filter, export {merge_ms:.0f} ms"
    columns |= {"basis": "sum of measured"}
    record("end to end", f"SST-Merge {scope}, input_filter 0", ms=fisher_ms + merge_ms, note=whole, **columns)
    if input_ms is not None:
        batch_ms, solve_ms = input_ms
        reading = 2 * batches * batch_ms
        note = f"2 x {batches} input batches {reading:.0f} ms + their filter {solve_ms:.0f} ms + {whole}"
        total = reading + solve_ms + fisher_ms + merge_ms
        record("end to end", f"SST-Merge {scope}", ms=total, note=note, **columns)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default=None, help="full on a GPU, tiny on a CPU unless given")
    parser.add_argument("--model", choices=SHAPES, default=None)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=("all-linear", "attention"), default="all-linear")
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--length", type=int, default=None)
    parser.add_argument("--samples", type=int, default=None, help="rows of each Fisher")
    parser.add_argument("--input-rank", type=int, default=None, help="columns of the sketch of inputs")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in the Fisher passes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench-output")) / "llm.csv")
    options = parser.parse_args(arguments)
    options.scale = options.scale or ("full" if options.device.startswith("cuda") else "tiny")
    for name, value in zip(("model", "batch", "length", "samples", "input_rank"), SCALES[options.scale]):
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
