"""Top-k generalized eigenproblems on one CPU thread: ours against SciPy, torch, ARPACK, LOBPCG, PRIMME and SLEPc.

A row is one solver on one pencil: process CPU seconds (the wall clock of a shared machine measures its neighbours), the contestants in
turn and the least of the rounds, or one call where that took ten times as long as the fastest; peak memory above what was held before; the relative eigenvalue error against LAPACK and the largest
sqrt(r' B^-1 r) over |lambda_1|. Every solver is asked for 1e-10 by its own rule and judged by what it attained: above 1e-8 its verdict
is `wrong`. Peers that are not installed are left out and named. A batch is one call where a solver has one, else a loop.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m bench.gevp_cpu [--n 256,1024] [--k 8,16] [--batch 1,32]
        [--fishers GAIN.safetensors COST.safetensors]      Fishers in core space, of which leading columns make the family `fisher`
    ... python -m bench.gevp_cpu --crossover single        times the two routes on dense pencils, or on the matrices that low-rank
        pencils come down to ("projected"); writes gevp_crossover*.csv and crossover.json
    python -m bench.gevp_cpu --derive                      crossover.json from the csv files that are there
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import scipy.linalg as sl
import scipy.sparse.linalg as ssl
import torch

from bench.common import ROOT, in_turn, machine, stopwatch
from bench.gevp_cuda import torch_eigh
from sst_kernels import Fisher
from sst_kernels.gevp import Settings, gevp
from sst_kernels.gevp.lowrank import top_pairs

RESULTS = ROOT / "bench" / "results"
TABLE = ROOT / "sst_kernels" / "gevp" / "crossover.json"
POWERS = {"decay": 0.8, "flat": 0.25, "steep": 2.0}
FAMILIES = tuple(POWERS)
CONTENDERS = ("sst", "scipy eigh gvx", "arpack", "primme", "slepc")
Pencil = tuple[np.ndarray, np.ndarray]
Pairs = tuple[np.ndarray, np.ndarray]


def pencil(n: int, kind: str, seed: int = 0) -> Pencil:
    """FIM-like pencils: "decay" (A of rank n/4 sharing B's power law), "flat" (full rank, other directions), "steep"."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, n + 1) ** -POWERS[kind]
    rows = n if kind == "flat" else n // 4
    turn = np.linalg.qr(rng.standard_normal((n, n)))[0]
    other = np.linalg.qr(rng.standard_normal((n, n)))[0] if kind == "flat" else turn
    gain = rng.standard_normal((rows, n)) * rng.standard_t(5, (rows, 1)) * weights @ other.T
    cost = rng.standard_normal((2 * n, n)) * weights @ turn.T
    return _from_rows(gain, cost)


def fisher_pencil(gain: np.ndarray, cost: np.ndarray, n: int, seed: int) -> Pencil:
    """n neighbouring coordinates (whole modules) of two saved Fishers, the `seed`-th such window."""
    first = (seed * n) % (gain.shape[1] - n + 1)
    return _from_rows(gain[:, first : first + n], cost[:, first : first + n])


def _from_rows(gain: np.ndarray, cost: np.ndarray) -> Pencil:
    a, b = (rows.T @ rows / len(rows) for rows in (gain, cost))
    b += 1e-3 * np.trace(b) / len(b) * np.eye(len(b))
    return (a + a.T) / 2, (b + b.T) / 2


def inverse(b: np.ndarray) -> ssl.LinearOperator:
    factor = sl.cho_factor(b, lower=True, check_finite=False)
    solve = lambda x: sl.cho_solve(factor, x, check_finite=False)  # noqa: E731
    return ssl.LinearOperator(b.shape, matvec=solve, matmat=solve, dtype=float)


def primme_eigsh(a: np.ndarray, b: np.ndarray, k: int) -> Pairs:
    import primme

    return primme.eigsh(a, k, M=b, Minv=inverse(b), OPinv=inverse(b), which="LA", tol=1e-10, maxBlockSize=8)


def slepc_eigsh(a: np.ndarray, b: np.ndarray, k: int) -> Pairs:
    """SLEPc's default solver, Krylov–Schur on B⁻¹A in the B inner product, B factored by PETSc's dense Cholesky."""
    from petsc4py import PETSc
    from slepc4py import SLEPc

    alone = PETSc.COMM_SELF
    matrices = [PETSc.Mat().createDense(x.shape, array=x, comm=alone) for x in (a, b)]
    solver = SLEPc.EPS().create(alone)
    solver.setOperators(*matrices)
    solver.setProblemType(SLEPc.EPS.ProblemType.GHEP)
    solver.setType(SLEPc.EPS.Type.KRYLOVSCHUR)
    solver.setWhichEigenpairs(SLEPc.EPS.Which.LARGEST_REAL)
    solver.setDimensions(k)
    solver.setTolerances(1e-10, 500)
    inner = solver.getST().getKSP()
    inner.setType("preonly")
    inner.getPC().setType("cholesky")
    solver.solve()
    vector = matrices[0].createVecRight()
    found = [(solver.getEigenpair(i, vector).real, vector.getArray().copy()) for i in range(solver.getConverged())[:k]]
    for thing in (solver, vector, *matrices):
        thing.destroy()
    values, vectors = zip(*found)
    return np.array(values), np.stack(vectors, 1)


def looped(solve: Callable[[np.ndarray, np.ndarray, int], Pairs]) -> Callable[[Pencil, int], list[Pairs]]:
    return lambda stacked, k: [solve(a, b, k) for a, b in zip(*stacked)]


def lobpcg(a: np.ndarray, b: np.ndarray, k: int) -> Pairs:
    start, given = np.random.default_rng(0).standard_normal((len(a), k)), {"B": b, "M": inverse(b), "largest": True}
    with warnings.catch_warnings():  # what it did not reach is in the row
        warnings.simplefilter("ignore")
        return ssl.lobpcg(a, start, tol=1e-10 * np.linalg.norm(a), maxiter=500, **given)


def torch_lobpcg(a: np.ndarray, b: np.ndarray, k: int) -> Pairs:
    a, b = map(torch.from_numpy, (a, b))
    start = torch.randn(len(a), k, dtype=a.dtype, generator=torch.Generator().manual_seed(0))
    solve = torch.cholesky_inverse(torch.linalg.cholesky(b))  # it takes a preconditioner as a matrix only
    return _pairs(*torch.lobpcg(a, k, b, start, iK=solve, niter=500, tol=1e-10, largest=True))


def torch_batched(solve: Callable[..., Pairs]) -> Callable[[Pencil, int], list[Pairs]]:
    """Of a solver of stacked torch pencils."""
    return lambda stacked, k: list(zip(*_pairs(*solve(*map(torch.from_numpy, stacked), k))))


def ours(method: str) -> Callable[[Pencil, int], list[Pairs]]:
    def solve(a: torch.Tensor, b: torch.Tensor, k: int) -> Pairs:
        result = gevp(a, b, k, method=method)
        return result.values, result.vectors

    return torch_batched(solve)


def _pairs(values: torch.Tensor, vectors: torch.Tensor) -> Pairs:
    return values.numpy(), vectors.numpy()


def solvers() -> dict[str, Callable[[Pencil, int], list[Pairs]]]:
    eigh = lambda a, b, k: sl.eigh(a, b, subset_by_index=[len(a) - k, len(a) - 1])  # noqa: E731
    every = lambda a, b, k: tuple(x[..., -k:] for x in sl.eigh(a, b, driver="gvd"))  # noqa: E731
    arpack = lambda a, b, k: ssl.eigsh(a, k, M=b, Minv=inverse(b), which="LA", tol=1e-10)  # noqa: E731
    one_by_one = {
        "scipy eigh gvx": eigh, "scipy eigh gvd": every, "arpack, cholesky": arpack, "scipy lobpcg, cholesky": lobpcg,
        "torch lobpcg, inverse": torch_lobpcg,
    }  # fmt: skip
    one_by_one |= {name: solve for name, (module, solve) in OPTIONAL.items() if find_spec(module)}
    table = {"sst auto": ours("auto"), "torch cholesky+eigh": torch_batched(torch_eigh)}
    return table | {name: looped(solve) for name, solve in one_by_one.items()}


OPTIONAL = {
    "slepc krylov-schur, cholesky": ("slepc4py", slepc_eigsh), "primme, cholesky, block 8": ("primme", primme_eigsh),
}  # fmt: skip


class Peak:
    """Most resident memory since the start, above what was resident then, in MiB (Linux; freed heap is returned first)."""

    def __init__(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._read("VmRSS")

    def mib(self) -> float:
        return max(0.0, (self._read("VmHWM") - self.before) / 1024)

    @staticmethod
    def _read(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))


def attained(stacked: Pencil, pairs: list[Pairs], references: list[np.ndarray], k: int) -> tuple[float, float]:
    """Largest relative eigenvalue error and largest sqrt(r' B^-1 r) / |lambda_1| over the batch."""
    error = residual = 0.0
    for a, b, (values, vectors), reference in zip(*stacked, pairs, references):
        order = np.argsort(values)[::-1]
        values, vectors = values[order], vectors[:, order]
        norms = np.sqrt(np.sum(vectors * (b @ vectors), axis=0))
        r = sl.solve_triangular(sl.cholesky(b, lower=True), a @ vectors - b @ vectors * values, lower=True) / norms
        error = max(error, np.abs(values / reference[:k] - 1).max())
        residual = max(residual, np.sqrt((r * r).sum(0)).max() / abs(reference[0]))
    return error, residual


def timed(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least process seconds of each over `rounds` rounds in which they take turns; a turn begins with a call that is not timed."""
    once = stopwatch("cpu")
    taken = in_turn(contestants, "cpu", rounds, warmup=0, clock=lambda run: (run(), once(run))[1])
    return {name: min(measured.times) / 1e3 for name, measured in taken.items()}


def measure(pencils: Iterable[tuple[str, int, int, Pencil]], ks: list[int]) -> Iterable[dict[str, object]]:
    for family, n, batch, stacked in pencils:
        references = [sl.eigh(a, b, eigvals_only=True)[::-1] for a, b in zip(*stacked)]
        large = n >= 2048 or n * batch > 4096  # the others are far behind at half of that
        for k in ks if batch == 1 or n <= 128 else [k for k in ks if k == 16]:
            if any(values[k - 1] < 1e-12 * values[0] for values in references):
                continue  # beyond the rank of A an eigenvalue has no relative error
            chosen = solvers()
            if large:
                chosen = {name: solve for name, solve in chosen.items() if name.startswith(CONTENDERS)}
            if n > 256 or batch > 1 or n < 3 * k:  # a hundred times as long as the others; refused
                chosen.pop("torch lobpcg, inverse", None)
            answers, peaks, seconds = {}, {}, {}
            for name, solve in chosen.items():
                solve(stacked, k)
                peak = Peak()
                start = time.process_time()
                answers[name] = solve(stacked, k)
                seconds[name] = time.process_time() - start
                peaks[name] = peak.mib()
            rounds = 15 if n * batch <= 128 else 5 if n * batch <= 512 else 1 if n * batch >= 32768 or n >= 1024 else 2
            near = [name for name in chosen if seconds[name] < 10 * min(seconds.values())]
            seconds |= timed({name: partial(chosen[name], stacked, k) for name in near}, rounds)
            for name in chosen:
                error, residual = attained(stacked, answers[name], references, k)
                row = {"pencil": family, "n": n, "batch": batch, "k": k, "solver": name}
                row |= {"cpu_ms": f"{1e3 * seconds[name]:.3f}", "peak_mib": f"{peaks[name]:.2f}"}
                row |= {"error": f"{error:.1e}", "residual": f"{residual:.1e}"}
                yield row | {"verdict": "wrong" if error > 1e-8 else "ok"}


def single(n: int, family: str) -> Callable[[int, str], object]:
    """A dense pencil, as a solve of k pairs by a route."""
    stacked = tuple(x[None] for x in pencil(n, family))
    return lambda k, route: ours(route)(stacked, k)


def projected(p: int, family: str) -> Callable[[int, str], object]:
    """What a pencil with p gain rows comes down to: U Uᵀ of rows with 4p columns that decay as those of `pencil` do."""
    weights = torch.arange(1, 4 * p + 1, dtype=torch.float64) ** -POWERS[family]
    rows = torch.randn(p, 4 * p, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * weights
    matrix = rows @ rows.mT
    return lambda k, route: top_pairs(matrix, k, Settings(method=route))


KINDS = {"single": (single, "gevp_crossover.csv"), "projected": (projected, "gevp_crossover_projected.csv")}


def crossover(kind: str, orders: list[int], ks: list[int]) -> Iterable[dict[str, object]]:
    for n in orders:
        for family in FAMILIES[:2]:
            solve = KINDS[kind][0](n, family)
            for k in ks:
                runs = {route: partial(solve, k, route) for route in ("direct", "jacobi_davidson")}
                seconds = timed(runs, 15 if n <= 256 else 4 if n <= 1024 else 1)
                times = {f"{route}_ms": f"{1e3 * spent:.3f}" for route, spent in seconds.items()}
                yield {"pencil": family, "n": n, "batch": 1, "k": k} | times


def derive(rows: Iterable[dict[str, str]]) -> list[list[int]]:
    """[[k, order], ...]: from `order` on, at every order measured, iterating took no longer than the direct route in the geometric mean
    over the families, and in none a tenth longer; twice the largest order measured where it never did."""
    gain: dict[tuple[int, int], list[float]] = defaultdict(list)
    for row in rows:
        gain[int(row["k"]), int(row["n"])].append(np.log(float(row["direct_ms"]) / float(row["jacobi_davidson_ms"])))
    table = []
    for k in sorted({k for k, _ in gain}):
        orders = sorted((n for own, n in gain if own == k), reverse=True)
        order = 2 * orders[0]
        for n in orders:
            if np.mean(gain[k, n]) < 0 or min(gain[k, n]) < -np.log(1.1):
                break
            order = n
        table.append([k, order])
    return table


def store(tables: dict[str, list[list[int]]]) -> None:
    kept = json.loads(TABLE.read_text()) | {"cpu": tables}
    lines = (f"  {json.dumps(device)}: {json.dumps(kinds)}" for device, kinds in sorted(kept.items()))
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print("wrote", TABLE, kept["cpu"])


def write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    about = machine("cpu")
    for peer in ("primme", "slepc4py"):
        with suppress(PackageNotFoundError):
            about["versions"] += f" {peer} {version(peer)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = None
        for row in rows:
            row |= {key: about[key] for key in ("device", "versions", "commit", "date")}
            if writer is None:
                writer = csv.DictWriter(stream, row, lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
            stream.flush()
            print(*list(row.values())[:-4], flush=True)
    left_out = [module for module, _ in OPTIONAL.values() if not find_spec(module)]
    print("wrote", path, "without", ", ".join(left_out) or "nothing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", default="64,128,256,512,1024,2048")
    parser.add_argument("--k", default="8,16,32")
    parser.add_argument("--batch", default="1,32", help="batches are measured up to n = 1024, above 128 for k = 16")
    parser.add_argument("--fishers", nargs=2, metavar=("GAIN", "COST"))
    parser.add_argument("--crossover", choices=("single", "projected"))
    parser.add_argument("--derive", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    orders, ks, batches = ([int(x) for x in text.split(",")] for text in (arguments.n, arguments.k, arguments.batch))
    if not arguments.derive:
        if os.environ.get("OPENBLAS_NUM_THREADS") != "1" or os.environ.get("OMP_NUM_THREADS") != "1":
            raise SystemExit(
                "set OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1: process time over several threads compares nothing"
            )
        torch.set_num_threads(1)
        if not arguments.crossover:
            rows = [Fisher.load(path).rows().double().numpy() for path in arguments.fishers or ()]
            return write(arguments.out / "gevp_cpu.csv", measure(_pencils(orders, batches, rows), ks))
        write(arguments.out / KINDS[arguments.crossover][1], crossover(arguments.crossover, orders, ks))
    store(
        {
            kind: derive(csv.DictReader((arguments.out / name).open(encoding="utf-8")))
            for kind, (_, name) in KINDS.items()
        }
    )


def _pencils(orders: list[int], batches: list[int], rows: list[np.ndarray]) -> Iterable[tuple[str, int, int, Pencil]]:
    for batch in batches:
        for n in orders:
            if batch > 1 and n > 1024:
                continue
            for family in FAMILIES[: 3 if batch == 1 else 2 if n <= 256 else 1]:
                several = (pencil(n, family, seed) for seed in range(batch))
                yield family, n, batch, tuple(np.stack(side) for side in zip(*several))
            if rows and (n <= 1024 if batch == 1 else n <= 256):
                several = (fisher_pencil(*rows, n, seed) for seed in range(batch))
                yield "fisher", n, batch, tuple(np.stack(side) for side in zip(*several))


if __name__ == "__main__":
    main()
