"""`memory_budget`: the same bits in pieces, a peak that stays below it, and refusals that say what would fit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sst_kernels.gevp import Diagonal, GEVPStatus, LowRank, gevp, stored


def pencils(*batch: int, n: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    x, y = torch.randn(2, *batch, n, n, dtype=dtype, generator=generator).unbind()
    return x @ x.mT, y @ y.mT + torch.eye(n, dtype=dtype)


def skewed(batch: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some problems with the asymmetry of float32 sums, one with a real one, one with a NaN."""
    a, b = pencils(batch, n=n, dtype=torch.float32)
    a[::2, 0, 1] *= 1 + 1e-6
    a[3, 0, 1] += a[3, 0, 0]
    b[4, 1, 1] = torch.nan
    return a, b


def single_and_double(batch: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = pencils(batch, n=n)
    return a.float(), b


BATCHES = {
    "packed": lambda n: pencils(9, n=n),
    "half": lambda n: tuple((x / 64).half() for x in pencils(9, n=n, dtype=torch.float32)),
    "mixed": lambda n: single_and_double(9, n),
    "transposed": lambda n: tuple(x.mT for x in pencils(9, n=n)),
    "expanded": lambda n: (pencils(9, n=n)[0], pencils(n=n)[1].expand(9, n, n)),
    "two dimensions": lambda n: pencils(3, 3, n=n),
    "two dimensions apart": lambda n: tuple(x.transpose(0, 1) for x in pencils(3, 4, n=n)),
    "skewed": lambda n: skewed(20, n),
    "list": lambda n: tuple([*x, y] for x, y in zip(pencils(9, n=n), pencils(n=n // 2))),
    "empty": lambda n: pencils(0, n=n),
}


@pytest.mark.parametrize("method", ["direct", "jacobi_davidson"])
@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("case", BATCHES)
def test_pieces_have_the_bits_of_the_whole(case, damping, method, monkeypatch):
    a, b = BATCHES[case](40)
    whole = gevp(a, b, 3, method=method, damping=damping)
    sizes = []

    def watched(a, *rest, solve=stored.gevp_dense):
        sizes.append(a.shape[:-2].numel())
        return solve(a, *rest)

    monkeypatch.setattr(stored, "gevp_dense", watched)
    pieces = gevp(a, b, 3, method=method, damping=damping, memory_budget=300_000)
    problems = 20 if case == "skewed" else 9
    assert case == "empty" or max(sizes) < problems <= sum(sizes)
    for one, other in zip(*(r if isinstance(r, list) else [r] for r in (whole, pieces)), strict=True):
        for name in ("values", "vectors", "error_bound", "status", "cycles"):
            assert torch.equal(getattr(one, name).nan_to_num(-7), getattr(other, name).nan_to_num(-7)), name
        assert one.route == other.route
    if case == "skewed":
        assert pieces.statuses()[3:5] == [GEVPStatus.not_symmetric, GEVPStatus.non_finite]


MEASURE = """
import json, os, sys
from pathlib import Path
import torch
from sst_kernels.gevp import gevp

def kilobytes(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))

def grown(solve):
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    solve()
    return 1024 * (kilobytes("VmHWM") - before)

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # Linux counts pages core by core, and adds that up when it likes
measured = []
for method, k, dtype in json.loads(sys.argv[2]):
    a, b = torch.randn(2, 40, 256, 256, dtype=getattr(torch, dtype)).unbind()
    a, b = a @ a.mT, b @ b.mT
    a[:, 0, 1] *= 1 + (1e-7 if dtype == "float64" else 1e-6)
    solve = lambda budget: gevp(a, b, k, method=method, damping=0.1, memory_budget=budget).raise_if_failed()
    solve(int(sys.argv[1]))
    measured.append([grown(lambda: solve(budget)) for budget in (int(sys.argv[1]), None)])
print(json.dumps(measured))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
def test_resident_memory_stays_below_the_budget():
    """In a process whose allocator gives memory back at once: glibc's heap keeps holes."""
    budget, cases = 8 << 20, [("direct", 4, "float64"), ("direct", 200, "float32"), ("jacobi_davidson", 4, "float64")]
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, str(budget), json.dumps(cases)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=True)
    for (_, k, _), (within, without) in zip(cases, json.loads(done.stdout), strict=True):
        result = 40 * 8 * (k * 258 + 1)
        assert within <= budget + result + (1 << 19)  # pages, and what the allocators round up
        assert without > 4 * budget


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["direct", "jacobi_davidson"])
def test_device_memory_stays_below_the_budget(method):
    a, b = (x.cuda() for x in pencils(40, n=256))
    whole = gevp(a, b, 4, method=method, damping=0.1)
    budget = torch.cuda.max_memory_allocated() // 4
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pieces = gevp(a, b, 4, method=method, damping=0.1, memory_budget=budget)
    assert torch.cuda.max_memory_allocated() - before <= budget + 40 * 8 * (4 * 258 + 1) + (1 << 16)
    assert torch.equal(pieces.values, whole.values)
    assert torch.equal(pieces.vectors, whole.vectors)


def test_a_budget_below_one_problem_names_what_would_fit():
    a, b = pencils(2, n=200)
    with pytest.raises(
        MemoryError, match=r"order 200 takes up to .* memory_budget is 1\.70 MiB; these would fit: method=\"jac"
    ):
        gevp(a, b, 4, method="direct", memory_budget=int(1.7 * 2**20))
    with pytest.raises(MemoryError, match=r"give it at least") as refused:
        gevp(a, b, 4, method="direct", memory_budget=1000)
    enough, least = map(int, re.findall(r"(\d+) bytes", str(refused.value)))
    gevp(a, b, 4, method="direct", memory_budget=enough).raise_if_failed()
    with pytest.raises(MemoryError):
        gevp(a, b, 4, method="direct", memory_budget=enough - 1)
    with pytest.raises(MemoryError):
        gevp(a, b, 4, method="jacobi_davidson", preconditioner="diagonal", memory_budget=least - 1)
    gevp(a, b, 4, method="jacobi_davidson", preconditioner="diagonal", memory_budget=least).raise_if_failed()


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1 GiB"])
def test_a_budget_is_a_number_of_bytes(value):
    with pytest.raises((TypeError, ValueError), match="memory_budget must be an integer"):
        gevp(*pencils(2, n=4), 2, memory_budget=value)


def test_one_pencil_of_operators_cannot_be_split():
    rows = torch.randn(3, 20, dtype=torch.float64)
    for A, B in ((LowRank(rows), Diagonal(torch.ones(20))), ([LowRank(rows)], [LowRank(rows, 0.1)])):
        with pytest.raises(ValueError, match=r"a pencil of LowRank and .* cannot be split"):
            gevp(A, B, 2, memory_budget=1 << 30)
