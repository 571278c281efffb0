"""Pencils whose tops separate slowly: the iteration is given up early, the direct route takes over, and the result says so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_kernels.gevp import Dense, Diagonal, GEVPResult, GEVPStatus, LowRank, gevp
from sst_kernels.gevp.dense import workspace_bytes
from sst_kernels.gevp.result import LEFT
from tests.gevp_backends import GPU, backend
from tests.test_gevp import assert_solves
from tests.test_gevp import pencil as quick


def path(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised Laplacian of a path."""
    link = torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
    link += link.mT.clone()
    root = link.sum(1).rsqrt()
    eye = torch.eye(n, dtype=torch.float64)
    return eye - root[:, None] * link * root, eye


def cycle(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised Laplacian of a cycle: every value but the first and the last is double."""
    eye = torch.eye(n, dtype=torch.float64)
    step = eye.roll(1, 0)
    return eye - (step + step.mT) / 2, eye


def laplace(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K v = lambda M v of linear elements on the unit interval."""
    near = torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
    near += near.mT.clone()
    eye = torch.eye(n, dtype=torch.float64)
    return (2 * eye - near) * (n + 1), (4 * eye + near) / (6 * (n + 1))


def parabola(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.diag(1 - torch.linspace(0, 1, n, dtype=torch.float64) ** 2), torch.eye(n, dtype=torch.float64)


def separate(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values 1, 1/2, 1/3, ... in random coordinates: the iteration has them in a few cycles."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=g))[0]
    weight = torch.linspace(1, 2, n, dtype=torch.float64)
    a, b = (turn * (weight / torch.arange(1, n + 1))) @ turn.mT, (turn * weight) @ turn.mT
    return (a + a.mT) / 2, (b + b.mT) / 2


SLOW = [path, cycle, laplace, parabola]


@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.parametrize(("n", "k"), [(300, 1), (300, 2), (300, 10), (400, 1), (420, 30), (600, 2), (600, 8), (800, 4)])
def test_what_lapack_solves_is_solved(kind, n, k):
    a, b = kind(n)
    result = gevp(a, b, k)
    assert result.statuses() == [GEVPStatus.converged]
    assert_solves(result, a, b, rtol=1e-12)
    assert (result.error_bound <= 1e-10 * result.values[0]).all()
    assert result.route.endswith(LEFT) == (result.rerouted is not None)


def test_it_is_given_up_early():
    """Neither of these is near its end when it leaves, and it leaves within the first three cycles."""
    for kind in SLOW:
        result = gevp(*kind(800), 4)
        assert result.route.endswith(LEFT)
        assert 0 <= int(result.cycles) <= 3
        assert int(gevp(*kind(800), 4, method="jacobi_davidson").cycles) > 20


@pytest.mark.parametrize("n", [256, 512])
@pytest.mark.parametrize("k", [2, 8, 16])
def test_what_converges_is_not_given_up(n, k):
    result = gevp(*separate(n), k, method="auto").raise_if_failed()
    assert result.route.startswith("jacobi_davidson")
    assert result.rerouted is None


def mixed(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quick, slow, indefinite, slow with the asymmetry of float32 sums, quick."""
    skew = path(n)
    skew[0][0, 1] *= 1 + 1e-7
    a, b = separate(n)
    problems = [(a, b), cycle(n), (a, -b), skew, separate(n, 1)]
    a, b = (torch.stack(side) for side in zip(*problems))
    return a, b


def same(one: GEVPResult, other: GEVPResult) -> None:
    for name in ("values", "vectors", "error_bound", "status", "cycles"):
        assert torch.equal(getattr(one, name).nan_to_num(7.0), getattr(other, name).nan_to_num(7.0)), name
    assert one.route == other.route


def test_alone_and_in_company():
    n, k = 300, 2
    a, b = mixed(n)
    together = gevp(a, b, k)
    assert together.route.endswith("; 2 of 5 (problem 1, 3) too slow, so direct")
    assert together.rerouted is not None
    assert together.rerouted.tolist() == [False, True, False, True, False]
    listed = gevp([*a], [*b], k)
    for index, (own, other) in enumerate(zip(together, listed, strict=True)):
        alone = gevp(a[index], b[index], k)
        same(alone, own)
        same(alone, other)
        assert alone.route.endswith(LEFT) == (index in (1, 3))


def test_a_memory_budget_that_holds_the_direct_route_gives_the_same_bits():
    n, k = 300, 2
    a, b = mixed(n)
    whole = gevp(a, b, k)
    device = torch.device("cpu")
    direct = workspace_bytes(1, n, k, "direct", "cholesky", False, device)
    iterative = workspace_bytes(1, n, k, "jacobi_davidson", "cholesky", False, device)
    copies = 8 * 8 * n * n
    same(whole, gevp(a, b, k, memory_budget=direct + iterative + copies))
    tight = gevp(a, b, k, memory_budget=iterative + copies // 2)
    assert tight.rerouted is None
    assert tight.statuses()[:2] == [GEVPStatus.converged, GEVPStatus.max_iterations]


@pytest.mark.parametrize("preconditioner", ["cholesky_single", "diagonal", "none"])
def test_other_preconditioners_go_over_as_well(preconditioner):
    a, b = laplace(300)
    result = gevp(a, b, 2, preconditioner=preconditioner, max_cycles=1)
    assert result.statuses() == [GEVPStatus.converged]
    assert result.route.endswith(LEFT)
    assert_solves(result, a, b, rtol=1e-12)


def test_operators_go_over_to_stored_matrices():
    a, _ = path(1100)
    weight = torch.linspace(1, 2, 1100, dtype=torch.float64)
    result = gevp(Dense(a), Diagonal(weight), 2)
    assert result.route.startswith("operator_jacobi_davidson")
    assert result.statuses() == [GEVPStatus.converged]
    assert_solves(result, a, torch.diag(weight), rtol=1e-12)


@pytest.mark.parametrize("k", [1, 8])
def test_projected_problems_go_over_to_eigh(k):
    p, n = 400, 420
    rows = torch.zeros(p, n, dtype=torch.float64)
    rows[:, :p] = torch.linalg.cholesky(path(p)[0] + 0.1 * torch.eye(p, dtype=torch.float64))
    cost = Diagonal(torch.ones(n, dtype=torch.float64))
    result = gevp(LowRank(rows), cost, k)
    assert result.statuses() == [GEVPStatus.converged]
    assert f"{LEFT})" in result.route
    exact = torch.linalg.eigvalsh(rows @ rows.mT).flip(0)[:k]
    assert (result.values - exact).abs().max() < 1e-12 * exact[0]


@settings(max_examples=10, deadline=None)
@given(n=st.integers(192, 400), k=st.integers(1, 12), power=st.floats(0.2, 3), seed=st.integers(0, 10**6))
def test_no_pencil_ends_in_max_iterations(n, k, power, seed):
    """Spectra 1 - x^power: from steep at the top to as flat as can be, in random coordinates."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=g))[0]
    a = turn * (1 - torch.linspace(0, 1, n, dtype=torch.float64) ** power) @ turn.mT
    b = turn * torch.linspace(1, 10, n, dtype=torch.float64) @ turn.mT
    a, b = (a + a.mT) / 2, (b + b.mT) / 2
    result = gevp(a, b, k)
    assert result.statuses() == [GEVPStatus.converged]
    assert_solves(result, a, b, rtol=1e-9)


@pytest.fixture(params=["cpu", "emulated", GPU])
def solve(request):
    return backend(request)


def test_the_direct_route_takes_over_on_every_backend(solve):
    """A batch that the CUDA routes iterate, cut short after one cycle."""
    a, b = (torch.stack(side) for side in zip(*[quick(130, seed, rank=3 if seed == 2 else None) for seed in range(8)]))
    result = solve(a, b, 8, tol=1e-13, max_cycles=1)
    if result.rerouted is None:
        assert result.route.startswith("direct"), result.route
    for index, own in enumerate(result):
        assert own.statuses()[0].usable
        assert_solves(own, a[index], b[index], rtol=1e-9)


ADVICE = {
    GEVPStatus.max_iterations: ["method at 'auto'", "'direct'", "raise tol"],
    GEVPStatus.not_positive_definite: ["damping", "1e-3 * trace(B)/n", "swapped"],
    GEVPStatus.not_symmetric: ["(A + A.mT) / 2"],
    GEVPStatus.non_finite: ["NaN or Inf", "rescale A or B"],
    GEVPStatus.rank_deficient: ["returned as 0"],
}


def test_what_the_advice_says_helps():
    for status, phrases in ADVICE.items():
        for phrase in phrases:
            assert phrase in status.advice, f"{status.name} no longer says {phrase!r}: test what it says now"

    a, b = cycle(600)
    stuck = gevp(a, b, 2, method="jacobi_davidson")
    assert stuck.statuses() == [GEVPStatus.max_iterations]
    reached = float(stuck.error_bound.max() / stuck.values[0])
    for other in ({}, {"method": "direct"}, {"method": "jacobi_davidson", "tol": 2 * reached}):
        gevp(a, b, 2, **other).raise_if_failed()

    a, b = quick(60)
    singular = b.clone()
    singular[:, 3] = singular[3, :] = 0
    assert gevp(a, singular, 2).statuses() == [GEVPStatus.not_positive_definite]
    gevp(a, singular, 2, damping=1e-3 * float(singular.trace()) / 60).raise_if_failed()
    assert gevp(b, a, 2).statuses() == [GEVPStatus.not_positive_definite]
    gevp(a, b, 2).raise_if_failed()

    skew = a.clone()
    skew[0, 1] += 0.1 * a.abs().max()
    assert gevp(skew, b, 2).statuses() == [GEVPStatus.not_symmetric]
    gevp((skew + skew.mT) / 2, b, 2).raise_if_failed()

    assert gevp(a * 1e200, b * 1e-200, 2).statuses() == [GEVPStatus.non_finite]
    gevp(a, b * 1e-200, 2).raise_if_failed()

    assert gevp(quick(60, rank=3)[0], b, 5).raise_if_failed().statuses() == [GEVPStatus.rank_deficient]
