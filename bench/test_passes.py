"""One batch through every Fisher structure and through the input pass, beside the plain training step; the filter of inputs."""

import pytest
import torch

import sst_kernels as sst
from bench import gates
from bench.passes import MU, Forward, Pass, Setting, name_of
from bench.shapes import INPUT_RANK
from bench.workload import STRUCTURES


@pytest.fixture(scope="module")
def at(shape, device):
    gates.fisher_gate(device)
    gates.inputs_gate(device)
    batch, length = (8, 512) if device == "cuda" else (4, 64)
    return Setting(
        shape, 16, "all-linear", batch, length, device, torch.bfloat16 if device == "cuda" else torch.float32
    )


@pytest.fixture(scope="module")
def model(at):
    return at.model()


@pytest.fixture(scope="module")
def frozen(at):
    return at.model().requires_grad_(False)


@pytest.fixture(scope="module")
def columns(at):
    return {"model": at.shape.name} | at.columns


def test_plain(cost, model, at, columns):
    flops = at.shape.step_flops(at.batch, at.length, at.rank)
    cost("pass", "plain", Pass(model, at.tokens()), gate=lambda _: None, flops=flops, **columns)


@pytest.mark.parametrize("name", STRUCTURES)
def test_accumulate(cost, model, at, columns, name):
    flops, step = at.shape.step_flops(at.batch, at.length, at.rank), Pass(model, at.tokens())
    with STRUCTURES[name].hooks(model, step) as accumulator:

        def finite(_):
            state = next(iter(accumulator.fisher.values())).state_dict()
            assert all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point())

        cost("pass", name, step, gate=finite, flops=flops, **columns)
    cost.benchmark.extra_info["state_bytes"] = accumulator.fisher.nbytes


def test_forward(cost, frozen, at, columns):
    flops = at.shape.forward_flops(at.batch, at.length, at.rank)
    cost("inputs", "forward", Forward(frozen, at.tokens()), gate=lambda _: None, flops=flops, **columns)


@pytest.mark.parametrize("sketched", [True, False], ids=["sketch", "whole"])
def test_input_pass(cost, frozen, at, columns, sketched, device):
    kept = (INPUT_RANK if device == "cuda" else 32) if sketched else None
    flops = at.shape.forward_flops(at.batch, at.length, at.rank) + at.batch * at.length * at.shape.input_flops(kept)
    with sst.input_moments(frozen, "safety", rank=kept) as moments:

        def gate(_):
            assert moments.tokens == at.batch * at.length
            assert moments.nbytes == at.shape.input_bytes(kept)

        cost("inputs", name_of(kept), Forward(frozen, at.tokens()), gate=gate, flops=flops, **columns)
    cost.benchmark.extra_info["state_bytes"] = moments.nbytes


def test_filter_inputs(cost, frozen, at, columns, device):
    kept, sides = INPUT_RANK if device == "cuda" else 32, []
    for seed in (0, 1):
        with sst.input_moments(frozen, "safety", rank=kept) as moments:
            Forward(frozen, at.tokens(seed))()
        sides.append(moments)

    def closed(reads):
        """The reads grow shorter, and none is lost."""
        for name, A in reads.items():
            assert 0 < A.norm() < sides[0].reads[name].norm()

    name = f"filter_inputs, {name_of(kept)}"
    cost("inputs", name, lambda: sst.filter_inputs(*sides, MU), gate=closed, rounds=3, **columns)
