"""Top-k generalized eigenproblems on one CPU thread: ours against SciPy, torch, ARPACK, LOBPCG, PRIMME and SLEPc.

Process CPU seconds, best of a few, one thread: wall time on a shared machine says nothing. Every solver asks for 1e-10 by its own
rule; a row carries the relative eigenvalue error against LAPACK, and a row whose error exceeds 1e-8 is marked wrong instead of
timed. Peers that are not installed are left out and named.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python bench/gevp_cpu.py [--n 256,1024] [--crossover]
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
import time
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import scipy
import scipy.linalg as sl
import scipy.sparse.linalg as ssl
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sst_kernels.gevp import gevp

RESULTS = Path(__file__).parent / "results"


def pencil(n: int, kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """FIM-like pencils: "decay" (A of rank n/4 sharing B's power law), "flat" (full rank, other directions), "steep"."""
    rng = np.random.default_rng(seed)
    power = {"decay": 0.8, "flat": 0.25, "steep": 2.0}[kind]
    weights = np.arange(1, n + 1) ** -power
    rows = n if kind == "flat" else n // 4
    turn = np.linalg.qr(rng.standard_normal((n, n)))[0]
    other = np.linalg.qr(rng.standard_normal((n, n)))[0] if kind == "flat" else turn
    gain = rng.standard_normal((rows, n)) * rng.standard_t(5, (rows, 1)) * weights @ other.T
    cost = rng.standard_normal((2 * n, n)) * weights @ turn.T
    a, b = gain.T @ gain / rows, cost.T @ cost / (2 * n)
    b += 1e-3 * np.trace(b) / n * np.eye(n)
    return (a + a.T) / 2, (b + b.T) / 2


def inverse(b: np.ndarray) -> ssl.LinearOperator:
    factor = sl.cho_factor(b, lower=True, check_finite=False)
    solve = lambda x: sl.cho_solve(factor, x, check_finite=False)  # noqa: E731
    return ssl.LinearOperator(b.shape, matvec=solve, matmat=solve, dtype=float)


def arpack(a, b, k):
    return ssl.eigsh(a, k, M=b, Minv=inverse(b), which="LA", tol=1e-10, return_eigenvectors=True)[0]


def lobpcg(a, b, k):
    start = np.random.default_rng(0).standard_normal((len(a), k))
    return ssl.lobpcg(a, start, B=b, M=inverse(b), largest=True, tol=1e-10 * np.linalg.norm(a), maxiter=500)[0]


def torch_eigh(a, b, k):
    factor = torch.linalg.cholesky(torch.from_numpy(b))
    half = torch.linalg.solve_triangular(factor, torch.from_numpy(a), upper=False)
    values, y = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
    torch.linalg.solve_triangular(factor.mT, y[:, -k:], upper=True)
    return values[-k:].numpy()


def primme_eigsh(a, b, k):
    import primme

    return primme.eigsh(a, k, M=b, Minv=inverse(b), OPinv=inverse(b), which="LA", tol=1e-10, maxBlockSize=8)[0]


def ours(method):
    return lambda a, b, k: gevp(torch.from_numpy(a), torch.from_numpy(b), k, method=method).values.numpy()


def solvers() -> dict:
    rows = {
        "sst auto": ours("auto"),
        "sst direct": ours("direct"),
        "sst jacobi_davidson": ours("jacobi_davidson"),
        "scipy eigh gvx": lambda a, b, k: sl.eigh(a, b, subset_by_index=[len(a) - k, len(a) - 1])[0],
        "torch cholesky+eigh": torch_eigh,
        "arpack, cholesky": arpack,
        "scipy lobpcg, cholesky": lobpcg,
    }
    if find_spec("primme"):
        rows["primme, cholesky, block 8"] = primme_eigsh
    return rows


def seconds(solve, a, b, k, repeats: int) -> tuple[float, np.ndarray]:
    best = np.inf
    for _ in range(repeats):
        start = time.process_time()
        values = solve(a, b, k)
        best = min(best, time.process_time() - start)
    return best, np.sort(values)[::-1]


def header() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": date.today().isoformat(),
        "commit": commit,
        "cpu": platform.processor() or platform.machine(),
        "scipy": scipy.__version__,
        "torch": torch.__version__,
    }


def measure(orders: list[int], ks: list[int]) -> list[dict]:
    table, meta = [], header()
    for n in orders:
        for kind in ("decay", "flat", "steep"):
            a, b = pencil(n, kind)
            reference = sl.eigh(a, b, eigvals_only=True)[::-1]
            for k in ks:
                for name, solve in solvers().items():
                    if n >= 2048 and name.startswith(("torch", "scipy lobpcg")) and k > 8:
                        continue
                    spent, values = seconds(solve, a, b, k, 5 if n <= 512 else 2)
                    error = np.abs(values / reference[:k] - 1).max()
                    row = {"pencil": kind, "n": n, "k": k, "solver": name, "cpu_seconds": f"{spent:.5f}"}
                    row |= {"error": f"{error:.1e}", "verdict": "wrong" if error > 1e-8 else "ok"}
                    table.append(row | meta)
                    print(*row.values(), flush=True)
    return table


def crossover(orders: list[int], ks: list[int]) -> list[dict]:
    table, meta = [], header()
    for k in ks:
        for n in orders:
            for kind in ("decay", "flat"):
                a, b = pencil(n, kind)
                spent = {method: seconds(ours(method), a, b, k, 7)[0] for method in ("direct", "jacobi_davidson")}
                row = {"device": "cpu", "pencil": kind, "n": n, "k": k} | {
                    name: f"{s:.5f}" for name, s in spent.items()
                }
                table.append(row | meta)
                print(*row.values(), flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", default="64,128,256,512,1024,2048")
    parser.add_argument("--k", default="8,16,32")
    parser.add_argument(
        "--crossover", action="store_true", help="time the two routes only; bench/results/gevp_crossover.csv"
    )
    arguments = parser.parse_args()
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        raise SystemExit(
            "set OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1: process time over several threads is not comparable"
        )
    torch.set_num_threads(1)
    orders, ks = ([int(x) for x in text.split(",")] for text in (arguments.n, arguments.k))
    table = crossover(orders, ks) if arguments.crossover else measure(orders, ks)
    target = RESULTS / ("gevp_crossover.csv" if arguments.crossover else "gevp_cpu.csv")
    with target.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, table[0])
        writer.writeheader()
        writer.writerows(table)
    print("wrote", target)


if __name__ == "__main__":
    main()
