"""Pencils of rows: the exact reduction to one symmetric matrix, and both ways to its pairs."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg as sl
import torch

from sst_kernels.gevp import Diagonal, GEVPStatus, LowRank, gevp

METHODS = ("direct", "jacobi_davidson")


def hard_rows(p, q, n, smallest, dtype=torch.float64):
    """A's rows in the span of B's, whose singular values reach down to `smallest`: where Gram-Woodbury subtracts."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(q, n, dtype=torch.float64, generator=g) * torch.logspace(0, np.log10(smallest), q)[:, None]
    w = (w / torch.linalg.matrix_norm(w, 2)).to(dtype)
    u = torch.randn(p, q, dtype=torch.float64, generator=g) @ w.double()
    return u.to(dtype), w


def projected_values(u, w, damping):
    """QR of [W; sqrt(damping) I] and a singular value decomposition: nothing is squared or subtracted."""
    r = np.linalg.qr(np.vstack([w.double().numpy(), damping**0.5 * np.eye(w.shape[1])]), mode="r")
    return np.linalg.svd(sl.solve_triangular(r, u.double().numpy().T, trans=1), compute_uv=False) ** 2


@pytest.mark.parametrize("smallest", [1, 1e-4])
@pytest.mark.parametrize("damping", [1e-2, 1e-6, 1e-8, 1e-12])
def test_split_projection_does_not_cancel(damping, smallest):
    p = 16
    u, w = hard_rows(p, 48, 600, smallest)
    result = gevp(LowRank(u), LowRank(w, damping), p + 3)
    assert np.abs(result.values[:p].numpy() / projected_values(u, w, damping) - 1).max() < 1e-10
    assert result.statuses() == [GEVPStatus.rank_deficient]
    b = LowRank(w, damping).dense()
    assert (result.vectors.mT @ b @ result.vectors - torch.eye(p + 3)).abs().max() < 1e-8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [1e-2, 1e-8])
def test_both_ways_to_the_pairs_of_the_reduced_problem(method, dtype, damping):
    """p = 96 leaves room to iterate; float32 rows are 6e-8 outside of the span, which counts at a damping of 1e-8."""
    u, w = hard_rows(96, 80, 300, 1e-2, dtype)
    result = gevp(LowRank(u), LowRank(w, damping), 8, method=method)
    assert result.route.startswith("split_projection")
    assert f"({method}: asked for)" in result.route
    assert result.statuses() == [GEVPStatus.converged]
    assert (result.cycles > 0) == (method == "jacobi_davidson")
    exact = projected_values(u, w, damping)[:8]
    error = np.abs(result.values.numpy() - exact)
    assert (error <= 1e-11 * exact[0]).all()
    assert (error <= result.error_bound.numpy() + 1e-12 * exact[0]).all()
    assert (result.error_bound <= 2e-10 * result.values[0]).all()
    gain, cost = LowRank(u), LowRank(w, damping)
    v = result.vectors
    assert (v.mT @ cost.matmul(v) - torch.eye(8)).abs().max() < 1e-9
    r = gain.matmul(v) - result.values * cost.matmul(v)
    true = (r * torch.linalg.solve(cost.dense(), r)).sum(0).clamp_min(0).sqrt()
    assert (true <= 2 * result.error_bound + 1e-15 * (1 + damping**-0.5) * result.values[0]).all()


@pytest.mark.parametrize("method", METHODS)
def test_reduced_problems_with_copies_without_rank_and_without_gain(method):
    n, p = 120, 64
    basis = torch.linalg.qr(torch.randn(n, p, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0].mT
    size = torch.linspace(1, 2, p, dtype=torch.float64).flip(0)
    size[:12] = 3.0
    cost = Diagonal(torch.full((n,), 0.5, dtype=torch.float64))
    copies = gevp(LowRank(size[:, None] * basis), cost, 14, method=method).raise_if_failed()
    assert (copies.values - 2 * size[:14] ** 2).abs().max() < 1e-10
    size[5:] = 0.0
    for rows, rank in ((size[:, None] * basis, 5), (torch.zeros(p, n), 0)):
        short = gevp(LowRank(rows), cost, 8, method=method)
        assert short.statuses() == [GEVPStatus.rank_deficient]
        assert (short.values - 18.0 * (torch.arange(8) < rank)).abs().max() < 1e-12
        assert not short.values[rank:].any()
        assert not short.error_bound[rank:].any()
        assert (short.vectors.mT @ cost.matmul(short.vectors) - torch.eye(8)).abs().max() < 1e-12
    rows = basis.clone()
    rows[3, 4] = float("inf")
    assert gevp(LowRank(rows), cost, 8, method=method).statuses() == [GEVPStatus.non_finite]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-400, 400])
def test_reduced_problems_do_not_depend_on_the_unit(method, exponent):
    """Squared residuals of values near 1e-240 vanish, and those of 1e240 overflow."""
    u = torch.randn(64, 90, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    cost = Diagonal(torch.linspace(1, 2, 90))
    plain = gevp(LowRank(u), cost, 8, method=method).raise_if_failed()
    scaled = gevp(LowRank(u * 2.0**exponent), cost, 8, method=method).raise_if_failed()
    assert torch.equal(scaled.values, plain.values * 4.0**exponent)
    assert torch.equal(scaled.error_bound, plain.error_bound * 4.0**exponent)
    assert torch.equal(scaled.vectors, plain.vectors)
    assert gevp(LowRank(u * 1e160), cost, 8, method=method).statuses() == [GEVPStatus.non_finite]


@pytest.mark.parametrize("rows", [0, 2])
def test_a_damping_that_rounding_swallows_is_a_status(rows):
    """There are five vectors to find, and on no more than the rows that there are is B more than its rounding."""
    g = torch.Generator().manual_seed(5)
    u, w = torch.randn(rows, 5, dtype=torch.float64, generator=g), torch.randn(2, 5, dtype=torch.float64, generator=g)
    assert gevp(LowRank(u), LowRank(w, 1e-60), 5).statuses() == [GEVPStatus.not_positive_definite]
    assert gevp(LowRank(u), LowRank(w, 1e-6), 5).statuses() == [GEVPStatus.rank_deficient]


def test_a_reduced_problem_that_is_cut_short_says_so():
    g = torch.Generator().manual_seed(3)
    u, w = torch.randn(200, 400, generator=g), torch.randn(50, 400, generator=g)
    cut = gevp(LowRank(u), LowRank(w, 0.1), 8, method="jacobi_davidson", max_cycles=1)
    exact = gevp(LowRank(u), LowRank(w, 0.1), 200, method="direct").values
    assert cut.statuses() == [GEVPStatus.max_iterations]
    nearest = (cut.values[:, None] - exact).abs().amin(1)
    assert (nearest <= cut.error_bound).all()
    assert (cut.error_bound > 1e-6 * exact[0]).any()
