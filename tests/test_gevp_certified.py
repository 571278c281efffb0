"""Bounds from sketches: what Frequent Directions certifies about a Fisher, carried through the eigenproblem."""

from __future__ import annotations

import math

import pytest
import scipy.linalg as sl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_kernels.fisher.structures.lowrank import LowRank as Sketch
from sst_kernels.gevp import LowRank, certified, quadratic_bounds


def sketched(rows, rank):
    sketch = Sketch((rows.shape[1], 1), rank=rank)
    for piece in rows.split(7):
        sketch.append(piece)
    return sketch


def operator(sketch, count):
    return LowRank(sketch.rows.double() / math.sqrt(count))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(6, 40),
    samples=st.integers(1, 90),
    rank=st.integers(2, 12),
    damping=st.sampled_from([1e-3, 0.1, 3.0]),
)
def test_the_true_values_lie_between_the_bounds(seed, n, samples, rank, damping):
    g = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, n + 1) ** -1.0
    gain, cost = (torch.randn(samples, n, generator=g) * decay[torch.randperm(n, generator=g)] for _ in range(2))
    sketches = [sketched(rows, rank) for rows in (gain, cost)]
    slack = [float(s._shrinkage + s._rounding) / samples for s in sketches]
    rounding = max(float(s._rounding) for s in sketches) / samples
    k = min(4, n)
    bounds = certified(
        *(operator(s, samples) for s in sketches),
        k,
        damping=damping,
        gain_slack=slack[0],
        cost_slack=slack[1],
        rounding=rounding,
    )
    a, b = (rows.double().mT @ rows.double() / samples for rows in (gain, cost))
    exact = sl.eigh(a.numpy(), (b + damping * torch.eye(n, dtype=torch.float64)).numpy(), eigvals_only=True)[::-1][
        :k
    ].copy()
    noise = 1e-12 * max(exact[0], 1e-30)
    assert (bounds.lower.numpy() <= exact + noise).all()
    assert (exact <= bounds.upper.numpy() + noise).all()
    assert (bounds.lower <= bounds.result.values).all()
    assert (bounds.result.values <= bounds.upper).all()
    if not any(slack):
        torch.testing.assert_close(bounds.lower, bounds.upper, rtol=1e-9, atol=1e-12)
    x = bounds.result.vectors
    low, high = quadratic_bounds(
        (x * operator(sketches[1], samples).matmul(x)).sum(0), x.square().sum(0), slack[1], rounding
    )
    price = (x * (b @ x)).sum(0)
    assert (low <= price + 1e-12 * price.max()).all()
    assert (price <= high + 1e-12 * price.max()).all()


def test_what_bounds_nothing_is_refused():
    rows = LowRank(torch.eye(3))
    with pytest.raises(ValueError, match="slacks must not be negative"):
        certified(rows, rows, 1, damping=1.0, gain_slack=-1.0)
    with pytest.raises(ValueError, match=r"damping must exceed rounding = 0\.5"):
        certified(rows, rows, 1, damping=0.1, rounding=0.5)
