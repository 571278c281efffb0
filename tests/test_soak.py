"""Ten thousand solves and accumulate steps leave memory, file descriptors and threads where they were."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sst_kernels import fisher_accumulate, gevp, sequence_nll
from sst_kernels.gevp import Dense, Diagonal, GEVPError, GEVPResult, Kronecker, LowRank
from tests.models import tiny_batch, tiny_lora

REPEATS, WARM = 10_000, 1_000
GROWTH = 4 << 20  # 420 bytes a repeat; what is meant to stay, the groups of 10 000 samples, is 80 kB of a list
PASSES = {
    "diagonal": {"structure": "diagonal"},
    "factor moments": {"structure": "diagonal", "space": "factor"},
    "frequent directions": {"structure": "lowrank", "rank": 8},
    "folded rows": {"scope": "module", "rows": "fold"},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc"),
]


def held() -> tuple[int, int, int]:
    """Resident bytes, open file descriptors and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def soak(what: str, step: Callable[[], object]) -> None:
    for _ in range(WARM):
        step()
    before, *handles = held()
    for _ in range(REPEATS):
        step()
    after, *handles_after = held()
    print(f"\n{what}: after {WARM} + {REPEATS} repeats resident memory grew by {(after - before) / 2**20:.2f} MiB")
    assert handles_after == handles
    assert after - before < GROWTH


@pytest.mark.parametrize("case", PASSES)
def test_steps_do_not_grow_the_process(case):
    model, batch = tiny_lora(), tiny_batch(1)
    with fisher_accumulate(model, "safety", **PASSES[case]) as pass_:
        soak(case, lambda: sequence_nll(model, batch).backward())
    assert pass_.fisher.counts.sequences == WARM + REPEATS


def pencil(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    n = shape[-1]
    x, y = torch.randn(2, *shape[:-1], n, n, dtype=dtype).unbind()
    return x @ x.mT, y @ y.mT + torch.eye(n, dtype=dtype)


def test_solves_do_not_grow_the_process():
    torch.manual_seed(0)
    a, b = pencil(24)
    c, d = pencil(48)
    single = pencil(3, 16, dtype=torch.float32)
    broken = torch.stack([a, a * torch.nan]), torch.stack([-b, b])
    rows = torch.randn(6, 24, dtype=torch.float64)
    factors = [x @ x.mT + torch.eye(5) for x in torch.randn(4, 5, 5, dtype=torch.float64)]

    def solve() -> list[GEVPResult]:
        return [
            gevp(a, b, 3),
            gevp(*single, 4),
            gevp(c, d, 2, method="jacobi_davidson", seed=1),
            gevp(c, d, 2, method="jacobi_davidson", preconditioner="cholesky_single"),
            gevp(LowRank(rows), LowRank(2 * rows, 0.1), 4),
            gevp(LowRank(rows), Dense(b), 4),
            gevp(Kronecker(*factors[:2]), Kronecker(*factors[2:]), 4),
            gevp(LowRank(rows), Diagonal(b.diagonal()), 2, method="jacobi_davidson"),
            *gevp([a, c], [b, d], 2),
        ]

    def step() -> None:
        solve()
        with pytest.raises(GEVPError, match="not_positive_definite"):
            gevp(*broken, 3).raise_if_failed()

    routes = {
        "direct",
        "jacobi_davidson",
        "split_projection",
        "cholesky_projection",
        "kronecker",
        "operator_jacobi_davidson",
    }
    assert {result.raise_if_failed().route.split(":")[0] for result in solve()} == routes
    soak("solves", step)
