"""Merging methods against independent implementations: PEFT, the published dense forms, and definitions written out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils
from safetensors.torch import load_file

from sst_kernels.testing import assert_close, tolerance
from sst_merge.errors import MergeError, RecipeError
from sst_merge.io.adapters import Adapter, LoraTerm, load_adapter
from sst_merge.methods import METHODS, Inputs, find, sparse
from sst_merge.methods.base import as_term, densely, thin_svd
from sst_merge.methods.regmean import OFF_DIAGONAL, regmean
from sst_merge.methods.spectral import core_space, isotropic, subspace_boost, tsv_merge
from sst_merge.session import SAFETY, TASK
from tests import merge_cases as cases

ROUND = 1e-6  # one float32 rounding of factors whose product is compared


def term(seed: int, rank: int, d_out: int = 12, d_in: int = 10, scaling: float = 2.0) -> LoraTerm:
    generator = torch.Generator().manual_seed(seed)
    return LoraTerm(
        torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator), scaling
    )


def full_term(delta: torch.Tensor) -> LoraTerm:
    return LoraTerm(torch.eye(delta.shape[1], dtype=torch.float64), delta, 1.0)


@pytest.fixture
def inputs() -> Inputs:
    task = Adapter({"a": term(0, 2), "b": term(1, 3)})
    safety = Adapter({"b": term(2, 4), "c": term(3, 2)})
    return Inputs(task, safety)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Inputs:
    return cases.method_inputs(tmp_path_factory.mktemp("methods"))


def test_names_sources_and_lookup():
    for name, method in METHODS.items():
        assert name == method.name
        assert method.source
        assert method.variant
        assert len(method.strengths) == len(set(method.strengths))
    with pytest.raises(RecipeError, match="did you mean 'dare-ties'"):
        find("dare_ties")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_finite_adapter_of_the_models_shapes(world, name):
    method = find(name)
    merged = method.merge(world, method.strengths[-1])
    shapes = {n: t.delta().shape for a in (world.task, world.safety) for n, t in a.terms.items()}
    assert merged.terms.keys() <= shapes.keys()
    for module, made in merged.terms.items():
        delta = made.delta()
        assert delta.shape == shapes[module]
        assert delta.isfinite().all()


@pytest.mark.parametrize("name", [n for n in METHODS if n != "no patch" and not n.startswith("safe-lora")])
def test_methods_depend_on_their_strength_and_repeat_bit_for_bit(world, name):
    method = find(name)
    least = 1e-6 if method.strength.startswith("KL budget") else method.strengths[0]  # tiny models are cheap to move
    low, high, again = (method.merge(world, s) for s in (least, method.strengths[-1], method.strengths[-1]))
    assert high.terms.keys() == again.terms.keys()
    assert all(torch.equal(high.terms[n].delta(), again.terms[n].delta()) for n in high.terms)
    both = high.terms.keys() & low.terms.keys()
    changed = [n for n in both if not torch.equal(low.terms[n].delta(), high.terms[n].delta())]
    changed += high.terms.keys() ^ low.terms.keys()
    assert changed


@pytest.mark.parametrize("name", ["dare-linear", "dare-ties", "random-subspace"])
def test_masks_and_random_directions_follow_the_seed(world, name):
    first, same, other = (find(name).merge(replace(world, seed=seed), 0.5).terms for seed in (0, 0, 1))
    assert all(torch.equal(first[n].delta(), same[n].delta()) for n in first)
    assert not all(torch.equal(first[n].delta(), other[n].delta()) for n in first)


def test_data_aware_methods_ask_for_data(inputs):
    for method in METHODS.values():
        if method.needs:
            with pytest.raises(MergeError, match=r"harm_data|task adapter"):
                method.merge(inputs, method.strengths[-1])


def test_plain_is_pefts_cat(world):
    session, alpha = world.source.session, 0.3
    session.model.add_weighted_adapter([TASK, SAFETY], [1.0, alpha], "cat", combination_type="cat")
    expected = cases_deltas(session.model, "cat")
    session.model.delete_adapter("cat")
    merged = find("plain").merge(world, alpha)
    for name, made in merged.terms.items():
        assert_close(name, made.delta(), expected[name], ROUND)


def test_peft_svd_loses_nothing_at_the_sum_of_ranks(world):
    merged, plain = find("peft-svd").merge(world, 0.7), find("plain").merge(world, 0.7)
    for name, made in merged.terms.items():
        assert_close(name, made.delta(), plain.terms[name].delta(), 1e-5)


@pytest.mark.parametrize("name", ["ties", "magnitude"])
def test_sparse_methods_on_full_factors_are_pefts_dense_rule(world, name):
    """PEFT's own merge at full rank is the same rule; ours goes through float64."""
    session, rule = world.source.session, {"ties": "ties_svd", "magnitude": "magnitude_prune_svd"}[name]
    session.model.add_weighted_adapter(
        [TASK, SAFETY], [1.0, 0.5], "peer", combination_type=rule, svd_rank=32, density=0.5, svd_full_matrices=False
    )
    expected = cases_deltas(session.model, "peer")
    session.model.delete_adapter("peer")
    merged = find(name).merge(world, 0.5)
    shared = world.task.terms.keys() & world.safety.terms.keys()
    assert shared
    for module in shared:
        assert_close(module, merged.terms[module].delta(), expected[module], 1e-4)


def cases_deltas(model, adapter: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).double()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and adapter in layer.lora_A
    }


def published_tsv(deltas: list[torch.Tensor], isotropize: bool = False) -> torch.Tensor:
    """Task singular vectors, arXiv:2412.00081: top 1/T of each task's triplets, Procrustes on both sides, in float64."""
    keep = min(deltas[0].shape) // len(deltas)
    triplets = [torch.linalg.svd(d) for d in deltas]
    u = torch.cat([t[0][:, :keep] for t in triplets], 1)
    s = torch.cat([t[1][:keep] for t in triplets])
    v = torch.cat([t[2][:keep].T for t in triplets], 1)
    pu, _, qu = torch.linalg.svd(u, full_matrices=False)
    pv, _, qv = torch.linalg.svd(v, full_matrices=False)
    made = (pu @ qu) @ torch.diag(s) @ (pv @ qv).T
    p, s, qh = torch.linalg.svd(made)
    return s.mean() * p @ qh if isotropize else made


def test_tsv_is_the_published_form_on_full_rank_deltas():
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(8, 8, dtype=torch.float64, generator=generator) for _ in range(2)]
    u, s, vh = tsv_merge([full_term(d) for d in deltas], [1.0, 1.0], 4)
    assert_close("tsv", (u * s) @ vh, published_tsv(deltas), 1e-10)


@pytest.mark.parametrize("isotropize", [False, True])
def test_core_space_is_the_published_form(isotropize):
    """arXiv:2509.17786: bases of the stacked B and the stacked A, all in those; TSV-M in the real rank is the same thing."""
    terms = [term(0, 3, scaling=1.0), term(1, 3, scaling=1.0)]
    left = torch.linalg.svd(torch.cat([t.B.double() for t in terms], 1), full_matrices=False)[0]
    right = torch.linalg.svd(torch.cat([t.A.double() for t in terms]), full_matrices=False)[2].T
    cores = [left.T @ t.delta() @ right for t in terms]
    u, s, vh = tsv_merge(terms, [1.0, 1.0])
    u, s, vh = isotropic(u, s, vh) if isotropize else (u, s, vh)
    assert_close("core", (u * s) @ vh, left @ published_tsv(cores, isotropize) @ right.T, 1e-10)


def test_core_space_loses_nothing():
    terms = [term(0, 2), term(1, 3)]
    expected = sum(t.delta() for t in terms)
    assert_close("sum", core_space(terms, sum).delta(), expected, ROUND)
    silent = LoraTerm(torch.zeros(1, 10), torch.zeros(12, 1))
    assert not core_space([silent, silent], sum).delta().any()


@pytest.mark.parametrize("name", ["tsv-m", "subspace-boosting", "iso-c", "core-space", "core-ties", "knots-ties"])
def test_spectral_methods_do_not_see_the_gauge(inputs, name):
    """B X⁻¹ · X A is the same ΔW; the published Core Space bases would turn with X."""
    generator = torch.Generator().manual_seed(4)

    def turned(t: LoraTerm) -> LoraTerm:
        x = torch.eye(t.rank, dtype=torch.float64) + 0.3 * torch.randn(t.rank, t.rank, generator=generator).double()
        return LoraTerm(x @ t.A.double(), t.B.double() @ torch.linalg.inv(x), t.scaling)

    other = Inputs(*(Adapter({n: turned(t) for n, t in a.terms.items()}) for a in (inputs.task, inputs.safety)))
    expected, made = (find(name).merge(i, 0.7) for i in (inputs, other))
    for module, t in made.terms.items():
        assert_close(module, t.delta(), expected.terms[module].delta(), 10 * ROUND)


def test_tsv_stays_put_under_noise_where_the_full_space_form_does_not():
    terms = [term(0, 2), term(1, 3)]
    clean = as_term(*tsv_merge(terms, [1.0, 1.0])).delta()
    noisy = [
        LoraTerm(t.A.double() + 1e-12 * torch.randn(t.A.shape, dtype=torch.float64), t.B.double(), t.scaling)
        for t in terms
    ]
    assert_close("tsv under noise", as_term(*tsv_merge(noisy, [1.0, 1.0])).delta(), clean, ROUND)


def test_subspace_boosting_is_the_published_form_on_full_rank_deltas():
    delta = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, s, vh = torch.linalg.svd(delta)
    cutoff = next(i for i in range(8) if float(s[: i + 1].sum() / s.sum()) >= 0.5)
    published = u @ torch.diag(s.clamp_min(s[cutoff])) @ vh
    bu, bs, bvh = subspace_boost(*thin_svd([full_term(delta)], [1.0]))
    assert_close("boost", (bu * bs) @ bvh, published, 1e-10)


def test_thin_svd_spans_the_weighted_sum():
    terms = [term(0, 2), term(1, 3)]
    u, s, vh = thin_svd(terms, [1.0, 0.5])
    assert len(s) == 5
    assert_close("svd", (u * s) @ vh, terms[0].delta() + 0.5 * terms[1].delta(), 1e-13)


def test_regmean_is_the_least_squares_solution():
    """argmin_W Σ_i ‖(W − ΔW_i) X_iᵀ‖² with shrunken Grams, by its normal equations."""
    terms, generator = [term(0, 2), term(1, 3)], torch.Generator().manual_seed(2)
    xs = [torch.randn(40, 10, dtype=torch.float64, generator=generator) for _ in terms]
    grams = [x.T @ x for x in xs]
    made = regmean(terms, grams, [1.0, 0.5]).delta()
    shrunk = [w * (OFF_DIAGONAL * g + (1 - OFF_DIAGONAL) * torch.diag(g.diag())) for w, g in zip((1.0, 0.5), grams)]
    expected = torch.linalg.solve(sum(shrunk), sum(t.delta() @ g for t, g in zip(terms, shrunk)).T).T
    assert_close("regmean", made, expected, 10 * ROUND)


def test_gram_evidence_counts_tokens_without_padding(world):
    grams = world.source.grams("harm")
    seen = []
    plain = world.source.session.model
    with torch.no_grad(), plain.disable_adapter():
        for example in world.source.harm.examples:
            ids = torch.tensor([example.tokens])
            hidden = plain.get_base_model().model.embed_tokens(ids)
            normed = plain.get_base_model().model.layers[0].input_layernorm(hidden)[0].double()
            seen.append(normed.T @ normed)
    assert_close("first layer", grams["model.layers.0.self_attn.q_proj"], sum(seen), tolerance(400) * 10)


def test_export_rank_is_stated(inputs):
    inputs.rank = 2
    merged = densely(inputs, sum)
    assert max(t.rank for t in merged.terms.values()) == 2
    assert "exported at rank 2" in merged.notes[-1]


def test_dense_export_is_exact(inputs):
    merged = densely(inputs, sum)
    plain = find("plain").merge(inputs, 1.0)
    for name, made in merged.terms.items():
        assert_close(name, made.delta(), plain.terms[name].delta(), 10 * ROUND)


def test_safe_lora_projects_onto_the_safety_directions(inputs):
    merged = find("safe-lora").merge(inputs, 1.0)
    v = inputs.safety.terms["b"].delta()
    expected = v @ v.T @ inputs.task.terms["b"].delta() / v.norm()
    assert_close("b", merged.terms["b"].delta(), expected, 10 * ROUND)
    assert torch.equal(merged.terms["a"].A, inputs.task.terms["a"].A)


def test_knots_without_conflicts_is_the_sum():
    """Where one adapter is silent, TIES at density 1 keeps the other."""
    from sst_merge.methods.spectral import knots_ties

    delta = term(0, 3).delta()
    with pytest.warns(UserWarning, match="no pruning"):
        made = knots_ties([delta, torch.zeros_like(delta)], 1.0, 1.0)
    assert_close("knots", made, delta, 1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("theirs", "ours", "weight", "options"),
    [
        ("task_arithmetic", find("plain").merge, 0.3, {}),
        ("ties", find("ties").merge, 1.0, {"density": sparse.DENSITY}),
        ("dare_linear", partial(sparse._merge, "dare_linear", 1.0), 0.3, {"density": 1.0}),
    ],
)
def test_mergekit_agrees(tmp_path, theirs, ours, weight, options):
    """mergekit merges whole models. Their adapted weights are zero here, so that adding ΔW and taking it off again rounds nothing."""
    run = pytest.importorskip("mergekit.merge", reason='pip install "mergekit>=0.1.5"').run_merge
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    plans = {"task": {"seed": 1}, "safety": {"seed": 2, "target_modules": ["q_proj", "o_proj", "up_proj"]}}
    adapters = {n: load_adapter(cases.adapter_folder(tmp_path / f"{n}-adapter", **o)) for n, o in plans.items()}
    for name, adapter in {"base": None, **adapters}.items():
        network = cases.model()
        with torch.no_grad():
            for module in adapters["task"].terms:
                delta = adapter.terms[module].delta() if adapter is not None and module in adapter.terms else 0.0
                network.get_submodule(module).weight.zero_().add_(delta)
        network.save_pretrained(tmp_path / name)
        cases.tokenizer().save_pretrained(tmp_path / name)
    plan = {
        "merge_method": theirs, "base_model": str(tmp_path / "base"), "dtype": "float32", "parameters": options,
        "models": [{"model": str(tmp_path / n), "parameters": {"weight": w}} for n, w in (("task", 1.0), ("safety", weight))],
    }  # fmt: skip
    run(MergeConfiguration.model_validate(plan), str(tmp_path / "out"), MergeOptions(copy_tokenizer=False, quiet=True))
    written = load_file(tmp_path / "out" / "model.safetensors")
    merged = ours(Inputs(adapters["task"], adapters["safety"]), weight)
    assert merged.terms.keys() == adapters["task"].terms.keys()
    for module, made in merged.terms.items():
        assert_close(module, made.delta(), written[f"{module}.weight"].double(), ROUND)


def test_dare_is_mergekits_but_for_the_rescaling():
    """The same masks from the same seed; mergekit's default then restores the L1 norm instead of dividing by the density."""
    sparsify = pytest.importorskip("mergekit.sparsify", reason='pip install "mergekit>=0.1.5"')
    deltas = [term(i, 3).delta().float() for i in range(2)]
    torch.manual_seed(5)
    expected = sum(w * sparsify.bernoulli(d, 0.5) / 0.5 for w, d in zip((1.0, 0.3), deltas))
    torch.manual_seed(5)
    assert_close("dare", merge_utils.dare_linear(deltas, torch.tensor([1.0, 0.3]), 0.5), expected, ROUND)


def test_lora_config_variants_are_refused_by_name(tmp_path):
    from sst_merge.errors import AdapterError

    model = get_peft_model(cases.model(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="DoRA"):
        load_adapter(tmp_path)
