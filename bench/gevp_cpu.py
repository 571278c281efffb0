"""Top-k generalized eigenproblems on one CPU thread: ours against SciPy, torch, ARPACK, LOBPCG, PRIMME and SLEPc.

A row is one solver on one pencil: process CPU seconds (the wall clock of a shared machine measures its neighbours), the contestants in
turn and the least of the rounds, or one call where that took ten times as long as the fastest; peak memory above what was held before; the
relative eigenvalue error against LAPACK and the largest sqrt(r' B^-1 r) over |lambda_1|. Every solver is asked for 1e-10 by its own rule and
judged by what it attained: above 1e-8 its verdict is `wrong`. Peers that are not installed are left out and named. A batch is one call where
a solver has one, else a loop.

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
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
TOLERANCE = 1e-10  # asked for
Array = np.ndarray
Pencil = tuple[Array, Array]
Pairs = tuple[Any, Any]
Solver = Callable[[Pencil, int], list[Pairs]]  # of a stacked pencil [batch, n, n]


def pencil(n: int, kind: str, seed: int = 0) -> Pencil:
    """FIM-like pencils: "decay" (A of rank n/4 sharing B's power law), "flat" (full rank, other directions), "steep"."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, n + 1) ** -POWERS[kind]
    rows = n if kind == "flat" else n // 4
    turn = np.linalg.qr(rng.standard_normal((n, n)))[0]
    other = np.linalg.qr(rng.standard_normal((n, n)))[0] if kind == "flat" else turn
    gain = rng.standard_normal((rows, n)) * rng.standard_t(5, (rows, 1)) * weights @ other.T
    return _from_rows(gain, rng.standard_normal((2 * n, n)) * weights @ turn.T)


def fisher_pencil(gain: Array, cost: Array, n: int, seed: int) -> Pencil:
    """n neighbouring coordinates (whole modules) of two saved Fishers, the `seed`-th such window."""
    first = (seed * n) % (gain.shape[1] - n + 1)
    return _from_rows(gain[:, first : first + n], cost[:, first : first + n])


def _from_rows(gain: Array, cost: Array) -> Pencil:
    a, b = (rows.T @ rows / len(rows) for rows in (gain, cost))
    b += 1e-3 * np.trace(b) / len(b) * np.eye(len(b))
    return (a + a.T) / 2, (b + b.T) / 2


def pencils(orders: list[int], batches: list[int], rows: list[Array]) -> Iterable[tuple[str, int, int, Pencil]]:
    for batch in batches:
        for n in (n for n in orders if batch == 1 or n <= 1024):
            makers = {f: partial(pencil, n, f) for f in FAMILIES[: 3 if batch == 1 else 2 if n <= 256 else 1]}
            if rows and n <= (1024 if batch == 1 else 256):
                makers["fisher"] = partial(fisher_pencil, *rows, n)
            for family, make in makers.items():
                yield family, n, batch, tuple(np.stack(side) for side in zip(*(make(seed=i) for i in range(batch))))


def inverse(b: Array) -> ssl.LinearOperator:
    solve = partial(sl.cho_solve, sl.cho_factor(b, lower=True, check_finite=False), check_finite=False)
    return ssl.LinearOperator(b.shape, matvec=solve, matmat=solve, dtype=float)


def lobpcg(a: Array, b: Array, k: int) -> Pairs:
    start, given = np.random.default_rng(0).standard_normal((len(a), k)), {"B": b, "M": inverse(b), "largest": True}
    with warnings.catch_warnings():  # what it did not reach is in the row
        warnings.simplefilter("ignore")
        return ssl.lobpcg(a, start, tol=TOLERANCE * np.linalg.norm(a), maxiter=500, **given)


def torch_lobpcg(a: Array, b: Array, k: int) -> Pairs:
    a, b = map(torch.from_numpy, (a, b))
    start = torch.randn(len(a), k, dtype=a.dtype, generator=torch.Generator().manual_seed(0))
    solve = torch.cholesky_inverse(torch.linalg.cholesky(b))  # it takes a preconditioner as a matrix only
    values, vectors = torch.lobpcg(a, k, b, start, iK=solve, niter=500, tol=TOLERANCE, largest=True)
    return values.numpy(), vectors.numpy()


def primme_eigsh(a: Array, b: Array, k: int) -> Pairs:
    import primme

    return primme.eigsh(a, k, M=b, Minv=inverse(b), OPinv=inverse(b), which="LA", tol=TOLERANCE, maxBlockSize=8)


def slepc_eigsh(a: Array, b: Array, k: int) -> Pairs:
    """SLEPc's default solver, Krylov–Schur on B⁻¹A in the B inner product, B factored by PETSc's dense Cholesky."""
    from petsc4py import PETSc
    from slepc4py import SLEPc

    matrices = [PETSc.Mat().createDense(x.shape, array=x, comm=PETSc.COMM_SELF) for x in (a, b)]
    solver = SLEPc.EPS().create(PETSc.COMM_SELF)
    solver.setOperators(*matrices)
    solver.setProblemType(SLEPc.EPS.ProblemType.GHEP)
    solver.setType(SLEPc.EPS.Type.KRYLOVSCHUR)
    solver.setWhichEigenpairs(SLEPc.EPS.Which.LARGEST_REAL)
    solver.setDimensions(k)
    solver.setTolerances(TOLERANCE, 500)
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


def in_torch(solve: Callable[..., Pairs]) -> Solver:
    """Of a solver of batches of torch pencils."""

    def run(stacked: Pencil, k: int) -> list[Pairs]:
        values, vectors = solve(*map(torch.from_numpy, stacked), k)
        return list(zip(values.numpy(), vectors.numpy()))

    return run


def ours(method: str) -> Solver:
    def solve(a: torch.Tensor, b: torch.Tensor, k: int) -> Pairs:
        result = gevp(a, b, k, method=method)
        return result.values, result.vectors

    return in_torch(solve)


OPTIONAL: dict[str, tuple[str, Callable[[Array, Array, int], Pairs]]] = {
    "slepc krylov-schur, cholesky": ("slepc4py", slepc_eigsh), "primme, cholesky, block 8": ("primme", primme_eigsh),
}  # fmt: skip


def solvers() -> dict[str, Solver]:
    alone: dict[str, Callable[[Array, Array, int], Pairs]] = {
        "scipy eigh gvx": lambda a, b, k: sl.eigh(a, b, subset_by_index=[len(a) - k, len(a) - 1]),
        "scipy eigh gvd": lambda a, b, k: tuple(x[..., -k:] for x in sl.eigh(a, b, driver="gvd")),
        "arpack, cholesky": lambda a, b, k: ssl.eigsh(a, k, M=b, Minv=inverse(b), which="LA", tol=TOLERANCE),
        "scipy lobpcg, cholesky": lobpcg,
        "torch lobpcg, inverse": torch_lobpcg,
    }
    alone |= {name: solve for name, (module, solve) in OPTIONAL.items() if find_spec(module)}
    looped = {name: lambda stacked, k, s=s: [s(a, b, k) for a, b in zip(*stacked)] for name, s in alone.items()}
    return {"sst auto": ours("auto"), "torch cholesky+eigh": in_torch(torch_eigh)} | looped


def peak_of(run: Callable[[], Any]) -> float:
    """Most resident memory of a call, above what was resident before, in MiB (Linux; freed heap is returned first)."""
    lines = lambda: Path("/proc/self/status").read_text().splitlines()  # noqa: E731
    read = lambda field: next(int(line.split()[1]) for line in lines() if line.startswith(field))  # noqa: E731
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS")
    run()
    return max(0.0, (read("VmHWM") - before) / 1024)


def attained(stacked: Pencil, pairs: list[Pairs], references: list[Array], k: int) -> tuple[float, float]:
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
    """Least process ms of each over `rounds` rounds in which they take turns; a turn begins with a call that is not timed."""
    once = stopwatch("cpu")
    taken = in_turn(contestants, "cpu", rounds, warmup=0, clock=lambda run: (run(), once(run))[1])
    return {name: min(measured.times) for name, measured in taken.items()}


def measure(found: Iterable[tuple[str, int, int, Pencil]], ks: list[int]) -> Iterable[dict[str, object]]:
    for family, n, batch, stacked in found:
        references = [sl.eigh(a, b, eigvals_only=True)[::-1] for a, b in zip(*stacked)]
        large = n >= 2048 or n * batch > 4096  # the others are far behind at half of that
        for k in ks if batch == 1 or n <= 128 else [k for k in ks if k == 16]:
            if any(values[k - 1] < 1e-12 * values[0] for values in references):
                continue  # beyond the rank of A an eigenvalue has no relative error
            runs = {
                name: partial(solve, stacked, k)
                for name, solve in solvers().items()
                if name.startswith(CONTENDERS) or not large
            }
            if n > 256 or batch > 1 or n < 3 * k:  # a hundred times as long as the others; refused
                runs.pop("torch lobpcg, inverse", None)
            answers = {name: run() for name, run in runs.items()}
            ms = {name: stopwatch("cpu")(run) for name, run in runs.items()}
            peaks = {name: peak_of(run) for name, run in runs.items()}
            rounds = 15 if n * batch <= 128 else 5 if n * batch <= 512 else 1 if n * batch >= 32768 or n >= 1024 else 2
            ms |= timed({name: run for name, run in runs.items() if ms[name] < 10 * min(ms.values())}, rounds)
            for name, pairs in answers.items():
                error, residual = attained(stacked, pairs, references, k)
                row = {"pencil": family, "n": n, "batch": batch, "k": k, "solver": name, "cpu_ms": f"{ms[name]:.3f}"}
                row |= {"peak_mib": f"{peaks[name]:.2f}", "error": f"{error:.1e}", "residual": f"{residual:.1e}"}
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
                times = timed(runs, 15 if n <= 256 else 4 if n <= 1024 else 1)
                yield {"pencil": family, "n": n, "batch": 1, "k": k} | {f"{r}_ms": f"{t:.3f}" for r, t in times.items()}


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
    about = {key: machine("cpu")[key] for key in ("device", "versions", "commit", "date")}
    for peer in ("primme", "slepc4py"):
        with suppress(PackageNotFoundError):
            about["versions"] += f" {peer} {version(peer)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        for number, row in enumerate(rows):
            writer = csv.DictWriter(stream, [*row, *about], lineterminator="\n")
            if number == 0:
                writer.writeheader()
            writer.writerow(row | about)
            stream.flush()
            print(*row.values(), flush=True)
    left_out = [module for module, _ in OPTIONAL.values() if not find_spec(module)]
    print("wrote", path, "without", ", ".join(left_out) or "nothing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", default="64,128,256,512,1024,2048")
    parser.add_argument("--k", default="8,16,32")
    parser.add_argument("--batch", default="1,32", help="batches are measured up to n = 1024, above 128 for k = 16")
    parser.add_argument("--fishers", nargs=2, default=(), metavar=("GAIN", "COST"))
    parser.add_argument("--crossover", choices=KINDS)
    parser.add_argument("--derive", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    orders, ks, batches = ([int(x) for x in text.split(",")] for text in (options.n, options.k, options.batch))
    if not options.derive:
        if {os.environ.get(f"{name}_NUM_THREADS") for name in ("OMP", "OPENBLAS")} != {"1"}:
            raise SystemExit("set OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1: process time over threads compares nothing")
        torch.set_num_threads(1)
        if not options.crossover:
            rows = [Fisher.load(path).rows().double().numpy() for path in options.fishers]
            write(options.out / "gevp_cpu.csv", measure(pencils(orders, batches, rows), ks))
            return
        write(options.out / KINDS[options.crossover][1], crossover(options.crossover, orders, ks))
    read = lambda name: csv.DictReader((options.out / name).read_text(encoding="utf-8").splitlines())  # noqa: E731
    store({kind: derive(read(name)) for kind, (_, name) in KINDS.items()})


if __name__ == "__main__":
    main()
