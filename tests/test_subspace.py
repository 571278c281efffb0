"""The pencil of two Fishers and the filters: against SciPy, their own objectives, and the symmetries they must have."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_kernels import Fisher, fisher_accumulate, sequence_nll, subspace
from sst_kernels.fisher import Block, Counts, TokenBatch
from sst_kernels.gevp import LowRank, gevp
from sst_kernels.subspace import coordinates
from sst_kernels.subspace.rowspace import RowSpace
from tests.models import lora_layers, tiny_batch, tiny_lora

RANKS = {"a": 2, "b": 3, "c": 2}


def fisher_of(rows: torch.Tensor, metric: dict, *, point: str = "patched", groups=None, **options) -> Fisher:
    """A core-space Fisher of the modules in RANKS that holds `rows` [N, Σ r²]."""
    blocks = [Block(name, name, (r, r)) for name, r in RANKS.items()]
    fisher = Fisher.empty(
        blocks, options.pop("structure", "full"), devices=dict.fromkeys(RANKS, torch.device("cpu")), metric=metric,
        scope="global", sample="sequence", count=options.pop("count", "sequences"), options=options,
        meta={"space": "core", "fingerprint": "x", "adapter": "a", "point": point, "point_given": True},
    )  # fmt: skip
    n = len(rows)
    spans, counts = torch.zeros(n, 2, dtype=torch.int64), Counts(n, 4 * n, 2 * n)
    fisher.joint.update(TokenBatch(rows[:0, :1], rows[:0, :1], spans, torch.ones(n), counts, rows.float()))
    fisher.note("data", n, groups)
    return fisher


def metrics(generator: torch.Generator) -> dict:
    def spd(r: int) -> torch.Tensor:
        x = torch.randn(r, 2 * r, dtype=torch.float64, generator=generator)
        return x @ x.T

    return {name: (spd(r), spd(r)) for name, r in RANKS.items()}


def pair(seed: int = 0, gain_rows: int = 12, cost_rows: int = 40, **options) -> tuple[Fisher, Fisher]:
    generator = torch.Generator().manual_seed(seed)
    metric, n = metrics(generator), sum(r * r for r in RANKS.values())
    gain = torch.randn(gain_rows, n, generator=generator) + 0.5
    cost = torch.randn(cost_rows, n, generator=generator) * torch.logspace(0, -2, n)
    return fisher_of(gain, metric, **options), fisher_of(cost, metric, **options)


def dense_metric(cost: Fisher, kind: str) -> np.ndarray:
    """M in S coordinates, module by module from its definition."""
    blocks, rows, start = [], cost.rows().double().numpy(), 0
    for left, right in (tuple(x.numpy() for x in pair) for pair in cost.metric.values()):
        r = len(left)
        roots = [np.real(scipy.linalg.sqrtm(x)) for x in (left, right)]
        samples = rows[:, start : start + r * r].reshape(-1, r, r)
        samples = np.linalg.solve(roots[0], samples) @ np.linalg.inv(roots[1])
        l_moment, r_moment = (np.einsum(path, samples, samples) / len(rows) for path in ("nij,nkj->ik", "nij,nil->jl"))
        shape = np.kron(l_moment, r_moment) / np.trace(l_moment) if kind == "kronecker" else np.eye(r * r)
        blocks.append((shape, np.kron(*roots)))
        start += r * r
    mean = sum(np.trace(shape) for shape, _ in blocks) / start
    shapes = ((0.999 * shape / mean + 0.001 * np.eye(len(shape)), root) for shape, root in blocks)
    return scipy.linalg.block_diag(*(root @ shape @ root for shape, root in shapes))


def dense_pencil(
    gain: Fisher, cost: Fisher, epsilon: float, scope: str, kind: str = "kronecker"
) -> tuple[np.ndarray, np.ndarray]:
    """F_gain and F_cost + εM in S coordinates, straight from the definition."""
    a, b = (f.rows().double().numpy() for f in (gain, cost))
    a, b = a.T @ a / len(a), b.T @ b / len(b)
    if scope == "module":
        mask = scipy.linalg.block_diag(*(np.ones((r * r, r * r)) for r in RANKS.values()))
        a, b = a * mask, b * mask
    return a, b + epsilon * dense_metric(cost, kind)


def flat(patch) -> np.ndarray:
    return torch.cat([patch.coordinates[name].flatten() for name in RANKS]).numpy()


IDENTITY = np.concatenate([np.eye(r).ravel() for r in RANKS.values()])


@pytest.mark.parametrize("metric", ["kronecker", "frobenius"])
@pytest.mark.parametrize("scope", ["global", "module"])
def test_values_are_those_of_the_pencil(scope, metric):
    gain, cost = pair()
    space = subspace(gain, cost, scope=scope, metric=metric)
    a, b = dense_pencil(gain, cost, space.epsilon, scope, metric)
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


@pytest.mark.parametrize("scope", ["global", "module"])
@pytest.mark.parametrize("mu", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("metric", ["kronecker", "frobenius"])
def test_soft_minimises_its_objective(scope, mu, metric):
    """s' = argmin (s'−s)ᵀF_g(s'−s) + μ s'ᵀ(F_c+εM)s', whose solution is (F_g + μ B)⁻¹ F_g s."""
    gain, cost = pair(1)
    space = subspace(gain, cost, scope=scope, metric=metric)
    a, b = dense_pencil(gain, cost, space.epsilon, scope, metric)
    expected = np.linalg.solve(a + mu * b, a @ IDENTITY)
    np.testing.assert_allclose(flat(space.soft(mu)), expected, rtol=1e-7, atol=1e-8 * abs(expected).max())


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
    np.testing.assert_allclose(flat(space.threshold(between)), expected, rtol=1e-7, atol=1e-8 * abs(expected).max())


def test_keeping_everything_returns_the_patch():
    gain, cost = pair(3, gain_rows=60)  # as many rows as coordinates: no direction has λ = 0
    for scope in ("global", "module"):
        patch = subspace(gain, cost, scope=scope).soft(0.0)
        np.testing.assert_allclose(flat(patch), IDENTITY, atol=1e-6)
        assert all(abs(kept - 1) < 1e-6 for kept in patch.kept.values())


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
        patch = space.soft(0.3)
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
    shuffled = subspace(fisher_of(gain.flip(0), metric), fisher_of(cost.flip(0), metric), scope=scope).values
    torch.testing.assert_close(shuffled, base, rtol=1e-8, atol=1e-9 * float(base[0]))


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
        a, b = dense_pencil(gain, fisher_of(kept, metric), space.epsilon, "global", kind)
        patch = np.linalg.solve(a + mu * b, a @ IDENTITY)
        total += 0.5 * ((out @ patch) ** 2).sum()
    prediction = space.soft(mu).prediction
    assert prediction.held_out
    assert prediction.cost_per_sequence == pytest.approx(total / 12, rel=1e-6)
    assert prediction.cost_per_label == pytest.approx(total / 12 / 2, rel=1e-6)
    assert prediction.in_sample_cost_per_label < prediction.cost_per_label
    kept = whole = 0.0
    for fold in range(4):
        inside = torch.arange(8) % 4 != fold
        a, b = dense_pencil(fisher_of(gain.rows()[inside], metric), cost, space.epsilon, "global", kind)
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
        a, b = dense_pencil(gain, fisher_of(cost_rows, cost.metric), space.epsilon, scope)
        pairs = [(s, *scipy.linalg.eigh(a[s, s], b[s, s])) for s in blocks]
        values = np.sort(np.concatenate([values for _, values, _ in pairs]))[::-1]
        cut = {"soft": 0.0, "threshold": level, "top_k": values[1:3].mean()}[name]
        out = np.zeros(sum(sizes))
        for s, values, v in pairs:
            weights = values / (values + level) if name == "soft" else values > cut
            out[s] = v @ (weights * (v.T @ (b[s, s] @ IDENTITY[s])))
        return out

    patch = getattr(space, name)(2 if name == "top_k" else level)
    expected, rows = filtered(cost.rows()), cost.rows().double().numpy()
    np.testing.assert_allclose(flat(patch), expected, rtol=1e-9, atol=1e-10 * abs(expected).max())
    half_square = lambda out, s: 0.5 * ((out @ s) ** 2).sum() / len(rows) / 2  # noqa: E731 - two labels per sequence
    of_fold = torch.arange(4) % 2
    held = sum(half_square(rows[of_fold == i], filtered(cost.rows()[of_fold != i])) for i in range(2))
    assert patch.prediction.cost_per_label == pytest.approx(held, rel=1e-8)
    assert patch.prediction.in_sample_cost_per_label == pytest.approx(half_square(rows, expected), rel=1e-8)
    assert patch.prediction.plain_cost_per_label == pytest.approx(half_square(rows, IDENTITY), rel=1e-10)
    assert space.predict_cost(patch.coordinates) == pytest.approx(half_square(rows, expected), rel=1e-8)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16), count=st.integers(1, 12), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    scale=st.sampled_from([1e-150, 1.0, 1e150]), repeated=st.booleans(),
)  # fmt: skip
def test_rows_lie_in_their_row_space(seed, count, sizes, scale, repeated):
    """rows = small rows · Qᵀ block by block with orthonormal Q, for rows of any scale and rank; Qᵀ is the adjoint of Q."""
    generator = torch.Generator().manual_seed(seed)
    stops = np.cumsum(sizes)
    blocks = [slice(int(stop) - size, int(stop)) for stop, size in zip(stops, sizes)]
    rows = torch.randn(count, sum(sizes), dtype=torch.float64, generator=generator)
    rows[0] *= scale
    if repeated:
        rows[-1] = rows[0]
    space = RowSpace(rows, blocks)
    width = space.rows.shape[1]
    assert width == sum(min(count, size) for size in sizes)
    identity = torch.eye(width, dtype=torch.float64)
    basis = space.lift(identity)
    torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=1e-14 * width)
    for row, small in zip(rows, space.rows):
        assert (space.lift(small[:, None])[:, 0] - row).abs().max() <= 1e-14 * len(row) * row.abs().max()
    z = torch.randn(sum(sizes), 2, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(space.project(z), basis.T @ z, rtol=0, atol=1e-13)


@pytest.mark.parametrize("damping", [3.0, 1e-2, 1e-5])
def test_row_space_keeps_the_eigenvalues_of_long_rows(damping):
    """Gain rows in the span of the cost's, nearly singular: what a Gram of the rows would round away."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.randn(24, 2000, dtype=torch.float64, generator=generator) * torch.logspace(0, -3, 24)[:, None]
    gain = torch.randn(16, 24, dtype=torch.float64, generator=generator) @ cost
    gain += 1e-6 * torch.randn(16, 2000, dtype=torch.float64, generator=generator)
    epsilon = damping * float(cost.square().sum()) / 2000
    u, w = RowSpace(torch.cat([gain, cost]), [slice(0, 2000)]).rows.split([16, 24])
    whole, small = (gevp(LowRank(a), LowRank(b, epsilon), 16).values for a, b in ((gain, cost), (u, w)))
    # 180 eps; an eigendecomposition of the Gram is off by 1e5 to 3e9 eps.
    torch.testing.assert_close(small, whole, rtol=4e-14, atol=4e-14 * float(whole[0]))


def test_draws_of_one_prompt_stay_in_one_fold():
    """With each cost row present twice, only group-wise folds keep the prediction where it was."""
    gain, cost = pair(5, gain_rows=40, cost_rows=13)
    doubled = torch.cat([cost.rows(), cost.rows()])
    n = len(cost.rows())
    together = fisher_of(doubled, cost.metric, groups=list(range(n)) * 2)
    apart = fisher_of(doubled, cost.metric)
    expected, kept, leaked = (
        subspace(gain, c, folds=4, damping=0.01).soft(1.0).prediction.cost_per_label for c in (cost, together, apart)
    )
    assert kept == pytest.approx(expected, rel=1e-6)
    assert leaked < 0.9 * expected


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
    assert not folded.soft(1.0).prediction.held_out
    for structure in ("diagonal", "kronecker", "lowrank"):
        space = subspace(*passes(structure), scope="module")
        assert torch.isfinite(space.soft(1.0).coordinates["model.layers.0.self_attn.q_proj"]).all()
    sketched = subspace(*passes("lowrank", rank=64), scope="global")
    whole = subspace(*passes("full"), scope="global", folds=2)
    torch.testing.assert_close(sketched.values, whole.values, rtol=1e-4, atol=1e-5 * float(whole.values[0]))


@pytest.mark.parametrize(("structure", "scope"), [("diagonal", "module"), ("lowrank", "global"), ("full", "global")])
def test_what_a_fisher_is_divided_by_changes_nothing(structure, scope):
    spaces = [
        subspace(*pair(structure=structure, count=count), scope=scope) for count in ("sequences", "tokens", "labels")
    ]
    first = spaces[0].soft(1.0)
    for space in spaces[1:]:
        torch.testing.assert_close(space.values, spaces[0].values, rtol=1e-6, atol=1e-9 * float(space.values[0]))
        other = space.soft(1.0).prediction
        assert other.cost_per_label == pytest.approx(first.prediction.cost_per_label, rel=1e-6)
        assert other.plain_cost_per_label == pytest.approx(first.prediction.plain_cost_per_label, rel=1e-6)


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
    for call in (lambda: space.soft(), lambda: space.soft(1.0, kl_budget=1.0)):
        with pytest.raises(ValueError, match="exactly one"):
            call()
    with pytest.raises(ValueError, match="must not be negative"):
        space.soft(-1.0)
    with pytest.raises(ValueError, match="k must lie in"):
        space.top_k(10**6)
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
        patch = subspace(gain.fisher, cost.fisher, scope=scope).soft(0.1)
        assert patch.kept[name] == 0.0
        assert all(torch.isfinite(core).all() for core in patch.coordinates.values())
