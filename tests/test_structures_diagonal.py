"""`diagonal` and `vila`: moments against numpy's float64, stability of the variance, the module importance of VILA."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_kernels.fisher.base import Counts, TokenBatch
from sst_kernels.fisher.structures import make_structure
from sst_kernels.fisher.structures.vila import importance_row_sums, select_top, vila_ratio
from tests.structure_cases import SHAPE, batch, exact, samples


def gradients(data) -> torch.Tensor:
    return torch.stack([s.gradient() for s in data])


@pytest.mark.parametrize("centred", [False, True])
def test_second_moment(centred):
    data = samples(17)
    structure = make_structure("diagonal", SHAPE, centred=centred)
    for at in range(0, 17, 5):
        structure.update(batch(data[at : at + 5], "right"))
    expected = exact(data).diagonal().reshape(SHAPE)
    torch.testing.assert_close(structure.diagonal(), expected, rtol=1e-5, atol=0)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_mean_and_variance(sizes, seed):
    data, at = samples(sum(sizes), seed=seed), 0
    structure = make_structure("diagonal", SHAPE, centred=True)
    for size in sizes:
        structure.update(batch(data[at : at + size]))
        at += size
    g = gradients(data)
    scale = float(g.abs().max())
    torch.testing.assert_close(structure.mean().reshape(-1), g.mean(0), rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(structure.variance().reshape(-1), g.var(0, unbiased=False), rtol=0, atol=2e-6 * scale**2)
    assert (structure.variance() >= 0).all()


def test_variance_survives_a_large_mean():
    """Mean 3000, deviation 1: running Σg² and (Σg)² in float32 would leave nothing of the difference."""
    n, g = 800, torch.Generator().manual_seed(0)
    values = (3000 + torch.randn(n, generator=g)).double()
    structure = make_structure("diagonal", (1, 1), centred=True)
    for value in values:
        structure.update(
            TokenBatch(
                value.float().reshape(1, 1), torch.ones(1, 1), torch.tensor([[0, 1]]), torch.ones(1), Counts(1, 1, 1)
            )
        )
    seen = values.float().double()
    assert float(structure.variance()) == pytest.approx(float(seen.var(unbiased=False)), rel=1e-4)
    square, total = torch.zeros(()), torch.zeros(())
    for value in seen.float():
        square, total = square + value * value, total + value
    naive = float(square / n - (total / n) ** 2)
    assert abs(naive - float(seen.var(unbiased=False))) > 0.1


def test_what_was_not_kept_is_refused():
    structure = make_structure("diagonal", SHAPE)
    structure.update(batch(samples(2)))
    for ask in (structure.mean, structure.variance):
        with pytest.raises(ValueError, match="centred=True"):
            ask()
    with pytest.raises(ValueError, match="centred"):
        make_structure("vila", SHAPE, centred=False)


def test_vila_is_the_variance_of_samples():
    data = samples(25)
    structure = make_structure("vila", SHAPE)
    structure.update(batch(data[:9])), structure.update(batch(data[9:]))
    variance = gradients(data).var(0, unbiased=False)
    torch.testing.assert_close(structure.dense(), torch.diag(variance), rtol=1e-5, atol=1e-5)


@pytest.fixture
def pairs():
    """(A, B) structures of one module, [3, 7] and [5, 3], for a forget and a retain set."""
    out = []
    for seed in (0, 1):
        a, b = make_structure("vila", (3, 7)), make_structure("vila", (5, 3))
        a.update(batch(samples(12, (3, 7), seed=seed))), b.update(batch(samples(12, (5, 3), seed=seed + 2)))
        out.append((a, b))
    return out


def test_vila_ratio_is_what_the_dense_products_give(pairs):
    (fa, fb), (ra, rb) = ([s.variance() for s in pair] for pair in pairs)
    forget, retain = fb @ fa, rb @ ra
    torch.testing.assert_close(importance_row_sums(fa, fb), forget.sum(1))
    torch.testing.assert_close(vila_ratio(*pairs), forget.sum(1) / (7e-5 + retain.sum(1)))


@settings(deadline=None)
@given(n=st.integers(1, 50), p=st.floats(0, 1))
def test_select_top(n, p):
    importance = torch.randperm(n, generator=torch.Generator().manual_seed(n)).double()
    mask = select_top(importance, p)
    assert int(mask.sum()) == math.ceil(p * n)
    if mask.any() and not mask.all():
        assert importance[mask].min() > importance[~mask].max()


def test_select_top_breaks_ties_by_position_and_checks_p():
    assert select_top(torch.ones(2, 2), 0.5).tolist() == [[True, True], [False, False]]
    with pytest.raises(ValueError, match="between 0 and 1"):
        select_top(torch.ones(3), 40)
