"""What a patch is predicted to cost: budgets, rows held out, folds, and pencils of few rows."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_kernels import subspace
from sst_kernels.subspace import pencils
from tests.pencil_cases import IDENTITY, RANKS, dense_pencil, fisher_of, flat, pair


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    budgets=st.lists(st.floats(1e-8, 1e3), min_size=2, max_size=5),
    name=st.sampled_from(["soft", "threshold", "top_k"]),
    scope=st.sampled_from(["global", "module"]),
)
def test_kl_budgets_are_kept_and_monotone(seed, budgets, name, scope):
    gain, cost = pair(seed)
    space = subspace(gain, cost, scope=scope)
    patches = [getattr(space, name)(kl_budget=b) for b in sorted(budgets)]
    for budget, patch in zip(sorted(budgets), patches):
        assert patch.prediction.cost_per_label <= budget * (1 + 1e-9)
    parameters = [p.parameter if name == "top_k" else -p.parameter for p in patches]
    assert parameters == sorted(parameters)


@pytest.mark.parametrize("name", ["soft", "threshold", "top_k"])
@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_a_path_holds_the_patch_of_every_budget(name, structure):
    """In any order, twice the same and none at all; a budget below everything keeps nothing, and can be written as JSON."""
    space = subspace(*pair(1, structure=structure), scope="module" if structure == "diagonal" else "global")
    budgets = [0.05, 0.0, 1e-3, 0.05, 1e-300, 1e6]
    for budget, patch in zip(budgets, space.path(budgets, name)):
        alone = getattr(space, name)(kl_budget=budget)
        assert (patch.parameter, patch.prediction, patch.kept) == (alone.parameter, alone.prediction, alone.kept)
        assert all(torch.equal(patch.coordinates[m], alone.coordinates[m]) for m in RANKS)
    for patch in space.path([0.0, 1e-300], name):
        assert not any(core.any() for core in patch.coordinates.values())
        assert patch.prediction.cost_per_label == patch.prediction.gain_kept == 0.0
        assert patch.strength == (0.0 if name == "top_k" else None)
        json.dumps([patch.strength, asdict(patch.prediction), patch.kept], allow_nan=False)
    assert space.path([]) == []
    with pytest.raises(ValueError, match="kl_budget must not be negative, got nan"):
        space.path([0.1, float("nan")], name)
    with pytest.raises(ValueError, match="filter: expected one of"):
        space.path([0.1], "hard")


@pytest.mark.parametrize("kind", ["kronecker", "frobenius"])
def test_held_out_predictions_see_no_row_of_their_own_pencil(kind):
    """Cross-fitting by hand: fold i of the cost rows is judged by the patch, and in the metric, of the others and all gain rows."""
    gain, cost = pair(4, gain_rows=8, cost_rows=12)
    space = subspace(gain, cost, folds=4, metric=kind)
    mu, total = 0.05, 0.0
    metric = gain.metric
    for fold in range(4):
        kept = cost.rows()[torch.arange(12) % 4 != fold]
        out = cost.rows()[torch.arange(12) % 4 == fold].double().numpy()
        a, b = dense_pencil(gain, fisher_of(kept, metric), space.epsilon, "global", kind, unseen=space.unseen)
        patch = np.linalg.solve(a + mu * b, a @ IDENTITY)
        total += 0.5 * ((out @ patch) ** 2).sum()
    prediction = space.soft(mu=mu).prediction
    assert prediction.held_out
    assert prediction.cost_per_sequence == pytest.approx(total / 12, rel=1e-6)
    assert prediction.cost_per_label == pytest.approx(total / 12 / 2, rel=1e-6)
    assert prediction.in_sample_cost_per_label < prediction.cost_per_label
    kept = whole = 0.0
    for fold in range(4):
        inside = torch.arange(8) % 4 != fold
        a, b = dense_pencil(
            fisher_of(gain.rows()[inside], metric), cost, space.epsilon, "global", kind, unseen=space.unseen
        )
        out = gain.rows()[~inside].double().numpy()
        kept += ((out @ np.linalg.solve(a + mu * b, a @ IDENTITY)) ** 2).sum()
        whole += ((out @ IDENTITY) ** 2).sum()
    assert prediction.gain_kept == pytest.approx(kept / whole, rel=1e-6)


@pytest.mark.parametrize("scope", ["global", "module"])
@pytest.mark.parametrize("name", ["soft", "threshold", "top_k"])
def test_fewer_rows_than_coordinates_change_nothing(scope, name):
    """3 + 4 rows against 17 coordinates (9 of the widest module): patch, costs and folds of the dense pencils."""
    gain, cost = pair(6, gain_rows=3, cost_rows=4)
    space = subspace(gain, cost, scope=scope, folds=2)
    sizes = [r * r for r in RANKS.values()]
    blocks = (
        [slice(0, sum(sizes))] if scope == "global" else [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in (0, 1, 2)]
    )
    level = float(space.values[:3].mean())

    def filtered(cost_rows: torch.Tensor) -> np.ndarray:
        a, b = dense_pencil(gain, fisher_of(cost_rows, cost.metric), space.epsilon, scope, unseen=space.unseen)
        pairs = [(s, *scipy.linalg.eigh(a[s, s], b[s, s])) for s in blocks]
        values = np.sort(np.concatenate([values for _, values, _ in pairs]))[::-1]
        cut = {"soft": 0.0, "threshold": level, "top_k": values[1:3].mean()}[name]
        out = np.zeros(sum(sizes))
        for s, values, v in pairs:
            weights = values / (values + level) if name == "soft" else values > cut
            out[s] = v @ (weights * (v.T @ (b[s, s] @ IDENTITY[s])))
        return out

    patch = space.top_k(2) if name == "top_k" else getattr(space, name)(mu=level)
    expected, rows = filtered(cost.rows()), cost.rows().double().numpy()
    np.testing.assert_allclose(flat(patch), expected, rtol=1e-9, atol=1e-10 * abs(expected).max())
    half_square = lambda out, s: 0.5 * ((out @ s) ** 2).sum() / len(rows) / 2  # noqa: E731 - two labels per sequence
    of_fold = torch.arange(4) % 2
    held = sum(half_square(rows[of_fold == i], filtered(cost.rows()[of_fold != i])) for i in range(2))
    assert patch.prediction.cost_per_label == pytest.approx(held, rel=1e-8)
    assert patch.prediction.in_sample_cost_per_label == pytest.approx(half_square(rows, expected), rel=1e-8)
    assert patch.prediction.plain_cost_per_label == pytest.approx(half_square(rows, IDENTITY), rel=1e-10)
    assert space.predict_cost(patch.coordinates) == pytest.approx(half_square(rows, expected), rel=1e-8)


def test_draws_of_one_prompt_stay_in_one_fold():
    """With each cost row present twice, only group-wise folds keep the prediction where it was."""
    gain, cost = pair(5, gain_rows=40, cost_rows=13)
    doubled = torch.cat([cost.rows(), cost.rows()])
    n = len(cost.rows())
    together = fisher_of(doubled, cost.metric, groups=list(range(n)) * 2)
    apart = fisher_of(doubled, cost.metric)
    expected, kept, leaked = (
        subspace(gain, c, folds=4, damping=0.01).soft(mu=1.0).prediction.cost_per_label for c in (cost, together, apart)
    )
    assert kept == pytest.approx(expected, rel=1e-6)
    assert leaked < 0.9 * expected


@pytest.mark.parametrize(("structure", "scope"), [("diagonal", "module"), ("lowrank", "global"), ("full", "global")])
def test_what_a_fisher_is_divided_by_changes_nothing(structure, scope):
    spaces = [
        subspace(*pair(structure=structure, count=count), scope=scope) for count in ("sequences", "tokens", "labels")
    ]
    first = spaces[0].soft(mu=1.0)
    for space in spaces[1:]:
        torch.testing.assert_close(space.values, spaces[0].values, rtol=1e-6, atol=1e-9 * float(space.values[0]))
        other = space.soft(mu=1.0).prediction
        assert other.cost_per_label == pytest.approx(first.prediction.cost_per_label, rel=1e-6)
        assert other.plain_cost_per_label == pytest.approx(first.prediction.plain_cost_per_label, rel=1e-6)


def test_parameters_are_named():
    """A bare number could be a budget or a μ."""
    space = subspace(*pair())
    for filtered in (space.soft, space.threshold):
        with pytest.raises(TypeError):
            filtered(0.02)


@pytest.mark.parametrize("scope", ["global", "module"])
@pytest.mark.parametrize("damping", [1.0, 1e-9, 1e-12])
def test_folds_agree_with_dense_pencils_at_any_damping(scope, damping):
    """At 1e-9 and below rows are taken instead of their products; SciPy's own error grows like eps over the damping."""
    gain, cost = pair(9, gain_rows=3, cost_rows=8)
    space = subspace(gain, cost, scope=scope, damping=damping, folds=2)
    mu, total = float(space.values[1]), 0.0
    for fold in range(2):
        kept = cost.rows()[torch.arange(8) % 2 != fold]
        out = cost.rows()[torch.arange(8) % 2 == fold].double().numpy()
        a, b = dense_pencil(gain, fisher_of(kept, cost.metric), space.epsilon, scope, unseen=space.unseen)
        total += 0.5 * ((out @ np.linalg.solve(a + mu * b, a @ IDENTITY)) ** 2).sum()
    assert space.soft(mu=mu).prediction.cost_per_sequence == pytest.approx(total / 8, rel=1e-6 + 1e-13 / damping)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e12])
def test_large_folds_in_float32_tell_the_same(scale, monkeypatch):
    """Products of unit rows round to 6e-8, which ε = tr/n lifts by at most n = 17; squares of 1e-18 lie below float32."""
    gain, cost = (fisher_of(f.rows() * scale, f.metric) for f in pair(11, gain_rows=6, cost_rows=10))
    path = torch.logspace(-4, 4, 9, dtype=torch.float64)
    double = subspace(gain, cost, folds=2)
    monkeypatch.setattr(pencils, "_LARGE", 0)
    single = subspace(gain, cost, folds=2)
    assert torch.equal(single.values, double.values)
    told, expected = (space.cost_path("soft", path * float(space.values[0])) for space in (single, double))
    assert not torch.equal(told, expected)
    torch.testing.assert_close(told, expected, rtol=17 * 6e-8 * 4, atol=0)
