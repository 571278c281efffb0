"""Every route of the eigensolver at the sizes a LoRA adapter of rank 16 brings."""

from functools import partial

import pytest
import torch

from sst_kernels.gevp import Dense, Diagonal, EigenKronecker, Kronecker, LowRank, gevp


def draw(*shape, device, seed):
    return torch.randn(*shape, dtype=torch.float64, device=device, generator=torch.Generator(device).manual_seed(seed))


def psd(n, *batch, device, seed=0):
    x = draw(*batch, n, 2 * n, device=device, seed=seed)
    return x @ x.mT / (2 * n)


def rows(p, n, device, seed):
    return draw(p, n, device=device, seed=seed) * torch.exp(-0.02 * torch.arange(p, device=device))[:, None]


def accurate(a, b, allowed=1e-8):
    """Residual A v − λ B v and B-orthonormality, as a share of the largest λ."""

    def gate(result):
        result.raise_if_failed()
        v, values = result.vectors, result.values
        if v.ndim == 3:
            v, values = v[0], values[0]
        av, bv = a.matmul(v), b.matmul(v)
        eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
        error = max(float((v.mT @ bv - eye).abs().max()), float((v.mT @ av - values * eye).abs().max() / values.max()))
        assert error <= allowed, f"residual or orthonormality {error:.2e}"
        return error

    return gate


def pencils(route, device):
    """What a route is given, the pencil as operators, what it is, and the least flops of it."""
    gpu = device == "cuda"
    n, k, (p, q) = (256, 16, (16, 4096)) if gpu else (64, 8, (16, 128))
    if route in ("direct", "jacobi_davidson"):
        a, b = psd(n, 28, device=device), psd(n, 28, device=device, seed=1) + 0.1 * torch.eye(n, device=device)
        return (a, b, k), (Dense(a[0]), Dense(b[0])), f"28 x {n}, k={k}", 28 * 14.0 * n**3 * (route == "direct")
    if route == "diagonal":
        n = 57344 if gpu else 3584
        pair = [Diagonal(torch.rand(n, dtype=torch.float64, device=device) + 0.1) for _ in range(2)]
        return (*pair, k), pair, f"n={n}, k={k}", 0.0
    if route == "lowrank":
        n, p = (57344, 256) if gpu else (3584, 32)
        pair = LowRank(rows(p, n, device, 0)), LowRank(rows(p, n, device, 1), 0.1)
        return (*pair, p), pair, f"n={n}, {p}+{p} rows", 12.0 * n * p**2
    if route == "kronecker":
        sides = [psd(m, device=device, seed=s) for s, m in enumerate((p, q, p, q))]
        pair = Kronecker(*sides[:2]), Kronecker(*sides[2:], 0.1, 0.1)
        return (*pair, k), pair, f"{p} x {q}, k={k}", 14.0 * (p**3 + q**3)
    q = 1024 if gpu else q
    u = [torch.linalg.qr(psd(m, device=device)).Q for m in (p, q)]
    pair = [EigenKronecker(*u, torch.rand(p, q, dtype=torch.float64, device=device) + 0.1) for _ in range(2)]
    return (*pair, k), pair, f"{p} x {q}, k={k}", 0.0


@pytest.mark.parametrize("route", ["direct", "jacobi_davidson", "diagonal", "lowrank", "kronecker", "eigenbasis"])
def test_gevp(cost, device, route):
    given, operators, what, flops = pencils(route, device)
    solve = partial(gevp, *given, method=route if route in ("direct", "jacobi_davidson") else "auto")
    result = cost("gevp", route, solve, gate=accurate(*operators), flops=flops, dtype=torch.float64, note=what)
    cost.benchmark.extra_info["route"] = result.route
