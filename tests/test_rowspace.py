"""Rows in an orthonormal basis of their own span: nothing of them, or of their pencils, may be lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_kernels.gevp import LowRank, gevp
from sst_kernels.subspace.rowspace import RowSpace


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16), count=st.integers(1, 12), size=st.integers(1, 60),
    scale=st.sampled_from([1e-150, 1.0, 1e150]), repeated=st.booleans(),
)  # fmt: skip
def test_rows_lie_in_their_row_space(seed, count, size, scale, repeated):
    """rows = small rows · Qᵀ with orthonormal Q, for rows of any scale and rank; Qᵀ is the adjoint of Q."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, size, dtype=torch.float64, generator=generator)
    rows[0] *= scale
    if repeated:
        rows[-1] = rows[0]
    space = RowSpace(rows)
    width = space.rows.shape[1]
    assert width == min(count, size)
    identity = torch.eye(width, dtype=torch.float64)
    basis = space.lift(identity)
    torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=1e-14 * width)
    for row, small in zip(rows, space.rows):
        assert (space.lift(small[:, None])[:, 0] - row).abs().max() <= 1e-14 * len(row) * row.abs().max()
    z = torch.randn(size, 2, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(space.project(z), basis.T @ z, rtol=0, atol=1e-13)


@pytest.mark.parametrize("damping", [3.0, 1e-2, 1e-5])
def test_row_space_keeps_the_eigenvalues_of_long_rows(damping):
    """Gain rows in the span of the cost's, nearly singular: what a Gram of the rows would round away."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.randn(24, 2000, dtype=torch.float64, generator=generator) * torch.logspace(0, -3, 24)[:, None]
    gain = torch.randn(16, 24, dtype=torch.float64, generator=generator) @ cost
    gain += 1e-6 * torch.randn(16, 2000, dtype=torch.float64, generator=generator)
    epsilon = damping * float(cost.square().sum()) / 2000
    u, w = RowSpace(torch.cat([gain, cost])).rows.split([16, 24])
    whole, small = (gevp(LowRank(a), LowRank(b, epsilon), 16).values for a, b in ((gain, cost), (u, w)))
    # 180 eps; an eigendecomposition of the Gram is off by 1e5 to 3e9 eps.
    torch.testing.assert_close(small, whole, rtol=4e-14, atol=4e-14 * float(whole[0]))
