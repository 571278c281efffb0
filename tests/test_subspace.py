"""The pencil of two Fishers and the filters: against SciPy, their own objectives, and the symmetries they must have."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_kernels import fisher_accumulate, sequence_nll, subspace
from sst_kernels.subspace import coordinates
from tests.models import lora_layers, tiny_batch, tiny_lora
from tests.pencil_cases import IDENTITY, RANKS, dense_metric, dense_pencil, fisher_of, flat, metrics, pair


@pytest.mark.parametrize("metric", ["kronecker", "frobenius"])
@pytest.mark.parametrize("scope", ["global", "module"])
def test_values_are_those_of_the_pencil(scope, metric):
    gain, cost = pair()
    space = subspace(gain, cost, scope=scope, metric=metric)
    a, b = dense_pencil(gain, cost, space.epsilon, scope, metric, unseen=space.unseen)
    expected = scipy.linalg.eigh(a, b, eigvals_only=True)[::-1]
    values = space.values.numpy()
    np.testing.assert_allclose(values, expected[: len(values)], rtol=1e-9, atol=1e-9 * expected[0])


def test_epsilon_is_relative_to_the_cost_in_frobenius_coordinates():
    gain, cost = pair()
    _, b = dense_pencil(gain, cost, 0.0, "global")
    trace = np.trace(np.linalg.solve(dense_metric(cost, "frobenius"), b))
    for metric in ("kronecker", "frobenius"):
        epsilon = subspace(gain, cost, damping=2.0, metric=metric).epsilon
        assert epsilon == pytest.approx(2.0 * trace / len(b), rel=1e-10)


def test_the_kronecker_metric_is_exact_where_the_fisher_is_a_kronecker_product():
    """Gradients X^½ G Y^½ with white G: E[CCᵀ] ⊗ E[CᵀC] / tr is their covariance, so λ of a like gain are all alike."""
    generator = torch.Generator().manual_seed(0)
    metric = {name: (torch.eye(r, dtype=torch.float64),) * 2 for name, r in RANKS.items()}
    sides = [torch.diag(torch.logspace(0, -0.25, r, dtype=torch.float64)) for r in RANKS.values() for _ in "lr"]

    def rows(count: int) -> torch.Tensor:
        parts = []
        for i, r in enumerate(RANKS.values()):
            white = torch.randn(count, r, r, dtype=torch.float64, generator=generator)
            parts.append((sides[2 * i] @ white @ sides[2 * i + 1].mT).flatten(1))
        return torch.cat(parts, 1)

    spread = {}
    for kind in ("kronecker", "frobenius"):
        space = subspace(
            fisher_of(rows(4_000), metric), fisher_of(rows(4_000), metric), metric=kind, damping=50.0, folds=2
        )
        spread[kind] = float(space.values[0] / space.values[-1])
    assert spread["kronecker"] < 1.5  # (1 + √(17/4000))² over (1 − √(17/4000))² is 1.3
    assert spread["frobenius"] > 8


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    mu=st.floats(1e-3, 10.0),
    scope=st.sampled_from(["global", "module"]),
    metric=st.sampled_from(["kronecker", "frobenius"]),
)
def test_soft_minimises_its_objective(seed, mu, scope, metric):
    """s' = argmin (s'−s)ᵀG(s'−s) + μ s'ᵀBs' with B = F_c+εM and G = F_g+λ₀B, whose solution is (G + μ B)⁻¹ G s."""
    gain, cost = pair(seed)
    space = subspace(gain, cost, scope=scope, metric=metric)
    a, b = dense_pencil(gain, cost, space.epsilon, scope, metric, unseen=space.unseen)
    expected = np.linalg.solve(a + mu * b, a @ IDENTITY)
    np.testing.assert_allclose(flat(space.soft(mu=mu)), expected, rtol=1e-7, atol=1e-8 * abs(expected).max())


@pytest.mark.parametrize("scope", ["global", "module"])
def test_top_k_and_threshold_project_onto_the_best_directions(scope):
    gain, cost = pair(2)
    space = subspace(gain, cost, scope=scope)
    a, b = dense_pencil(gain, cost, space.epsilon, scope)
    _, vectors = scipy.linalg.eigh(a, b)
    vectors = vectors[:, ::-1][:, :5]
    expected = vectors @ (vectors.T @ (b @ IDENTITY))
    np.testing.assert_allclose(flat(space.top_k(5)), expected, rtol=1e-7, atol=1e-8 * abs(expected).max())
    between = float(space.values[4:6].mean())
    np.testing.assert_allclose(flat(space.threshold(mu=between)), expected, rtol=1e-7, atol=1e-8 * abs(expected).max())


@pytest.mark.parametrize("scope", ["global", "module"])
@pytest.mark.parametrize("gain_rows", [60, 20, 12, 3])
@pytest.mark.parametrize("cost_rows", [40, 4])
@pytest.mark.parametrize("name", ["soft", "threshold", "top_k"])
def test_a_large_budget_keeps_the_whole_patch(scope, gain_rows, cost_rows, name):
    """Whether gain rows show every direction (60; 20, of which a fold lacks some), few of each module or few of all; from rows, products and stored matrices."""
    gain, cost = pair(3, gain_rows=gain_rows, cost_rows=cost_rows)
    space = subspace(gain, cost, scope=scope, folds=2)
    unseen = gain_rows < (17 if scope == "global" else 9)
    assert (space.unseen > 0) == unseen or gain_rows == 12
    patch = getattr(space, name)(kl_budget=1e9)
    np.testing.assert_allclose(flat(patch), IDENTITY, atol=1e-9)
    assert all(abs(kept - 1) < 1e-9 for kept in patch.kept.values())
    if unseen:
        assert patch.prediction.gain_kept == pytest.approx(1, abs=1e-9)
    assert patch.prediction.in_sample_cost_per_label == pytest.approx(patch.prediction.plain_cost_per_label, rel=1e-9)
    assert patch.prediction.cost_per_label == pytest.approx(patch.prediction.plain_cost_per_label, rel=1e-9)


@pytest.mark.parametrize("cost_rows", [40, 4])
def test_what_no_refusal_shows_comes_last_and_is_priced_by_those_held_out(cost_rows):
    """Gain rows in four directions and a little noise: λ₀ is the noise's, so strengths that the four decide are as they were."""
    generator = torch.Generator().manual_seed(0)
    metric, n = metrics(generator), sum(r * r for r in RANKS.values())
    strong = torch.randn(12, 4, generator=generator) @ torch.randn(4, n, generator=generator)
    noise = torch.randn(12, n, generator=generator)
    cost = fisher_of(torch.randn(cost_rows, n, generator=generator), metric)
    found = {}
    for level in (1e-3, 1e-2):
        gain = fisher_of(strong + level * noise, metric)
        space = subspace(gain, cost, folds=2)
        found[level] = space.unseen
        assert float(space.values[3]) > 100 * space.unseen == 100 * float(space.values[-1])
        a, b = dense_pencil(gain, cost, space.epsilon, "global")
        mu = 0.3 * float(space.values[3])
        without = np.linalg.solve(a + mu * b, a @ IDENTITY)
        assert abs(flat(space.soft(mu=mu)) - without).max() <= space.unseen / mu * abs(IDENTITY - without).max() * 3
    assert found[1e-2] == pytest.approx(100 * found[1e-3], rel=0.2)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    scope=st.sampled_from(["global", "module"]),
    kind=st.sampled_from(["kronecker", "frobenius"]),
)
def test_the_gauge_of_the_adapter_does_not_matter(seed, scope, kind):
    """(B X⁻¹, X A) leaves λ and the filtered ΔW = c·B S' A unchanged."""
    generator = torch.Generator().manual_seed(seed)
    a_side = {n: torch.randn(r, 7, dtype=torch.float64, generator=generator) for n, r in RANKS.items()}
    b_side = {n: torch.randn(6, r, dtype=torch.float64, generator=generator) for n, r in RANKS.items()}
    full = {n: torch.randn(20, 6, 7, dtype=torch.float64, generator=generator) for n in RANKS}  # ∂L/∂W per sample
    gauge = {
        n: torch.eye(r, dtype=torch.float64) + 0.3 * torch.randn(r, r, dtype=torch.float64, generator=generator)
        for n, r in RANKS.items()
    }

    def solved(a: dict, b: dict):
        rows = torch.cat([(b[n].T @ full[n] @ a[n].T).flatten(1) for n in RANKS], 1)
        metric = {n: (b[n].T @ b[n], a[n] @ a[n].T) for n in RANKS}
        gain, cost = fisher_of(rows[:8], metric), fisher_of(rows[8:], metric)
        space = subspace(gain, cost, scope=scope, metric=kind, folds=2)
        patch = space.soft(mu=0.3)
        return space.values, {n: b[n] @ patch.coordinates[n] @ a[n] for n in RANKS}

    values, change = solved(a_side, b_side)
    moved_values, moved = solved(
        {n: gauge[n] @ a for n, a in a_side.items()}, {n: b @ torch.linalg.inv(gauge[n]) for n, b in b_side.items()}
    )
    condition = max(float(torch.linalg.cond(g)) for g in gauge.values())
    # Rows are stored in float32, so each gauge rounds them differently.
    tolerance = 1e-5 * condition**2
    torch.testing.assert_close(moved_values, values, rtol=tolerance, atol=tolerance * float(values[0]))
    for name in RANKS:
        assert (moved[name] - change[name]).norm() <= tolerance * 10 * max(1.0, float(change[name].norm()))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(1e-3, 1e3), scope=st.sampled_from(["global", "module"]))
def test_scaling_laws(seed, scale, scope):
    """λ is linear in the gain and inverse in the cost; the order of the rows does not matter."""
    generator = torch.Generator().manual_seed(seed)
    metric, n = metrics(generator), sum(r * r for r in RANKS.values())
    gain, cost = torch.randn(9, n, generator=generator), torch.randn(15, n, generator=generator)
    base = subspace(fisher_of(gain, metric), fisher_of(cost, metric), scope=scope).values
    scaled = subspace(fisher_of(gain * scale, metric), fisher_of(cost, metric), scope=scope).values
    torch.testing.assert_close(scaled, base * scale**2, rtol=1e-5, atol=1e-5 * float(base[0]) * scale**2)
    scaled = subspace(fisher_of(gain, metric), fisher_of(cost * scale, metric), scope=scope).values
    torch.testing.assert_close(scaled, base / scale**2, rtol=1e-5, atol=1e-5 * float(base[0]) / scale**2)
    own, shuffled = (
        subspace(fisher_of(g, metric), fisher_of(c, metric), scope=scope)
        for g, c in ((gain, cost), (gain.flip(0), cost.flip(0)))
    )
    plain, other = (space.values - space.unseen for space in (own, shuffled))  # λ₀ depends on which rows are a fold
    torch.testing.assert_close(other, plain, rtol=1e-8, atol=1e-9 * float(base[0]))


def test_other_structures_serve_module_scope():
    model = tiny_lora()
    batches = [tiny_batch(12, seed=s) for s in range(2)]

    def passes(structure, **options):
        with fisher_accumulate(model, "safety", structure=structure, **options) as gain:
            model(**batches[0]).loss.backward()
        with fisher_accumulate(model, "safety", structure=structure, **options) as cost:
            sequence_nll(model, batches[1]).backward()
        return gain.fisher, cost.fisher

    exact = subspace(*passes("full"), scope="module", folds=2)
    folded = subspace(*passes("full", scope="module"), scope="module")
    torch.testing.assert_close(folded.values, exact.values, rtol=1e-5, atol=1e-6 * float(exact.values[0]))
    assert not folded.soft(mu=1.0).prediction.held_out
    for structure in ("diagonal", "kronecker", "lowrank"):
        space = subspace(*passes(structure), scope="module")
        assert torch.isfinite(space.soft(mu=1.0).coordinates["model.layers.0.self_attn.q_proj"]).all()
    sketched = subspace(*passes("lowrank", rank=64), scope="global")
    whole = subspace(*passes("full"), scope="global", folds=2)
    raw, expected = (space.values - space.unseen for space in (sketched, whole))
    torch.testing.assert_close(raw, expected, rtol=1e-4, atol=1e-5 * float(whole.values[0]))


def test_an_untrained_adapter_is_named():
    gain, cost = pair()
    nothing = fisher_of(torch.zeros_like(cost.rows()), cost.metric)
    for scope in ("global", "module"):
        with pytest.raises(ValueError, match="cost Fisher is zero"):
            subspace(gain, nothing, scope=scope)


def test_what_does_not_belong_together_is_refused():
    gain, cost = pair()
    other = fisher_of(cost.rows(), cost.metric, point="reference")
    other.meta["point_given"] = False
    with pytest.raises(ValueError, match="different points"):
        subspace(gain, other)
    subspace(gain, other, mix_points=True)
    stranger = fisher_of(cost.rows(), cost.metric)
    stranger.meta["fingerprint"] = "y"
    with pytest.raises(ValueError, match="fingerprint differs"):
        subspace(gain, stranger)
    with pytest.raises(ValueError, match="fewer than folds=20"):
        subspace(gain, cost, folds=20)
    for arguments in ({"scope": "layer"}, {"metric": "spectral"}, {"damping": 0.0}, {"folds": 1}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            subspace(gain, cost, **arguments)
    space = subspace(gain, cost)
    for call in (lambda: space.soft(), lambda: space.soft(mu=1.0, kl_budget=1.0)):
        with pytest.raises(ValueError, match="exactly one"):
            call()
    with pytest.raises(ValueError, match="must not be negative"):
        space.soft(mu=-1.0)
    with pytest.raises(ValueError, match="k must be a whole number in"):
        space.top_k(10**6)
    with pytest.raises(ValueError, match="k must be a whole number in"):
        space.top_k(1.5)
    diagonal = [fisher_of(f.rows(), f.metric, structure="diagonal") for f in (gain, cost)]
    with pytest.raises(ValueError, match="needs cross-module statistics"):
        subspace(*diagonal, scope="global")


def test_a_module_that_costs_nothing_in_the_samples_is_not_free(monkeypatch):
    """Its benign gradients vanish and its gain is small: the level of the metric bounds how far it is moved."""
    gain, cost = pair(7)
    shares = torch.ones(2, gain.rows().shape[1])
    shares[:, :4] = torch.tensor([[0.1], [0.0]])
    gain, cost = (fisher_of(f.rows() * share, f.metric) for f, share in zip((gain, cost), shares))
    kept = subspace(gain, cost).soft(kl_budget=0.01).kept["a"]
    monkeypatch.setattr(coordinates, "_LEVEL", 1e-9)
    assert kept < 0.1 * subspace(gain, cost).soft(kl_budget=0.01).kept["a"]


def test_a_dead_module_keeps_nothing():
    """B = 0: the module's ΔW is zero whatever S is, so its metric and gradients vanish and nothing may blow up."""
    model, batch = tiny_lora().double(), tiny_batch(8)
    name, layer = next(iter(lora_layers(model, "safety").items()))
    layer.lora_B["safety"].weight.data.zero_()
    with fisher_accumulate(model, "safety") as gain:
        model(**batch).loss.backward()
    with fisher_accumulate(model, "safety") as cost:
        sequence_nll(model, tiny_batch(8, seed=3)).backward()
    for scope in ("global", "module"):
        patch = subspace(gain.fisher, cost.fisher, scope=scope).soft(mu=0.1)
        assert patch.kept[name] == 0.0
        assert all(torch.isfinite(core).all() for core in patch.coordinates.values())
