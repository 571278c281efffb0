"""Held-out responses from inner products against those of the solved pencils, and the products against the rows."""

from __future__ import annotations

import pytest
import torch

from sst_kernels.fisher.base import Block
from sst_kernels.subspace.coordinates import Coordinates, products
from sst_kernels.subspace.crossfit import Fold, complement, with_rest
from sst_kernels.subspace.filters import WEIGHTS
from sst_kernels.subspace.spectrum import row_directions

MUS = torch.logspace(-4, 4, 9, dtype=torch.float64)


@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("repeated", [False, True])
def test_responses_are_those_of_the_solved_pencil(damping, repeated):
    """11 gain and 9 of 12 cost rows of 60 numbers, the cost's decaying; repeated rows make the products singular."""
    generator = torch.Generator().manual_seed(3)
    gain, cost = (torch.randn(count, 60, dtype=torch.float64, generator=generator) for count in (11, 12))
    cost *= torch.logspace(0, -2, 12, dtype=torch.float64)[:, None]
    if repeated:
        gain[1], cost[1], gain[2] = gain[0], cost[0], cost[3]
    patch = torch.randn(60, dtype=torch.float64, generator=generator)
    epsilon = damping * float(cost.square().sum()) / 12 / 60
    held = torch.arange(12) % 4 == 1
    kept = cost[~held]
    values, ways, _ = row_directions(gain, kept, epsilon, patch)
    rows, index = torch.cat([gain, cost]), torch.arange(23)
    of_kept, others = index[11:][~held], torch.cat([index[:11], index[11:][held]])
    rest, _ = complement(rows @ rows.T, of_kept, others, epsilon)
    fold = Fold.of_complement(rest, slice(0, 11), slice(11, None), gain @ patch, cost[held] @ patch).raised(0.01)
    peer = Fold(*with_rest(values, cost[held] @ ways, cost[held] @ patch)).raised(0.01)
    torch.testing.assert_close(
        fold.values[:-1].flip(0)[: len(values)] - 0.01, values, rtol=1e-8, atol=1e-12 * float(values[0])
    )
    everything = fold.energy(WEIGHTS["soft"], torch.zeros(1, dtype=torch.float64))
    assert float(everything) == pytest.approx(float((cost[held] @ patch).square().sum()), rel=1e-9)
    for name, parameters in (("soft", MUS), ("threshold", MUS * 1.01), ("top_k", torch.arange(9.0).double())):
        weights = WEIGHTS[name]
        actual, expected = (x.energy(weights, parameters) for x in (fold, peer))
        torch.testing.assert_close(
            actual, expected, rtol=60 * 2e-16 * 100 / damping, atol=1e-14 * float(expected.max())
        )


def test_products_are_those_of_the_gradients():
    """Neighbourhoods of several ranks, several coordinates at once, rows of several dtypes and more than one panel of them."""
    generator = torch.Generator().manual_seed(0)
    ranks = [3, 3, 2, 40, 3]
    blocks = [Block(f"m{i}", f"m{i}", (r, r)) for i, r in enumerate(ranks)]
    roots = [torch.randn(2, r, r + 2, dtype=torch.float64, generator=generator) for r in ranks]
    metric = {f"m{i}": tuple(x @ x.mT) for i, x in enumerate(roots)}
    frobenius = Coordinates(blocks, metric, torch.device("cpu"))
    rows = [
        torch.randn(n, frobenius.size, dtype=d, generator=generator)
        for n, d in ((270, torch.float32), (9, torch.float64))
    ]
    both = [frobenius, *frobenius.kronecker(*frobenius.moments(rows[0], [slice(None)]))]
    for z, found in zip(both, products(rows, both)):
        x = z.gradients(*rows)
        scale = x.norm(dim=1)
        torch.testing.assert_close(found / scale / scale[:, None], x @ x.T / scale / scale[:, None], rtol=0, atol=1e-14)
        s = torch.randn(z.size, dtype=torch.float64, generator=generator)
        cores = {b.name: s[z.slices[b.name]].reshape(b.shape) for b in blocks}
        torch.testing.assert_close(
            x @ z.from_cores(cores), torch.cat([r.double() for r in rows]) @ s, rtol=1e-9, atol=1e-9
        )
