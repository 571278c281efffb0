"""The `cost` fixture: one benchmark, gated, warmed up, timed on the device's own clock, described by a full table row.

`pytest bench` runs every gate and every function once; `pytest bench --benchmark` (or `--benchmark-only`) times them, and writes
rows to $OUT/benchmark.csv where OUT is set.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.common import Ceilings, Recorder, cpu_clock, machine, measure_ceilings, peak_memory
from bench.shapes import SHAPES, Shape

import torch  # isort: skip

SECONDS, MOST_ROUNDS = 2.0, 500  # what a benchmark takes where it can be had in more than its least rounds
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_configure(config: pytest.Config) -> None:
    wanted = ("--benchmark", "--benchmark-only", "--benchmark-enable")
    if not any(config.getoption(name, default=False) for name in wanted):
        config.option.benchmark_disable = True


class EventClock:
    """Seconds on the GPU's own clock: each reading records an event and waits for it."""

    __name__ = "EventClock"  # pytest-benchmark prints its timer's name

    def __init__(self) -> None:
        self.last: torch.cuda.Event | None = None
        self.seconds = 0.0

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.last is not None:
            self.seconds += self.last.elapsed_time(event) / 1e3
        self.last = event
        return self.seconds


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def shape(device: str) -> Shape:
    """Four layers of Llama-2-7B on a GPU, two of the scaled-down shape on a CPU."""
    return SHAPES["llama-2-7b"].with_layers(4) if device == "cuda" else SHAPES["llama-tiny"].with_layers(2)


@pytest.fixture(scope="session")
def ceilings(device: str) -> dict[torch.dtype, Ceilings]:
    """Measured copy bandwidth and matrix rates."""
    dtypes = (torch.bfloat16, torch.float64) if device == "cuda" else (torch.float32, torch.float64)
    return {dtype: measure_ceilings(device, dtype) for dtype in dtypes}


@dataclass
class Cost:
    """Call it with what to time; see `__call__`."""

    benchmark: Any
    device: str
    ceilings: dict[torch.dtype, Ceilings]

    def __call__(
        self, stage: str, variant: str, run: Callable[[], Any], *, gate: Callable[[Any], float | None], bytes: float = 0.0,
        flops: float = 0.0, dtype: torch.dtype | None = None, rounds: int = 5, **columns: Any,
    ) -> Any:  # fmt: skip
        """Check what `run` returns with `gate` (which raises, or returns an error to report), time it, and return it.

        rounds: the least number of them. bytes, flops, dtype: the least work, for the floor.
        """
        with peak_memory(self.device) as peak:
            result = run()
        error = gate(result)
        clock = self.benchmark._timer = EventClock() if self.device == "cuda" else cpu_clock()
        if self.benchmark.enabled:  # warm by now: as many rounds as fit SECONDS
            begin = clock()
            run()
            rounds = max(rounds, min(MOST_ROUNDS, int(SECONDS / max(clock() - begin, 1e-9))))
        self.benchmark.pedantic(run, rounds=rounds, warmup_rounds=2)
        ceiling = self.ceilings[dtype or next(iter(self.ceilings))]
        floor = ceiling.floor_ms(bytes, flops) if bytes or flops else None
        columns |= {"bytes": bytes or None, "flops": flops or None, "floor_ms": floor}
        columns |= {"peak_mib": peak.mib, "error": error}
        about = {"stage": stage, "variant": variant, "basis": "measured"}
        self.benchmark.extra_info.update(machine(self.device), **about, **columns)
        if self.benchmark.enabled and (out := os.environ.get("OUT")):
            stats = self.benchmark.stats.stats
            columns |= {"ms": 1e3 * stats.median, "iqr_ms": 1e3 * stats.iqr, "runs": stats.rounds}
            Recorder(Path(out) / "benchmark.csv", self.device)(stage, variant, **columns)
        return result


@pytest.fixture
def cost(benchmark: Any, device: str, ceilings: dict[torch.dtype, Ceilings]) -> Cost:
    benchmark.group = benchmark.name.split("[")[0]
    return Cost(benchmark, device, ceilings)
