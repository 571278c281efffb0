"""What all measurements share: one clock, one table format, one description of the machine, two ceilings.

A row stands for one measured (or, where `basis` says so, derived) number. Rows are written as they come, so that a run that is cut
off leaves what it has measured.
"""

from __future__ import annotations

import csv
import datetime
import functools
import gc
import hashlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [entry for entry in (str(ROOT), str(ROOT / "python")) if entry not in sys.path]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

COLUMNS = (
    "stage", "model", "targets", "rank", "batch", "length", "variant", "basis",
    "ms", "iqr_ms", "runs", "plain_ms", "ratio", "peak_mib", "above_plain_mib", "state_bytes", "bytes", "flops", "floor_ms",
    "launches", "syncs", "error", "note", "device", "driver", "versions", "commit", "date",
)  # fmt: skip
Turn = tuple[Callable[[], Any], Callable[[], AbstractContextManager]]
PACKAGES = ("torch", "triton", "transformers", "peft", "scipy")


@functools.cache
def commit() -> str:
    """$SST_COMMIT, else git's HEAD (with + when library or bench differ from it), else a digest of the sources."""
    if given := os.environ.get("SST_COMMIT"):
        return given
    try:
        git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
        head = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        changed = git(
            ["git", "status", "--porcelain", "--untracked-files=no", "sst_kernels", "csrc", "bench/*.py"]
        ).stdout
        return head + ("+" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        digest = hashlib.sha256()
        for path in sorted([*ROOT.glob("sst_kernels/**/*.py"), *ROOT.glob("csrc/**/*.*")]):
            digest.update(path.read_bytes())
        return f"tree-{digest.hexdigest()[:10]}"


@functools.cache
def machine(device: str) -> dict[str, str]:
    """Device, driver, versions, commit and date, as every row carries them."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    if device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()
        name, driver = torch.cuda.get_device_name(device), driver[0] if driver else "unknown"
    else:
        name, driver = _cpu_name(), ""
    return {
        "device": name,
        "driver": driver,
        "versions": " ".join([f"python {platform.python_version()}", *(f"{k} {v}" for k, v in versions.items())]),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


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
        if measured is not None:
            row |= measured.columns()
        row |= values
        unknown = row.keys() - set(COLUMNS)
        if unknown:
            raise ValueError(f"columns {sorted(unknown)} are not in the table: {COLUMNS}")
        row = {key: _text(row.get(key)) for key in COLUMNS}
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        self.rows.append(row)
        shown = (
            f"{k}={row[k]}" for k in ("ms", "ratio", "floor_ms", "peak_mib", "launches", "syncs", "note") if row[k]
        )
        print(f"{row['model']:14} {stage:10} {variant:44} {'  '.join(shown)}", flush=True)
        return row


@dataclass(frozen=True)
class Measured:
    """Times in ms, and the most memory in MiB held above what was held before."""

    times: list[float]
    peak_mib: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    def columns(self) -> dict[str, Any]:
        quarters = statistics.quantiles(self.times, n=4, method="inclusive") if len(self.times) > 1 else [0, 0, 0]
        return {
            "ms": self.median,
            "iqr_ms": quarters[2] - quarters[0],
            "runs": len(self.times),
            "peak_mib": self.peak_mib,
        }


def measure(
    run: Callable[[], Any], device: str, *, repeats: int = 5, warmup: int = 1, seconds: float | None = None
) -> Measured:
    """Time `run` on the device: events on a GPU, `cpu_clock` on a CPU; stop early once `seconds` are spent (after one run)."""
    for _ in range(warmup):
        run()
    clock = stopwatch(device)
    times: list[float] = []
    start = time.monotonic()
    with peak_memory(device) as peak:
        for _ in range(repeats):
            times.append(clock(run))
            if seconds is not None and time.monotonic() - start > seconds:
                break
    return Measured(times, peak.mib)


def in_turn(turns: dict[str, Turn], device: str, repeats: int) -> dict[str, Measured]:
    """Each call timed inside its own context, all of them once a round, after one round that is not timed: drift hits all alike."""
    clock, times = stopwatch(device), {name: [] for name in turns}
    for number in range(repeats + 1):
        for name, (run, context) in turns.items():
            with context():
                spent = clock(run)
            if number:
                times[name].append(spent)
    return {name: Measured(found) for name, found in times.items()}


def stopwatch(device: str) -> Callable[[Callable[[], Any]], float]:
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
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield peak
    torch.cuda.synchronize()
    peak.mib = (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_mib(run: Callable[[], Any], device: str = "cpu") -> float | None:
    """Most MiB held above the start while `run` runs; on a CPU by the allocator's own events."""
    if device.startswith("cuda"):
        with peak_memory(device) as peak:
            run()
        return peak.mib
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def _events(run: Callable[[], Any]) -> float:
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


def _on_cpu(run: Callable[[], Any]) -> float:
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
    ceilings = Ceilings(_copy_rate(device, record), _matmul_rate(device, dtype, record))
    free(device)
    return ceilings


def _copy_rate(device: str, record: Recorder | None) -> float:
    elements = 2**30 if device.startswith("cuda") else 2**24
    source = torch.randn(elements, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, repeats=10, warmup=3)
    rate = 8 * elements / (copy.median / 1e3)
    if record is not None:
        record("ceiling", "copy", copy, bytes=8 * elements, note=f"{rate / 1e9:.4g} GB/s read + written")
    return rate


def _matmul_rate(device: str, dtype: torch.dtype, record: Recorder | None) -> float:
    n = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = measure(lambda: a @ b, device, repeats=10, warmup=3)
    rate = 2 * n**3 / (product.median / 1e3)
    if record is not None:
        name = f"matmul {n} {str(dtype).removeprefix('torch.')}"
        record("ceiling", name, product, flops=2.0 * n**3, note=f"{rate / 1e9:.4g} GFLOP/s")
    return rate


def count_calls(run: Callable[[], Any], device: str) -> tuple[int, int]:
    """(kernel launches, host synchronisations) of one call of `run`. On a CPU: (outermost torch operations, 0)."""
    if not device.startswith("cuda"):
        return sum(event.cpu_parent is None for event in _profiled(run, on_gpu=False)), 0
    names = [event.name for event in _profiled(run, on_gpu=True)]
    waits = sum(name in _WAITS for name in names) - _own_waits()
    return sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names), max(0, waits)


_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@functools.cache
def _own_waits() -> int:
    """Synchronisations that profiling itself brings."""
    return sum(event.name in _WAITS for event in _profiled(lambda: None, on_gpu=True))


def _profiled(run: Callable[[], Any], *, on_gpu: bool) -> Any:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    return profiler.events()


def free(device: str) -> None:
    """Give memory back between stages."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def spectral_rows(count: int, width: int, device: str, *, seed: int = 0, decay: float = 0.02) -> Tensor:
    """Random rows [count, width] float32 whose Gram spectrum decays like that of measured Fishers: e^(-decay·i)."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randn(count, width, device=device, generator=generator)
    return rows * torch.exp(-decay / 2 * torch.arange(count, device=device))[:, None]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cpu_name() -> str:
    threads = torch.get_num_threads()
    return f"{_processor()}, {'1 thread, CPU time' if threads == 1 else f'{threads} threads, wall clock'}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
