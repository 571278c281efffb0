"""One batch through every Fisher structure, through the readings and the input pass, beside the plain step; the filter of inputs."""

from contextlib import nullcontext

import pytest
import torch

import sst_kernels as sst
from bench import evidence, gates
from bench.passes import MU, Forward, Pass, Setting
from bench.shapes import INPUT_RANK
from bench.workload import STRUCTURES


@pytest.fixture(scope="module")
def at(shape, device):
    gates.fisher_gate(device)
    gates.evidence_gate(device)
    batch, length, dtype = (8, 512, torch.bfloat16) if device == "cuda" else (4, 64, torch.float32)
    return Setting(shape, 16, "all-linear", batch, length, device, dtype)


@pytest.fixture(scope="module")
def model(at):
    return at.model()


@pytest.fixture(scope="module")
def frozen(at):
    return at.model().requires_grad_(False)


@pytest.fixture
def timed(cost, at):
    return lambda *what, **more: cost(*what, **{"gate": lambda _: None, "model": at.shape.name} | at.columns | more)


@pytest.mark.parametrize("name", ["plain", *STRUCTURES])
def test_fisher(timed, model, at, name):
    flops, step = at.shape.step_flops(at.batch, at.length, at.rank), Pass(model, at.tokens())
    if name == "plain":
        timed("pass", name, step, flops=flops)
        return
    with STRUCTURES[name].hooks(model, step) as accumulator:

        def finite(_):
            state = next(iter(accumulator.fisher.values())).state_dict()
            assert all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point())

        timed("pass", name, step, gate=finite, flops=flops)


@pytest.mark.parametrize("name", ["evidence, harm, opening and rest", "evidence, benign, 2 draws"])
def test_reading(timed, frozen, at, name):
    batch = at.tokens()
    run, opened = (evidence.harmful(frozen, batch) | evidence.benign(frozen, batch))[name]
    with opened():
        timed("evidence", name, run, flops=at.shape.reading_flops(INPUT_RANK, 2, at.rank, at.batch, at.length))


def sketched(device):
    return INPUT_RANK if device == "cuda" else 32


@pytest.mark.parametrize("name", ["forward", "sketch", "whole"])
def test_inputs(timed, frozen, at, device, name):
    kept = sketched(device) if name == "sketch" else None
    moments = nullcontext() if name == "forward" else sst.input_moments(frozen, "safety", rank=kept)
    flops = at.shape.forward_flops(at.batch, at.length, at.rank)
    if name != "forward":
        flops += at.batch * at.length * at.shape.input_flops(kept)

    def gate(_):
        assert name == "forward" or moments.tokens == at.batch * at.length
        assert name == "forward" or moments.nbytes == at.shape.input_bytes(kept)

    with moments:
        timed("inputs", name, Forward(frozen, at.tokens()), gate=gate, flops=flops)


def test_filter_inputs(timed, frozen, at, device):
    sides = [sst.input_moments(frozen, "safety", rank=sketched(device)) for _ in range(2)]
    for seed, moments in enumerate(sides):
        with moments:
            Forward(frozen, at.tokens(seed))()

    def closed(reads):
        """The reads grow shorter, and none is lost."""
        assert all(0 < A.norm() < sides[0].reads[name].norm() for name, A in reads.items())

    timed("inputs", "filter_inputs, sketch", lambda: sst.filter_inputs(*sides, MU), gate=closed, rounds=3)
