"""One stage in a capture range: `python -m bench.capture STAGE`.

Prints ready `nsys` and `ncu` command lines; run under them, only the stage itself is captured. Run plainly, it writes a Chrome trace
(chrome://tracing, ui.perfetto.dev) of torch.profiler instead. `python -m bench.capture table RAW.csv... --out FILE.csv` makes one row
per kernel of `ncu --csv --page raw` logs.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import count_calls, profile  # sets the import paths, so before the library

import torch  # isort: skip
import sst_kernels as sst
from bench import evidence, gates, ops, passes, workload
from bench.shapes import SHAPES, Shape

NCU_COLUMNS = {
    "gpu__time_duration.sum": "time_us",
    "dram__bytes.sum": "dram_mb",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "lts__t_sector_hit_rate.pct": "l2_hit_percent",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor_percent",  # the name depends on the chip: see on_gpu.sh
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}
SECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3}  # in µs
UNITS = SECONDS | {"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3}
Stage = Callable[[Shape, str, bool], Callable[[], Any]]


def stage_ops(shape: Shape, device: str, small: bool) -> Callable[[], None]:
    """Every op once: the attention width of the shape, batch 8 x 512, rank 16 (or odd little sizes that leave partial tiles)."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = ops.Size(3, 37, 6, 81, 3) if small else ops.Size(8, 512, 16, shape.hidden, 7 * shape.layers)
    draw = ops.Draw(size, device, dtype)
    cases = [case for make in ops.CASES.values() for case in make(draw)]

    def run() -> None:
        for case in cases:
            case.call(*case.inputs, *case.state)

    return run


def stage_gevp(shape: Shape, device: str, small: bool) -> Callable[[], Any]:
    """All dense module pencils of the shape at rank 16 ([r², r²] each), k = 16."""
    count, n = (3, 19) if small else (7 * shape.layers, 256)
    x = torch.randn(2, count, n, 2 * n, device=device, dtype=torch.float64)
    a, b = x @ x.mT / n
    b = b + 0.1 * torch.eye(n, device=device, dtype=torch.float64)
    return lambda: sst.gevp(a, b, min(16, n)).raise_if_failed()


def _setting(shape: Shape, device: str, small: bool) -> passes.Setting:
    batch, length = (3, 37) if small else (8, 512)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return passes.Setting(gates.GATE_SHAPE if small else shape, 16, "all-linear", batch, length, device, dtype)


def stage_pass(shape: Shape, device: str, small: bool) -> Callable[[], None]:
    """One training step with the core Fisher hooked in."""
    at = _setting(shape, device, small)
    step = passes.Pass(at.model(), at.tokens())
    sst.fisher_accumulate(step.model, "safety").__enter__()
    return step


def stage_reading(shape: Shape, device: str, small: bool) -> Callable[[], None]:
    """A batch of benign rows read, two draws."""
    at = _setting(shape, device, small)
    ((run, opened),) = evidence.benign(at.model(), at.tokens()).values()
    run.context = opened()  # held, and open as long as the process lives
    run.context.__enter__()
    return run


def stage_merge(shape: Shape, device: str, small: bool) -> Callable[[], Any]:
    """Pencil, filter and coordinates of the patch, in core space, 256 + 256 rows."""
    shape, samples = (shape.with_layers(2), 16) if small else (shape, 256)
    adapter = workload.random_adapter(shape, 16, "all-linear", device=device)
    gain, cost = (workload.core_fisher(adapter, samples, device=device, seed=seed) for seed in (1, 2))
    return lambda: sst.subspace(gain, cost).soft(kl_budget=0.01)


STAGES: dict[str, Stage] = {
    "ops": stage_ops, "gevp": stage_gevp, "reading": stage_reading, "pass": stage_pass, "merge": stage_merge,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "table"])
    parser.add_argument("logs", type=Path, nargs="*")
    parser.add_argument("--model", choices=SHAPES, default="llama-2-7b" if on_gpu else "llama-tiny")
    parser.add_argument("--small", action="store_true", help="little odd sizes: for compute-sanitizer")
    parser.add_argument("--capture", action="store_true", help="only open the capture range (under nsys or ncu)")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench-output")))
    options = parser.parse_args(arguments)
    if options.stage == "table":
        write_table(options.logs, options.out)
        return 0
    device = "cuda" if on_gpu else "cpu"
    run = STAGES[options.stage](SHAPES[options.model], device, options.small)
    run()  # compilation and allocation stay outside the range
    if options.capture:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda.nvtx.range_push(options.stage)
        run()
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_pop()
        torch.cuda.profiler.stop()
        return 0
    again = f"{shlex.quote(sys.executable)} -m bench.capture {options.stage} --model {options.model} --capture"
    print(f"nsys profile --capture-range=cudaProfilerApi -t cuda,nvtx,cublas -o {options.stage} {again}")
    print(f"ncu --clock-control none --profile-from-start off --metrics {','.join(NCU_COLUMNS)} {again}")
    launches, syncs = count_calls(run, device)
    kind = "kernel launches" if on_gpu else "torch operations"
    print(f"{options.stage}: {launches} {kind}, {syncs} host synchronisations")
    trace = options.out / f"trace_{options.stage}.json"
    trace.parent.mkdir(parents=True, exist_ok=True)
    profile(run).export_chrome_trace(str(trace))
    print(f"trace: {trace}")
    return 0


def write_table(logs: list[Path], path: Path) -> None:
    """One row per kernel of the logs, equal kernels averaged in order of first launch."""
    kernels: dict[tuple[str, str], list[dict[str, float]]] = {}
    for log in logs:
        head, *lines = csv.reader(x for x in log.read_text("utf-8").splitlines() if x.startswith('"'))
        for values in lines[1:]:
            cells = dict(zip(head, zip(values, lines[0])))
            name = re.sub(r"<.*", "", cells["Kernel Name"][0].replace("void ", "")).split("(")[0].split("::")[-1][:60]
            found = ((column, *cells.get(metric, ("", ""))) for metric, column in NCU_COLUMNS.items())
            numbers = {c: float(value.replace(",", "")) * UNITS.get(unit, 1.0) for c, value, unit in found if value}
            kernels.setdefault((log.stem.removeprefix("ncu_raw_"), name), []).append(numbers)
    columns = list(dict.fromkeys(NCU_COLUMNS.values()))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["stage", "kernel", "launches", *columns])
        for (stage, name), launches in kernels.items():
            means = ([launch[c] for launch in launches if c in launch] for c in columns)
            writer.writerow([stage, name, len(launches), *(f"{sum(v) / len(v):.4g}" if v else "" for v in means)])


if __name__ == "__main__":
    raise SystemExit(main())
