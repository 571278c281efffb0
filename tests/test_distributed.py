"""Passes over 2 and 4 processes (gloo) against one process: every structure, uneven and empty shares, DDP, FSDP2."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sst_kernels import distributed
from sst_kernels.distributed import reduce_over_ranks, share_by_cost, sum_over_ranks
from sst_kernels.fisher import make_structure
from tests.distributed_cases import (
    CASES,
    FSDP2_ON_CPU,
    SAMPLES,
    SHARES,
    accumulate,
    answers,
    evidence,
    evidence_answers,
    inputs,
    on_rank,
)

SKETCHED = "lowrank-small"  # the one case that loses something
EVERY = [*(case for case in CASES if case != SKETCHED), "eigen_kronecker"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    address = f"file://{tmp_path_factory.mktemp('gloo') / 'rendezvous'}"
    multiprocessing.set_forkserver_preload(["tests.distributed_cases"])  # one import of torch for all ranks
    with mp.get_context("forkserver").Manager() as manager:
        results = manager.dict()
        mp.start_processes(on_rank, (address, results), nprocs=4, start_method="forkserver")
        return [dict(results[rank]) for rank in range(4)]


def alone(case: str) -> dict:
    everything = list(range((SAMPLES + 1) // 2))
    if case == "eigen_kronecker":
        basis = accumulate(CASES["kronecker"], everything)
        return answers(accumulate({"structure": case, "space": "factor", "basis": basis}, everything))
    return answers(accumulate(CASES[case], everything))


@pytest.mark.parametrize("case", EVERY)
def test_the_total_is_that_of_one_process(case, ranks):
    expected = alone(case)
    for world in (2, 4):
        total = ranks[0][case, world]
        assert total["counts"] == expected["counts"]
        assert sorted(total["groups"]) == sorted(expected["groups"]) == list(range(SAMPLES))
        for mine, theirs in zip(total["dense"], expected["dense"], strict=True):
            assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("case", EVERY)
def test_all_ranks_hold_the_same_bits(case, ranks):
    for world in (2, 4):
        for rank in range(1, world):
            for key, tensor in ranks[0][case, world]["state"].items():
                assert torch.equal(tensor, ranks[rank][case, world]["state"][key]), (key, rank)


@pytest.mark.parametrize("sketch", [None, 4])
def test_input_moments_are_those_of_one_process(sketch, ranks):
    expected = inputs(list(range((SAMPLES + 1) // 2)), sketch)
    for world in (2, 4):
        for rank in range(world):
            total = ranks[rank]["inputs", world][sketch]
            assert (total["tokens"], total["shared"]) == (expected["tokens"], expected["shared"])
            for name, moment in expected["moments"].items():
                assert (total["moments"][name] - moment).norm() <= 1e-6 * moment.norm()
                assert torch.equal(total["moments"][name], ranks[0]["inputs", world][sketch]["moments"][name])


@pytest.mark.parametrize("world", [2, 4])
def test_evidence_is_that_of_one_process(world, ranks):
    """Rows in rank order, two passes over the gain side one after the other; label draws keep prompts whole, apart on all ranks."""
    alone = evidence_answers(evidence(list(range((SAMPLES + 1) // 2))))
    total = ranks[0]["evidence", world]
    sizes = [min(2, SAMPLES - 2 * i) for i in range((SAMPLES + 1) // 2)]
    first = [2 * i + j for share in SHARES[world] for i in share[:1] for j in range(sizes[i])]
    rest = [2 * i + j for share in SHARES[world] for i in share[1:] for j in range(sizes[i])]
    drawn = [4 * i + k for share in SHARES[world] for i in share for k in range(2 * sizes[i])]
    for side, order in (("gain", first + rest), ("cost", drawn)):
        mine, theirs = total[side], alone[side]
        assert (mine["counts"], mine["tokens"]) == (theirs["counts"], theirs["tokens"])
        for key, tensor in theirs["state"].items():
            if key.endswith("rows"):
                assert (mine["state"][key] - tensor[order]).norm() <= 1e-6 * tensor.norm()
        for name, moment in theirs["moments"].items():
            assert (mine["moments"][name] - moment).norm() <= 1e-6 * moment.norm()
    prompts = [2 * i + j for share in SHARES[world] for i in share for _ in range(2) for j in range(sizes[i])]
    pairs = set(zip(total["cost"]["groups"], prompts, strict=True))
    assert len(pairs) == len(set(total["cost"]["groups"])) == SAMPLES


@pytest.mark.parametrize("world", [2, 4])
def test_evidence_has_the_same_bits_on_all_ranks(world, ranks):
    mine = ranks[0]["evidence", world]
    for rank in range(1, world):
        theirs = ranks[rank]["evidence", world]
        for side in ("gain", "cost"):
            assert mine[side]["groups"] == theirs[side]["groups"]
            assert mine[side]["state"].keys() == theirs[side]["state"].keys()
            for key, tensor in mine[side]["state"].items():
                assert torch.equal(tensor, theirs[side]["state"][key]), (rank, side, key)
        for name, core in mine["patch"].items():
            assert torch.equal(core, theirs["patch"][name])


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("batch", "ValueError", "every label of the batch is masked"),
        ("adapter", "ValueError", "accumulates with other ['fingerprint']"),
        ("losses", "ValueError", "the losses differ: ['loss'] and ['other']"),
    ],
)
def test_an_error_in_evidence_on_one_rank_is_raised_on_all(fault, kind, message, ranks):
    for rank in range(4):
        raised, held = ranks[rank]["evidence", fault]
        assert message in raised
        assert raised.startswith(kind if fault != "batch" or rank == 2 else "RuntimeError: another rank failed")
        assert held == 0


def test_the_same_world_size_repeats_the_bits(ranks):
    for world in (2, 4):
        for key, tensor in ranks[0]["kronecker", world]["state"].items():
            assert torch.equal(tensor, ranks[0]["again", world]["state"][key])


@pytest.mark.parametrize("world", [2, 4])
def test_rows_stand_in_rank_order_beside_their_groups(world, ranks):
    total = ranks[0]["full", world]
    order = [2 * i + j for share in SHARES[world] for i in share for j in range(min(2, SAMPLES - 2 * i))]
    assert total["groups"] == order
    expected = accumulate({}, list(range((SAMPLES + 1) // 2))).rows()[order]
    torch.testing.assert_close(
        total["state"]["state/joint/rows"], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
    )


def test_the_certificate_of_frequent_directions_survives(ranks):
    """A sketch of fewer rows than samples: 0 ⪯ F − F̃ ⪯ Δ I for the total, to the rounding that Δ allows for."""
    exact = accumulate({}, list(range((SAMPLES + 1) // 2))).rows().double()
    for world in (2, 4):
        total = ranks[0][SKETCHED, world]
        sketch = total["state"]["state/joint/rows"].double()
        gap = torch.linalg.eigvalsh(exact.T @ exact - sketch.T @ sketch) / SAMPLES
        assert total["certificate"] > 0
        assert gap[-1] <= total["certificate"]
        assert gap[0] >= -total["rounding"]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_wrapped_models_go_through_the_hooks(wrapper, ranks):
    if wrapper == "fsdp" and not FSDP2_ON_CPU:
        pytest.skip("this torch shards on GPUs only (FSDP2 on the CPU needs 2.7)")
    expected, total = alone("full"), ranks[0][wrapper]
    assert total["counts"] == expected["counts"]
    for mine, theirs in zip(total["dense"], expected["dense"], strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def test_what_ranks_share_of_a_solve_lies_on_one_device():
    from sst_kernels.subspace.crossfit import Fold
    from sst_kernels.subspace.modules import Part, _tensors

    x = torch.empty(2, 3, dtype=torch.float64, device="meta")  # as on a GPU, where `told` comes from the host
    part = Part(x, x[..., None], "", torch.zeros(2, dtype=torch.float64), (Fold(x[0], x),))
    assert torch.cat([t.flatten() for t in _tensors(part)]).device.type == "meta"


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_solves_are_those_of_one_rank(world, ranks):
    for rank in range(world):
        solved = ranks[rank]["solve", world]
        assert torch.equal(solved["shared"], solved["alone"])
        mine, theirs = solved["patches"]
        for name, core in theirs.coordinates.items():
            torch.testing.assert_close(mine.coordinates[name], core, rtol=1e-9, atol=1e-10)
            assert torch.equal(mine.coordinates[name], ranks[0]["solve", world]["patches"][0].coordinates[name])
        assert torch.equal(solved["shared"], ranks[0]["solve", world]["shared"])


def test_an_error_on_one_rank_is_raised_on_all(ranks):
    assert ranks[2]["error"].startswith("ValueError: samples [0, 1] of this batch have no labels")
    for rank in (0, 1, 3):
        assert ranks[rank]["error"].startswith("RuntimeError: another rank failed")
        assert "rank 2: ValueError: samples [0, 1]" in ranks[rank]["error"]


def test_ranks_with_other_adapters_are_refused(ranks):
    for rank in range(4):
        assert "accumulates with other ['fingerprint']" in ranks[rank]["mismatch"]


def test_sums_of_all_blocks_share_a_bucket(monkeypatch):
    """28 blocks of two factors: one all-reduce for each dtype of state and counts, more where buckets are small."""
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: sent.append(tensor))
    monkeypatch.setattr(distributed, "_carrier", lambda device, group: device)
    blocks = [make_structure("kronecker", (2, 3)) for _ in range(28)]
    reduce_over_ranks([r for block in blocks for r in (block.reduction(), block.count_reduction())])
    assert sorted((str(t.dtype), t.numel()) for t in sent) == [("torch.float32", 28 * 13), ("torch.int64", 28 * 4)]
    tensors = [torch.arange(6.0) for _ in range(5)]
    sent.clear()
    sum_over_ranks(tensors, bucket_bytes=2 * tensors[0].nbytes)
    assert [t.numel() for t in sent] == [12, 12, 6]
    assert all(torch.equal(t, torch.arange(6.0)) for t in tensors)


def test_costs_are_dealt_evenly_and_completely():
    costs = [27.0, 8.0, 8.0, 8.0, 1.0, 1.0, 1.0]
    shares = share_by_cost(costs, 2)
    assert sorted(i for share in shares for i in share) == list(range(7))
    assert shares == [[0], [1, 2, 3, 4, 5, 6]]
    assert share_by_cost([1.0], 3) == [[0], [], []]
