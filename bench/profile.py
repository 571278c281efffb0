"""One stage in a capture range: `python bench/profile.py STAGE`.

Prints ready `nsys` and `ncu` command lines; run under them, only the stage itself is captured. Run plainly, it writes a Chrome trace
(chrome://tracing, ui.perfetto.dev) of torch.profiler instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "profile":
    # `python bench/x.py` puts this folder in front of the standard library, and cProfile imports a module of this name.
    import importlib.machinery
    import importlib.util
    import sysconfig

    _spec = importlib.machinery.PathFinder.find_spec("profile", [sysconfig.get_path("stdlib")])
    sys.modules["profile"] = _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
elif __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if __name__ != "profile":
    import argparse
    import os
    import shlex
    from collections.abc import Callable

    from bench.common import count_calls  # sets the import paths, so before the library

    import torch  # isort: skip
    import sst_kernels as sst
    from bench import estimates, gates, inputs, passes, workload
    from bench.shapes import SHAPES, Shape
    from sst_kernels import ops

    NCU_METRICS = (
        "gpu__time_duration.sum",
        "dram__bytes.sum",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "lts__t_sector_hit_rate.pct",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",  # the name depends on the chip: see on_gpu.sh
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__throughput.avg.pct_of_peak_sustained_elapsed",
        "sm__warps_active.avg.pct_of_peak_sustained_active",
        "launch__registers_per_thread",
    )


def stage_ops(shape: Shape, device: str, small: bool) -> Callable[[], None]:
    """Every op once: the attention width of the shape, batch 8 x 512, rank 16 (or odd little sizes that leave partial tiles)."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    samples, length, d, r, modules = (3, 37, 81, 6, 3) if small else (8, 512, shape.hidden, 16, 7 * shape.layers)
    draw = lambda *size: torch.randn(*size, device=device).to(dtype)  # noqa: E731
    tokens = samples * length
    spans = ops.spans_from_lengths(samples, length, None, device=device)
    scale = torch.rand(samples, device=device) + 0.5
    left, right, wide = draw(tokens, r), draw(tokens, r), draw(tokens, d)
    omega = torch.randint(0, 2, (d, min(64, d)), device=device).to(dtype) * 2 - 1
    zeros = lambda *size: torch.zeros(*size, device=device)  # noqa: E731
    basis = [torch.linalg.qr(torch.randn(n, n, device=device)).Q for n in (r, r)]

    def run() -> None:
        ops.core_outer([left] * modules, [right] * modules, spans, scale, zeros(samples, modules * r * r))
        ops.factor_moments(left, wide, spans, scale, None, zeros(r, d))
        ops.factor_rows(left, wide, spans, scale, zeros(samples, r * d))
        ops.gram(wide, spans, scale, zeros(d, d))
        ops.sketch(wide, omega, spans, scale, zeros(d, omega.shape[1]))
        ops.eigen_moments(left, right, spans, scale, *basis, zeros(r, r))

    return run


def stage_gevp(shape: Shape, device: str, small: bool) -> Callable[[], None]:
    """All dense module pencils of the shape at rank 16 ([r², r²] each), k = 16."""
    count, n = (3, 19) if small else (7 * shape.layers, 256)
    x = torch.randn(2, count, n, 2 * n, device=device, dtype=torch.float64)
    a, b = x @ x.mT / n
    b = b + 0.1 * torch.eye(n, device=device, dtype=torch.float64)
    return lambda: sst.gevp(a, b, min(16, n)).raise_if_failed()


def stage_pass(shape: Shape, device: str, small: bool) -> Callable[[], None]:
    """One training step with the core Fisher hooked in."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    shape = shape.with_layers(2) if small else shape
    batch, length = (2, 64) if small else (8, 512)
    model = workload.build_model(shape, rank=16, length=length, device=device, dtype=dtype)
    step = passes.Pass(model, workload.token_batch(shape, batch, length, device))
    accumulator = sst.fisher_accumulate(model, "safety")
    accumulator.__enter__()
    return step


def stage_inputs(shape: Shape, device: str, small: bool) -> Callable[[], None]:
    """A batch of the input pass, sketched at 512 columns."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    shape, columns = (gates.GATE_SHAPE, 8) if small else (shape, estimates.INPUT_RANK)
    batch, length = (3, 37) if small else (8, 512)
    model = workload.build_model(shape, rank=16, length=length, device=device, dtype=dtype).requires_grad_(False)
    sst.input_moments(model, "safety", rank=columns).__enter__()
    return inputs.Forward(model, workload.token_batch(shape, batch, length, device))


def stage_merge(shape: Shape, device: str, small: bool) -> Callable[[], None]:
    """Pencil, filter and coordinates of the patch, in core space, 256 + 256 rows."""
    shape, samples = (shape.with_layers(2), 16) if small else (shape, 256)
    adapter = workload.random_adapter(shape, 16, "all-linear", device=device)
    gain, cost = (workload.core_fisher(adapter, samples, device=device, seed=seed) for seed in (1, 2))
    return lambda: sst.subspace(gain, cost).soft(kl_budget=0.01)


def main(arguments: list[str] | None = None) -> int:
    stages = {"ops": stage_ops, "gevp": stage_gevp, "inputs": stage_inputs, "pass": stage_pass, "merge": stage_merge}
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--model", choices=SHAPES, default="llama-2-7b" if on_gpu else "llama-tiny")
    parser.add_argument("--small", action="store_true", help="little odd sizes: for compute-sanitizer")
    parser.add_argument("--capture", action="store_true", help="only open the capture range (under nsys or ncu)")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench-output")))
    options = parser.parse_args(arguments)
    device = "cuda" if on_gpu else "cpu"
    run = stages[options.stage](SHAPES[options.model], device, options.small)
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
    again = f"{shlex.quote(sys.executable)} -m bench.profile {options.stage} --model {options.model} --capture"
    print(f"nsys profile --capture-range=cudaProfilerApi -t cuda,nvtx,cublas -o {options.stage} {again}")
    print(f"ncu --clock-control none --profile-from-start off --metrics {','.join(NCU_METRICS)} {again}")
    launches, syncs = count_calls(run, device)
    kind = "kernel launches" if on_gpu else "torch operations"
    print(f"{options.stage}: {launches} {kind}, {syncs} host synchronisations")
    print(f"trace: {write_trace(run, options.out / f'trace_{options.stage}.json')}")
    return 0


def write_trace(run: Callable[[], None], path: Path) -> Path:
    """A Chrome trace of one call of `run`."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities) as profiler:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return path


if __name__ == "__main__":
    raise SystemExit(main())
