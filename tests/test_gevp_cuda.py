"""The solver on CUDA tensors: kernels against host loops, routes against QR + SVD values, the CPU instantiation and LAPACK,
bits alone and in company, failures kept to their own problem, and the memory that a solve asks for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sst_kernels import _native
from sst_kernels.gevp import GEVPStatus, gevp
from sst_kernels.gevp.operators import LowRank
from tests.test_cuda_build import ROOT, include_directories

pytestmark = pytest.mark.gpu
METHODS = ("direct", "jacobi_davidson")


@pytest.fixture(scope="module", autouse=True)
def native():
    try:
        return _native.cuda()
    except ImportError as error:
        pytest.fail(f"the CUDA module does not load: {error}")


@pytest.fixture(scope="module")
def kernel_program(tmp_path_factory) -> Path:
    """tests/cpp/cuda_kernels.cu, compiled for the GPU at hand."""
    nvcc = shutil.which("nvcc") or pytest.skip("nvcc is not on PATH")
    program = tmp_path_factory.mktemp("kernels") / "cuda_kernels"
    major, minor = torch.cuda.get_device_capability()
    sources = [ROOT / "tests" / "cpp" / "cuda_kernels.cu"]
    sources += [ROOT / "csrc" / "cuda" / f"{name}.cu" for name in ("gemm", "jacobi", "cholesky", "reduce")]
    flags = [
        "-std=c++17",
        "-O2",
        f"-arch=sm_{major}{minor}",
        "--extended-lambda",
        "--expt-relaxed-constexpr",
        "-lineinfo",
    ]
    command = [nvcc, *flags, *include_directories(), *map(str, sources), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    return program


def test_every_kernel_against_host_loops(kernel_program: Path):
    ran = subprocess.run([str(kernel_program)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_under_compute_sanitizer(kernel_program: Path, tool: str):
    sanitizer = shutil.which("compute-sanitizer") or pytest.skip("compute-sanitizer is not on PATH")
    ran = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "3", str(kernel_program)],
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert ran.returncode == 0, ran.stdout[-6000:]


def pencil(n: int, k: int, cond: float = 1e4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A = G'G, B = H'H + delta I and the k largest values as squared singular values of G R^-1, B = R'R by QR: no squaring."""
    rng = np.random.default_rng(seed)
    decay = np.arange(1, n + 1) ** -0.8
    g, h = rng.standard_normal((max(n // 4, k), n)) * decay, rng.standard_normal((2 * n, n)) * decay
    delta = np.linalg.norm(h, 2) ** 2 / cond
    r = np.linalg.qr(np.vstack([h, np.sqrt(delta) * np.eye(n)]), mode="r")
    values = np.linalg.svd(np.linalg.solve(r.T, g.T), compute_uv=False)[:k] ** 2
    return g.T @ g, h.T @ h + delta * np.eye(n), values


def batch_of(n: int, k: int, count: int, **options) -> tuple[Tensor, Tensor, Tensor]:
    made = [pencil(n, k, seed=seed, **options) for seed in range(count)]
    a, b, values = (torch.from_numpy(np.stack(parts)) for parts in zip(*made))
    return a, b, values


def check(name: str, a: Tensor, b: Tensor, result, expected: Tensor, allowed: float) -> None:
    """Status, values, B-orthonormality, residual and honesty of the bound; every number stands in the message."""
    a, b, values, v, bound = (
        x.detach().cpu().double() for x in (a, b, result.values, result.vectors, result.error_bound)
    )
    status = result.status.cpu().tolist()
    shift = ((values - expected).abs() / expected[..., :1]).amax().item()
    gram = v.mT @ b @ v
    skew = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype)).abs().amax().item()
    factor = torch.linalg.cholesky(b)
    rho = torch.linalg.solve_triangular(factor, a @ v - (b @ v) * values[..., None, :], upper=False).norm(dim=-2)
    eta = (rho / expected[..., :1]).amax().item()
    slack = (rho - 2 * bound).amax().item() / expected.max().item()
    told = f"{name}: status {status} values off {shift:.1e} V'BV-I {skew:.1e} residual {eta:.1e} bound short by {slack:.1e} {result.route}"
    print(told, flush=True)
    assert set(status) == {0}, told
    assert shift <= allowed, told
    assert skew <= 1e-8, told
    assert eta <= max(2e-10, allowed), told
    assert slack <= 1e-11, told


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "k", "count"), [(96, 4, 3), (130, 8, 5), (256, 16, 4), (400, 32, 2), (515, 8, 2)])
def test_values_of_qr_and_svd(method: str, n: int, k: int, count: int):
    a, b, expected = batch_of(n, k, count)
    check(f"{method} n={n} k={k}", a, b, gevp(a.cuda(), b.cuda(), k, method=method), expected, 1e-10)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (7, 3), (16, 16), (33, 33), (63, 5), (64, 64), (65, 65)])
def test_direct_at_small_orders(n: int, k: int):
    a, b, expected = batch_of(n, k, 6, cond=1e3)
    check(f"direct n={n}", a, b, gevp(a.cuda(), b.cuda(), k, method="direct"), expected, 1e-11)


@pytest.mark.parametrize("preconditioner", ["cholesky_single", "diagonal"])
def test_preconditioners_reach_double_precision(preconditioner: str):
    a, b, expected = batch_of(256, 8, 3, cond=1e4)
    result = gevp(a.cuda(), b.cuda(), 8, method="jacobi_davidson", preconditioner=preconditioner, max_cycles=200)
    check(preconditioner, a, b, result, expected, 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_float32_storage(method: str):
    a, b, _ = batch_of(200, 8, 3, cond=1e3)
    a, b = (x.float() for x in (a, b))
    a, b = (a + a.mT) / 2, (b + b.mT) / 2
    expected = gevp(a.double(), b.double(), 8, method="direct").values
    check(f"float32 {method}", a, b, gevp(a.cuda(), b.cuda(), 8, method=method), expected, 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_cpu_and_cuda_agree(method: str):
    a, b, _ = batch_of(160, 8, 3)
    cpu, gpu = gevp(a, b, 8, method=method), gevp(a.cuda(), b.cuda(), 8, method=method)
    assert torch.equal(cpu.status, gpu.status.cpu())
    torch.testing.assert_close(gpu.values.cpu(), cpu.values, rtol=0, atol=1e-11 * float(cpu.values.max()))
    torch.testing.assert_close(
        gpu.vectors.cpu().abs(), cpu.vectors.abs(), rtol=0, atol=1e-5 * float(cpu.vectors.abs().max())
    )


@pytest.mark.parametrize(("method", "n"), [("direct", 60), ("jacobi_davidson", 200)])
def test_same_bits_alone_and_in_company(method: str, n: int):
    easy, hard = batch_of(n, 8, 4, cond=1e2), batch_of(n, 8, 3, cond=1e6)
    a, b = (torch.cat([easy[i], hard[i]])[[4, 0, 5, 1, 2, 6, 3]].cuda() for i in (0, 1))
    together, again = (gevp(a, b, 8, method=method) for _ in range(2))
    assert torch.equal(together.vectors, again.vectors), "two runs differ"
    for p in range(len(a)):
        alone = gevp(a[p : p + 1], b[p : p + 1], 8, method=method)
        assert torch.equal(alone.values[0], together.values[p]), f"problem {p}: values differ"
        assert torch.equal(alone.vectors[0], together.vectors[p]), f"problem {p}: vectors differ"


@pytest.mark.parametrize(("method", "n"), [("direct", 40), ("direct", 150), ("jacobi_davidson", 150)])
def test_bad_problems_keep_to_themselves(method: str, n: int):
    a, b, expected = batch_of(n, 6, 8)
    clean = gevp(a.cuda(), b.cuda(), 6, method=method)
    a[1, 3, 5] = torch.nan
    b[2, 7, 7] = torch.inf
    b[3, 9, 9] = -1.0
    a[5, 4, 8] += a[5].abs().max()
    a[6] = 0.0
    result = gevp(a.cuda(), b.cuda(), 6, method=method)
    status = [GEVPStatus(code).name for code in result.status.tolist()]
    wanted = [
        "converged",
        "non_finite",
        "non_finite",
        "not_positive_definite",
        "converged",
        "not_symmetric",
        "rank_deficient",
        "converged",
    ]
    assert status == wanted, f"{method} n={n}: {status}"
    for p in (1, 2, 3, 5):
        assert result.values[p].isnan().all(), f"values of problem {p} are not NaN"
        assert result.vectors[p].isnan().all(), f"vectors of problem {p} are not NaN"
    assert (result.values[6] == 0).all()
    good = [0, 4, 7]
    if method == "jacobi_davidson" or n <= 64:
        assert torch.equal(result.vectors[good], clean.vectors[good])
    torch.testing.assert_close(result.values[good].cpu(), expected[good], rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_scales(method: str, scale: float):
    a, b, expected = batch_of(120, 5, 2)
    result = gevp((a * scale).cuda(), b.cuda(), 5, method=method)
    torch.testing.assert_close(result.values.cpu() / scale, expected, rtol=1e-9, atol=0)
    assert set(result.status.tolist()) == {0}


@pytest.mark.parametrize("method", METHODS)
def test_multiplicity_above_the_block(method: str):
    n, k = 160, 12
    rng = np.random.default_rng(3)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    spectrum = np.r_[np.full(12, 7.0), np.linspace(5, 0.1, n - 12)]
    a = torch.from_numpy((q * spectrum) @ q.T)
    result = gevp(((a + a.T) / 2).cuda(), torch.eye(n, dtype=torch.float64, device="cuda"), k, method=method)
    torch.testing.assert_close(result.values.cpu(), torch.full((k,), 7.0, dtype=torch.float64), rtol=1e-9, atol=0)


def test_operators_on_cuda():
    rng = np.random.default_rng(5)
    rows = [torch.from_numpy(rng.standard_normal((count, 900)) * np.arange(1, 901) ** -0.6) for count in (40, 120)]
    gain, cost = rows
    here = gevp(LowRank(gain), LowRank(cost, 1e-2), 6, method="jacobi_davidson")
    there = gevp(LowRank(gain.cuda()), LowRank(cost.cuda(), 1e-2), 6, method="jacobi_davidson")
    assert there.values.is_cuda
    torch.testing.assert_close(there.values.cpu(), here.values, rtol=1e-9, atol=0)


def test_runs_on_the_callers_stream():
    a, b, expected = batch_of(128, 4, 2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gain = torch.empty_like(a, device="cuda")
        torch.cuda._sleep(20_000_000)
        gain.copy_(a.pin_memory(), non_blocking=True)
        result = gevp(gain, b.cuda(), 4, method="jacobi_davidson")
    stream.synchronize()
    torch.testing.assert_close(result.values.cpu(), expected, rtol=1e-9, atol=0)


def test_memory_is_what_was_announced_and_all_of_it_returns():
    a, b, _ = batch_of(256, 8, 8)
    a, b = a.cuda(), b.cuda()
    gevp(a, b, 8, method="jacobi_davidson")
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gevp(a, b, 8, method="jacobi_davidson")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == held
    extra = (torch.cuda.max_memory_allocated() - held) / 8
    n, m = 256, 64
    print(f"extra memory per problem {extra / 8 / n**2:.2f} n^2 = n^2 + {(extra / 8 - n**2) / (n * m):.2f} n m")
    assert extra / 8 <= n**2 + 6 * n * m


def test_small_workspace_is_refused(native):
    a, b, _ = batch_of(96, 4, 2)
    a, b = a.cuda(), b.cuda()
    options = native.Options.for_problem(96, 4)
    out = [torch.empty(2 * 96 * 4, dtype=torch.float64, device="cuda") for _ in range(5)]
    size = native.workspace_bytes(2, 96, options, False, 0)
    where = (a.data_ptr(), 96 * 96, b.data_ptr(), 96 * 96, False, 2, 96)
    with pytest.raises(RuntimeError, match="workspace too small"):
        native.solve_dense(*where, options, *(x.data_ptr() for x in out), out[0].data_ptr(), size // 4, 0)
