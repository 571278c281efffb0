"""csrc/cuda, on a GPU and, on any machine with a C++ compiler, on the host (tests/emulation.py): kernels against host loops, routes
against QR + SVD values, the CPU instantiation and LAPACK, bits alone and in company, failures kept to their own problem, and the
memory that a solve asks for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sst_kernels.gevp import GEVPStatus, gevp
from sst_kernels.gevp.operators import LowRank
from tests.emulation import EmulatedGPU, build
from tests.gevp_backends import GPU, Solve, backend
from tests.test_cuda_build import ROOT

LARGER = ((256, 16, 4), (400, 32, 2), (515, 8, 2))
METHODS = ("direct", "jacobi_davidson")
KERNELS = ("gemm", "jacobi", "cholesky", "reduce")
PROGRAM = ROOT / "tests" / "cpp" / "cuda_kernels.cu"
WHERE = ("emulated", GPU)


@pytest.fixture(scope="module", params=WHERE)
def solve(request) -> Solve:
    return backend(request)


def gpu_program(target: Path) -> Path:
    """tests/cpp/cuda_kernels.cu, compiled for the GPU at hand."""
    nvcc = shutil.which("nvcc") or pytest.skip("nvcc is not on PATH")
    major, minor = torch.cuda.get_device_capability()
    flags = [
        *(
            "-std=c++17",
            "-O2",
            "-lineinfo",
            f"-arch=sm_{major}{minor}",
            "--extended-lambda",
            "--expt-relaxed-constexpr",
        ),
        *(f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"),
    ]
    sources = [PROGRAM, *(ROOT / "csrc" / "cuda" / f"{name}.cu" for name in KERNELS)]
    built = subprocess.run([nvcc, *flags, *map(str, sources), "-o", str(target)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    return target


@pytest.fixture(scope="module")
def kernel_program(request, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("kernels") / "cuda_kernels"
    return gpu_program(target) if request.param == "gpu" else build(target, PROGRAM, KERNELS)


@pytest.mark.parametrize("kernel_program", WHERE, indirect=True)
@pytest.mark.parametrize("shapes", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_every_kernel_against_host_loops(kernel_program: Path, shapes: str):
    ran = subprocess.run([str(kernel_program), shapes], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


BARRIERS = {
    "reduce again": "    value = warp_reduce(lane < Threads / 32 ? scratch[lane] : identity, combine);\n    __syncthreads();\n",
    "compact": "        if (lane == 0) per_warp[warp] = __popc(ballot);\n        __syncthreads();\n",
    "compact again": "        if (keep) list[place] = problem;\n        __syncthreads();\n",
    "gemm_tile": "        __syncthreads();  // the buffer staged next was last read before this barrier: one barrier a step is enough\n",
    "jacobi": "            __syncthreads();\n        }\n    }\n\n    int* rank",
    "reduce": "    if (lane == 0) scratch[warp] = value;\n    __syncthreads();\n",
    "cholesky": "        __syncthreads();\n        for (int i = threadIdx.x / kTile; i < width",
}


@pytest.mark.parametrize(
    "kernel",
    [
        "gemm_tile",
        "jacobi",
        *(pytest.param(x, marks=pytest.mark.slow) for x in sorted(BARRIERS.keys() - {"gemm_tile", "jacobi"})),
    ],
)
def test_a_missing_barrier_would_be_found(kernel: str, tmp_path: Path):
    """What the emulation's random order of threads counts on."""
    change = BARRIERS[kernel], BARRIERS[kernel].replace("__syncthreads();", ";")
    program = build(tmp_path / "cuda_kernels", PROGRAM, KERNELS, ["-O1"], change=change)
    ran = subprocess.run([str(program), "quick"], capture_output=True, text=True, timeout=300)
    assert "FAILED: " in ran.stdout, ran.stdout[-2000:] + ran.stderr[-2000:]


def test_threads_that_part_ways_at_a_barrier_are_reported(tmp_path: Path):
    whole = "        if (!__syncthreads_or(coupled)) {\n"
    change = whole, f"        if (thread == 3) continue;\n{whole}"
    program = build(tmp_path / "cuda_kernels", PROGRAM, KERNELS, ["-O1"], change=change)
    ran = subprocess.run([str(program), "quick"], capture_output=True, text=True, timeout=300)
    assert re.search(r"jacobi\.cu:\d+ is not met by all threads of a CTA", ran.stdout), ran.stdout[-2000:]


@pytest.mark.slow
def test_kernels_under_sanitizers_of_the_host(tmp_path: Path):
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = build(tmp_path / "cuda_kernels", PROGRAM, KERNELS, flags)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=1200, env=environment)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("kernel_program", [GPU], indirect=True)
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
@pytest.mark.parametrize(
    ("n", "k", "count"),
    [(96, 4, 3), (130, 8, 5), (200, 16, 2), *(pytest.param(*size, marks=pytest.mark.slow) for size in LARGER)],
)
def test_values_of_qr_and_svd(solve: Solve, method: str, n: int, k: int, count: int):
    a, b, expected = batch_of(n, k, count)
    check(f"{method} n={n} k={k}", a, b, solve(a, b, k, method=method), expected, 1e-10)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (7, 3), (16, 16), (33, 33), (63, 5), (64, 64), (65, 65)])
def test_direct_at_small_orders(solve: Solve, n: int, k: int):
    a, b, expected = batch_of(n, k, 6, cond=1e3)
    check(f"direct n={n}", a, b, solve(a, b, k, method="direct"), expected, 1e-11)


@pytest.mark.parametrize("preconditioner", ["cholesky_single", pytest.param("diagonal", marks=pytest.mark.slow)])
def test_preconditioners_reach_double_precision(solve: Solve, preconditioner: str):
    a, b, expected = batch_of(160, 8, 2, cond=1e4)
    result = solve(a, b, 8, method="jacobi_davidson", preconditioner=preconditioner, max_cycles=200)
    check(preconditioner, a, b, result, expected, 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_float32_storage(solve: Solve, method: str):
    a, b, _ = batch_of(200, 8, 3, cond=1e3)
    a, b = (x.float() for x in (a, b))
    a, b = (a + a.mT) / 2, (b + b.mT) / 2
    expected = gevp(a.double(), b.double(), 8, method="direct").values
    check(f"float32 {method}", a, b, solve(a, b, 8, method=method), expected, 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_cpu_and_cuda_agree(solve: Solve, method: str):
    a, b, _ = batch_of(160, 8, 3)
    cpu, gpu = gevp(a, b, 8, method=method), solve(a, b, 8, method=method)
    assert torch.equal(cpu.status, gpu.status)
    torch.testing.assert_close(gpu.values, cpu.values, rtol=0, atol=1e-11 * float(cpu.values.max()))
    torch.testing.assert_close(gpu.vectors.abs(), cpu.vectors.abs(), rtol=0, atol=1e-5 * float(cpu.vectors.abs().max()))


@pytest.mark.parametrize(("method", "n"), [("direct", 60), ("jacobi_davidson", 110)])
def test_same_bits_alone_and_in_company(solve: Solve, method: str, n: int):
    easy, hard = batch_of(n, 8, 4, cond=1e2), batch_of(n, 8, 3, cond=1e6)
    a, b = (torch.cat([easy[i], hard[i]])[[4, 0, 5, 1, 2, 6, 3]] for i in (0, 1))
    together, again = (solve(a, b, 8, method=method) for _ in range(2))
    assert torch.equal(together.vectors, again.vectors), "two runs differ"
    for p in range(len(a)):
        alone = solve(a[p : p + 1], b[p : p + 1], 8, method=method)
        assert torch.equal(alone.values[0], together.values[p]), f"problem {p}: values differ"
        assert torch.equal(alone.vectors[0], together.vectors[p]), f"problem {p}: vectors differ"


@pytest.mark.parametrize(("method", "n"), [("direct", 40), ("direct", 96), ("jacobi_davidson", 96)])
def test_bad_problems_keep_to_themselves(solve: Solve, method: str, n: int):
    a, b, expected = batch_of(n, 6, 8)
    clean = solve(a, b, 6, method=method)
    a[1, 3, 5] = torch.nan
    b[2, 7, 7] = torch.inf
    b[3, 9, 9] = -1.0
    a[5, 4, 8] += a[5].abs().max()
    a[6] = 0.0
    result = solve(a, b, 6, method=method)
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
    torch.testing.assert_close(result.values[good], expected[good], rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_scales(solve: Solve, method: str, scale: float):
    a, b, expected = batch_of(120, 5, 2)
    result = solve(a * scale, b, 5, method=method)
    torch.testing.assert_close(result.values / scale, expected, rtol=1e-9, atol=0)
    assert set(result.status.tolist()) == {0}


@pytest.mark.parametrize("method", METHODS)
def test_multiplicity_above_the_block(solve: Solve, method: str):
    n, k = 160, 12
    rng = np.random.default_rng(3)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    spectrum = np.r_[np.full(12, 7.0), np.linspace(5, 0.1, n - 12)]
    a = torch.from_numpy((q * spectrum) @ q.T)
    result = solve(((a + a.T) / 2)[None], torch.eye(n, dtype=torch.float64)[None], k, method=method)
    torch.testing.assert_close(result.values[0], torch.full((k,), 7.0, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_threads_changes_no_bit(emulated: EmulatedGPU, method: str):
    a, b, _ = batch_of(96, 4, 2)
    results = []
    for seed in (1, 2):
        emulated.schedule(seed)
        results.append(emulated.gevp_dense(a, b, 4, method, "cholesky", 1e-10, 100, 0))
    for one, other in zip(*results):
        assert torch.equal(one, other)


def test_the_host_waits_once_a_cycle_and_never_for_the_direct_route(emulated: EmulatedGPU):
    a, b = batch_of(160, 16, 2)[1], torch.eye(160, dtype=torch.float64).expand(2, 160, 160).contiguous()
    a = torch.linalg.inv(a)  # of full rank, and crowded where it is wanted
    a = (a + a.mT) / 2
    cycles = emulated.gevp_dense(a, b, 16, "jacobi_davidson", "cholesky", 1e-13, 100, 0)[-1]
    assert cycles.max() > 1
    assert emulated.waits == 2 + cycles.max()  # once for what the screen refuses, once for what has no factor
    emulated.gevp_dense(a, b, 16, "direct", "cholesky", 1e-10, 100, 0)
    assert emulated.waits == 0


def low_rank_pair(n: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(5)
    gain, cost = (rng.standard_normal((count, n)) * np.arange(1, n + 1) ** -0.6 for count in (40, 120))
    return torch.from_numpy(gain), torch.from_numpy(cost)


def test_operators_emulated(emulated: EmulatedGPU):
    gain, cost = low_rank_pair(200)
    here = gevp(LowRank(gain), LowRank(cost, 1e-2), 6, method="jacobi_davidson")
    a, b = LowRank(gain), LowRank(cost, 1e-2)
    products = (a.matmul, b.matmul, torch.linalg.inv(b.dense()).matmul)
    values, _, _, status, _ = emulated.gevp_products(products, 200, 6)
    assert status.item() == 0
    torch.testing.assert_close(values, here.values, rtol=1e-9, atol=0)


@pytest.mark.gpu
def test_operators_on_cuda():
    gain, cost = low_rank_pair(900)
    here = gevp(LowRank(gain), LowRank(cost, 1e-2), 6, method="jacobi_davidson")
    there = gevp(LowRank(gain.cuda()), LowRank(cost.cuda(), 1e-2), 6, method="jacobi_davidson")
    assert there.values.is_cuda
    torch.testing.assert_close(there.values.cpu(), here.values, rtol=1e-9, atol=0)


@pytest.mark.gpu
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


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_small_workspace_is_refused(native):
    a, b, _ = batch_of(96, 4, 2)
    a, b = a.cuda(), b.cuda()
    options = native.Options.for_problem(96, 4)
    out = [torch.empty(2 * 96 * 4, dtype=torch.float64, device="cuda") for _ in range(5)]
    size = native.workspace_bytes(2, 96, options, False, 0)
    where = (a.data_ptr(), 96 * 96, b.data_ptr(), 96 * 96, False, 2, 96)
    with pytest.raises(RuntimeError, match="workspace too small"):
        native.solve_dense(*where, options, *(x.data_ptr() for x in out), out[0].data_ptr(), size // 4, 0)
