"""Passes over one process per GPU (NCCL, gloo for what lies on the host) against one GPU alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sst_kernels import fisher_accumulate, sequence_nll
from sst_kernels.fisher import Fisher
from tests.distributed_cases import batches
from tests.models import tiny_lora

CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full on the host": {"state_device": "cpu"},
    "full-module": {"scope": "module"},
    "lowrank": {"structure": "lowrank", "rank": 32},
    "diagonal-centred": {"structure": "diagonal", "centred": True},
    "kronecker": {"structure": "kronecker", "space": "factor"},
    "kronecker on the host": {"structure": "kronecker", "space": "factor", "state_device": "cpu"},
}

pytestmark = pytest.mark.gpu


def accumulate(options: dict[str, Any], gpu: int, share: slice, group: Any = None) -> Fisher:
    model = tiny_lora().to(f"cuda:{gpu}")
    with fisher_accumulate(model, "safety", group=group, **options) as pass_:
        for batch in batches()[share]:
            sequence_nll(model, {name: tensor.to(f"cuda:{gpu}") for name, tensor in batch.items()}).backward()
    return pass_.fisher


def on_rank(rank: int, world: int, address: str, results: Any) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=address, rank=rank, world_size=world)
    out = {}
    for case, options in CASES.items():
        fisher = accumulate(options, rank, slice(rank, None, world), dist.group.WORLD)
        out[case] = vars(fisher.counts), [fisher[name].dense().cpu() for name in fisher]
    results[rank] = out
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    world = min(torch.cuda.device_count(), 4)
    address = f"file://{tmp_path_factory.mktemp('nccl') / 'rendezvous'}"
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(on_rank, (world, address, results), nprocs=world)
        return [dict(results[rank]) for rank in range(world)]


@pytest.mark.parametrize("case", CASES)
def test_the_total_is_that_of_one_gpu(case, ranks):
    expected = accumulate(CASES[case], 0, slice(None))
    for counts, dense in (rank[case] for rank in ranks):
        assert counts == vars(expected.counts)
        for mine, name in zip(dense, expected, strict=True):
            theirs = expected[name].dense().cpu()
            assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("case", CASES)
def test_all_gpus_hold_the_same_bits(case, ranks):
    for _, dense in (rank[case] for rank in ranks[1:]):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(dense, ranks[0][case][1], strict=True))
