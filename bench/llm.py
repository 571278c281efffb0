"""SST-Merge at the true shapes of large models: `python -m bench.llm --help`.

Stages in order of importance; each row goes to the CSV as soon as it is measured, so that a run under `timeout` leaves what it has.
A stage that fails leaves a row `failed`, and the next one runs.
"""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import Recorder, free, measure_ceilings

import torch  # isort: skip
from bench import evidence, gates, merging, passes
from bench.shapes import SHAPES

STAGES = ("passes", "evidence", "merge", "peers")
# Model, batch, length, rows of each Fisher.
SCALES = {
    "tiny": ("llama-tiny", 4, 64, 32),
    "small": ("llama-small", 4, 128, 64),
    "full": ("llama-2-7b", 8, 512, 256),
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
    others = merging.Merges(shape, record, **where)

    def read() -> tuple[float, float]:
        record("gate", "evidence against one backward per sample", error=gates.evidence_gate(device))
        sides = {"harm": at.tokens(), "benign": at.tokens(1)}
        found = evidence.readings(at.model(), sides, record, device, options.repeats, rank=at.rank, targets=at.targets)
        free(device)
        solved = evidence.layers_filter(at, record, options.samples)
        return found["evidence, harm, opening and rest"] + found["evidence, benign, 2 draws"], solved

    def merge() -> None:
        for scope in ("global", "module"):
            total = merging.sst_stages(
                shape, record, ceilings64, samples=options.samples, scope=scope, repeats=options.repeats, **where
            )
            if "evidence" in spent:
                record_whole(
                    record, scope, -(-options.samples // options.batch), *spent["evidence"], total, **at.columns
                )
        others.factored()
        others.peft("dare_linear", "dare_linear_svd")

    def peers() -> None:
        others.dense()
        others.kfac()
        others.peft("svd", "ties_svd")

    stages: dict[str, Callable[[], Any]] = {
        "passes": lambda: passes.fisher_passes(at, record, ceilings), "evidence": read,
        "merge": merge, "peers": peers,
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
    record: Recorder, scope: str, batches: int, pair_ms: float, filter_ms: float, merge_ms: float, **columns: Any
) -> None:
    """The end-to-end row out of measured parts: a batch of refusals and one of benign answers read, the filter, what follows."""
    note = f"{batches} x {pair_ms:.0f} ms reading + filter(mu) {filter_ms:.0f} ms + solve, filter, export {merge_ms:.0f} ms"
    total = batches * pair_ms + filter_ms + merge_ms
    record("end to end", f"SST-Merge {scope}", ms=total, note=note, basis="sum of measured", **columns)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default=None, help="full on a GPU, tiny on a CPU unless given")
    parser.add_argument("--model", choices=SHAPES, default=None)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=("all-linear", "attention"), default="all-linear")
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--length", type=int, default=None)
    parser.add_argument("--samples", type=int, default=None, help="rows of each Fisher")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in the Fisher passes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench-output")) / "llm.csv")
    options = parser.parse_args(arguments)
    options.scale = options.scale or ("full" if options.device.startswith("cuda") else "tiny")
    for name, value in zip(("model", "batch", "length", "samples"), SCALES[options.scale]):
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
