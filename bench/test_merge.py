"""Filter, export and the whole solve of SST-Merge, and the merges of others, on the modules of one model."""

import pytest
import torch

import sst_kernels as sst
from bench import baselines, gates, workload
from sst_merge.io.adapters import load_adapter, write_adapter
from sst_merge.merge.algebra import concatenate, transform

RANK, SAMPLES = 16, 64


@pytest.fixture(scope="module")
def adapters(shape):
    return [workload.random_adapter(shape, RANK, "all-linear", device="cpu", seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def fishers(adapters, device):
    return [workload.core_fisher(adapters[0], SAMPLES, device=device, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def columns(shape):
    return {"model": shape.name, "rank": RANK, "batch": SAMPLES}


@pytest.mark.parametrize("scope", ["global", "module"])
def test_subspace(cost, fishers, columns, scope):
    gate = lambda _: gates.solve_gate(*fishers, scope)  # noqa: E731
    cost("gevp", f"subspace {scope}", lambda: sst.subspace(*fishers, scope=scope), gate=gate, rounds=3, **columns)


def test_filter(cost, fishers, columns):
    space = sst.subspace(*fishers)

    def within_budget(patch):
        assert 0 < patch.prediction.cost_per_label <= 1.0

    cost("filter", "soft(kl_budget)", lambda: space.soft(kl_budget=1.0), gate=within_budget, rounds=3, **columns)


def test_export(cost, fishers, adapters, columns, tmp_path):
    patch = sst.subspace(*fishers).soft(mu=1.0)

    def export():
        write_adapter(concatenate([(1.0, adapters[1]), (1.0, transform(adapters[0], patch.coordinates))]), tmp_path)

    def same_change(_):
        name, term = next(iter(load_adapter(tmp_path).terms.items()))
        safety = adapters[0].terms[name]
        change = safety.scaling * (safety.B.double() @ patch.coordinates[name].cpu() @ safety.A.double())
        expected = adapters[1].terms[name].delta() + change
        error = float((term.delta() - expected).norm() / expected.norm())
        assert error <= 1e-6, f"the written adapter is off by {error:.2e}"
        return error

    size = sum(4.0 * (t.A.numel() + t.B.numel()) for a in adapters for t in a.terms.values())
    cost("export", "transform + concatenate + write", export, gate=same_change, bytes=2 * size, **columns)


@pytest.mark.parametrize("name", list(baselines.FACTORED))
def test_factored_merge(cost, shape, device, columns, name):
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator, device=device)

    modules = [[(draw(p, RANK), draw(RANK, q)) for _ in range(2)] for p, q in shape.modules().values()]
    merge = lambda: [baselines.FACTORED[name](tasks) for tasks in modules]  # noqa: E731
    cost("merge", name, merge, gate=lambda _: gates.baseline_gate(device), rounds=3, **columns)
