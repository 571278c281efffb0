"""One batch through every Fisher structure, beside the plain training step (`plain`)."""

import pytest
import torch

import sst_kernels as sst
from bench import gates
from bench.passes import Pass
from bench.workload import build_model, token_batch

STRUCTURES = (
    ("core", "full", {}),
    ("core", "lowrank", {"rank": 64}),
    ("core", "diagonal", {}),
    ("core", "kronecker", {}),
    ("core", "kronecker_svd", {}),
    ("factor", "diagonal", {}),
    ("factor", "kronecker_lowrank", {"rank": 64}),
    ("factor", "kronecker", {}),
    ("factor", "vila", {}),
)


@pytest.fixture(scope="module")
def setting(shape, device):
    batch, length = (8, 512) if device == "cuda" else (4, 64)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    gates.fisher_gate(device)
    model = build_model(shape, rank=16, length=length, device=device, dtype=dtype)
    return (
        model,
        token_batch(shape, batch, length, device),
        {"model": shape.name, "rank": 16, "batch": batch, "length": length},
    )


def finite(model):
    for name, parameter in model.named_parameters():
        assert parameter.grad is None, f"{name} kept a gradient"


def test_plain(cost, setting, shape):
    model, batch, columns = setting
    flops = shape.step_flops(columns["batch"], columns["length"], columns["rank"])
    cost("pass", "plain", Pass(model, batch), gate=lambda _: finite(model), flops=flops, **columns)


@pytest.mark.parametrize(("space", "structure", "options"), STRUCTURES, ids=lambda x: x if isinstance(x, str) else "")
def test_accumulate(cost, setting, shape, space, structure, options):
    model, batch, columns = setting
    flops = shape.step_flops(columns["batch"], columns["length"], columns["rank"])
    with sst.fisher_accumulate(model, "safety", space=space, structure=structure, **options) as accumulator:

        def gate(_):
            finite(model)
            state = accumulator.fisher[next(iter(accumulator.fisher))].state_dict()
            assert all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point())

        cost("pass", f"{space}/{structure}", Pass(model, batch), gate=gate, flops=flops, **columns)
    cost.benchmark.extra_info["state_bytes"] = accumulator.fisher.nbytes
