"""Each op against its physical floor, against the torch form of it, and against torch.compile of that form.

    python -m bench.ops [--quick] [--sweep] [--ops gram sketch] [--out FILE]

The floor is the larger of bytes over measured copy bandwidth and flops over measured GEMM rate; both are measured first, on
this device. Values are checked against float64 before anything is timed, and a wrong form is not timed. The forms of a case
take turns; `ratio` is a form's time over the torch form's. On CUDA (bfloat16) each call meets a cold L2 cache and is queued
behind a sleep that outlasts its launching, which is checked; what launching costs the caller is in the note. On a CPU (float32) the sizes
are small.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.common import ROOT, Measured, Recorder, free, in_turn, measure_ceilings, peak_mib, stopwatch

import torch  # isort: skip
from bench.op_cases import CASES, Case, Draw, Size
from sst_kernels.testing import error_ratio

ALLOWED = 1e-5
Run = Callable[[], object]


class Clock:
    """Milliseconds of single calls on a device; on a GPU with cold caches, and all of a call queued before the device comes to it."""

    def __init__(self, device: str, rounds: int):
        self.device, self.rounds = device, rounds
        self.once = self._queued if device == "cuda" else stopwatch(device)
        self.cycles = 20_000_000  # of sleep ahead of a call: some 10 ms
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if device == "cuda" else None

    def in_turn(self, runs: dict[str, Run]) -> dict[str, Measured]:
        """`rounds` times of each, one after the other in every round, after one call of each."""
        return in_turn(runs, self.device, self.rounds, clock=self.once)

    def _queued(self, run: Run) -> float:
        """Time between events around `run`. Where the device reached the first before the host had queued the last, the host may be in
        it: then it counts for nothing, and the device sleeps longer. RuntimeError for a call that itself waits for the device."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while self.cycles < 1 << 32:
            torch.cuda._sleep(self.cycles)
            self.flush.zero_()
            begin.record()
            run()
            end.record()
            early = begin.query()
            end.synchronize()
            if not early:
                return begin.elapsed_time(end)
            self.cycles *= 2
        raise RuntimeError(
            "the call waits for the device, so that its time on the device cannot be told from the host's"
        )

    def host(self, run: Run) -> str:
        """What a call costs the caller, the device not waited for."""
        if self.flush is None:
            return ""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            run()
        spent = (time.perf_counter() - begin) / 20
        torch.cuda.synchronize()
        return f"host {1e6 * spent:.0f} us a call"


def error_of(case: Case, call: Callable[..., object], expected: list[torch.Tensor]) -> float:
    """Worst error ratio of one call against float64; the lower triangle of a Gram matrix, which is all that `gram` writes."""
    state = [s.clone() for s in case.state]
    call(*case.inputs, *state)
    part = torch.tril if case.op.startswith("gram") else torch.clone
    return max(error_ratio(part(a), part(e)) for a, e in zip(state, expected))


def measure_case(case: Case, forms: dict[str, Callable[..., object]], clock: Clock, record: Recorder, ceilings) -> None:
    """Check every form, time those that are right, write a row for each."""
    expected = [s.double() for s in case.state]
    case.plain(*(x.double() for x in case.inputs), *expected)
    work = {"bytes": case.bytes, "flops": case.flops, "floor_ms": ceilings.floor_ms(case.bytes, case.flops)}
    errors: dict[str, float] = {}
    for form, call in forms.items():
        try:
            error = error_of(case, call, expected)
        except Exception as problem:  # a configuration that does not fit must not cost the others
            record(case.op, form, **work, basis="failed", note=f"{type(problem).__name__}: {str(problem)[:80]}")
            continue
        if error <= ALLOWED:
            errors[form] = error
        else:
            record(case.op, form, **work, error=error, basis="failed", note="wrong: not timed")
    state = [s.clone() for s in case.state]
    runs = {form: (lambda call=forms[form]: call(*case.inputs, *state)) for form in errors}
    taken = clock.in_turn(runs)
    plain = taken.get("torch")
    for form, run in runs.items():
        beside = {"plain_ms": plain.median, "ratio": taken[form].median / plain.median} if plain else {}
        beside["peak_mib"] = peak_mib(run, clock.device)
        record(case.op, form, taken[form], **work | beside, error=errors[form], note=clock.host(run))


def sizes(op: str, device: str, modules: int, few: bool) -> Iterator[Size]:
    """core_outer has no d, gram no r, and eigen_moments no d beyond 5120, where its basis alone is 484 MB."""
    if device == "cpu":
        points = itertools.product((1, 8), (64, 256), (16, 64), (512,))
        points = [(8, 64, 16, 256)] if few else points
    elif few:
        wide = [(1, 2048, 64, 4096)] if op in ("core_outer", "sketch", "factor_moments") else []
        points = [(8, 512, 16, 4096), *wide, *([(8, 512, 512, 4096)] if op == "sketch" else [])]
    else:
        ranks = (16, 64, 512) if op == "sketch" else (8, 16, 64)
        points = itertools.product((1, 8), (512, 2048), ranks, (4096, 5120, 11008))
    seen = set()
    for B, T, r, d in points:
        key = (B, T, r) if op == "core_outer" else (B, T, d) if op == "gram" else (B, T, r, d)
        if key not in seen and not (op == "eigen_moments" and d > 5120):
            seen.add(key)
            yield Size(B, T, r, d, modules)


def main(arguments: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one or two sizes per op: at most two minutes on an H100")
    parser.add_argument("--sweep", action="store_true", help="time a handful of kernel configurations per op instead")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--ops", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--out", type=Path, help="default: bench/results/ops[_sweep]_<device>.csv; rows are appended")
    parser.add_argument("--modules", type=int, help="modules of one core_outer call (224 on a GPU: 7B, all linear)")
    options = parser.parse_args(arguments)
    few = options.quick or options.sweep
    out = options.out or ROOT / "bench/results" / f"ops{'_sweep' if options.sweep else ''}_{device}.csv"
    modules = options.modules or (224 if device == "cuda" else 28)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ceilings = measure_ceilings(device, dtype, Recorder(out, device))
    clock = Clock(device, 15)
    compiled: set[str] = set()
    for op in options.ops:
        for size in sizes(op, device, modules, few):
            for case in CASES[op](Draw(size, device, dtype)):
                record = Recorder(out, device, model=case.width, rank=size.r, batch=size.B, length=size.T)
                forms: dict[str, Callable[..., object]] = {"sst": case.call}
                if options.sweep:
                    for config in case.candidates:
                        label = " ".join(f"{k}={v}" for k, v in config.items())
                        forms[label] = lambda *a, c=config, f=case.tuned: f(*a, **c)
                else:
                    forms["torch"] = case.plain
                    # Unrolled over the modules of a model, core_outer compiles for minutes; a quick run compiles each op once.
                    if options.compile and op != "core_outer" and not (options.quick and case.op in compiled):
                        compiled.add(case.op)
                        torch._dynamo.reset()
                        forms["torch.compile"] = torch.compile(case.plain)
                measure_case(case, forms, clock, record, ceilings)
            free(device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
