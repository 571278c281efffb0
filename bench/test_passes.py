"""One batch through every Fisher structure, through the readings, beside the plain step."""

import pytest
import torch

from bench import evidence, gates
from bench.passes import Pass, Setting
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


def test_filter(timed, at):
    found = evidence.random_evidence(at, at.shape, {"gain": 16, "cost": 32})
    price = evidence.other_price()

    def closed(filtered):
        """What benign inputs excite grows less, and none of the reads is lost."""
        for name, A in filtered.lora_A.items():
            x = found.cost.moments[name]
            kept, given = (
                float((z @ (x @ z.mT)).trace())
                for z in (A.to(x.device).double(), found.weights.a[name].to(x.device).double())
            )
            assert 0 < kept < given

    timed("decision", "filter(mu)", lambda: found.filter(price()), gate=closed, rounds=3)


@pytest.mark.parametrize("name", ["evidence, harm, opening and rest", "evidence, benign, 2 draws"])
def test_reading(timed, frozen, at, name):
    batch = at.tokens()
    run, opened = (evidence.harmful(frozen, batch) | evidence.benign(frozen, batch))[name]
    with opened():
        timed("evidence", name, run, flops=at.shape.reading_flops(INPUT_RANK, 2, at.rank, at.batch, at.length))
