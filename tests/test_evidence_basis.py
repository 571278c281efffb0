"""A basis of what is readable: exact where it says so, the best there is between, and well conditioned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sst_kernels as sst
from sst_kernels.fisher.structures.moment import dense
from sst_kernels.fisher.taps import LayerTap
from sst_kernels.inputs import Basis, basis_of
from sst_kernels.inputs.filter import (
    _DEPENDENT,
    _LEVEL,
    _ROUNDING,
    _ridge,
    filtered_in_basis,
    filtered_lora_A,
    read_loss,
)
from sst_kernels.inputs.moments import MomentSums
from sst_kernels.testing import error_ratio, half_ulp, tolerance
from tests.models import lora_layers, tiny_batch, tiny_lora
from tests.test_evidence import ADAPTERS, batches, read

SHARE = _ROUNDING[0]  # of the diagonal that the ridge adds, so that Σ q_i² X_ii ≤ 1 / SHARE for q of unit length


def sums_of(tokens, rank=None):
    """Moments of one module "q" from tokens [S, d]."""
    sums = MomentSums({"q": tokens.shape[1]}, rank, 0)
    sums.add("q", tokens, tokens, torch.tensor([[0, len(tokens)]]))
    sums.tokens = len(tokens)
    return sums


@st.composite
def problems(draw):
    """(A [r, d], gain and cost moments): few or many tokens, decades of scale, massive coordinates, dependent rows, sketches."""
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    d, r = draw(st.integers(4, 24)), draw(st.integers(1, 4))
    decay = torch.logspace(0, -draw(st.sampled_from([0.0, 1.0, 2.0])), d)
    massive = draw(st.sampled_from([1.0, 1e3]))
    sides = []
    for _ in range(2):
        turn = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
        x = torch.randn(draw(st.integers(2, 80)), d, generator=generator) @ (decay[:, None] * turn)
        x[:, 0] *= massive
        sides.append(x)
    a = torch.randn(r, d, generator=generator)
    dependent = draw(st.sampled_from(["no", "equal", "zero row"]))
    if dependent == "equal" and r > 1:
        a[1] = 2 * a[0]
    elif dependent == "zero row" and r > 1:
        a[0] = 0
    rank = draw(st.sampled_from([None, None, 1]))  # d > 4: a sketch of one column
    return a, sums_of(sides[0], rank), sums_of(sides[1], rank)


def objective(a, new, gain, cost, mu):
    """What A' minimises: E_g‖(A' − A)x‖² + μ E_c‖A'x‖², with the ridge of `filter_inputs`."""
    x, y = dense(gain["q"]), dense(cost["q"])
    ridge = _ridge("q", gain["q"], SHARE) + mu * _ridge("q", cost["q"], SHARE)
    a, new = a.double(), new.double()
    return float((((new - a) @ x) * (new - a) + mu * (new @ y) * new + new.square() * ridge).sum())


def rounding(basis, a):
    """Share of its energy that A' may lose in a basis in float32, whose dependent directions were left out: an entry rounds by u, the
    ridge lets entries be 1/√SHARE too large, and coordinates are sums of d of them."""
    directions, d = (len(basis.mus) + 1) * len(a), basis["q"].shape[1]
    return directions * (_DEPENDENT + d * (half_ulp(torch.float32) / SHARE**0.5) ** 2)


def in_basis(a, basis, gain, cost, mu):
    columns = {"q": basis.coordinates("q", a)}
    found = filtered_in_basis(columns, basis, gain.projected(basis), cost.projected(basis), mu)
    return found["q"] @ basis["q"].double()


@settings(deadline=None, max_examples=60)
@given(problems(), st.sampled_from([(1.0,), (0.3, 3.0), (0.1, 1.0, 10.0, 100.0)]))
def test_a_basis_is_exact_at_its_prices(problem, mus):
    a, gain, cost = problem
    basis = Basis.of({"q": a}, gain, cost, mus)
    basis.check_holds({"q": a})
    for mu, exact in zip(mus, filtered_lora_A({"q": a}, gain, cost, mus)["q"]):
        lost = read_loss({"q": exact}, {"q": in_basis(a, basis, gain, cost, mu)}, gain, cost, mu)["q"]
        assert lost <= rounding(basis, a) * (1 + 1 / mu + mu), (mu, lost)


@settings(deadline=None, max_examples=60)
@given(problems(), st.floats(0.01, 300.0))
def test_between_its_prices_a_basis_gives_the_best_of_its_span(problem, mu):
    """In the metric of what is minimised: no further from the minimum than A, any A' of the basis, or the best of a smaller one."""
    a, gain, cost = problem
    (exact,) = filtered_lora_A({"q": a}, gain, cost, [mu])["q"]
    least = objective(a, exact, gain, cost, mu)
    whole = objective(0 * a, a, gain, cost, 1.0)  # ‖A‖² in the metric of the basis
    best = []
    for mus in ((1.0,), (0.1, 1.0, 10.0)):
        basis = Basis.of({"q": a}, gain, cost, mus)
        slack = (rounding(basis, a) * max(1.0, mu) * whole) ** 0.5

        def distance(new):
            return max(objective(a, new, gain, cost, mu) - least, 0.0) ** 0.5

        found = in_basis(a, basis, gain, cost, mu)
        assert objective(a, found, gain, cost, mu) >= least * (1 - 1e-9)
        for other in (a, *filtered_lora_A({"q": a}, gain, cost, mus)["q"]):
            assert distance(found) <= distance(other) + slack
        best.append(distance(found))
    assert best[1] <= best[0] + slack


@settings(deadline=None, max_examples=30)
@given(problems(), st.integers(0, 100))
def test_the_gauge_does_not_matter(problem, seed):
    """T A spans what A spans: A' becomes T A'."""
    a, gain, cost = problem
    generator = torch.Generator().manual_seed(seed)
    turn = 3 * torch.linalg.qr(torch.randn(len(a), len(a), generator=generator, dtype=torch.float64))[0]
    found = []
    for reads in (a.double(), turn @ a.double()):
        basis = Basis.of({"q": reads}, gain, cost, (0.3, 3.0))
        found.append(in_basis(reads, basis, gain, cost, 1.0))
    lost = read_loss({"q": turn @ found[0]}, {"q": found[1]}, gain, cost, 1.0)["q"]
    assert lost <= 4 * rounding(basis, a)


@settings(deadline=None, max_examples=30)
@given(problems())
def test_rows_of_a_basis_are_orthonormal_in_the_inputs_metric(problem):
    """So that whatever is solved in its coordinates is well conditioned: eigenvalues between min(1, μ) and max(1, μ)."""
    a, gain, cost = problem
    basis = Basis.of({"q": a}, gain, cost, (0.3, 3.0))
    x, y = (dense(side.projected(basis)["q"]) for side in (gain, cost))
    m, d = basis["q"].shape
    error = x + y + sum(basis.ridges["q"]) - torch.eye(m, dtype=torch.float64)
    assert float(error.norm()) <= 4 * m * d**0.5 * half_ulp(torch.float32) / SHARE**0.5
    assert m <= 3 * len(a)


def test_a_module_that_reads_nothing_has_an_empty_basis():
    tokens = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    a, gain, cost = torch.zeros(2, 5), sums_of(tokens), sums_of(tokens.flip(0))
    basis = Basis.of({"q": a}, gain, cost, (1.0,))
    assert basis["q"].shape == (0, 5)
    assert torch.equal(in_basis(a, basis, gain, cost, 1.0), a.double())


def massive(model, scale):
    """One coordinate of what each block reads is `scale` times as large, as in models with massive activations."""
    for layer in model.get_base_model().model.layers:
        layer.input_layernorm.weight.data[3] *= scale
        layer.post_attention_layernorm.weight.data[5] *= scale
    return model


def delta(evidence, mu):
    """ΔW' of the soft patch, per module."""
    chosen = evidence.filter(mu)
    patch = chosen.subspace(folds=2).soft(mu=0.1)
    return {n: c * b.double() @ a.double() for n, (a, b, c) in chosen.factors(patch.coordinates).items()}


@pytest.mark.parametrize("rank", [None, 7])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_condensed_evidence_decides_as_the_whole(scale, rank):
    """At its prices the same patch, as far as inputs tell; within 1e-5 of ΔW itself where no coordinate stands far above the others."""
    model = massive(tiny_lora(adapters=ADAPTERS, r=1), scale)
    whole = read(model, batches(1), batches(20), rank=rank)
    small = whole.condense([0.3, 3.0])
    assert small.condense() is small
    assert small.nbytes < whole.nbytes / 4
    lost = 3 * (_DEPENDENT + 48 * half_ulp(torch.float32) ** 2 / (SHARE if rank is None else _LEVEL))
    for mu in (0.0, 0.3, 3.0):
        one, other = delta(whole, mu), delta(small, mu)
        price = mu or 1.0
        energy = read_loss(one, other, whole.gain.moments, whole.cost.moments, price)
        assert max(energy.values()) <= lost * (1 + 1 / price + price), mu
        for name, old in one.items():
            assert scale > 1 or float((other[name] - old).norm()) <= 1e-5 * float(old.norm()), (mu, name)
        assert error_ratio(small.filter(mu).gain.rows(), whole.filter(mu).gain.rows()) < 1e-5
    between = [
        whole.filter(1.0).lora_A,
        *(whole.condense(mus).filter(1.0).lora_A for mus in ([3.0], [0.3, 3.0], [1.0])),
    ]
    far, near, exact = (
        sum(read_loss(between[0], reads, whole.gain.moments, whole.cost.moments, 1.0).values()) for reads in between[1:]
    )
    assert exact < near < far


def test_condensed_halves_add_up(monkeypatch):
    """Two parts of the data in one basis, condensed and then merged, are the whole of it condensed."""
    model = tiny_lora(adapters=ADAPTERS, r=1)
    small = read(model, batches(1), batches(20)).condense([0.3, 3.0])
    monkeypatch.setattr(Basis, "of", lambda *_: small.basis)
    first, second = (read(model, batches(1)[s], batches(20)[s]).condense() for s in (slice(0, 1), slice(1, 3)))
    first.merge(second)
    for mu in (0.3, 1.0):
        mine, theirs = first.filter(mu), small.filter(mu)
        for name, a in theirs.lora_A.items():
            assert error_ratio(mine.lora_A[name], a) < 1e-5
        assert error_ratio(mine.gain.rows(), theirs.gain.rows()) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_second_pass_is_streamed_into_the_basis_of_a_pilot(scale):
    """Its rows are those of the patch that reads A', as a pass over a model that carries A' takes them."""
    model, sides = massive(tiny_lora(adapters=ADAPTERS), scale), []
    for seed in (1, 20):
        with torch.no_grad(), sst.input_moments(model, "safety") as pilot:
            for batch in batches(seed, n=2):
                model(**batch)
        sides.append(pilot)
    basis = basis_of(*sides, mus=(0.3, 3.0))
    harm, benign = batches(1, n=4), batches(20, n=4)
    evidence = read(model, harm, benign, basis=basis)
    assert evidence.nbytes < read(model, harm, benign).nbytes
    layers = lora_layers(model, "safety")
    for mu in (0.0, 0.3, 1.0):
        chosen = evidence.filter(mu)
        for name, a in chosen.lora_A.items():
            layers[name].lora_A["safety"].weight.data = a
        with sst.fisher_accumulate(model, "safety", point="reference") as pass_:
            for batch in harm:
                sst.sequence_nll(model, batch, weights=sst.opening_weights(batch["labels"])).backward()
        for name, a in evidence.weights.a.items():
            layers[name].lora_A["safety"].weight.data = a
        assert error_ratio(chosen.gain.rows(), pass_.fisher.rows()) < 1e-5
        assert chosen.gain.counts == pass_.fisher.counts


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_streamed_and_condensed_evidence_are_the_same(scale):
    """Over the data that made the basis: the ridge of `filter_inputs` is the basis's, so that A' is that of the whole at its prices."""
    model = massive(tiny_lora(adapters=ADAPTERS), scale)
    whole = read(model, batches(1), batches(20))
    small = whole.condense([0.3, 3.0])
    streamed = read(model, batches(1), batches(20), basis=small.basis)
    for mu in (0.3, 3.0):
        reads = [e.filter(mu).lora_A for e in (whole, small, streamed)]
        for other in reads[1:]:
            lost = read_loss(reads[0], other, whole.gain.moments, whole.cost.moments, mu)
            allowed = 7 * 3 * (_DEPENDENT + 48 * (half_ulp(torch.float32) / SHARE**0.5) ** 2) * (1 + 1 / mu + mu)
            assert max(lost.values()) <= allowed
        one, other = (e.filter(mu).gain.rows() for e in (small, streamed))
        assert error_ratio(other, one) < (1e-5 if scale == 1.0 else 1e-4)


def test_products_in_bfloat16_take_the_basis_in_two_parts():
    """One token's y: rounded in proportion to itself, not to the entries that cancel in it."""
    model, unit = massive(tiny_lora(adapters=ADAPTERS), 1e3), half_ulp(torch.bfloat16)
    basis = read(model, batches(1), batches(20)).condense([0.3, 3.0]).basis
    name = "model.layers.1.self_attn.q_proj"
    q, seen = basis[name], []
    layer = lora_layers(model, "safety")[name]
    handle = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**tiny_batch(4))
    handle.remove()
    x = seen[0].flatten(0, 1).bfloat16()
    site = SimpleNamespace(scaling=1.0, lora_b=SimpleNamespace(weight=torch.zeros(1, 1)))
    errors = {}
    for exact in (True, False):
        kept = LayerTap(None, site, q, exact=exact)._times_columns(x)
        assert kept.dtype == torch.bfloat16
        errors[exact] = kept.double() - x.double() @ q.double().mT
    high = q.bfloat16().double()
    first, second = (x.double() @ part.mT for part in (high, q.double() - high))
    terms = x.double().abs() @ q.double().abs().mT
    allowed = unit * (first.abs() + second.abs() + (first + second).abs() * (1 + unit))
    allowed = allowed * (1 + unit) + (unit**2 + tolerance(x.shape[1])) * terms
    assert bool((errors[True].abs() <= allowed).all())
    assert not bool((errors[False].abs() <= allowed).all())
    wide = LayerTap(None, site, q, exact=True)._times_columns(x.float())
    assert torch.equal(wide, x.float() @ q.mT)


def test_what_is_refused():
    model = tiny_lora(adapters=ADAPTERS)
    evidence = read(model, batches(1), batches(20))
    basis = evidence.condense([1.0]).basis
    with pytest.raises(ValueError, match="the basis does not hold what model"):
        sst.Evidence.of(tiny_lora(adapters=ADAPTERS, seed=4), "safety", basis=basis)
    with pytest.raises(ValueError, match="the basis belongs to other modules"):
        sst.Evidence.of(model, "safety", basis=basis, modules=".*q_proj")
    with pytest.raises(ValueError, match="mu must lie in 0 … 1e100, got -1"):
        evidence.condense([-1.0])
    half = sst.Evidence.of(model, "safety")
    with half.accumulate("gain") as reading:
        reading.backward(batches(1)[0])
    with pytest.raises(ValueError, match="the cost side holds no sequences"):
        half.condense()
    with pytest.raises(TypeError, match="expected the moments of two passes of input_moments, got dict"):
        basis_of({}, {})
