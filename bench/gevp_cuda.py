"""Batched top-k pencils on a GPU: this library beside torch, CuPy and cuSOLVER, on the same inputs, at the same accuracy.

    python -m bench.gevp_cuda [--cases 224x256x16,224x1024x16,...] [--solvers ours,torch,...] [--kind decay] [--seconds 140] [--out FILE]

A case is batch x n x k. A solver whose result fails the gate is reported and not timed. Solvers that loop over problems are
timed on a part of the batch and scaled (basis "scaled"): their time is linear in it. Rows appear as they are measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import sst_kernels as sst
from bench import common, cusolver

CASES = "224x256x16,224x512x16,224x1024x16,16x2048x16,8x4096x16,1x11008x16"
TARGETS = {"decay": 0.8, "flat": 0.1, "steep": 2.0}


def pencil(kind: str, batch: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """FIM-like pencils: Gram matrices of n/4 and 2n random rows whose columns decay like i^-rate, damped by 1e-4."""
    generator = torch.Generator("cuda").manual_seed(seed)
    decay = torch.arange(1, n + 1, device="cuda", dtype=torch.float64) ** -TARGETS[kind]
    a, b = (torch.empty(batch, n, n, dtype=dtype, device="cuda") for _ in range(2))
    for p in range(batch):  # one problem at a time: the rows of a whole batch need twice its memory
        g = torch.randn(n // 4, n, dtype=torch.float64, device="cuda", generator=generator) * decay
        h = torch.randn(2 * n, n, dtype=torch.float64, device="cuda", generator=generator) * decay
        a[p] = (g.mT @ g) / len(g)
        b[p] = (h.mT @ h) / len(h)
        b[p].diagonal().add_(1e-4)
    return a, b


def accuracy(a: Tensor, b: Tensor, values: Tensor, vectors: Tensor) -> tuple[float, float]:
    """Worst B^-1-norm residual over the largest value, and worst |V' B V - I|, over the batch."""
    eta = skew = 0.0
    eye = torch.eye(vectors.shape[-1], dtype=torch.float64, device=a.device)
    for p in range(len(vectors)):
        v, bv = vectors[p], b[p].double() @ vectors[p]
        residual = a[p].double() @ v - bv * values[p]
        factor, info = torch.linalg.cholesky_ex(b[p].double())
        if info:
            return float("nan"), float("nan")
        rho = torch.linalg.solve_triangular(factor, residual, upper=False).norm(dim=0).max() / values[p, 0].abs()
        eta, skew = (
            max(eta, float(rho.nan_to_num(nan=1e300))),
            max(skew, float((v.mT @ bv - eye).abs().max().nan_to_num(nan=1e300))),
        )
    return eta, skew


def solvers(n: int) -> dict[str, Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]]:
    """Name to callable. CuPy's batched eigh is included when CuPy is there and the order is one it can take in reasonable time."""

    def ours(method: str, **options):
        def run(a: Tensor, b: Tensor, k: int):
            result = sst.gevp(a, b, k, method=method, **options)
            run.result = result
            return result.values, result.vectors

        return run

    library = cusolver.CuSolver()
    table = {
        "ours jacobi_davidson": ours("jacobi_davidson"),
        "ours direct": ours("direct"),
        "ours fp32 factor": ours("jacobi_davidson", preconditioner="cholesky_single"),
        "XsyevBatched": library.xsyev_batched,
        "sygvdx loop": library.sygvdx,
        "Xsygvdx loop": library.xsygvdx,
        "sygvd loop": library.sygvd,
        "torch cholesky+eigh": cusolver.torch_eigh,
    }
    if n <= 512:
        table["syevjBatched"] = library.syevj_batched
        try:
            import cupy
        except ImportError:
            return table

        def with_cupy(a: Tensor, b: Tensor, k: int):
            factor, c = cusolver.reduce(a, b)
            with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
                values, vectors = (torch.from_dlpack(x) for x in cupy.linalg.eigh(cupy.from_dlpack(c)))
            return cusolver.restore(factor, values[:, -k:].flip(-1), vectors[:, :, -k:].flip(-1))

        table["cupy eigh"] = with_cupy
    return table


def part_of(name: str, batch: int, n: int) -> int:
    """Problems to time a looping solver on: a second or so of work."""
    torch_loops = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)  # from there on it takes a batch at once
    looping = name.endswith("loop") or (name.startswith("torch") and n > 32 and torch_loops) or name.startswith("cupy")
    return min(batch, 8 if n <= 512 else 4 if n <= 1024 else 1) if looping else batch


def run_case(record: common.Recorder, case: str, kind: str, chosen: list[str], deadline: float) -> None:
    batch, n, k = (int(part) for part in case.split("x"))
    a, b = pencil(kind, batch, n)
    torch.cuda.synchronize()
    # Both matrices read once; a Cholesky factor and one product of n x n with n x k.
    moved, flops = 2 * 8.0 * batch * n * n, batch * (n**3 / 3 + 2 * n * n * k)
    expected = cusolver.torch_eigh(a[:1], b[:1], k)[0]
    for name, solve in solvers(n).items():
        if chosen and not any(part in name for part in chosen):
            continue
        if time.monotonic() > deadline:
            print(f"{case} {name}: skipped, the time is spent", flush=True)
            continue
        part = part_of(name, batch, n)
        x, y = a[:part], b[:part]
        try:
            begin = time.monotonic()
            values, vectors = solve(x, y, k)
            torch.cuda.synchronize()
            once = time.monotonic() - begin
            checked = min(part, 32)
            eta, skew = accuracy(x[:checked], y[:checked], values[:checked], vectors[:checked])
            shift = float(((values[:1] - expected).abs() / expected[:, :1]).max().nan_to_num(nan=1e300))
            own = f"torch {torch.__version__}, cuSOLVER {cusolver.version()}; " if name.split()[0] != "ours" else ""
            note = f"{own}residual {eta:.1e} orthonormality {skew:.1e} against eigh {shift:.1e}"
            if hasattr(solve, "result"):
                result = solve.result
                codes = torch.unique(result.status, return_counts=True)
                cycles = (
                    "" if result.cycles is None else f" cycles {int(result.cycles.min())}..{int(result.cycles.max())}"
                )
                note += f" status {dict(zip(codes[0].tolist(), codes[1].tolist()))}{cycles}"
            if not (eta <= 1e-9 and skew <= 1e-8 and shift <= 1e-9):
                record("gevp", name, targets=case, batch=batch, error="gate", note=note)
                continue
            del values, vectors
            repeats = max(1, min(5, int(4.0 / max(once, 1e-4))))
            measured = common.measure(
                lambda s=solve, u=x, v=y: s(u, v, k), "cuda", repeats=repeats, warmup=int(once < 2.0), seconds=5.0
            )
            scale = batch / part
            columns = measured.columns() | {
                "ms": measured.median * scale,
                "iqr_ms": measured.columns()["iqr_ms"] * scale,
            }
            if scale > 1:
                columns |= {"basis": "scaled", "peak_mib": None}
                note += f" timed on {part}"
            record("gevp", name, targets=case, batch=batch, **columns, bytes=moved, flops=flops, note=note)
        except Exception as error:  # a peer that cannot take a case is a finding, not the end of the run
            record(
                "gevp",
                name,
                targets=case,
                batch=batch,
                error=type(error).__name__,
                note=str(error).splitlines()[0][:200],
            )
            torch.cuda.synchronize()
        common.free("cuda")


def profile(case: str, kind: str, method: str) -> None:
    """Prints where the time of one warm solve goes: kernels by total time, and the time between them."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    batch, n, k = (int(part) for part in case.split("x"))
    a, b = pencil(kind, batch, n)
    sst.gevp(a, b, k, method=method)
    torch.cuda.synchronize()
    with recorded(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        begin = time.perf_counter()
        sst.gevp(a, b, k, method=method)
        torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - begin)
    kernels = [x for x in profiler.key_averages() if x.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(x.self_device_time_total for x in kernels) / 1e3
    print(f"{case} {method}: wall {wall:.2f} ms, kernels {busy:.2f} ms in {sum(x.count for x in kernels)} launches")
    for x in sorted(kernels, key=lambda x: -x.self_device_time_total)[:18]:
        name = x.key.replace("sst::cuda::", "").replace("(anonymous namespace)::", "").replace("void ", "")
        print(f"{x.self_device_time_total / 1e3:9.3f} ms {x.count:5d} x  {name[:150]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=CASES, help="batch x n x k, comma-separated")
    parser.add_argument("--solvers", default="", help="parts of names, comma-separated; all by default")
    parser.add_argument("--kind", default="decay", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=140.0, help="no solver is started after this")
    parser.add_argument("--out", type=Path, default=common.ROOT / "bench" / "results" / "gevp_cuda.csv")
    parser.add_argument(
        "--profile", default="", choices=["", "direct", "jacobi_davidson"], help="profile this method instead"
    )
    options = parser.parse_args()
    if options.profile:
        for case in options.cases.split(","):
            profile(case, options.kind, options.profile)
        return
    record = common.Recorder(options.out, "cuda", model=options.kind)
    deadline = time.monotonic() + options.seconds
    for case in options.cases.split(","):
        run_case(record, case, options.kind, [part for part in options.solvers.split(",") if part], deadline)
        common.free("cuda")


if __name__ == "__main__":
    main()
