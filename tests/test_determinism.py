"""Same inputs, same machine: same bits, in every structure and route, from threads as alone, and in forked children."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import sst_kernels as sst
from sst_kernels.fisher import STRUCTURES
from sst_kernels.gevp.operators import Diagonal, Kronecker, LowRank
from tests.models import tiny_batch, tiny_lora


def accumulated(structure: str) -> sst.Fisher:
    space = "core" if structure in ("full", "lowrank", "kronecker_svd") else "factor"
    options = {"basis": accumulated("kronecker")} if structure == "eigen_kronecker" else {}
    model, generator = tiny_lora(), torch.Generator().manual_seed(5)
    with sst.fisher_accumulate(model, "safety", space=space, structure=structure, **options) as pass_:
        for seed in range(3):
            sst.sequence_nll(model, tiny_batch(4, seed=seed), "mc", generator=generator).backward()
    return pass_.fisher


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_passes_repeat_their_bits(structure):
    (_, first), (_, second) = (accumulated(structure).pack() for _ in range(2))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])


def pencil(n: int, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(batch, n, n + 4, dtype=torch.float64, generator=generator) for _ in range(2))
    return a @ a.mT, b @ b.mT


def problems():
    a, b = pencil(48, 3)
    rows = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    yield "direct", lambda: sst.gevp(a, b, 5, method="direct")
    yield "jacobi_davidson", lambda: sst.gevp(a, b, 2, method="jacobi_davidson")
    yield "single precision", lambda: sst.gevp(a.float(), b.float(), 5, method="direct")
    yield "diagonal", lambda: sst.gevp(Diagonal(a[0, 0].abs()), Diagonal(b[0, 1].abs() + 1), 5)
    yield "kronecker", lambda: sst.gevp(Kronecker(a[0], b[0]), Kronecker(b[1], b[2]), 5)
    yield "split projection", lambda: sst.gevp(LowRank(rows), LowRank(rows.flip(1), 0.5), 8)
    more = torch.randn(72, 100, generator=torch.Generator().manual_seed(2))
    iterated = {"method": "jacobi_davidson"}
    yield "iterated projection", lambda: sst.gevp(LowRank(more), LowRank(more.flip(1), 0.5), 8, **iterated)


def same(a: sst.GEVPResult, b: sst.GEVPResult) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("values", "vectors", "error_bound", "status")
    )


@pytest.mark.parametrize("solve", [pytest.param(s, id=name) for name, s in problems()])
def test_solves_repeat_their_bits_alone_and_in_threads(solve):
    expected = solve()
    assert same(solve(), expected)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: solve(), range(12)):
            assert same(result, expected)


FORKING = """
import multiprocessing, torch, sst_kernels as sst

generator = torch.Generator().manual_seed(0)
a, b = (torch.randn(4, 32, 36, dtype=torch.float64, generator=generator) for _ in range(2))
pencil = a @ a.mT, b @ b.mT


def solve(queue):
    queue.put(sst.gevp(*pencil, 3).values.tolist())


expected = sst.gevp(*pencil, 3).values.tolist()
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
children = [context.Process(target=solve, args=(queue,)) for _ in range(2)]
for child in children:
    child.start()
for child in children:
    child.join(60)
    assert child.exitcode == 0, child.exitcode
assert [queue.get() for _ in children] == [expected, expected]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_children_solve_too():
    """In a process of its own: what other tests leave in torch's BLAS is not what is asked here."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FORKING], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
