"""SST-Merge at the true shapes of large models: `python bench/llm.py --help`.

Stages in order of importance; each row goes to the CSV as soon as it is measured, and `--minutes` is a budget: what does not fit is
left out or extrapolated, and its row says which.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

if __package__ in (
    None,
    "",
):  # run as a script: import siblings as bench.*, and keep bench/profile.py off the top level
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.common import Ceilings, Recorder, free, measure_ceilings

import torch  # isort: skip
from bench import estimates, gates, importance, inputs, merging, passes
from bench.shapes import SHAPES, Shape

T = TypeVar("T")
STAGES = ("passes", "inputs", "merge", "svd", "checkpointing", "importance", "peers", "ranks", "attention", "models")
# Model, batch, length, rows of each Fisher, columns of the sketch of inputs: the last shrinks with the width, as all else does.
SCALES = {
    "tiny": ("llama-tiny", 4, 64, 32, 32),
    "small": ("llama-small", 4, 128, 64, 64),
    "full": ("llama-2-7b", 8, 512, 256, estimates.INPUT_RANK),
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device, record = options.device, Recorder(options.out, options.device, model=options.model)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    left = deadline(options.minutes)
    error = gates.fisher_gate(device)
    record("gate", "Fisher passes against one backward per sample", error=error)
    ceilings = measure_ceilings(device, dtype, record)
    ceilings64 = measure_ceilings(device, torch.float64, record)
    free(device)
    run = Run(options, record, ceilings, ceilings64, dtype, left)
    for stage in options.stages:
        if left() < 5:
            print(f"time budget spent before stage {stage}", flush=True)
            break
        run.attempt(stage, getattr(run, stage))
        free(device)
    print(f"{len(record.rows)} rows in {options.out}, {run.failures} failure(s)", flush=True)
    return 1 if run.failures else 0


class Run:
    """One method per stage, sharing what they measured."""

    def __init__(
        self,
        options: argparse.Namespace,
        record: Recorder,
        ceilings: Ceilings,
        ceilings64: Ceilings,
        dtype: torch.dtype,
        left: Callable[[], float],
    ):
        self.options, self.record, self.ceilings, self.ceilings64 = options, record, ceilings, ceilings64
        self.dtype, self.left = dtype, left
        self.shape, self.rank, self.targets = SHAPES[options.model], options.rank, options.targets
        self.pass_ms: dict[str, float] = {}
        self.input_ms: tuple[float, float] | None = None
        self.failures = 0

    def attempt(self, name: str, part: Callable[[], T]) -> T | None:
        """A part that fails leaves a row that says so, and must not cost the rows of the next."""
        try:
            return part()
        except Exception as problem:
            traceback.print_exc()
            self.record("error", name, basis="failed", note=f"{type(problem).__name__}: {str(problem)[:200]}")
            self.failures += 1
            return None

    def passes(self) -> None:
        self.pass_ms = self._passes()

    def inputs(self) -> None:
        self.input_ms = self._inputs(self.shape, self.record, self.options.repeats)
        if self.options.scale == "small":  # the solve of one layer of the true width fits any machine
            name, device = SCALES["full"][0], self.options.device
            inputs.input_filters(
                SHAPES[name], Recorder(self.options.out, device, model=name), rank=self.rank, targets=self.targets,
                columns=estimates.INPUT_RANK, device=device, dtype=self.dtype, repeats=1,
            )  # fmt: skip

    def merge(self) -> None:
        """SST-Merge's own stages and its efficient peer, then end to end where the passes were measured."""
        where = {"rank": self.rank, "targets": self.targets, "device": self.options.device}
        totals = {}
        for scope in ("global", "module"):
            totals |= self.attempt(f"SST-Merge {scope}", lambda scope=scope: self._merge(scopes=(scope,))) or {}
        self.attempt("factored merges", lambda: merging.factored_merges(self.shape, self.record, **where))
        self.attempt("PEFT dare_linear", lambda: merging.peft_dare_linear(self.shape, self.record, **where))
        names = ("core/full frozen", "core/full frozen, sampled labels at S=0")
        if all(name in self.pass_ms for name in names):
            batches = -(-self.options.samples // self.options.batch)
            both = batches * sum(self.pass_ms[name] for name in names)
            for scope, total in totals.items():
                record_whole(
                    self.record, scope, batches, both, total, self.input_ms, rank=self.rank, targets=self.targets,
                    batch=self.options.batch, length=self.options.length,
                )  # fmt: skip

    def svd(self) -> None:
        merging.peft_merges(
            self.shape, self.record, rank=self.rank, targets=self.targets, device=self.options.device,
            methods=("dare_linear_svd",), time_left=self._share(0.4),
        )  # fmt: skip

    def checkpointing(self) -> None:
        wanted = ("core/full", "core/full frozen", "factor/diagonal", "factor/kronecker_lowrank l=64")
        self._passes(checkpointing=True, variants=tuple(v for v in passes.VARIANTS if v.name in wanted))

    def peers(self) -> None:
        where = {"rank": self.rank, "targets": self.targets, "device": self.options.device}
        parts = {
            "dense merges": lambda: merging.dense_merges(self.shape, self.record, time_left=self._share(0.3), **where),
            "K-FAC pencils": lambda: merging.kfac_gevp(self.shape, self.record, time_left=self._share(0.3), **where),
            "PEFT svd": lambda: merging.peft_merges(
                self.shape, self.record, methods=("svd", "ties_svd"), time_left=self._share(0.4), **where
            ),
        }
        for name, part in parts.items():
            self.attempt(name, part)

    def importance(self) -> None:
        importance.importance_passes(
            self.shape, self.record, rank=self.rank, batch=self.options.batch, length=self.options.length, layers=8,
            device=self.options.device, dtype=self.dtype, repeats=self.options.repeats,
        )  # fmt: skip

    def ranks(self) -> None:
        for rank in (64, 8, 32):
            if self.left() > 5:
                self._passes(rank=rank, variants=passes.VARIANTS[:1])
                self._merge(rank=rank, scopes=("global",), repeats=3)

    def attention(self) -> None:
        self._passes(targets="attention", variants=passes.VARIANTS[:1])

    def models(self) -> None:
        if self.options.scale != "full":
            return
        for name in SHAPES:
            if name == self.options.model or name.startswith(("llama-tiny", "llama-small")) or self.left() < 20:
                continue
            shape, record = SHAPES[name], Recorder(self.options.out, self.options.device, model=name)
            passes.fisher_passes(
                shape, record, self.ceilings, rank=self.rank, targets=self.targets, batch=self.options.batch,
                length=self.options.length, device=self.options.device, dtype=self.dtype,
                checkpointing=name == "llama-2-13b", variants=passes.VARIANTS[:4:2], repeats=3, time_left=self.left,
            )  # fmt: skip
            self._inputs(shape, record, repeats=2)
            merging.sst_stages(
                shape, record, self.ceilings64, rank=self.rank, targets=self.targets, samples=self.options.samples,
                device=self.options.device, scopes=("global",), repeats=3,
            )  # fmt: skip
            free(self.options.device)

    def _passes(self, **changes) -> dict[str, float]:
        settings = {"rank": self.rank, "targets": self.targets} | changes
        return passes.fisher_passes(
            self.shape, self.record, self.ceilings, batch=self.options.batch, length=self.options.length,
            device=self.options.device, dtype=self.dtype, repeats=self.options.repeats, time_left=self.left, **settings,
        )  # fmt: skip

    def _inputs(self, shape: Shape, record: Recorder, repeats: int) -> tuple[float, float]:
        """ms of one batch of the input pass and of the solve of its filter, sketched."""
        options = self.options
        where = {"rank": self.rank, "targets": self.targets, "columns": options.input_rank, "device": options.device}
        spent = inputs.input_passes(
            shape, record, self.ceilings, batch=options.batch, length=options.length, dtype=self.dtype, repeats=repeats,
            **where,
        )  # fmt: skip
        free(options.device)
        solved = inputs.input_filters(shape, record, dtype=self.dtype, repeats=repeats, **where)
        name = inputs.name_of(options.input_rank)
        return spent[name], solved[name]

    def _merge(self, **changes) -> dict[str, float]:
        settings = {"rank": self.rank, "targets": self.targets, "repeats": self.options.repeats} | changes
        return merging.sst_stages(
            self.shape,
            self.record,
            self.ceilings64,
            samples=self.options.samples,
            device=self.options.device,
            **settings,
        )

    def _share(self, fraction: float) -> Callable[[], float]:
        return deadline(self.left() * fraction / 60)


def record_whole(
    record: Recorder,
    scope: str,
    batches: int,
    fisher_ms: float,
    merge_ms: float,
    input_ms: tuple[float, float] | None,
    **columns: Any,
) -> None:
    """End-to-end rows out of measured parts: without the input filter, and with it where it was measured."""
    fishers = f"2 x {batches} Fisher batches {fisher_ms:.0f} ms"
    merged = f"solve, filter, export {merge_ms:.0f} ms"
    columns |= {"basis": "sum of measured"}
    record(
        "end to end", f"SST-Merge {scope}, input_filter 0", ms=fisher_ms + merge_ms, note=f"{fishers} + {merged}", **columns
    )  # fmt: skip
    if input_ms is not None:
        batch_ms, solve_ms = input_ms
        reading = 2 * batches * batch_ms
        record(
            "end to end", f"SST-Merge {scope}", ms=reading + solve_ms + fisher_ms + merge_ms, **columns,
            note=f"2 x {batches} input batches {reading:.0f} ms + their filter {solve_ms:.0f} ms + {fishers} + {merged}",
        )  # fmt: skip


def deadline(minutes: float) -> Callable[[], float]:
    """Seconds left of a budget that starts now."""
    end = time.monotonic() + 60 * minutes
    return lambda: end - time.monotonic()


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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=8.0)
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
