"""Long bfloat16 passes against float64, operators for the solver, and reduction over processes."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from sst_kernels.fisher.base import Counts, TokenBatch
from sst_kernels.fisher.structures import make_structure
from sst_kernels.fisher.structures.moment import sign_matrix
from tests.structure_cases import CASES, SHAPE, batch, build, exact, first_pass, samples

P, Q, N, T = 4, 6, 2, 3


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=[400, pytest.param(10_000, marks=pytest.mark.slow)])
def long_pass(request):
    """All structures after K bfloat16 batches of 2 sequences, and the per-sample gradients in float64."""
    g = torch.Generator().manual_seed(0)
    left = (torch.randn(request.param, N * T, P, generator=g) + 0.5).bfloat16()
    right = (torch.randn(request.param, N * T, Q, generator=g) + 0.5).bfloat16()
    spans, scale = torch.tensor([[0, 3], [3, 6]]), torch.ones(N)
    structures = {
        "full": make_structure("full", (P, Q), rows="fold"),
        "diagonal": make_structure("diagonal", (P, Q)),
        "vila": make_structure("vila", (P, Q)),
        "kronecker": make_structure("kronecker", (P, Q)),
        "kronecker_lowrank": make_structure("kronecker_lowrank", (P, Q), rank=3),
        "eigen_kronecker": make_structure("eigen_kronecker", (P, Q), basis=first_pass((P, Q))),
        "kronecker_svd": make_structure("kronecker_svd", (P, Q)),
        "lowrank": make_structure("lowrank", (P, Q), rank=P * Q),
    }
    for l, r in zip(left, right, strict=True):
        for structure in structures.values():
            structure.update(TokenBatch(l, r, spans, scale, Counts(N, N * T, N * T)))
    left, right = left.double(), right.double()
    per_sample = torch.einsum("kntp,kntq->knpq", left.view(-1, N, T, P), right.view(-1, N, T, Q))
    return structures, per_sample.reshape(-1, P, Q), (left.reshape(-1, P), right.reshape(-1, Q))


def test_long_bfloat16_passes_stay_within_1e_5(long_pass):
    structures, gradients, (left, right) = long_pass
    n, rows = len(gradients), gradients.flatten(1)
    fisher = rows.mT @ rows / n
    kron, low, eigen = (structures[k] for k in ("kronecker", "kronecker_lowrank", "eigen_kronecker"))
    u, v = eigen._u_left.double(), eigen._u_right.double()
    rounded = (right @ sign_matrix(Q, 3, 0, torch.device("cpu"), torch.float64)).bfloat16().double()
    errors = {
        "full": relative(structures["full"].dense(), fisher),
        "lowrank": relative(structures["lowrank"].dense(), fisher),
        "diagonal": relative(structures["diagonal"].diagonal().flatten(), fisher.diagonal()),
        "mean": relative(structures["vila"].mean().flatten(), rows.mean(0)),
        "variance": relative(structures["vila"].variance().flatten(), rows.var(0, unbiased=False)),
        "kronecker left": relative(kron.factors()[0], left.mT @ left / n),
        "kronecker right": relative(kron.factors()[1], right.mT @ right / len(right)),
        "sketch": relative(low.state_dict()["right"].double(), torch.cat([right, rounded], 1).mT @ rounded),
        "trace": abs(float(low.state_dict()["right_trace"] / right.square().sum()) - 1),
        "eigen_kronecker": relative(eigen.eigenvalues(), (u.mT @ gradients @ v).square().sum(0) / n),
    }
    assert max(errors.values()) <= 1e-5, {k: f"{e:.1e}" for k, e in errors.items()}


def test_kronecker_svd_after_a_long_pass(long_pass):
    structures, gradients, _ = long_pass
    rows = gradients.flatten(1)
    fisher = rows.mT @ rows / len(rows)
    rearranged = fisher.reshape(P, Q, P, Q).permute(0, 2, 1, 3).reshape(P * P, Q * Q)
    u, s, v = torch.linalg.svd(rearranged)
    best = s[0] * torch.kron(u[:, 0].reshape(P, P), v[0].reshape(Q, Q))
    assert relative(structures["kronecker_svd"].dense(), best) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_operators_are_the_structures(case):
    structure = build(case)
    structure.update(batch(samples(9)))
    operator = structure.operator()
    x = torch.randn(structure.size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(operator.matmul(x), structure.matvec(x), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(operator.diagonal(), structure.dense().diagonal(), rtol=1e-10, atol=1e-9)
    damped = operator.damped(0.5)
    torch.testing.assert_close(damped.matmul(x), structure.matvec(x) + 0.5 * x, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("ranks", [(2, 3), (3, 5), (3, 2)])
def test_spectral_operator_inverts_when_damped(ranks):
    first = make_structure("kronecker_lowrank", SHAPE, rank=max(ranks))
    first.update(batch(samples(9)))
    for structure in (first, make_structure("eigen_kronecker", SHAPE, basis=first)):
        if structure is not first:
            structure.update(batch(samples(9)))
        operator = structure.operator().damped(1e-3)
        x = torch.randn(15, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(operator.matmul(operator.solve(x)), x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(operator.dense().diagonal(), operator.diagonal(), rtol=1e-10, atol=1e-9)
    truncated = make_structure("kronecker_lowrank", (3, 40), rank=2)
    truncated.update(batch(samples(9, (3, 40))))
    compressed = make_structure("eigen_kronecker", (3, 40), basis=truncated)
    compressed.update(batch(samples(9, (3, 40))))
    assert compressed.operator().solve(torch.ones(120, 1)) is None


PARTS = {0: slice(0, 5), 1: slice(5, 14)}


def _reduce(rank: int, address: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    data, out = samples(14), {}
    for case in [*CASES, "empty-rank"]:
        structure = build("full" if case == "empty-rank" else case)
        part = data[PARTS[rank]] if case != "empty-rank" else data[:0] if rank == 0 else data
        for at in range(0, len(part), 4):
            structure.update(batch(part[at : at + 4]))
        structure.all_reduce()
        out[case] = (structure.dense().numpy(), vars(structure.counts), getattr(structure, "certificate", None))
    results[rank] = out
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    address = f"file://{tmp_path_factory.mktemp('gloo') / 'rendezvous'}"
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_reduce, (address, results), nprocs=2)
        return dict(results)


@pytest.mark.parametrize("case", CASES)
def test_all_reduce_equals_merging_the_ranks(case, reduced):
    data, parts = samples(14), []
    for rank in PARTS:
        parts.append(build(case))
        part = data[PARTS[rank]]
        for at in range(0, len(part), 4):
            parts[-1].update(batch(part[at : at + 4]))
    parts[0].merge(parts[1])
    (dense, counts, certificate), (other, other_counts, _) = reduced[0][case], reduced[1][case]
    assert (dense == other).all()
    assert counts == other_counts == vars(parts[0].counts)
    expected = parts[0].dense()
    error = (torch.from_numpy(dense) - expected).abs().max() / expected.abs().max()
    assert error <= 512 * 2**-24
    if certificate is not None:
        assert certificate == pytest.approx(parts[0].certificate, rel=1e-3)


def test_all_reduce_with_a_rank_that_saw_nothing(reduced):
    for rank in (0, 1):
        dense = torch.from_numpy(reduced[rank]["empty-rank"][0])
        torch.testing.assert_close(dense, exact(samples(14)), rtol=1e-5, atol=1e-5)
