"""What all measurements share: one clock, one table format, one description of the machine, two ceilings.

A row stands for one measured (or, where `basis` says so, derived) number. Rows are written as they come, so that a run that is cut
off leaves what it has measured.
"""

from __future__ import annotations

import csv
import datetime
import gc
import hashlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [entry for entry in (str(ROOT), str(ROOT / "python")) if entry not in sys.path]

import torch  # noqa: E402

COLUMNS = (
    "stage", "model", "targets", "rank", "batch", "length", "variant", "basis",
    "ms", "iqr_ms", "runs", "plain_ms", "ratio", "peak_mib", "above_plain_mib", "state_bytes", "bytes", "flops", "floor_ms",
    "launches", "syncs", "error", "note", "device", "driver", "versions", "commit", "date",
)  # fmt: skip
Run = Callable[[], Any]
Turn = Run | tuple[Run, Callable[[], AbstractContextManager]]  # what is timed, and the context it is timed in
PACKAGES = ("torch", "triton", "transformers", "peft", "scipy")


@cache
def commit() -> str:
    """$SST_COMMIT, else git's HEAD (with + when library or bench differ from it), else a digest of the sources."""
    if given := os.environ.get("SST_COMMIT"):
        return given
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    with suppress(OSError, subprocess.CalledProcessError):
        head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        sources = ("sst_kernels", "csrc", "bench/*.py")
        changed = git(["git", "status", "--porcelain", "--untracked-files=no", *sources]).stdout.strip()
        return head + "+" * bool(changed)
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("sst_kernels/**/*.py"), *ROOT.glob("csrc/**/*.*")]):
        digest.update(path.read_bytes())
    return f"tree-{digest.hexdigest()[:10]}"


@cache
def machine(device: str) -> dict[str, str]:
    """Device, driver, versions, commit and date, as every row carries them."""
    versions = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    if device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
        name, driver = torch.cuda.get_device_name(device), found[0] if found else "unknown"
    else:
        threads, driver = torch.get_num_threads(), ""
        name = f"{_processor()}, {'1 thread, CPU time' if threads == 1 else f'{threads} threads, wall clock'}"
    about = {"device": name, "driver": driver, "versions": " ".join(versions)}
    return about | {"commit": commit(), "date": datetime.date.today().isoformat()}


class Recorder:
    """Appends rows to a CSV file with the columns above, flushed at once, and prints a line for each."""

    def __init__(self, path: Path, device: str, **fixed: Any):
        self.path, self.device, self.fixed = Path(path), device, fixed
        self.rows: list[dict[str, Any]] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")

    def __call__(self, stage: str, variant: str, measured: Measured | None = None, **values: Any) -> dict[str, Any]:
        row = {"basis": "measured", **self.fixed, **machine(self.device), "stage": stage, "variant": variant}
        row |= (measured.columns() if measured is not None else {}) | values
        if unknown := row.keys() - set(COLUMNS):
            raise ValueError(f"columns {sorted(unknown)} are not in the table: {COLUMNS}")
        row = {key: _text(row.get(key)) for key in COLUMNS}
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        self.rows.append(row)
        told = ("ms", "ratio", "floor_ms", "peak_mib", "above_plain_mib", "launches", "syncs", "note")
        print(f"{row['model']:14} {stage:10} {variant:44}", *(f" {k}={row[k]}" for k in told if row[k]), flush=True)
        return row


@dataclass(frozen=True)
class Measured:
    """Times in ms, and the most memory in MiB held above what was held before."""

    times: list[float]
    peak_mib: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def over(self, plain: Measured) -> float:
        """The median quotient with what was timed in turn."""
        return statistics.median(a / b for a, b in zip(self.times, plain.times, strict=True))

    def columns(self) -> dict[str, Any]:
        quarters = statistics.quantiles(self.times, n=4, method="inclusive") if len(self.times) > 1 else [0, 0, 0]
        spread = {"ms": self.median, "iqr_ms": quarters[2] - quarters[0]}
        return spread | {"runs": len(self.times), "peak_mib": self.peak_mib}


def in_turn(
    turns: Mapping[str, Turn], device: str, repeats: int, *, warmup: int = 1, seconds: float | None = None,
    clock: Callable[[Run], float] | None = None,
) -> dict[str, Measured]:  # fmt: skip
    """Every turn once a round inside its own context, so that drift hits all alike, in an order drawn anew, since who comes next finds
    the caches of who came before; the first `warmup` rounds do not count.

    clock: what times one call in ms, `stopwatch` by default. seconds: what the rounds may take; the last one is finished.
    """
    clock, found, order = clock or stopwatch(device), {name: ([], []) for name in turns}, list(turns.items())
    random = Random(0)
    begin = time.monotonic()
    for number in range(-warmup, repeats):
        begin = time.monotonic() if number == 0 else begin
        if number > -warmup:  # the first is the caller's
            random.shuffle(order)
        for name, turn in order:
            run, context = turn if isinstance(turn, tuple) else (turn, nullcontext)
            with context(), peak_memory(device) as peak:
                spent = clock(run)
            if number >= 0:
                found[name][0].append(spent)
                found[name][1].append(peak.mib)
        if number >= 0 and seconds is not None and time.monotonic() - begin > seconds:
            break
    return {
        name: Measured(times, max((p for p in peaks if p is not None), default=None))
        for name, (times, peaks) in found.items()
    }


def measure(run: Run, device: str, *, repeats: int = 5, warmup: int = 1, seconds: float | None = None) -> Measured:
    """`in_turn` of a single call."""
    return in_turn({"": run}, device, repeats, warmup=warmup, seconds=seconds)[""]


def stopwatch(device: str) -> Callable[[Run], float]:
    """What times one call in ms: device events on a GPU, `cpu_clock` on a CPU."""
    return _events if device.startswith("cuda") else _on_cpu


class Peak:
    mib: float | None = None


@contextmanager
def peak_memory(device: str):
    """Most memory allocated inside, in MiB above the start. CPU: not measured (the allocator does not tell)."""
    peak = Peak()
    if not device.startswith("cuda"):
        yield peak
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield peak
    torch.cuda.synchronize()
    peak.mib = (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_mib(run: Run, device: str = "cpu") -> float | None:
    """Most MiB held above the start while `run` runs; on a CPU by the allocator's own events."""
    if device.startswith("cuda"):
        with peak_memory(device) as peak:
            run()
        return peak.mib
    held = most = 0
    profiler = profile(run, "CPU", profile_memory=True).profiler
    for event in sorted(profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def _events(run: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def cpu_clock() -> Callable[[], float]:
    """Seconds on a CPU. One thread is timed by the CPU time of the process, which is what it would take on an idle machine: the wall
    clock of a shared one measures its neighbours. Several threads are timed by the wall clock."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _on_cpu(run: Run) -> float:
    clock = cpu_clock()
    begin = clock()
    run()
    return 1e3 * (clock() - begin)


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do at most, measured: bytes/s of a large copy (read plus written), flop/s of large products."""

    bandwidth: float
    matmul: float

    def floor_ms(self, bytes_moved: float = 0.0, flops: float = 0.0) -> float:
        """The larger of the two times that no implementation beats."""
        return 1e3 * max(bytes_moved / self.bandwidth, flops / self.matmul)


def measure_ceilings(device: str, dtype: torch.dtype, record: Recorder | None = None) -> Ceilings:
    """Copy bandwidth and matrix rate in `dtype`, on random data far larger than any cache."""
    elements, n = (2**30, 8192) if device.startswith("cuda") else (2**24, 1024)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    copy = measure(partial(target.copy_, source), device, repeats=10, warmup=3)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = measure(partial(torch.matmul, a, b), device, repeats=10, warmup=3)
    moved, flops = 8 * elements, 2.0 * n**3
    found = Ceilings(1e3 * moved / copy.median, 1e3 * flops / product.median)
    if record is not None:
        record("ceiling", "copy", copy, bytes=moved, note=f"{found.bandwidth / 1e9:.4g} GB/s read + written")
        name = f"matmul {n} {str(dtype).removeprefix('torch.')}"
        record("ceiling", name, product, flops=flops, note=f"{found.matmul / 1e9:.4g} GFLOP/s")
    return found


def count_calls(run: Run, device: str) -> tuple[int, int]:
    """(kernel launches, host synchronisations) of one call of `run`. On a CPU: (outermost torch operations, 0)."""
    if not device.startswith("cuda"):
        return sum(event.cpu_parent is None for event in profiled(run)), 0
    names = [event.name for event in profiled(run, on_gpu=True)]
    waits = sum(name in _WAITS for name in names) - _own_waits()
    return sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names), max(0, waits)


_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@cache
def _own_waits() -> int:
    """Synchronisations that profiling itself brings."""
    return sum(event.name in _WAITS for event in profiled(lambda: None, on_gpu=True))


def profiled(run: Run, *, on_gpu: bool = False) -> Any:
    """What torch's profiler saw of one call: the CUDA runtime's calls and kernels, or torch's operations."""
    return profile(run, "CUDA" if on_gpu else "CPU").events()


def profile(run: Run, *activities: str, **options: Any) -> Any:
    """torch's profiler after one call of `run`; all activities that there are unless some are named."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    wanted = [getattr(ProfilerActivity, name) for name in activities] or None
    with recorded(activities=wanted, **options) as profiler:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profiler


def free(device: str) -> None:
    """Give memory back between stages."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
