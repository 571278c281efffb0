"""Each op against its physical floor, against the torch form of it, and against torch.compile of that form.

    python bench/ops.py [--quick] [--sweep] [--ops gram sketch] [--csv FILE]

The floor is the larger of bytes over measured copy bandwidth and flops over measured GEMM rate; both are measured first, on
this device. Values are checked against float64 before anything is timed, and a wrong op is not timed. Rows are written as
they come. On CUDA a time is the median of device events around one call with a cold L2 cache, queued behind a sleep so
that launching is not in it; `host_us` is what launching costs the caller. On a CPU the sizes are small.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sst_kernels import ops  # noqa: E402
from sst_kernels.testing import error_ratio  # noqa: E402

ALLOWED = 1e-5
OPS = ("core_outer", "factor_rows", "factor_moments", "gram", "sketch", "eigen_moments")
COLUMNS = (
    *("op", "form", "B", "T", "r", "d", "config", "us", "floor_us", "of_floor", "bytes", "flops", "error", "peak_mib"),
    *("host_us", "copy_gbs", "gemm_tflops", "device", "driver", "torch", "triton", "commit", "date"),
)


@dataclass
class Case:
    """One op at one size: how to call it, the same in torch, what it must give, and what it must at least move and do."""

    op: str
    size: dict[str, int]
    inputs: list[torch.Tensor]
    state: list[torch.Tensor]
    call: Callable[..., None]
    plain: Callable[..., None]
    bytes: int
    flops: int
    tuned: Callable[..., None] | None = None
    candidates: tuple[dict, ...] = ()


def grid(**choices) -> tuple[dict, ...]:
    return tuple(dict(zip(choices, values)) for values in itertools.product(*choices.values()))


def narrow_tiles(
    p: int, q: int, wide: tuple[int, ...], BT: tuple[int, ...], warps=(4,), stages=(3, 4)
) -> tuple[dict, ...]:
    """Candidates for the factor kernels: the narrow side whole, the wide side at several tile widths."""
    from sst_kernels.ops.tiles import block

    base = {"BP": block(p, 64)} if p <= q else {"BQ": block(q, 64)}
    side = "BQ" if p <= q else "BP"
    return tuple(base | c for c in grid(**{side: wide}, BT=BT, num_warps=warps, num_stages=stages))


def kernel(op: str):
    return getattr(importlib.import_module(f"sst_kernels.ops.{op}.kernel"), op)


def mm(a, b):
    """Product with float32 result: of bfloat16 operands without widening them where torch can."""
    if a.dtype == torch.bfloat16 and a.is_cuda:
        return (torch.bmm if a.ndim == 3 else torch.mm)(a, b, out_dtype=torch.float32)
    return (a if a.dtype == torch.float64 else a.float()) @ (b if b.dtype == torch.float64 else b.float())


def cases(op: str, B: int, T: int, r: int, d: int, device: str, modules: int) -> Iterator[Case]:
    """The cases of `op` at one size, in bfloat16: [B·T, ·] tokens, every sample T long, a scale per sample."""
    S, size = B * T, {"B": B, "T": T, "r": r, "d": d}
    g = torch.Generator(device).manual_seed(B + T + r + d)
    rand = lambda *shape, dtype=torch.bfloat16: torch.randn(*shape, generator=g, device=device).to(dtype)  # noqa: E731
    zeros = lambda *shape: torch.zeros(*shape, device=device)  # noqa: E731
    spans = ops.spans_from_lengths(B, T, device=device)
    scale = torch.rand(B, generator=g, device=device) + 0.5
    split = lambda x: x.view(B, T, -1)  # noqa: E731
    s3 = scale[:, None, None]
    gradients = lambda left, right, out: mm(split(left).mT, split(right)) * s3.to(out.dtype)  # noqa: E731

    if op == "core_outer":
        lefts, rights = [rand(S, r) for _ in range(modules)], [rand(S, r) for _ in range(modules)]

        def plain(*args):
            *tokens, out = args
            for m in range(modules):
                G = gradients(tokens[m], tokens[modules + m], out)
                out[:, m * r * r : (m + 1) * r * r] = G.flatten(1)

        yield Case(
            op,
            size | {"d": modules},
            lefts + rights,
            [zeros(B, modules * r * r)],
            lambda *a: ops.core_outer(a[:modules], a[modules:-1], spans, scale, a[-1]),
            plain,
            4 * modules * S * r + 4 * B * modules * r * r,
            2 * modules * S * r * r,
            lambda *a, **c: kernel(op)(a[:modules], a[modules:-1], spans, scale, a[-1], "ieee", **c),
            grid(BT=(32, 64, 128), num_warps=(1, 2, 4), num_stages=(2, 4)),
        )
    elif op == "gram":

        def plain(x, out):
            out += mm(x.T, x).tril_() if out.dtype == torch.float64 else mm(x.T, x)

        yield Case(
            op,
            size,
            [rand(S, d)],
            [zeros(d, d)],
            lambda x, out: ops.gram(x, None, None, out),
            plain,
            2 * S * d + 4 * d * d,
            S * d * d,
            lambda x, out, **c: kernel(op)(x, None, None, out, "ieee", **c),
            (
                *grid(BD=(128,), BT=(64,), num_warps=(4, 8), num_stages=(3, 4)),
                {"BD": 128, "BT": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128},
                {"BD": 128, "BT": 32, "num_warps": 4, "num_stages": 5},
                {"BD": 128, "BT": 32, "num_warps": 8, "num_stages": 5},
                {"BD": 128, "BT": 128, "num_warps": 8, "num_stages": 2},
                {"BD": 256, "BT": 32, "num_warps": 8, "num_stages": 3},
                {"BD": 64, "BT": 128, "num_warps": 4, "num_stages": 3},
            ),
        )
        yield Case(
            "gram scaled",
            size,
            [rand(S, d)],
            [zeros(d, d)],
            lambda x, out: ops.gram(x, spans, scale, out),
            lambda x, out: plain(
                (split(x) * s3.to(out.dtype)).flatten(0, 1).to(torch.promote_types(x.dtype, s3.dtype)), out
            ),
            2 * S * d + 4 * d * d,
            S * d * d,
            lambda x, out, **c: kernel(op)(x, spans, scale, out, "ieee", **c),
            grid(BD=(64, 128), BT=(32, 64, 128), num_warps=(8,), num_stages=(3, 4)),
        )
    elif op == "sketch":

        def plain(x, omega, out):
            z = mm(x, omega) * scale.to(out.dtype).square().repeat_interleave(T)[:, None]
            out += x.to(out.dtype).T @ z

        def tune(x, omega, out, **c):
            from sst_kernels.ops.sketch.kernel import sketch

            sketch(x, omega, spans, scale, out, "ieee", **c)

        yield Case(
            op,
            size,
            [rand(S, d), rand(d, r)],
            [zeros(d, r)],
            lambda x, omega, out: ops.sketch(x, omega, spans, scale, out),
            plain,
            2 * S * d + 10 * d * r,
            4 * S * d * r,
            tune,
            grid(parts=(2, 4, 8), BD=(64, 128), BT=(32, 64), num_warps=(4, 8)),
        )

        def product(x, u, out, **c):
            from sst_kernels.ops.sketch.kernel import project

            out.copy_(project(x, u, "tf32x3", **c))

        if device == "cuda":
            for name, rows, columns, dtype in (
                ("project bf16", S, r, torch.bfloat16),
                ("project rotate", B * r, d, torch.float32),
            ):
                yield Case(
                    name,
                    size,
                    [rand(rows, d, dtype=dtype), rand(d, columns, dtype=dtype)],
                    [zeros(rows, columns)],
                    product,
                    lambda x, u, out: out.copy_(mm(x, u)),
                    dtype.itemsize * (rows * d + d * columns) + 4 * rows * columns,
                    2 * rows * d * columns,
                    product,
                    grid(parts=(1, 2, 4), BT=(64, 128), BD=(32, 64), BL=(32, 64), num_warps=(4,), num_stages=(3,)),
                )
    for flip in (False, True) if op in ("factor_rows", "factor_moments") else (False,) if op == "eigen_moments" else ():
        p, q = (d, r) if flip else (r, d)
        left, right = rand(S, p), rand(S, q)
        name = f"{op} {'B' if flip else 'A'}" if op != "eigen_moments" else op
        read = 2 * S * (p + q)
        if op == "factor_rows":
            yield Case(
                name,
                size,
                [left, right],
                [zeros(B, p * q)],
                lambda left, right, out: ops.factor_rows(left, right, spans, scale, out),
                lambda left, right, out: out.copy_(gradients(left, right, out).flatten(1)),
                read + 4 * B * p * q,
                2 * S * p * q,
                lambda left, right, out, **c: kernel(op)(left, right, spans, scale, out, "ieee", **c),
                narrow_tiles(p, q, (32, 64, 128), (64, 128), (4,), (3, 4)),
            )
        elif op == "factor_moments":

            def plain(left, right, total, square):
                G = gradients(left, right, square)
                total += G.sum(0)
                square += G.square().sum(0)

            yield Case(
                name,
                size,
                [left, right],
                [zeros(p, q), zeros(p, q)],
                lambda left, right, total, square: ops.factor_moments(left, right, spans, scale, total, square),
                plain,
                read + 16 * p * q,
                2 * S * p * q,
                lambda left, right, *o, **c: kernel(op)(left, right, spans, scale, *o, "ieee", **c),
                narrow_tiles(p, q, (16, 32, 64), (64, 128), (2, 4), (3, 4)),
            )
        else:
            u_left = torch.linalg.qr(rand(p, p, dtype=torch.float32))[0]
            u_right = rand(q, q, dtype=torch.float32) / q**0.5

            def plain(left, right, u_left, u_right, out):
                out += (u_left.T @ gradients(left, right, out) @ u_right).square().sum(0)

            rotated = min(S * q * q + S * p * q, S * p * q + B * p * q * q)
            yield Case(
                name,
                size,
                [left, right, u_left, u_right],
                [zeros(p, q)],
                lambda left, right, u_left, u_right, out: ops.eigen_moments(
                    left, right, spans, scale, u_left, u_right, out
                ),
                plain,
                read + 4 * (p * p + q * q) + 8 * p * q,
                2 * rotated,
            )


class Clock:
    """Times and ceilings of one device."""

    def __init__(self, device: str, repeats: int):
        self.cuda, self.repeats = device == "cuda", repeats
        self.flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if self.cuda else None
        n = 8192 if self.cuda else 1024
        source, target = torch.randn(2, (256 << 20 if self.cuda else 16 << 20) // 4, device=device)
        self.bandwidth = 2 * source.nbytes / self(lambda: target.copy_(source))
        a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if self.cuda else torch.float32)
        self.rate = 2 * n**3 / self(lambda: a @ b)

    def __call__(self, f: Callable[[], object]) -> float:
        """Median seconds of one call."""
        times = []
        f()
        for _ in range(self.repeats):
            if self.cuda:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(1_000_000)
                self.flush.zero_()
                start.record()
                f()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                f()
                times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def host(self, f: Callable[[], object]) -> float:
        """Seconds the caller spends per call, the device not waited for."""
        if not self.cuda:
            return float("nan")
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            f()
        elapsed = (time.perf_counter() - begin) / 20
        torch.cuda.synchronize()
        return elapsed


def provenance(device: str) -> dict[str, str]:
    run = lambda *c: subprocess.run(c, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()  # noqa: E731
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else run("uname", "-m") + " CPU",
        "driver": run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if device == "cuda" else "",
        "torch": torch.__version__,
        "triton": version,
        "commit": run("git", "rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
    }


class Bench:
    """Runs cases and writes one row per measured form."""

    def __init__(self, args, clock: Clock, device: str):
        self.args, self.clock, self.device = args, clock, device
        self.compiled: set[str] = set()
        self.common = provenance(device) | {
            "copy_gbs": f"{clock.bandwidth / 1e9:.0f}",
            "gemm_tflops": f"{clock.rate / 1e12:.2f}",
        }
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        self.file = args.csv.open("w", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.writer.writeheader()

    def measure(self, case: Case, form: str, call, config: str = "", expected=None) -> None:
        """Check, then time, then write."""
        state = [s.clone() for s in case.state]
        try:
            call(*case.inputs, *state)
        except Exception as error:
            self.row(case, form, config, note=f"{type(error).__name__}: {str(error)[:80]}")
            return
        # The torch forms of `gram` write both triangles; the lower one is what is compared.
        lower = (lambda t: t.tril()) if case.op.startswith("gram") else lambda t: t
        error = max(error_ratio(lower(a), lower(e)) for a, e in zip(state, expected))
        if not error <= ALLOWED:
            self.row(case, form, config, error=error, note="wrong: not timed")
            return
        peak = float("nan")
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call(*case.inputs, *state)
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        run = lambda: call(*case.inputs, *state)  # noqa: E731
        self.row(case, form, config, self.clock(run), self.clock.host(run), error, peak)

    def row(
        self,
        case,
        form,
        config,
        seconds=float("nan"),
        host=float("nan"),
        error=float("nan"),
        peak=float("nan"),
        note="",
    ):
        floor = max(case.bytes / self.clock.bandwidth, case.flops / self.clock.rate)
        values = {
            "us": f"{seconds * 1e6:.1f}",
            "floor_us": f"{floor * 1e6:.1f}",
            "of_floor": f"{floor / seconds:.2f}",
            "error": f"{error:.1e}",
            "peak_mib": f"{peak:.1f}",
            "host_us": f"{host * 1e6:.0f}",
        }
        self.writer.writerow(
            case.size
            | {"op": case.op, "form": form, "config": note or config, "bytes": case.bytes, "flops": case.flops}
            | values
            | self.common
        )
        self.file.flush()
        size = " ".join(f"{k}={v}" for k, v in case.size.items())
        print(
            f"{case.op:17s} {form:8s} {size:26s}", *(f"{k}={v}" for k, v in values.items()), note or config, flush=True
        )

    def run(self, case: Case) -> None:
        expected = [s.double() for s in case.state]
        case.plain(*(x.double() for x in case.inputs), *expected)
        self.measure(case, "sst", case.call, expected=expected)
        if self.args.sweep:
            for candidate in case.candidates:
                config = " ".join(f"{k}={v}" for k, v in candidate.items())
                self.measure(case, "sweep", lambda *a, c=candidate: case.tuned(*a, **c), config, expected)
            return
        self.measure(case, "torch", case.plain, expected=expected)
        # Unrolled over the modules of a model, core_outer compiles for minutes; a quick run compiles each op once.
        if self.args.compile and case.op != "core_outer" and not (self.args.quick and case.op in self.compiled):
            self.compiled.add(case.op)
            torch._dynamo.reset()
            self.measure(case, "compile", torch.compile(case.plain), expected=expected)


def sizes(args, device: str) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """(op, (B, T, r, d)); core_outer has no d and eigen_moments no d beyond 5120, where its basis alone is 484 MB."""
    for op in args.ops:
        if device == "cpu":
            grid_ = itertools.product((1, 8), (64,), (8, 16), (256,))
        elif args.quick or args.sweep:
            grid_ = [(8, 512, 16, 4096)] + (
                [(1, 2048, 64, 4096)] if op in ("core_outer", "sketch", "factor_moments") else []
            )
        else:
            grid_ = itertools.product((1, 8), (512, 2048), (8, 16, 64), (4096, 5120, 11008))
        seen = set()
        for B, T, r, d in grid_:
            key = (B, T, r) if op == "core_outer" else (B, T, d) if op == "gram" else (B, T, r, d)
            if key not in seen and not (op == "eigen_moments" and d > 5120):
                seen.add(key)
                yield op, (B, T, r, d)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one or two sizes per op: at most two minutes on an H100")
    parser.add_argument("--sweep", action="store_true", help="time a handful of kernel configurations per op instead")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--ops", nargs="*", default=OPS, choices=OPS)
    parser.add_argument("--csv", type=Path, help="default: bench/results/ops[_sweep]_<device>.csv")
    parser.add_argument("--modules", type=int, help="modules of one core_outer call (224 on a GPU: 7B, all linear)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name().replace(" ", "-").lower() if device == "cuda" else "cpu"
    args.csv = args.csv or ROOT / "bench/results" / f"ops{'_sweep' if args.sweep else ''}_{name}.csv"
    modules = args.modules or (224 if device == "cuda" else 8)
    bench = Bench(args, Clock(device, 15 if args.quick or args.sweep else 30), device)
    for op, size in sizes(args, device):
        for case in cases(op, *size, device, modules):
            bench.run(case)


if __name__ == "__main__":
    main()
