"""The input pass of a merge, whole and sketched, beside the forward pass it is; and the filter made of both sides."""

import pytest
import torch

import sst_kernels as sst
from bench import estimates, gates
from bench.inputs import MU, Forward, name_of
from bench.workload import build_model, token_batch


@pytest.fixture(scope="module")
def setting(shape, device):
    batch, length, sketch = (8, 512, estimates.INPUT_RANK) if device == "cuda" else (4, 64, 32)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    gates.inputs_gate(device)
    model = build_model(shape, rank=16, length=length, device=device, dtype=dtype).requires_grad_(False)
    forwards = [Forward(model, token_batch(shape, batch, length, device, seed=seed)) for seed in (0, 1)]
    return model, forwards, sketch, {"model": shape.name, "rank": 16, "batch": batch, "length": length}


def work(shape, columns):
    return shape.forward_flops(columns["batch"], columns["length"], columns["rank"])


def test_forward(cost, setting, shape):
    _, (forward, _), _, columns = setting
    cost("inputs", "forward", forward, gate=lambda _: None, flops=work(shape, columns), **columns)


@pytest.mark.parametrize("sketched", [True, False], ids=["sketch", "whole"])
def test_input_pass(cost, setting, shape, sketched):
    model, (forward, _), sketch, columns = setting
    kept = sketch if sketched else None
    flops = work(shape, columns) + columns["batch"] * columns["length"] * estimates.input_flops(shape, kept)
    with sst.input_moments(model, "safety", rank=kept) as moments:

        def gate(_):
            assert moments.tokens == columns["batch"] * columns["length"]
            assert moments.nbytes == estimates.input_bytes(shape, kept)

        cost("inputs", name_of(kept), forward, gate=gate, flops=flops, **columns)
    cost.benchmark.extra_info["state_bytes"] = moments.nbytes


def test_filter_inputs(cost, setting, shape):
    model, forwards, sketch, columns = setting
    sides = []
    for forward in forwards:
        with sst.input_moments(model, "safety", rank=sketch) as moments:
            forward()
        sides.append(moments)

    def closed(reads):
        """The reads grow shorter, and none is lost."""
        for name, A in reads.items():
            assert 0 < A.norm() < sides[0].reads[name].norm()

    cost(
        "inputs",
        f"filter_inputs, {name_of(sketch)}",
        lambda: sst.filter_inputs(*sides, MU),
        gate=closed,
        rounds=3,
        **columns,
    )
