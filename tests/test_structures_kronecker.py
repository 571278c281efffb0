"""The Kronecker family: what each factor means, how near the products come, and what the low-rank form guarantees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_kernels import ops
from sst_kernels.fisher.base import Counts, TokenBatch
from sst_kernels.fisher.later import Later
from sst_kernels.fisher.structures import make_structure
from sst_kernels.fisher.structures.kronecker_svd import nearest_products
from sst_kernels.fisher.structures.moment import SecondMoment
from tests.structure_cases import SHAPE, batch, exact, first_pass, samples


def outer_sum(x: torch.Tensor) -> torch.Tensor:
    return x.mT.double() @ x.double()


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_factors_are_the_documented_moments(approx):
    data = samples(8)
    structure = make_structure("kronecker", SHAPE, approx=approx)
    structure.update(batch(data, "left"))
    if approx == "expand":
        left = sum(outer_sum(s.scale * s.left.double()) for s in data)
        right = sum(outer_sum(s.right) for s in data) / sum(len(s.right) for s in data)
    else:
        left = sum(outer_sum(s.scale * s.left.double().sum(0, keepdim=True)) for s in data)
        right = sum(outer_sum(s.right.double().mean(0, keepdim=True)) for s in data) / len(data)
    torch.testing.assert_close(structure.dense(), torch.kron(left / len(data), right), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), [("kronecker", {}), ("kronecker_lowrank", {"rank": 9})])
@pytest.mark.parametrize("cuts", [[0, 7, 30, 31, 64], [0, 16, 32, 48, 64]], ids=["ragged", "equal"])
@pytest.mark.parametrize("most", [1 << 26, 0], ids=["held", "added at once"])
def test_sums_at_the_end_of_a_batch_are_those_of_each_module(kind, options, cuts, most, monkeypatch):
    """Three modules, two of which read one input, in two batches whose samples leave out a token of padding that is NaN."""
    monkeypatch.setattr(Later, "most", most)
    g = torch.Generator().manual_seed(11)
    shapes = [(4, 12), (4, 12), (12, 4)]
    alone, shared = ([make_structure(kind, shape, **options) for shape in shapes] for _ in range(2))
    for _ in range(2):
        spans = torch.stack([torch.tensor(cuts[:-1]), torch.tensor(cuts[1:])], 1)
        spans[1, 1] -= 1
        x, later = torch.randn(64, 12, generator=g), Later()
        sides = [(torch.randn(64, 4, generator=g), x), (torch.randn(64, 4, generator=g), x)]
        sides.append((torch.randn(64, 12, generator=g), torch.randn(64, 4, generator=g)))
        for side in {id(side): side for pair in sides for side in pair}.values():
            side[spans[1, 1]] = torch.nan
        given = spans, torch.rand(4, generator=g) + 0.5, Counts(4, 63, 63)
        for (left, right), one, other in zip(sides, alone, shared):
            one.update(TokenBatch(left, right, *given))
            before = other.state_dict()["left"].clone()
            other.update(TokenBatch(left, right, *given, later=later))
            assert left.shape[1] > 4 or torch.equal(other.state_dict()["left"], before)  # the narrow ones wait
            sketched = kind == "kronecker_lowrank" and right.shape[1] == 12
            assert not sketched or other.state_dict()["right"].any() == (most == 0 or bool(other.counts.sequences > 4))
        later.settle()
        later.settle()  # and nothing is added twice
    for one, other in zip(alone, shared):
        torch.testing.assert_close(other.dense(), one.dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_exact_for_single_tokens_with_one_right_vector(approx):
    """Where the K-FAC assumption holds the structure is the Fisher itself, scale included."""
    data = samples(6, longest=1)
    for s in data:
        s.right.copy_(data[0].right)
    structure = make_structure("kronecker", SHAPE, approx=approx)
    structure.update(batch(data))
    torch.testing.assert_close(structure.dense(), exact(data), rtol=1e-5, atol=1e-5)


def test_expand_has_the_right_scale_in_expectation():
    """Independent zero-mean left tokens, independent of right: E[F] = G ⊗ A without a factor of T left over."""
    g = torch.Generator().manual_seed(3)
    p, q, n, tokens = 2, 3, 4000, 5
    mix_l, mix_r = torch.randn(p, p, generator=g), torch.randn(q, q, generator=g)
    left, right = torch.randn(n * tokens, p, generator=g) @ mix_l, torch.randn(n * tokens, q, generator=g) @ mix_r
    begin = torch.arange(n) * tokens
    data = TokenBatch(left, right, torch.stack([begin, begin + tokens], 1), torch.ones(n), Counts(n, n * tokens, n))
    kron, full = make_structure("kronecker", (p, q)), make_structure("full", (p, q))
    kron.update(data), full.update(data)
    expected = tokens * torch.kron(mix_l.mT @ mix_l, mix_r.mT @ mix_r).double()
    for structure in (kron, full):  # standard error of a fourth moment over n samples
        error = (structure.dense() - expected).norm() / expected.norm()
        assert error < 6 / n**0.5


def wide(n: int, decay: float, shape=(3, 40), seed=0):
    """Samples whose right factor has the spectrum decay^i, so that a low-rank sketch has something to find."""
    data = samples(n, shape, seed=seed)
    for s in data:
        s.right = s.right * decay ** torch.arange(shape[1])
    return data


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 45), decay=st.sampled_from([0.5, 0.8, 1.0]), n=st.integers(1, 30), seed=st.integers(0, 99))
def test_nystrom_trace_bound_and_order(rank, decay, n, seed):
    data = wide(n, decay, seed=seed)
    dense, low = make_structure("kronecker", (3, 40)), make_structure("kronecker_lowrank", (3, 40), rank=rank)
    dense.update(batch(data)), low.update(batch(data))
    for exact_factor, factor in zip(dense.factors(), low.factors(), strict=True):
        eye = torch.eye(len(exact_factor), dtype=torch.float64)
        built = factor @ eye
        trace, rounding = exact_factor.trace(), 1e-5 * exact_factor.trace()
        assert abs(factor.trace - trace) <= rounding
        error = torch.linalg.eigvalsh(exact_factor - built)
        assert error.abs().max() <= factor.bound + rounding
        assert torch.linalg.eigvalsh(exact_factor - (built - factor.rest * eye)).min() >= -rounding
    assert torch.linalg.matrix_norm(dense.dense() - low.dense(), 2) <= low.error_bound + 3e-5 * dense.dense().trace()


def test_nystrom_converges_with_the_spectrum():
    data = wide(60, 0.6)
    dense = make_structure("kronecker", (3, 40))
    dense.update(batch(data))
    errors = []
    for rank in (4, 8, 16):
        low = make_structure("kronecker_lowrank", (3, 40), rank=rank)
        low.update(batch(data))
        errors.append(float((low.dense() - dense.dense()).norm() / dense.dense().norm()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 1e-4


def test_nothing_square_is_kept_or_needed():
    low = make_structure("kronecker_lowrank", (8, 1 << 17), rank=4)
    g = torch.Generator().manual_seed(0)
    tokens = TokenBatch(
        torch.randn(6, 8, generator=g),
        torch.randn(6, 1 << 17, generator=g),
        torch.tensor([[0, 6]]),
        torch.ones(1),
        Counts(1, 6, 6),
    )
    low.update(tokens)
    assert low.nbytes < 5 * 4 * (8 + (1 << 17))
    assert low.matvec(torch.ones(8 << 17)).isfinite().all()


def test_modules_that_read_one_input_sketch_it_once(monkeypatch):
    """…and an input that was overwritten, or another one at the same address, is sketched anew."""
    calls, sketch = [], ops.sketch
    monkeypatch.setattr(ops, "sketch", lambda *a, **k: calls.append(1) or sketch(*a, **k))
    shared = batch(wide(9, 0.9))
    structures = [make_structure("kronecker_lowrank", (3, 40), rank=4) for _ in range(3)]
    for i, structure in enumerate(structures):
        structure.update(replace(shared, left=(i + 1) * shared.left))
    assert len(calls) == 1
    assert torch.equal(structures[0].state_dict()["right"], structures[2].state_dict()["right"])
    torch.testing.assert_close(structures[2].dense(), 9 * structures[0].dense(), rtol=1e-5, atol=1e-5)
    shared.right.mul_(2)
    again = make_structure("kronecker_lowrank", (3, 40), rank=4)
    again.update(shared)
    assert len(calls) == 2
    torch.testing.assert_close(again.dense(), 4 * structures[0].dense(), rtol=1e-5, atol=1e-5)
    for seed in range(5):
        fresh = make_structure("kronecker_lowrank", (3, 40), rank=4)
        fresh.update(batch(wide(9, 0.9, seed=seed)))
    assert len(calls) == 7


def test_modules_that_read_one_input_multiply_it_once(monkeypatch):
    """From the second batch on, which knows who reads what; to the same bits as modules that share nothing."""
    calls, gram = [], ops.gram
    monkeypatch.setattr(ops, "gram", lambda x, *a: calls.append(x.shape[1]) or gram(x, *a))
    together, alone = ([make_structure("kronecker", (3, 40)) for _ in range(3)] for _ in range(2))
    other, narrow = make_structure("kronecker", (3, 40)), make_structure("kronecker", (40, 3))
    for seed, expected in ((1, 3), (2, 1), (3, 1)):
        shared = batch(wide(9, 0.9, seed=seed))
        for structure in alone:
            structure.update(replace(shared, right=shared.right.clone()))
        calls.clear()
        for structure in together:
            structure.update(shared)
            narrow.update(replace(shared, left=torch.randn(len(shared.right), 40), right=shared.left))
        assert calls.count(40) == expected + 3
        other.update(batch(wide(9, 0.9, seed=seed + 10)))
        assert calls.count(40) == expected + 4
    for a, b in zip(together, alone):
        assert torch.equal(a.state_dict()["right"], b.state_dict()["right"])
    shared.right.mul_(2)
    calls.clear()
    together[1].update(shared)
    assert calls.count(40) == 1


def test_lowrank_sketch_depends_on_its_seed_only():
    one, same, other = (make_structure("kronecker_lowrank", (3, 40), rank=4, seed=s) for s in (1, 1, 2))
    for s in (one, same, other):
        s.update(batch(wide(9, 0.9)))
    assert torch.equal(one.state_dict()["right"], same.state_dict()["right"])
    assert not torch.equal(one.state_dict()["right"], other.state_dict()["right"])


def test_eigen_moments_are_the_best_diagonal_in_the_basis():
    data = samples(12)
    structure = make_structure("eigen_kronecker", SHAPE, basis=first_pass())
    structure.update(batch(data))
    basis = torch.kron(structure._u_left.double(), structure._u_right.double())
    best = (basis.mT @ exact(data) @ basis).diagonal()
    torch.testing.assert_close(structure.eigenvalues().reshape(-1), best, rtol=2e-5, atol=2e-5 * float(best.max()))


def test_eigen_kronecker_is_at_least_as_near_as_kronecker():
    data = samples(40)
    first = make_structure("kronecker", SHAPE)
    first.update(batch(data))
    second = make_structure("eigen_kronecker", SHAPE, basis=first)
    second.update(batch(data))
    assert (exact(data) - second.dense()).norm() <= (exact(data) - first.dense()).norm()


def test_eigen_kronecker_in_a_truncated_basis_is_the_compression():
    data = wide(10, 0.7)
    first = make_structure("kronecker_lowrank", (3, 40), rank=6)
    first.update(batch(data))
    second = make_structure("eigen_kronecker", (3, 40), basis=first)
    second.update(batch(data))
    assert second.eigenvalues().shape == (3, 6)
    assert second.dense().trace() <= exact(data).trace() * (1 + 1e-6)
    assert second.dense().trace() >= 0.98 * exact(data).trace()


def test_eigen_kronecker_wants_its_basis():
    structure = make_structure("eigen_kronecker", SHAPE)
    with pytest.raises(RuntimeError, match="first pass"):
        structure.update(batch(samples(2)))
    with pytest.raises(ValueError, match="shape"):
        make_structure("eigen_kronecker", (4, 4), basis=first_pass())
    one = make_structure("eigen_kronecker", SHAPE, basis=first_pass())
    other_pass = make_structure("kronecker", SHAPE)
    other_pass.update(batch(samples(20, seed=1)))
    with pytest.raises(ValueError, match="eigenbases"):
        one.merge(make_structure("eigen_kronecker", SHAPE, basis=other_pass))


def rearranged(matrix: torch.Tensor, p: int, q: int) -> torch.Tensor:
    """Van Loan & Pitsianis: R(X ⊗ Y) = vec(X) vec(Y)ᵀ."""
    return matrix.reshape(p, q, p, q).permute(0, 2, 1, 3).reshape(p * p, q * q)


@settings(max_examples=30, deadline=None)
@given(p=st.integers(1, 5), q=st.integers(1, 5), n=st.integers(1, 30), seed=st.integers(0, 999))
def test_kronecker_svd_attains_the_optimum_of_lapack(p, q, n, seed):
    data = samples(n, (p, q), seed=seed)
    structure = make_structure("kronecker_svd", (p, q))
    structure.update(batch(data))
    fisher = exact(data)
    sigma = torch.linalg.svdvals(rearranged(fisher, p, q))
    error = (fisher - structure.dense()).norm()
    assert error <= sigma[1:].norm() + 3e-6 * sigma[0]


@settings(max_examples=20, deadline=None)
@given(p=st.integers(2, 4), q=st.integers(2, 5), n=st.integers(2, 30), seed=st.integers(0, 999))
def test_more_terms_come_nearer_and_stay_psd(p, q, n, seed):
    data = samples(n, (p, q), seed=seed)
    fisher, errors = exact(data), []
    for rank in (1, 2, 4):
        structure = make_structure("kronecker_svd", (p, q), rank=rank)
        structure.update(batch(data))
        errors.append(float((fisher - structure.dense()).norm()))
        for x, y in structure.terms():
            assert torch.linalg.eigvalsh(x).min() >= -1e-14
            assert torch.linalg.eigvalsh(y).min() >= -1e-14 * y.norm()
    slack = 1e-6 * float(fisher.norm())
    assert errors[1] <= errors[0] + slack
    assert errors[2] <= errors[1] + slack


def test_kronecker_svd_of_a_product_is_the_product():
    g = torch.Generator().manual_seed(0)
    x, y = (outer_sum(torch.randn(6, n, generator=g)) for n in (3, 4))
    rows = torch.linalg.cholesky(torch.kron(x, y)).mT.reshape(12, 3, 4)
    ((left, right),) = nearest_products(rows, 1)
    torch.testing.assert_close(left, x / x.norm(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(right, y * x.norm(), rtol=1e-12, atol=1e-12)


def test_kronecker_svd_resolves_equal_singular_values_by_the_kfac_factor():
    """F = e₁e₁ᵀ ⊗ e₁e₁ᵀ + e₂e₂ᵀ ⊗ e₂e₂ᵀ: any mix of the two pairs is optimal, only PSD ones are acceptable."""
    rows = torch.zeros(2, 2, 2, dtype=torch.float64)
    rows[0, 0, 0] = rows[1, 1, 1] = 1.0
    ((left, right),) = nearest_products(rows, 1)
    assert torch.linalg.eigvalsh(left).min() >= 0
    error = (rows.flatten(1).mT @ rows.flatten(1) - torch.kron(left, right)).norm()
    assert error == pytest.approx(1.0, abs=1e-12)


def test_wide_and_tall_blocks_agree():
    data = samples(12, (3, 5))
    swapped = [type(s)(s.right, s.left, s.scale) for s in data]
    one, two = make_structure("kronecker_svd", (3, 5)), make_structure("kronecker_svd", (5, 3))
    one.update(batch(data)), two.update(batch(swapped))
    order = torch.arange(15).reshape(3, 5).mT.reshape(-1)
    torch.testing.assert_close(one.dense()[order][:, order], two.dense(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("d", [12, 40])
def test_sums_are_all_that_ranks_must_add(d):
    """Dense or sketched, moments over parts of the data add up to that over all of it."""
    x = torch.randn(90, d, generator=torch.Generator().manual_seed(4))
    parts, whole = ([SecondMoment(d, 12, 0, torch.device("cpu")) for _ in range(n)] for n in (2, 1))
    for moment, tokens in zip((*parts, *whole), (x[:50], x[50:], x)):
        moment.add(tokens, torch.tensor([[0, len(tokens)]]), None)
    for mine, other in zip(parts[0].sums(), parts[1].sums(), strict=True):
        mine += other
    eye = torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(parts[0].factor(90) @ eye, whole[0].factor(90) @ eye, rtol=1e-5, atol=1e-5)
