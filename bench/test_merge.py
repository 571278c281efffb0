"""Filter, export and the whole solve of SST-Merge, and the merges of others, on the modules of one model."""

import pytest

import sst_kernels as sst
from bench import baselines, gates, merging, workload
from sst_merge.io.adapters import load_adapter

RANK, SAMPLES = 16, 64


@pytest.fixture(scope="module")
def adapters(shape):
    return [workload.random_adapter(shape, RANK, "all-linear", device="cpu", seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def fishers(adapters, device):
    return [workload.core_fisher(adapters[0], SAMPLES, device=device, seed=seed) for seed in (1, 2)]


@pytest.fixture
def timed(cost, shape):
    return lambda *what, **more: cost(*what, model=shape.name, rank=RANK, batch=SAMPLES, **{"rounds": 3} | more)


@pytest.mark.parametrize("scope", ["global", "module"])
def test_subspace(timed, fishers, scope):
    gate = lambda _: gates.solve_gate(*fishers, scope)  # noqa: E731
    timed("gevp", f"subspace {scope}", lambda: sst.subspace(*fishers, scope=scope), gate=gate)


def test_filter(timed, fishers):
    space = sst.subspace(*fishers)

    def within_budget(patch):
        assert 0 < patch.prediction.cost_per_label <= 1.0

    timed("filter", "soft(kl_budget)", lambda: space.soft(kl_budget=1.0), gate=within_budget)


def test_export(timed, fishers, adapters, tmp_path):
    patch, (safety, task) = sst.subspace(*fishers).soft(mu=1.0), adapters

    def same_change(_):
        name, term = next(iter(load_adapter(tmp_path).terms.items()))
        own = safety.terms[name]
        change = own.scaling * (own.B.double() @ patch.coordinates[name].cpu() @ own.A.double())
        expected = task.terms[name].delta() + change
        error = float((term.delta() - expected).norm() / expected.norm())
        assert error <= 1e-6, f"the written adapter is off by {error:.2e}"
        return error

    size = sum(4.0 * (t.A.numel() + t.B.numel()) for a in adapters for t in a.terms.values())
    export = lambda: merging.export(task, safety, patch, tmp_path)  # noqa: E731
    timed("export", "transform + concatenate + write", export, gate=same_change, bytes=2 * size, rounds=5)


@pytest.mark.parametrize("name", list(baselines.FACTORED))
def test_factored_merge(timed, shape, device, name):
    modules = [merging.tasks(size, 1, RANK, device) for size in shape.modules().values()]
    merge = lambda: [baselines.FACTORED[name](pair) for pair in modules]  # noqa: E731
    timed("merge", name, merge, gate=lambda _: gates.baseline_gate(device))
