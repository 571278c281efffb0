"""The solver against LAPACK's own test types, a QR+SVD reference, published spectra and hard cases, by both dense routes."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec

import numpy as np
import pytest
import scipy.linalg as sl
import torch
from scipy.stats import ortho_group

from sst_kernels.gevp import GEVPStatus
from tests.gevp_backends import GPU, backend

ULP = np.finfo(np.float64).eps
TOL = 1e-10


@pytest.fixture(scope="module", params=["cpu", pytest.param("emulated", marks=pytest.mark.slow), GPU])
def solve(request):
    def of_arrays(a, b, k, method, **options):
        return backend(request)(torch.as_tensor(a), torch.as_tensor(b), k, method=method, tol=TOL, **options)

    return of_arrays


def spd(n, cond, rng):
    q = ortho_group.rvs(n, random_state=rng) if n > 1 else np.ones((1, 1))
    b = (q * np.logspace(0, -np.log10(cond), n)) @ q.T
    return (b + b.T) / 2


def drvsg(kind, n, rng):
    """A of LAPACK's DRVSG: zero, identity, diagonal and dense spectra (even, geometric, clustered), scalings, random."""
    even = np.linspace(1, ULP, n) if n > 1 else np.ones(n)
    geometric = ULP ** (np.arange(n) / max(n - 1, 1))
    clustered = np.r_[1.0, np.full(max(n - 1, 0), ULP)][:n]
    signs = rng.choice([-1.0, 1.0], n)
    big, small = np.sqrt(np.finfo(float).max) * ULP, np.sqrt(np.finfo(float).tiny) / ULP
    q = ortho_group.rvs(n, random_state=rng) if n > 1 else np.ones((n, n))
    band = np.tril(np.triu(rng.uniform(-1, 1, (n, n)), -2), 2)
    match kind:
        case 1:
            a = np.zeros((n, n))
        case 2:
            a = np.eye(n)
        case 3 | 4 | 5:
            a = np.diag(signs * (even, geometric, clustered)[kind - 3])
        case 6:
            a = np.diag(signs * geometric) * big
        case 7:
            a = np.diag(signs * geometric) * small
        case 8 | 9 | 10:
            a = (q * (signs * (even, geometric, clustered)[kind - 8])) @ q.T
        case 11:
            a = (q * (signs * even)) @ q.T * big
        case 12:
            a = (q * (signs * even)) @ q.T * small
        case 13 | 14 | 15:
            a = rng.uniform(-1, 1, (n, n)) * (1.0, big, small)[kind - 13]
        case _:
            a = (band, band + np.diag(even), band * big, band * small, band @ band.T, band + 4 * np.eye(n))[kind - 16]
    return (a + a.T) / 2


def residual_ratio(a, b, values, vectors, size):
    """xSGT01's ||A Z - B Z D|| / (||A|| ||Z|| n ulp), with ||A|| + size ||B|| in place of ||A||.

    `size` is 0 for LAPACK's own test, where cond(B) = 10. For larger cond(B) it is the largest |lambda| of the whole spectrum: that is
    what a reduction to standard form is backward stable against, whichever part of the spectrum is wanted.
    """
    told = values != 0  # the others are within their bound of zero and are tested for that
    if not told.any():
        return 0.0
    values, vectors = values[told], vectors[:, told]
    scale = np.linalg.norm(a, 1) + size * np.linalg.norm(b, 1)
    r = np.linalg.norm(a @ vectors - b @ vectors * values, 1)
    return r / (scale * np.linalg.norm(vectors, 1) * len(a) * ULP)


@pytest.mark.parametrize("cond", [10, 1e4, 1e6])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 16, 64])
def test_direct_passes_lapack_drvsg(solve, n, cond):
    rng = np.random.default_rng(n)
    b = spd(n, cond, rng)
    for kind in range(1, 22):
        a = drvsg(kind, n, rng)
        k = max(1, n // 2)
        result = solve(a, b, k, "direct")
        values, vectors = result.values.numpy(), result.vectors.numpy()
        assert result.statuses()[0].usable, kind
        spectrum = sl.eigh(a, b, eigvals_only=True)[::-1]
        size, limit = (0.0, 20) if cond == 10 else (np.abs(spectrum).max(), 2)
        assert residual_ratio(a, b, values, vectors, size) < limit, kind
        assert np.abs(vectors.T @ b @ vectors - np.eye(k)).max() < 10 * n * ULP + ULP * cond, kind
        assert (np.diff(values) <= 0).all(), kind
        exact = spectrum[:k]
        zero = values == 0
        assert (np.abs(exact) <= 2 * result.error_bound.numpy() + 10 * n * ULP * cond * np.linalg.norm(a, 2))[
            zero
        ].all(), kind


@pytest.mark.parametrize("cond", [10, 1e4, 1e6])
def test_iterative_meets_its_tolerance_on_drvsg(solve, cond):
    n, k = 96, 8
    rng = np.random.default_rng(1)
    b = spd(n, cond, rng)
    for kind in range(1, 22):
        a = drvsg(kind, n, rng)
        result = solve(a, b, k, "jacobi_davidson")
        values, vectors, bound = result.values.numpy(), result.vectors.numpy(), result.error_bound.numpy()
        exact = sl.eigh(a, b, eigvals_only=True)[::-1]
        size = np.abs(exact).max()
        assert result.statuses()[0].usable, (kind, result)
        assert (bound <= TOL * size * 1.01).all(), kind
        assert np.abs(values - exact[:k]).max() <= max(TOL * size, 20 * n * ULP * cond * size * 1e-3), kind
        assert np.abs(vectors.T @ b @ vectors - np.eye(k)).max() < 10 * n * ULP * np.sqrt(cond), kind


def qr_svd(gain, cost, damping):
    """Eigenvalues of G'G v = lambda (H'H + d I) v as squared singular values of G R^-1, R from the QR of [H; sqrt(d) I]."""
    n = gain.shape[1]
    r = np.linalg.qr(np.vstack([cost, np.sqrt(damping) * np.eye(n)]), mode="r")
    return np.linalg.svd(sl.solve_triangular(r, gain.T, trans=1).T, compute_uv=False) ** 2


@pytest.mark.parametrize("method", ["direct", "jacobi_davidson"])
@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6])
def test_against_the_qr_svd_reference(solve, method, damping):
    rng = np.random.default_rng(0)
    n, k = 160, 8
    decay = np.arange(1, n + 1) ** -0.8
    gain, cost = rng.standard_normal((n // 4, n)) * decay, rng.standard_normal((2 * n, n)) * decay / np.sqrt(2 * n)
    a, b = gain.T @ gain, cost.T @ cost + damping * np.eye(n)
    result = solve(a, b, k, method)
    exact = qr_svd(gain, cost, damping)[:k]
    cond = np.linalg.cond(b)
    assert np.abs(result.values.numpy() / exact - 1).max() < 5 * ULP * np.sqrt(cond * n) * 100
    v = result.vectors.numpy()
    r = a @ v - b @ v * result.values.numpy()
    recomputed = np.sqrt(np.sum(r * np.linalg.solve(b, r), axis=0))
    noise = ULP * n * np.sqrt(cond) * exact[0]
    assert (recomputed <= 2 * result.error_bound.numpy() + noise).all()
    assert (result.error_bound.numpy() <= 2 * recomputed + noise).all()


@pytest.mark.parametrize("preconditioner", ["cholesky_single", "diagonal", "none"])
def test_inexact_preconditioners_reach_float64_quality(solve, preconditioner):
    rng = np.random.default_rng(3)
    n, k = 200, 6
    decay = np.arange(1, n + 1) ** -0.6
    gain, cost = rng.standard_normal((n // 4, n)) * decay, rng.standard_normal((2 * n, n)) * decay / np.sqrt(2 * n)
    damping = 1e-6 if preconditioner == "cholesky_single" else 1e-3
    a, b = gain.T @ gain, cost.T @ cost + damping * np.eye(n)
    result = solve(a, b, k, "jacobi_davidson", preconditioner=preconditioner)
    exact = qr_svd(gain, cost, damping)[:k]
    assert result.statuses() == [GEVPStatus.converged]
    assert np.abs(result.values.numpy() / exact - 1).max() < 1e-10
    assert (result.error_bound.numpy() <= TOL * exact[0] * 1.01).all()


@pytest.mark.parametrize("method", ["direct", "jacobi_davidson"])
@pytest.mark.parametrize("n", [10, 128, 512, *(pytest.param(n, marks=pytest.mark.slow) for n in (1024, 2048))])
def test_mikota_pair(solve, method, n):
    """SciPy's Mikota pair: stiffness against mass has the eigenvalues 1, 4, 9, ..., n^2."""
    mass = np.diag(1 / np.arange(1, n + 1))
    entries = np.arange(2 * n - 1, 0, -2).astype(float)
    stiffness = np.diag(entries) - np.diag(np.arange(n - 1, 0, -1.0), 1) - np.diag(np.arange(n - 1, 0, -1.0), -1)
    result = solve(stiffness, mass, 10, method)
    exact = np.arange(n, n - 10, -1.0) ** 2
    assert result.statuses() == [GEVPStatus.converged]
    assert np.abs(result.values.numpy() / exact - 1).max() < 100 * 10 * n * ULP


@pytest.mark.parametrize("method", ["direct", "jacobi_davidson"])
def test_elastic_rod(solve, method):
    """SciPy's ElasticRod; largest eigenvalues of the linear-element rod, known in closed form."""
    n = 100
    length, young, density, area = 1.0, 1.0, 1.0, 1.0
    h = length / n
    stiffness = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    mass = 4 * np.eye(n) + np.eye(n, k=1) + np.eye(n, k=-1)
    stiffness[-1, -1], mass[-1, -1] = 1, 2
    stiffness, mass = stiffness * area * young / h, mass * area * density * h / 6
    result = solve(stiffness, mass, 8, method)
    beta = (2 * np.arange(n, 0, -1) - 1) * np.pi / (2 * n)
    exact = 6 / h**2 * (1 - np.cos(beta)) / (2 + np.cos(beta))
    assert np.abs(result.values.numpy() / exact[:8] - 1).max() < 1e-11


def slepc_pencil(m, diagonal, coupling=0.0):
    """5-point Laplacian on an m x m grid; a mass matrix with the given diagonal and one coupling between neighbouring rows."""
    line = 2 * np.eye(m) - np.eye(m, k=1) - np.eye(m, k=-1)
    laplacian = np.kron(line, np.eye(m)) + np.kron(np.eye(m), line)
    return laplacian, np.diag(diagonal) + coupling * (np.eye(m * m, k=1) + np.eye(m * m, k=-1))


@pytest.mark.parametrize("method", ["direct", "jacobi_davidson"])
def test_slepc_test1(solve, method):
    """SLEPc's generalized test: 18 x 18 grid, B = diag(2 / log(i + 2)), four published values."""
    laplacian, mass = slepc_pencil(18, 2 / np.log(np.arange(18 * 18) + 2))
    result = solve(laplacian, mass, 4, method)
    assert np.round(result.values.numpy(), 5).tolist() == [21.89996, 21.65898, 21.28794, 20.82229]


@pytest.mark.parametrize("method", ["direct", "jacobi_davidson"])
def test_slepc_with_coupled_mass(solve, method):
    """In the manner of SLEPc's test32: the same Laplacian, B with off-diagonal entries; LAPACK is the reference."""
    laplacian, mass = slepc_pencil(18, np.full(18 * 18, 4.0), coupling=-1.0)
    result = solve(laplacian, mass, 8, method)
    exact = sl.eigh(laplacian, mass, eigvals_only=True)[::-1][:8]
    assert result.statuses() == [GEVPStatus.converged]
    assert np.abs(result.values.numpy() / exact - 1).max() < 1e-12
    r = laplacian @ result.vectors.numpy() - mass @ result.vectors.numpy() * result.values.numpy()
    size = np.linalg.norm(laplacian, np.inf) + exact[0] * np.linalg.norm(mass, np.inf)
    assert (np.linalg.norm(r, axis=0) < TOL * size * np.linalg.norm(result.vectors.numpy(), axis=0)).all()


def ansys_beam():
    """Stiffness and mass [900, 900] of the beam in the ansys-mapdl-reader wheel, of which only the file reader is imported: the
    package itself wants VTK."""
    package = find_spec("ansys.mapdl.reader") if find_spec("ansys") and find_spec("ansys.mapdl") else None
    if package is None:
        pytest.skip("ansys-mapdl-reader is not installed (pip install --no-deps ansys-mapdl-reader)")
    bare = sys.modules.setdefault(package.name, module_from_spec(package))
    reader = import_module(f"{package.name}.full")
    _, *upper = reader.FullFile(f"{bare.__path__[0]}/examples/file.full").load_km(sort=True)
    stiffness, mass = (x + np.triu(x, 1).T for x in (np.triu(part.toarray()) for part in upper))
    free = np.diag(stiffness) != 0
    return stiffness[np.ix_(free, free)], mass[np.ix_(free, free)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["direct", "jacobi_davidson"])
def test_ansys_beam_with_doubled_modes(solve, method):
    """Bending modes in pairs 1e-10 apart, of which ARPACK misses one and at which PRIMME fails."""
    stiffness, mass = ansys_beam()
    assert len(stiffness) == 900
    result = solve(mass, stiffness, 8, method)
    exact = sl.eigh(mass, stiffness, eigvals_only=True)[::-1][:8]
    assert result.statuses() == [GEVPStatus.converged]
    assert np.abs(result.values.numpy() / exact - 1).max() < 1e-8
    hertz = 1 / np.sqrt(result.values.numpy()) / (2 * np.pi)
    assert (np.abs(hertz / 1283.20036903 - 1) < 1e-8).sum() == 2


@pytest.mark.parametrize("method", ["direct", "jacobi_davidson"])
@pytest.mark.parametrize("multiplicity", [2, 6, 12, 20])
@pytest.mark.parametrize("k", [8, 16])
def test_every_copy_of_a_multiple_eigenvalue(solve, method, multiplicity, k):
    rng = np.random.default_rng(5)
    n = 150
    values = rng.uniform(0, 4, n)
    values[:multiplicity] = 10.0 * (1 + 1e-12 * np.arange(multiplicity))
    values[multiplicity : multiplicity + 2] = 5.0
    factor, q = np.linalg.cholesky(spd(n, 1e4, rng)), ortho_group.rvs(n, random_state=rng)
    a, b = factor @ (q * values) @ q.T @ factor.T, factor @ factor.T
    result = solve((a + a.T) / 2, (b + b.T) / 2, k, method)
    exact = np.sort(values)[::-1][:k]
    assert result.statuses() == [GEVPStatus.converged]
    assert np.abs(result.values.numpy() - exact).max() < 1e-8
    assert np.abs(result.vectors.numpy().T @ b @ result.vectors.numpy() - np.eye(k)).max() < 1e-10


@pytest.mark.parametrize("method", ["direct", "jacobi_davidson"])
@pytest.mark.parametrize("scale_a", [1e-150, 1.0, 1e150])
@pytest.mark.parametrize("scale_b", [1e-150, 1.0, 1e150])
def test_scaling_over_three_hundred_decades(solve, method, scale_a, scale_b):
    rng = np.random.default_rng(7)
    n, k = 80, 4
    x = rng.standard_normal((n, n))
    a, b = x @ x.T, spd(n, 1e3, rng)
    plain = solve(a, b, k, method).values.numpy()
    if scale_a / scale_b == 1e300:
        plain, a = plain / 1e10, a / 1e10
    scaled = solve(a * scale_a, b * scale_b, k, method)
    assert scaled.statuses() == [GEVPStatus.converged]
    assert np.abs(scaled.values.numpy() / (plain * (scale_a / scale_b)) - 1).max() < 1e-9
