"""gevp() as a caller meets it: statuses, batches, routes, operators, errors, the registered op, and properties."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.linalg as sl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_kernels import _native
from sst_kernels.gevp import (
    Dense,
    Diagonal,
    EigenKronecker,
    GEVPError,
    GEVPStatus,
    Kronecker,
    KroneckerSum,
    LowRank,
    gevp,
)
from sst_kernels.gevp.dense import PRECONDITIONERS, empty_outputs

BOEING = Path("/work/shared/data/harwell-boeing")
METHODS = ("direct", "jacobi_davidson")


def pencil(n, seed=0, rank=None):
    g = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, n + 1, dtype=torch.float64) ** -0.7
    gain = torch.randn(rank or n // 3, n, dtype=torch.float64, generator=g) * decay
    cost = torch.randn(2 * n, n, dtype=torch.float64, generator=g) * decay / n**0.5
    a, b = gain.mT @ gain, cost.mT @ cost + 1e-3 * torch.eye(n, dtype=torch.float64)
    return (a + a.mT) / 2, (b + b.mT) / 2


def peer(a, b, k):
    return torch.tensor(sl.eigh(a.double().numpy(), b.double().numpy(), eigvals_only=True)[::-1][:k].copy())


def assert_solves(result, a, b, rtol=1e-10):
    a, b, v = a.double(), b.double(), result.vectors
    exact = peer(a, b, v.shape[-1])
    assert (result.values - exact).abs().max() <= rtol * exact.abs().max()
    assert (v.mT @ b @ v - torch.eye(v.shape[-1], dtype=torch.float64)).abs().max() < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_each_problem_of_a_mixed_batch_has_its_own_status(method):
    n, k = 64, 4
    a, b = pencil(n)
    nan_upper, nan_lower, inf_b = a.clone(), a.clone(), b.clone()
    nan_upper[0, 5], nan_lower[5, 0], inf_b[3, 3] = float("nan"), float("nan"), float("inf")
    skew = a.clone()
    skew[0, 1] += a.abs().max()
    singular = torch.zeros_like(b)
    singular[: n // 2, : n // 2] = torch.eye(n // 2)
    pairs = [
        (a, b),
        (nan_upper, b),
        (a, -b),
        (nan_lower, b),
        (a, inf_b),
        (skew, b),
        (a, singular),
        (torch.zeros_like(a), b),
        (a, b),
    ]
    result = gevp(torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs]), k, method=method)
    assert [status.name for status in result.statuses()] == [
        "converged", "non_finite", "not_positive_definite", "non_finite", "non_finite", "not_symmetric", "not_positive_definite",
        "rank_deficient", "converged",
    ]  # fmt: skip
    alone = gevp(a, b, k, method=method)
    for index in (0, 8):
        assert torch.equal(result.values[index], alone.values)
        assert torch.equal(result.vectors[index], alone.vectors)
    for index in range(1, 7):
        assert result.values[index].isnan().all()
        assert result.vectors[index].isnan().all()
    zero = result.vectors[7]
    assert (result.values[7] == 0).all()
    assert (zero.mT @ b @ zero - torch.eye(k)).abs().max() < 1e-10
    with pytest.raises(GEVPError, match=r"6 of 9 .*\n(.*\n)*.*not_positive_definite \(problem 2, 6\): .*damping"):
        result.raise_if_failed()
    assert alone.raise_if_failed() is alone


@pytest.mark.parametrize("preconditioner", ["cholesky", "cholesky_single", "diagonal", "none"])
def test_a_batch_is_bitwise_its_problems(preconditioner):
    """Chunks run the batched control flow of a GPU; easy, hard, bad and rank-deficient problems share one."""
    n, k = 72, 4
    problems = [pencil(n, seed) for seed in range(3)] + [pencil(n, 3, rank=2)]
    flat = torch.diag(1 + 1e-3 * torch.arange(n, dtype=torch.float64))
    problems += [
        (flat, problems[0][1]),
        (problems[1][0], -problems[1][1]),
        (problems[0][0] * float("nan"), problems[0][1]),
    ]
    a, b = (torch.stack(side) for side in zip(*problems))
    native = _native.cpu()

    def run(chunk, threads):
        outputs = empty_outputs((len(a),), n, k, a.device)
        options = native.Options.for_problem(n, k, False)
        options.preconditioner = PRECONDITIONERS[preconditioner]
        options.inner_steps = 20 if preconditioner in ("diagonal", "none") else 0
        size = native.workspace_bytes(len(a), n, options, False, threads, chunk)
        workspace = torch.full(
            (size,), 255, dtype=torch.uint8
        )  # all-ones bytes are NaN: nothing may be read before it is written
        addresses = [tensor.data_ptr() for tensor in outputs]
        where = (a.data_ptr(), n * n, b.data_ptr(), n * n, False, len(a), n)
        native.solve_dense(*where, options, *addresses, workspace.data_ptr(), size, threads, chunk)
        return outputs

    solo = run(1, 1)
    assert len(set(solo[4].tolist())) > 2, "the batch should mix easy and hard problems"
    for chunk, threads in ((1, 2), (3, 2), (len(a), 1)):
        for one, many in zip(solo, run(chunk, threads)):
            assert torch.equal(one.nan_to_num(7.0), many.nan_to_num(7.0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 3])
def test_more_pairs_than_rank_are_padded(method, rank):
    a, b = pencil(96, rank=rank)
    result = gevp(a, b, 8, method=method)
    assert result.statuses() == [GEVPStatus.rank_deficient]
    assert (result.values[:rank] > 0).all()
    assert (result.values[rank:] == 0).all()
    assert_solves(result, a, b)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_all_pairs_and_identity(n):
    a, b = pencil(max(n, 3), rank=50)
    a, b = a[:n, :n].contiguous(), b[:n, :n].contiguous()
    assert_solves(gevp(a, b, n), a, b)
    eye = torch.eye(n, dtype=torch.float64)
    assert torch.allclose(gevp(eye, eye, n).values, torch.ones(n, dtype=torch.float64), rtol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_float32_storage_is_accumulated_in_float64(method):
    a, b = (x.float() for x in pencil(120))
    result = gevp(a, b, 6, method=method)
    assert result.values.dtype is torch.float64
    assert_solves(result, (a + a.mT) / 2, (b + b.mT) / 2, rtol=1e-9)


def test_rounding_asymmetry_is_solved_as_the_symmetric_part():
    a, b = pencil(96)
    noisy = a + 1e-8 * a.abs().max() * torch.randn(
        96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    assert_solves(gevp(noisy, b, 4, method="jacobi_davidson"), (noisy + noisy.mT) / 2, b)


def test_empty_batches_and_no_pairs():
    assert gevp(torch.zeros(0, 5, 5), torch.zeros(0, 5, 5), 2).values.shape == (0, 2)
    assert gevp(*pencil(6), 0).vectors.shape == (6, 0)
    assert gevp(torch.zeros(2, 3, 4, 4), torch.eye(4).expand(2, 3, 4, 4), 2).vectors.shape == (2, 3, 4, 2)


@pytest.mark.skipif(not BOEING.exists(), reason="the Harwell-Boeing files are not on this machine")
@pytest.mark.parametrize("method", METHODS)
def test_lund_in_both_orders(method):
    stiffness, mass = (torch.tensor(scipy.io.mmread(BOEING / name).toarray()) for name in ("LUNDA.mtx", "lund_b.mtx"))
    top = gevp(stiffness, mass, 5, method=method)
    published = torch.tensor([2204623.635, 1328524.824, 657507.918, 416860.929, 373135.767], dtype=torch.float64)
    assert (top.values - published).abs().max() < 1e-3
    assert_solves(top, stiffness, mass)
    assert_solves(gevp(mass, stiffness, 5, method=method), mass, stiffness, rtol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_finite_element_membrane(method):
    skfem = pytest.importorskip("skfem", reason="scikit-fem is not installed")
    from skfem.models.poisson import laplace, mass

    basis = skfem.Basis(skfem.MeshTri.init_tensor(*[np.linspace(0, 1, 13)] * 2), skfem.ElementTriP2())
    interior = basis.complement_dofs(basis.get_dofs())
    stiffness, weight = (
        torch.tensor(form.assemble(basis).toarray()[np.ix_(interior, interior)]) for form in (laplace, mass)
    )
    result = gevp(weight, stiffness, 6, method=method)  # the inverse problem: largest 1 / (pi^2 (i^2 + j^2))
    modes = 1 / result.values / np.pi**2
    assert (modes / torch.tensor([2.0, 5, 5, 8, 10, 10]) - 1).abs().max() < 1e-3
    assert_solves(result, weight, stiffness)


def operators(seed=0):
    g = torch.Generator().manual_seed(seed)
    psd = lambda n: torch.cov(torch.randn(n, 3 * n, generator=g, dtype=torch.float64))  # noqa: E731
    basis = lambda n: torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]  # noqa: E731
    left, right = basis(9), basis(12)
    spectrum = lambda: torch.rand(9, 12, generator=g, dtype=torch.float64) ** 4  # noqa: E731
    return {
        "diagonal": (Diagonal(torch.rand(108, generator=g)), Diagonal(torch.rand(108, generator=g) + 0.1)),
        "eigenbasis": (EigenKronecker(left, right, spectrum()), EigenKronecker(left, right, spectrum(), 0.1)),
        "kronecker": (Kronecker(psd(9), psd(12)), Kronecker(psd(9), psd(12), 0.1, 0.2)),
        "split_projection": (
            LowRank(torch.randn(20, 108, generator=g)),
            LowRank(torch.randn(30, 108, generator=g), 0.1),
        ),
        "cholesky_projection": (LowRank(torch.randn(20, 108, generator=g)), Dense(psd(108))),
        "stored": (EigenKronecker(left, right, spectrum()), KroneckerSum([(psd(9), psd(12)), (psd(9), psd(12))])),
    }


@pytest.mark.parametrize("route", list(operators()))
def test_structures_take_their_route_and_agree_with_their_dense_form(route):
    gain, cost = operators()[route]
    result = gevp(gain, cost, 7)
    assert result.route.startswith(route)
    assert_solves(result, gain.dense(), cost.dense())
    x = torch.randn(gain.n, 3, dtype=torch.float64)
    for operator in (gain, cost):
        assert torch.allclose(operator.matmul(x), operator.dense().double() @ x)
        assert torch.allclose(operator.diagonal(), operator.dense().double().diagonal())


@pytest.mark.parametrize("route", ["eigenbasis", "stored", "kronecker", "diagonal"])
def test_operators_are_iterated_without_being_stored(route):
    gain, cost = operators()[route]
    result = gevp(gain, cost, 5, method="jacobi_davidson", damping=0.05)
    assert result.route.startswith("operator_jacobi_davidson")
    assert result.statuses() == [GEVPStatus.converged]
    assert_solves(result, gain.dense(), cost.dense() + 0.05 * torch.eye(gain.n, dtype=torch.float64))


@pytest.mark.parametrize("scale_a", [1e-240, 1e240])
@pytest.mark.parametrize("scale_b", [1e-240, 1e240])
@pytest.mark.parametrize("route", ["stored", "eigenbasis", "kronecker"])
def test_iterated_operators_of_any_size(route, scale_a, scale_b):
    """No product or square of the solve leaves float64 before the values themselves do; with block CG and with B's own inverse."""
    plain = gevp(*operators()[route], 3, method="jacobi_davidson").raise_if_failed()
    gain, cost = operators()[route]
    scaled = gevp(sized(gain, scale_a), sized(cost, scale_b), 3, method="jacobi_davidson")
    if scale_a > 1 > scale_b:
        assert scaled.statuses() == [GEVPStatus.non_finite]
        return
    expected = plain.values * (scale_a / scale_b)
    assert scaled.statuses() == [GEVPStatus.converged]
    assert (scaled.values - expected).abs().max() <= 1e-9 * expected.max()
    if scale_a / scale_b == 1:
        norms = ((scaled.vectors * cost.matmul(scaled.vectors)) * scale_b).sum(0)
        assert (norms - 1).abs().max() < 1e-9


@pytest.mark.parametrize("route", list(operators()))
@pytest.mark.parametrize("method", ["auto", "jacobi_davidson"])
def test_structured_pencils_at_the_edges(route, method):
    """No pairs, values beyond float64, entries that are not finite, and orders that leave no room for a restarted basis."""
    gain, cost = operators()[route]
    none = gevp(gain, cost, 0, method=method)
    assert none.statuses() == [GEVPStatus.converged]
    assert none.vectors.shape == (gain.n, 0)
    assert none.values.shape == (0,)
    if route.endswith("projection"):
        return
    assert_solves(gevp(gain, cost, 60, method=method), gain.dense(), cost.dense())
    nan = float("nan")
    pencils = (sized(gain, 1e250), sized(cost, 1e-250)), (sized(gain, nan), cost), (gain, sized(cost, nan))
    for pencil in pencils:
        assert gevp(*pencil, 3, method=method).statuses() == [GEVPStatus.non_finite]


def sized(operator, scale):
    """`operator` times `scale`."""
    match operator:
        case Diagonal():
            return Diagonal(operator.diag * scale)
        case EigenKronecker():
            return EigenKronecker(operator.u_left, operator.u_right, operator.s * scale)
        case Kronecker():
            return Kronecker(operator.left * scale, operator.right)
        case KroneckerSum():
            return KroneckerSum([(left * scale, right) for left, right in operator.terms])


def test_residuals_that_wait_their_turn_are_no_stagnation():
    """Values as evenly spaced as can be: the last of them stay where they are until those above have converged."""
    d = torch.linspace(1, 2, 500, dtype=torch.float64)
    result = gevp(Diagonal(d), Diagonal(torch.ones(500)), 32, method="jacobi_davidson").raise_if_failed()
    assert result.statuses() == [GEVPStatus.converged]
    assert (result.values - d.flip(0)[:32]).abs().max() < 1e-12


def test_low_rank_with_diagonal_damping_and_bad_input():
    g = torch.Generator().manual_seed(1)
    u, w, d = torch.randn(5, 50, generator=g), torch.randn(9, 50, generator=g), torch.rand(50, generator=g) + 0.1
    assert_solves(gevp(LowRank(u), LowRank(w, d), 5), LowRank(u).dense(), LowRank(w, d).dense())
    u[2, 3] = float("nan")
    assert gevp(LowRank(u), LowRank(w, d), 5).statuses() == [GEVPStatus.non_finite]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.eye(3), torch.eye(4), 1), {}, "A is of order 3, B of order 4"),
        ((torch.eye(3).expand(2, 3, 3), torch.eye(3), 1), {}, r"A is \(2, 3, 3\), B \(3, 3\)"),
        ((torch.zeros(3, 4), torch.eye(3), 1), {}, "square"),
        ((torch.eye(3), torch.eye(3), 4), {}, "k must be between 0 and n = 3, got 4"),
        ((torch.eye(3), torch.eye(3), 1), {"method": "lanczos"}, "method must be one of"),
        ((torch.eye(3), torch.eye(3), 1), {"preconditioner": "ilu"}, "preconditioner must be one of"),
    ],
)
def test_misuse_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        gevp(*arguments, **options)
    with pytest.raises(TypeError, match="floating point"):
        gevp(torch.eye(3, dtype=torch.int64), torch.eye(3, dtype=torch.int64), 1)


def test_the_op_is_registered_with_a_fake():
    a, b = (x[None] for x in pencil(40))
    arguments = (a, b, 4, "direct", "cholesky", 1e-10, 100, 0, False)
    torch.library.opcheck(
        torch.ops.sst_kernels.gevp_dense.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_result_reads_as_a_sentence():
    text = repr(gevp(torch.stack([pencil(20)[0]] * 2), torch.stack([pencil(20)[1], -pencil(20)[1]]), 3))
    assert "batch=(2,), n=20, k=3, 1 converged, 1 not_positive_definite" in text
    assert "route='direct: n = 20 <" in text


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(40, 70), method=st.sampled_from(METHODS))
def test_congruence_scaling_and_permutation(seed, n, method):
    a, b = pencil(n, seed)
    k = 4
    g = torch.Generator().manual_seed(seed)
    plain = gevp(a, b, k, method=method).values
    x = torch.eye(n, dtype=torch.float64) + 0.3 * torch.randn(n, n, dtype=torch.float64, generator=g) / n**0.5
    turned = gevp(*((m + m.mT) / 2 for m in (x.mT @ a @ x, x.mT @ b @ x)), k, method=method).values
    assert torch.allclose(turned, plain, rtol=1e-7, atol=0)
    assert torch.allclose(gevp(a * 3, b * 0.5, k, method=method).values, plain * 6, rtol=1e-9)
    order = torch.randperm(n, generator=g)
    assert torch.allclose(gevp(a[order][:, order], b[order][:, order], k, method=method).values, plain, rtol=1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(0.01, 10), method=st.sampled_from(METHODS))
def test_damping_is_monotone_and_a_shift_of_a_along_b_shifts_the_spectrum(seed, shift, method):
    a, b = pencil(60, seed)
    plain, damped = gevp(a, b, 4, method=method).values, gevp(a, b, 4, method=method, damping=shift).values
    assert (damped < plain).all()
    eye = torch.eye(60, dtype=torch.float64)
    assert torch.equal(damped, gevp(a, b + shift * eye, 4, method=method).values)
    moved = gevp(a + shift * b, b, 4, method=method).values
    assert torch.allclose(moved, plain + shift, rtol=1e-8)


def test_a_list_of_any_orders_is_its_problems():
    """Groups of equal order are batches; the bits, the order and the statuses are those of single solves."""
    orders = (20, 140, 20, 7, 140, 20)
    pairs = [pencil(n, seed) for seed, n in enumerate(orders)]
    pairs[2] = (pairs[2][0], -pairs[2][1])
    pairs[4] = tuple(x.float() for x in pairs[4])
    operators_too = [(LowRank(torch.randn(5, 30)), LowRank(torch.randn(9, 30), 0.1))]
    results = gevp(*map(list, zip(*pairs, *operators_too)), 4, damping=1e-3)
    assert len(results) == len(pairs) + 1
    for (a, b), result in zip(pairs + operators_too, results):
        alone = gevp(a, b, 4, damping=1e-3)
        for name in ("values", "vectors", "error_bound", "status", "cycles"):
            assert torch.equal(getattr(alone, name).nan_to_num(7.0), getattr(result, name).nan_to_num(7.0)), name
        assert alone.route == result.route
    assert results[2].statuses() == [GEVPStatus.not_positive_definite]
    assert gevp([], [], 4) == []
    eye = torch.eye(3)
    for a, b, error, message in (
        ([eye], eye, TypeError, "both be lists"),
        ([eye], [eye, eye], ValueError, "A has 1 matrices, B 2"),
        ([eye[None]], [eye[None]], ValueError, r"pencil 0 is \(1, 3, 3\)"),
    ):
        with pytest.raises(error, match=message):
            gevp(a, b, 1)
    with pytest.raises(TypeError, match="cannot be iterated"):
        list(results[0])
