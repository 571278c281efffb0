"""Rivals by the definitions that they name, in dense float64 on tiny matrices, and RegMean++ against whole forward passes."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sst_kernels.testing import assert_close
from sst_merge.evaluate import active
from sst_merge.io.adapters import Adapter, LoraTerm
from sst_merge.io.data import batches
from sst_merge.io.fit import attach
from sst_merge.methods import Inputs, find
from sst_merge.methods.inputs import DAMPING, NULL_SHARE, RIDGE, safe_delta, steer
from sst_merge.methods.layers import fit, projected, within
from sst_merge.methods.masks import BENIGN_SHARE, led_mask
from sst_merge.methods.projection import distances
from sst_merge.methods.regmean import data_free, regmean
from sst_merge.methods.spectral import directional
from sst_merge.run.grams import Grams
from tests import merge_cases as cases
from tests.test_methods import ROUND, term


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Inputs:
    return cases.method_inputs(tmp_path_factory.mktemp("rivals"))


def moments(seed: int, tokens: int = 60, d: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """E[x xᵀ] and E[x] of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(d, d, dtype=torch.float64, generator=generator) + 1.0
    return x.T @ x / tokens, x.mean(0)


def test_grams_sum_inputs_and_ones_over_marked_tokens(world):
    source = world.source
    gram, second, mean = (
        f("harm")["model.layers.0.self_attn.q_proj"] for f in (source.grams, source.second_moments, source.means)
    )
    tokens = sum(len(e.tokens) for e in source.harm)
    assert_close("gram", gram, tokens * second, 1e-14)
    model, seen = source.session.model.get_base_model(), []
    for example in source.harm:
        hidden = model.model.embed_tokens(torch.tensor([example.tokens]))
        seen.append(model.model.layers[0].input_layernorm(hidden)[0].double())
    assert_close("mean", mean, torch.cat(seen).mean(0), 1e-5)


def test_regmean_plus_plus_reads_the_merged_model_layer_after_layer(world):
    """The first layer is RegMean's. The second one's Grams come from whole passes with layer 0 merged and layer 1 of the side's own."""
    source, strength = world.source, 0.3
    model = source.session.model
    made, plain = (find(n).merge(world, strength).terms for n in ("regmean++", "regmean"))
    first = [n for n in made if ".layers.0." in n]
    second = [n for n in made if ".layers.1." in n]
    assert len(first) + len(second) == len(made)
    for name in first:
        assert_close(name, made[name].delta(), plain[name].delta(), 1e-4)
    grams = []
    for data, own in ((source.benign, world.task), (source.harm, world.safety)):
        mixed = {n: made[n] for n in first} | {n: own.terms[n] for n in second if n in own.terms}
        attach(model, "mixed", Adapter(mixed))
        with Grams(model.get_base_model(), second) as sums, active(model, "mixed"), torch.no_grad():
            for batch in batches(data, 64):  # other batches than those of the method
                inputs = batch.inputs("cpu")
                sums.mask = inputs["attention_mask"].bool()
                model(**inputs, use_cache=False)
        model.delete_adapter("mixed")
        grams.append({n: s[:-1, :-1] for n, s in sums.sums.items()})
    shared = [n for n in second if n in world.task.terms and n in world.safety.terms]
    assert shared
    for name in shared:
        pair = [world.task.terms[name], world.safety.terms[name]]
        expected = regmean(pair, [g[name] for g in grams], [1.0, strength])
        assert_close(name, made[name].delta(), expected.delta(), 1e-4)
    assert any(not torch.allclose(made[n].delta(), plain[n].delta(), rtol=1e-3, atol=1e-6) for n in shared)


def test_regmean_plus_plus_leaves_the_model_as_it_was(world):
    model = world.source.session.model
    before = {*model.peft_config}
    find("regmean++").merge(world, 0.1)
    assert {*model.peft_config} == before


def test_data_free_covariance_is_regmean_on_the_differences():
    terms, weights = [term(0, 3), term(1, 4)], [1.0, 0.4]
    deltas = [w * t.delta() for w, t in zip(weights, terms)]
    grams = [d.T @ d for d in deltas]
    expected = sum(d @ g for d, g in zip(deltas, grams)) @ torch.linalg.pinv(sum(grams), hermitian=True, rtol=1e-12)
    assert_close("data-free", data_free(terms, weights).delta(), expected, 1e-5)


def test_data_free_covariance_is_the_sum_where_rows_do_not_meet():
    a = torch.eye(10, dtype=torch.float64)
    terms = [LoraTerm(a[:3], term(0, 3).B, 2.0), LoraTerm(a[3:5], term(1, 2).B, 1.0)]
    expected = terms[0].delta() + 0.5 * terms[1].delta()
    assert_close("sum", data_free(terms, [1.0, 0.5]).delta(), expected, ROUND)


def test_alpha_steer_is_the_ridge_solution_in_the_null_space():
    """argmin over u in span(N) of E(uᵀx − 1)² + ε‖u‖² for harmful x, by its normal equations; it adds what the patch adds on average."""
    patch, (harm, mean), (benign, _) = term(0, 3), moments(1), moments(2)
    made = steer(patch, harm, mean, benign)
    assert made.rank == 1
    null = torch.linalg.eigh(benign)[1][:, : round(NULL_SHARE * 10)]
    inner = null.T @ harm @ null
    inner += RIDGE * inner.trace() / len(inner) * torch.eye(len(inner), dtype=torch.float64)
    reads = null @ torch.linalg.inv(inner) @ null.T @ mean
    assert_close("steer", made.delta(), torch.outer(patch.delta() @ mean, reads), 10 * ROUND)


def test_alpha_steer_does_nothing_to_benign_inputs_of_few_directions():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20, 4, dtype=torch.float64, generator=generator) @ torch.randn(
        4, 10, dtype=torch.float64, generator=generator
    )
    harm, mean = moments(1)
    made = steer(term(0, 3), harm, mean, x.T @ x)
    assert float((made.delta() @ x.T).norm()) < 1e-5 * float(made.delta().norm() * x.norm())
    assert float((made.delta() @ mean).norm()) > 0.1 * float((term(0, 3).delta() @ mean).norm())


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_safe_delta_keeps_columns_within_the_cost_and_compensates_best(share):
    patch, (gram, _) = term(0, 3), moments(4)
    h = gram + DAMPING * gram.trace() / 10 * torch.eye(10, dtype=torch.float64)
    inverse, delta = torch.linalg.inv(h).diag(), patch.delta()
    cost = delta.square().sum(0) / (2 * inverse)
    kept: list[int] = []
    for m in sorted(range(10), key=lambda m: -float(inverse[m])):
        if float(sum(cost[i] for i in [*kept, m])) > share * float(cost.sum()):
            break
        kept.append(m)
    assert 0 < len(kept) < 10
    rest = [m for m in range(10) if m not in kept]
    made = safe_delta(patch, gram, share).delta()
    assert_close("kept", made[:, kept], delta[:, kept], ROUND)

    def moved(d: torch.Tensor) -> float:
        return float((d @ h * d).sum())

    generator = torch.Generator().manual_seed(5)
    for _ in range(5):  # no other choice of the rest moves benign outputs less
        other = made.clone()
        other[:, rest] += 0.1 * torch.randn(12, len(rest), dtype=torch.float64, generator=generator)
        assert moved(other) > moved(made)
    alone = made.clone()
    alone[:, rest] = 0
    assert moved(alone) > moved(made)


def test_safe_delta_of_the_whole_cost_is_the_patch():
    patch, (gram, _) = term(0, 3), moments(4)
    assert_close("whole", safe_delta(patch, gram, 1.0).delta(), patch.delta(), ROUND)
    assert not safe_delta(patch, gram, 0.0).delta().any()


def test_led_masks_by_hand():
    ten = torch.arange(10.0)
    assert BENIGN_SHARE == 0.1
    # top half by both: 5 … 9 and 5, 6, 7, 0, 1 -> 5, 6, 7; benign claims 6
    patched = torch.tensor([8.0, 7, 0, 1, 2, 9, 10, 11, 3, 4])
    mask = led_mask((ten, patched, (ten == 6).float()), 0.5)
    assert mask.nonzero().flatten().tolist() == [5, 7]


def test_led_scores_are_weight_times_root_fisher(world):
    from sst_merge.methods.masks import of_factors

    spec = of_factors("diagonal")
    patched, benign = world.source.fishers(spec)
    reference = world.source.gain(replace(spec, harm_points=("reference",)))
    merged = find("led").merge(world, 0.5)
    name = next(n for n in world.safety.terms if n in world.task.terms)
    t = world.safety.terms[name]
    own = []
    for side, weight in (("A", t.A), ("B", t.B)):
        scores = [
            weight.double().abs() * f[f"{name}.lora_{side}"].diagonal().double().sqrt()
            for f in (reference, patched, benign)
        ]
        tops = [
            s >= s.flatten().sort(descending=True)[0][math.ceil(share * s.numel()) - 1]
            for s, share in zip(scores, (0.5, 0.5, BENIGN_SHARE))
        ]
        own.append(weight.double() * (tops[0] & tops[1] & ~tops[2]))
    expected = world.task.terms[name].delta() + t.scaling * own[1] @ own[0]
    assert_close(name, merged.terms[name].delta(), expected, 10 * ROUND)


def test_distances_are_standardised_among_modules_of_a_shape():
    task = {n: term(i, 2) for i, n in enumerate("abcd")} | {"e": term(9, 2, d_out=6)}
    safety = {n: term(10 + i, 3) for i, n in enumerate("abcd")} | {"e": term(19, 3, d_out=6), "f": term(5, 1)}
    plain = []
    for n in "abcd":
        v, w = safety[n].delta(), task[n].delta()
        plain.append(float((v @ v.T @ w / v.norm() - w).norm()))
    values = torch.tensor(plain, dtype=torch.float64)
    spread = values.quantile(0.75) - values.quantile(0.25)
    found = distances(task, safety)
    assert found.keys() == set("abcde")
    assert [found[n] for n in "abcd"] == pytest.approx(((values - values.mean()) / spread).tolist(), rel=1e-5)
    assert found["e"] == 0.0
    far = max("abcd", key=found.__getitem__)
    order = sorted("abcde", key=lambda n: (found[n], n))
    inputs = Inputs(Adapter(task), Adapter(safety))
    assert set(find("splora").merge(inputs, 0.2).terms) == set(order[:4])
    assert far == order[-1]
    assert find("splora").merge(inputs, 0.2).terms["a" if far != "a" else "b"] is task["a" if far != "a" else "b"]
    patch = find("splora-patch").merge(inputs, 0.0)
    for n in "abcde":  # nothing of the patch where the task has the module, all where it has not
        assert_close(n, patch.terms[n].delta(), task[n].delta(), ROUND)
    assert_close("f", patch.terms["f"].delta(), safety["f"].delta(), ROUND)


def test_directional_alignment_is_the_sum_in_a_shared_subspace():
    generator = torch.Generator().manual_seed(6)
    left, right = (torch.linalg.qr(torch.randn(d, 3, dtype=torch.float64, generator=generator))[0] for d in (12, 10))
    terms = [
        LoraTerm(torch.randn(3, 3, dtype=torch.float64, generator=generator) @ right.T, left, 1.0) for _ in range(2)
    ]
    made = directional(terms, [1.0, 0.5])
    assert_close("sum", made.delta(), terms[0].delta() + 0.5 * terms[1].delta(), 10 * ROUND)


def test_directional_alignment_by_procrustes():
    """Each part keeps its singular values; its frames are the nearest orthonormal ones to the projections on the leading subspace."""
    terms, weights = [term(0, 3), term(1, 2)], [1.0, 0.5]
    u, _, vh = torch.linalg.svd(sum(w * t.delta() for w, t in zip(weights, terms)))
    u, v, expected = u[:, :3], vh[:3].T, torch.zeros(12, 10, dtype=torch.float64)
    for w, t in zip(weights, terms):
        p, s, qh = torch.linalg.svd(w * t.delta())
        p, s, q = p[:, : t.rank], s[: t.rank], qh[: t.rank].T
        frames = []
        for basis, own in ((u, p), (v, q)):
            x, _, yh = torch.linalg.svd(basis @ basis.T @ own, full_matrices=False)
            frames.append(x @ yh)
            assert_close("orthonormal", frames[-1].T @ frames[-1], torch.eye(t.rank, dtype=torch.float64), 1e-10)
        expected += frames[0] @ s.diag() @ frames[1].T
    assert_close("aligned", directional(terms, weights).delta(), expected, 10 * ROUND)


def test_layer_alphas_of_diagonal_fishers_are_soft_thresholds_of_their_ratio():
    gain, cost = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    metric = torch.full((3,), 1e-12, dtype=torch.float64)
    made = fit(gain.diag(), cost.diag(), metric, 0.5)
    assert made.tolist() == pytest.approx([4 / 4.5, 1 / 2, 0.0], abs=1e-9)
    budget = float((torch.tensor([4 / 4.5, 1 / 2, 0]).double().square() * cost).sum()) / 2
    assert within(gain.diag(), cost.diag(), metric, budget).tolist() == pytest.approx(made.tolist(), abs=1e-3)
    spent = within(gain.diag(), cost.diag(), metric, budget / 10)
    assert float((spent.square() * cost).sum()) / 2 == pytest.approx(budget / 10, rel=1e-3)
    assert within(gain.diag(), cost.diag(), metric, 1e9).tolist() == pytest.approx([1, 1, 0], abs=1e-4)


def test_layer_alphas_are_never_negative():
    """A cheap module that points against the others' refusals would be turned round: it is left out."""
    rows = torch.tensor([[1.0, -0.9]]).double()
    made = fit(rows.T @ rows, torch.tensor([[0.1, 0.0], [0.0, 5.0]]).double(), torch.ones(2).double() * 1e-9, 1.0)
    assert made[0] > 0
    assert made[1] == 0


def test_fishers_along_modules_are_derivatives_of_the_loss(world):
    """½ αᵀQα of whole modules is the same quadratic that the pencil predicts from S = α I."""
    fishers = replace(world.pencil.fishers, input_filter=0.0)
    space = world.source.subspace(replace(world.pencil, fishers=fishers))
    _, cost = world.source.fishers(fishers)
    q, alpha = projected(cost), torch.linspace(0.1, 1.0, len(cost), dtype=torch.float64)
    cores = {n: float(a) * torch.eye(world.safety.terms[n].rank, dtype=torch.float64) for n, a in zip(cost, alpha)}
    labels = cost.counts.labels / cost.counts.sequences
    assert float(alpha @ q @ alpha) / 2 / labels == pytest.approx(space.predict_cost(cores), rel=1e-5)


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[1] / "examples/compare").glob("*.yml")), ids=lambda f: f.stem
)
def test_example_recipes_are_comparisons(file):
    """In a process of its own: a model that only becomes whole when another was used first would pass here."""
    code = (
        "import sys; from sst_merge.compare.recipe import Comparison; print(len(Comparison.load(sys.argv[1]).sweeps))"
    )
    found = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=120)
    assert int(found.stdout) > 1, found.stderr
