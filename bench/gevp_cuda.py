"""Batched top-k pencils on a GPU: this library beside torch and cuSOLVER, on the same inputs, at the same accuracy.

    python -m bench.gevp_cuda [--cases 224x256x16,224x1024x16,...] [--solvers ours,torch,...] [--kind decay] [--seconds 140] [--out FILE]
    python -m bench.gevp_cuda --predict     what a solve on an H100 should take, counted on a CPU

A case is batch x n x k. A solver whose result fails the gate is reported and not timed. Solvers that loop over problems are timed on a
part of the batch and scaled (basis "scaled"): their time is linear in it. Rows appear as they are measured.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Sequence
from ctypes import byref, c_double, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sst_kernels as sst
from bench import common

CASES = "224x256x16,224x512x16,224x1024x16,16x2048x16,8x4096x16,1x11008x16"
TARGETS = {"decay": 0.8, "flat": 0.1, "steep": 2.0}
Pairs = tuple[Tensor, Tensor]
VECTORS, LOWER, ITYPE, INDEX_RANGE, R_64F = c_int(1), c_int(0), c_int(1), c_int(1002), c_int(1)  # of cusolver_common.h


def pencil(kind: str, batch: int, n: int, device: str = "cuda", seed: int = 0) -> Pairs:
    """FIM-like pencils: Gram matrices of n/4 and 2n random rows whose columns decay like i^-rate, damped by 1e-4."""
    generator, wide = torch.Generator(device).manual_seed(seed), {"dtype": torch.float64, "device": device}
    decay = torch.arange(1, n + 1, **wide) ** -TARGETS[kind]
    a, b = (torch.empty(batch, n, n, **wide) for _ in range(2))
    for p in range(batch):  # one problem at a time: the rows of a whole batch need twice its memory
        for out, rows in ((a, n // 4), (b, 2 * n)):
            x = torch.randn(rows, n, generator=generator, **wide) * decay
            out[p] = x.mT @ x / len(x)
        b[p].diagonal().add_(1e-4)
    return a, b


class CuSolver:
    """cuSOLVER on the current stream. Methods take float64 CUDA tensors [batch, n, n] and return values [batch, k], descending, and
    vectors [batch, n, k] with v' B v = 1. RuntimeError with cuSOLVER's status when a call fails."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(_library())
        self.handle, self.parameters, self.jacobi = c_void_p(), c_void_p(), c_void_p()
        self._call("Create", byref(self.handle))
        self._call("SetStream", self.handle, c_void_p(torch.cuda.current_stream().cuda_stream))
        self._call("CreateParams", byref(self.parameters))
        self._call("CreateSyevjInfo", byref(self.jacobi))

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self.library, f"cusolverDn{name}")(*arguments):
            raise RuntimeError(f"cusolverDn{name} returned cuSOLVER status {status}")

    def _solve(self, name: str, problems: Sequence[tuple], info: Tensor, *last: Any) -> None:
        """Each of `problems`, in the workspace that the first asks for. The 64-bit interface wants one on the host too, 11.7.1 both zeroed."""
        wide = name.startswith("X")
        sizes = (c_size_t(), c_size_t()) if wide else (c_int(),)
        self._call(f"{name}_bufferSize", *problems[0], *map(byref, sizes), *last)
        work = torch.zeros(max(1, sizes[0].value * (1 if wide else 8)), dtype=torch.uint8, device=info.device)
        host = (ctypes.create_string_buffer(max(1, sizes[1].value)), sizes[1]) if wide else ()
        for p, arguments in enumerate(problems):
            self._call(name, *arguments, _at(work), sizes[0], *host, _at(info, p), *last)

    def sygvdx(self, a: Tensor, b: Tensor, k: int) -> Pairs:
        """The k largest pairs, one problem after the other."""
        n, found = a.shape[-1], c_int()
        a, factor, values, info = _state(a, b)
        fixed = (self.handle, ITYPE, VECTORS, INDEX_RANGE, LOWER, c_int(n))
        limits = (c_double(0), c_double(0), c_int(n - k + 1), c_int(n), byref(found))
        matrices = lambda p: (_at(a, p), c_int(n), _at(factor, p), c_int(n), *limits, _at(values, p))  # noqa: E731
        self._solve("Dsygvdx", [(*fixed, *matrices(p)) for p in range(len(a))], info)
        return values[:, :k].flip(-1), a[:, :k].flip(1).mT

    def xsygvdx(self, a: Tensor, b: Tensor, k: int) -> Pairs:
        """The same by the 64-bit interface. RuntimeError where this cuSOLVER does not have it: it came with CUDA 13."""
        if not hasattr(self.library, "cusolverDnXsygvdx"):
            raise RuntimeError(f"cuSOLVER {version()} has no cusolverDnXsygvdx")
        n, found, low, high = a.shape[-1], c_int64(), c_double(0), c_double(0)
        a, factor, values, info = _state(a, b)
        fixed = (self.handle, self.parameters, ITYPE, VECTORS, INDEX_RANGE, LOWER, c_int64(n))
        limits = (byref(low), byref(high), c_int64(n - k + 1), c_int64(n), byref(found))
        matrices = lambda p: (R_64F, _at(a, p), c_int64(n), R_64F, _at(factor, p), c_int64(n))  # noqa: E731
        of = lambda p: (*fixed, *matrices(p), *limits, R_64F, _at(values, p), R_64F)  # noqa: E731
        self._solve("Xsygvdx", [of(p) for p in range(len(a))], info)
        return values[:, :k].flip(-1), a[:, :k].flip(1).mT

    def xsyev_batched(self, a: Tensor, b: Tensor, k: int) -> Pairs:
        """torch's batched Cholesky and triangular solves around cusolverDnXsyevBatched."""
        factor, c = reduce(a, b)
        c, _, values, info = _state(c)
        n = c_int64(c.shape[-1])
        problem = (self.handle, self.parameters, VECTORS, LOWER, n, R_64F, _at(c), n, R_64F, _at(values), R_64F)
        self._solve("XsyevBatched", [problem], info, c_int64(len(c)))
        return restore(factor, values, c.mT, k)

    def syevj_batched(self, a: Tensor, b: Tensor, k: int) -> Pairs:
        """The same around cusolverDnDsyevjBatched, which CuPy's batched eigh is made of."""
        factor, c = reduce(a, b)
        c, _, values, info = _state(c)
        n = c_int(c.shape[-1])
        problem = (self.handle, VECTORS, LOWER, n, _at(c), n, _at(values))
        self._solve("DsyevjBatched", [problem], info, self.jacobi, c_int(len(c)))
        return restore(factor, values, c.mT, k)


def reduce(a: Tensor, b: Tensor) -> Pairs:
    """L and the symmetric C = L^-1 A L^-T of B = L L'."""
    factor = torch.linalg.cholesky(b)
    half = torch.linalg.solve_triangular(factor, a, upper=False)
    return factor, torch.linalg.solve_triangular(factor, half.mT, upper=False).contiguous()


def restore(factor: Tensor, values: Tensor, vectors: Tensor, k: int) -> Pairs:
    """The k last of ascending pairs of C into pairs of the pencil."""
    vectors = torch.linalg.solve_triangular(factor.mT, vectors[..., -k:].flip(-1), upper=True)
    return values[:, -k:].flip(-1), vectors


def torch_eigh(a: Tensor, b: Tensor, k: int) -> Pairs:
    """What torch offers: batched Cholesky, two solves, eigh."""
    factor, c = reduce(a, b)
    return restore(factor, *torch.linalg.eigh(c), k)


def _state(a: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a call overwrites: copies of the matrices, values [batch, n], status [batch]."""
    info = torch.zeros(len(a), dtype=torch.int32, device=a.device)
    return a.clone(), rest[0].clone() if rest else a, torch.empty_like(a[..., 0]), info


def _at(tensor: Tensor, problem: int = 0) -> c_void_p:
    return c_void_p(tensor[problem].data_ptr() if problem else tensor.data_ptr())


def version() -> str:
    """Of the library, as major.minor.patch."""
    number = c_int()
    ctypes.CDLL(_library()).cusolverGetVersion(byref(number))
    return f"{number.value // 1000}.{number.value // 100 % 10}.{number.value % 100}"


def _library() -> str:
    """The library that torch brought, or else that of the toolkit."""
    try:
        import nvidia
    except ImportError:
        return "libcusolver.so"
    found = (path for root in nvidia.__path__ for path in sorted(Path(root).glob("*/lib/libcusolver.so*")))
    return str(next(found, "libcusolver.so"))


class Ours:
    """`sst.gevp` by a method; `said` is what its last result says of itself."""

    def __init__(self, method: str, **options: Any):
        self.options, self.said = {"method": method, **options}, ""

    def __call__(self, a: Tensor, b: Tensor, k: int) -> Pairs:
        result = sst.gevp(a, b, k, **self.options)
        codes = torch.unique(result.status, return_counts=True)
        self.said = f" status {dict(zip(codes[0].tolist(), codes[1].tolist()))}"
        if result.cycles is not None:
            self.said += f" cycles {int(result.cycles.min())}..{int(result.cycles.max())}"
        return result.values, result.vectors


def solvers(n: int) -> dict[str, Callable[[Tensor, Tensor, int], Pairs]]:
    library = CuSolver()
    table = {
        "ours jacobi_davidson": Ours("jacobi_davidson"), "ours direct": Ours("direct"),
        "ours fp32 factor": Ours("jacobi_davidson", preconditioner="cholesky_single"),
        "XsyevBatched": library.xsyev_batched, "sygvdx loop": library.sygvdx, "Xsygvdx loop": library.xsygvdx,
        "torch cholesky+eigh": torch_eigh,
    }  # fmt: skip
    return table | ({"syevjBatched": library.syevj_batched} if n <= 512 else {})


def part_of(name: str, batch: int, n: int) -> int:
    """Problems to time a looping solver on: a second or so of work."""
    torch_loops = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)  # from there on it takes a batch at once
    looping = name.endswith("loop") or (name.startswith("torch") and n > 32 and torch_loops)
    return min(batch, 8 if n <= 512 else 4 if n <= 1024 else 1) if looping else batch


def accuracy(a: Tensor, b: Tensor, values: Tensor, vectors: Tensor) -> tuple[float, float]:
    """Worst B^-1-norm residual over the largest value, and worst |V' B V - I|, over the batch."""
    eta = skew = 0.0
    eye = torch.eye(vectors.shape[-1], dtype=torch.float64, device=a.device)
    for A, B, w, v in zip(a, b, values, vectors):
        factor, info = torch.linalg.cholesky_ex(B)
        if info:
            return float("nan"), float("nan")
        residual = torch.linalg.solve_triangular(factor, A @ v - B @ v * w, upper=False)
        eta = max(eta, float((residual.norm(dim=0).max() / w[0].abs()).nan_to_num(nan=1e300)))
        skew = max(skew, float((v.mT @ B @ v - eye).abs().max().nan_to_num(nan=1e300)))
    return eta, skew


def measure(name: str, solve: Callable[[Tensor, Tensor, int], Pairs], a: Tensor, b: Tensor, k: int) -> dict[str, Any]:
    """The columns of one solver's row: times where its result is right, else what is wrong."""
    part = part_of(name, len(a), a.shape[-1])
    x, y = a[:part], b[:part]
    begin = time.monotonic()
    values, vectors = solve(x, y, k)
    torch.cuda.synchronize()
    once = time.monotonic() - begin
    eta, skew = accuracy(x[:32], y[:32], values[:32], vectors[:32])
    expected = torch_eigh(a[:1], b[:1], k)[0]
    shift = float(((values[:1] - expected).abs() / expected[:, :1]).max().nan_to_num(nan=1e300))
    own = solve.said if isinstance(solve, Ours) else f", torch {torch.__version__}, cuSOLVER {version()}"
    note = f"residual {eta:.1e} orthonormality {skew:.1e} against eigh {shift:.1e}{own}"
    if not (eta <= 1e-9 and skew <= 1e-8 and shift <= 1e-9):
        return {"error": "gate", "note": note}
    del values, vectors
    repeats = max(1, min(5, int(4.0 / max(once, 1e-4))))
    run = lambda: solve(x, y, k)  # noqa: E731
    columns = common.measure(run, "cuda", repeats=repeats, warmup=int(once < 2.0), seconds=5.0).columns()
    if part < len(a):
        columns |= {name: columns[name] * len(a) / part for name in ("ms", "iqr_ms")}
        columns |= {"basis": "scaled", "peak_mib": None}
        note += f" timed on {part}"
    return columns | {"note": note}


def run_case(record: common.Recorder, case: str, kind: str, chosen: list[str], deadline: float) -> None:
    batch, n, k = (int(part) for part in case.split("x"))
    a, b = pencil(kind, batch, n)
    # Both matrices read once; a Cholesky factor and one product of n x n with n x k.
    work = {"bytes": 2 * 8.0 * batch * n * n, "flops": batch * (n**3 / 3 + 2 * n * n * k)}
    for name, solve in solvers(n).items():
        if chosen and not any(part in name for part in chosen):
            continue
        if time.monotonic() > deadline:
            print(f"{case} {name}: skipped, the time is spent", flush=True)
            continue
        try:
            columns = work | measure(name, solve, a, b, k)
        except Exception as error:  # a peer that cannot take a case is a finding, not the end of the run
            columns = {"error": type(error).__name__, "note": str(error).splitlines()[0][:200]}
            torch.cuda.synchronize()
        record("gevp", name, targets=case, batch=batch, **columns)
        common.free("cuda")


# The model of docs/gevp_cuda.md: products and cycles are counted, the rates are those that comparable kernels reach, the latencies guesses.
PREDICTED = "224x256x16,224x1024x8,224x1024x16,224x1024x32,32x2048x16"
PEAK_BYTES, PEAK_FLOPS = 3.35e12, 60e12  # of the data sheet, for the floor
BYTES, FLOPS = 2.5e12, 30e12  # a second, assumed
LAUNCH, ROUND, SMS = 4e-6, 1e-6, 132  # seconds a launch and a round of Jacobi rotations, assumed; multiprocessors
LAUNCHES_A_STEP, SWEEPS = 27, 8


def counted(a: Tensor, b: Tensor, k: int) -> tuple[int, int, int, int, int]:
    """Block, basis, keep, cycles and products of one pencil by the GPU's shapes, on the CPU."""
    from sst_kernels import _native
    from sst_kernels.gevp.dense import empty_outputs

    n, native = len(a), _native.cpu()
    options, outputs = native.Options.for_problem(n, k, True), empty_outputs((1,), n, k, a.device)
    size = native.workspace_bytes(1, n, options, False, 1)
    memory = torch.empty(size, dtype=torch.uint8)
    where = (a.data_ptr(), n * n, b.data_ptr(), n * n, False, 1, n)
    native.solve_dense(*where, options, *(x.data_ptr() for x in outputs), memory.data_ptr(), size, 1)
    if int(outputs[3]) != 0:
        raise RuntimeError(f"order {n}, k = {k}: status {int(outputs[3])} instead of converged")
    cycles = int(outputs[4])
    products = (options.basis + (cycles - 1) * (options.basis - options.keep)) // options.block
    return options.block, options.basis, options.keep, cycles, products


def seconds(batch: int, n: int, block: int, basis: int, keep: int, cycles: int, products: int) -> dict[str, float]:
    """Each stage by its bytes or flops, whichever takes longer, and its launches."""
    matrix, column, waves = 8.0 * batch * n * n, 8.0 * batch * n, -(-batch // SMS)
    a_step = column * (2 * (basis + keep) + 20 * block) / BYTES + LAUNCHES_A_STEP * LAUNCH
    a_cycle = 2 * column * (basis + 2 * keep) / BYTES + waves * SWEEPS * (basis - 1) * ROUND
    return {
        "screen": 2 * matrix / BYTES,
        "copy, factor": 2 * matrix / BYTES + 0.78 * batch * n**3 / FLOPS + 3 * n / 64 * LAUNCH,
        "products": products * max(2 * matrix / BYTES, 4 * batch * n * n * block / FLOPS),
        "orthonormalise": products * (a_step + 2 * waves * SWEEPS * (block - 1) * ROUND),
        "Ritz, restart": cycles * a_cycle,
        "floor": 2 * matrix / PEAK_BYTES + batch * n**3 / 3 / PEAK_FLOPS,
    }


def predict(cases: str) -> None:
    print(
        f"{BYTES / 1e12:.1f} TB/s, {FLOPS / 1e12:.0f} Tflop/s; {LAUNCH * 1e6:.0f} us a launch, {ROUND * 1e6:.0f} us a round\n"
    )
    stages = list(seconds(*[1] * 7))
    print(f"| case | block, basis, keep | products, cycles | {' | '.join(stages[:-1])} | sum | floor |")
    print("| --- |" + " --- |" * (len(stages) + 3))
    for case, kind in ((c, kind) for c in cases.split(",") for kind in ("decay", "steep")):
        batch, n, k = (int(part) for part in case.split("x"))
        a, b = pencil(kind, 1, n, "cpu", seed=1)
        block, basis, keep, cycles, products = found = counted(a[0], b[0], k)
        *times, floor = (1e3 * x for x in seconds(batch, n, *found).values())
        cells = " | ".join(f"{x:.1f}" for x in (*times, sum(times), floor))
        shape = f"{block}, {basis}, {keep} | {products}, {cycles}"
        print(f"| [{batch}, {n}], k = {k}, {kind} | {shape} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="batch x n x k, comma-separated")
    parser.add_argument("--solvers", default="", help="parts of names, comma-separated; all by default")
    parser.add_argument("--kind", default="decay", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=140.0, help="no solver is started after this")
    parser.add_argument("--out", type=Path, default=common.ROOT / "bench" / "results" / "gevp_cuda.csv")
    parser.add_argument("--predict", action="store_true", help="count and compute instead; needs no GPU")
    options = parser.parse_args()
    if options.predict:
        predict(options.cases or PREDICTED)
        return
    record, deadline = common.Recorder(options.out, "cuda", model=options.kind), time.monotonic() + options.seconds
    for case in (options.cases or CASES).split(","):
        run_case(record, case, options.kind, [part for part in options.solvers.split(",") if part], deadline)


if __name__ == "__main__":
    main()
