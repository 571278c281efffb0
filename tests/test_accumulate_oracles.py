"""Core gradients and the pencil from dense weights alone: W + c·B S A put into the bare model, no hook and no PEFT layer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sst_kernels import fisher_accumulate, sequence_nll, subspace
from sst_kernels.testing import error_ratio
from tests.models import ROUNDING, TARGETS, lora_layers, one_by_one, position_ids, tiny_batch, tiny_lora, tiny_model

Cores = dict[str, Tensor]


def changes(model: nn.Module, adapter: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Per module S → c·B S A, in the orientation of the weight."""

    def change(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        a, b = (part[adapter].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
        turn = Tensor.t if layer.fan_in_fan_out else Tensor.clone
        return lambda core: turn(layer.scaling[adapter] * b @ core @ a)

    return {name: change(layer) for name, layer in lora_layers(model, adapter).items()}


def dense_nll(kind: str, model: nn.Module) -> Callable[[Cores, dict[str, Tensor]], Tensor]:
    """(S per module, one sample) → Σ −log p of the bare model with task and patch added to its weights, in float64."""
    base = wide(tiny_model(kind))
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    for name, change in changes(model, "task").items():
        weights[f"{name}.weight"] += change(torch.eye(3, dtype=torch.float64))
    patch = changes(model, "safety")

    def nll(cores: Cores, sample: dict[str, Tensor]) -> Tensor:
        moved = weights | {f"{name}.weight": weights[f"{name}.weight"] + patch[name](s) for name, s in cores.items()}
        logits = torch.func.functional_call(base, moved, kwargs={"input_ids": sample["input_ids"]}).logits[0, :-1]
        return nn.functional.cross_entropy(logits, sample["labels"][0, 1:], reduction="sum")

    return nll


def wide(model: nn.Module) -> nn.Module:
    """The model in float64 throughout: its RMSNorm would narrow to float32."""

    def norm(module: nn.Module, x: Tensor) -> Tensor:
        return module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = norm.__get__(module)
    return model.double()


def setting(kind: str, core: float) -> tuple[nn.Module, Cores]:
    model = wide(tiny_lora(kind, adapters=("task", "safety")))
    return model, {
        name: core * torch.eye(layer.r["safety"], dtype=torch.float64)
        for name, layer in lora_layers(model, "safety").items()
    }


@pytest.mark.parametrize(("point", "core"), [("patched", 1.0), ("reference", 0.0)])
@pytest.mark.parametrize("kind", list(TARGETS))
def test_rows_are_those_of_torch_func_on_dense_weights(kind, point, core):
    model, cores = setting(kind, core)
    nll, batch = dense_nll(kind, model), tiny_batch(3)
    with fisher_accumulate(model, "safety", point=point) as pass_:
        sequence_nll(model, batch).backward()
    gradients = [torch.func.grad(nll)(cores, sample) for sample in one_by_one(batch)]
    expected = torch.stack([torch.cat([g.flatten() for g in gradient.values()]) for gradient in gradients])
    assert error_ratio(pass_.fisher.rows(), expected) < ROUNDING


@pytest.mark.parametrize("kind", list(TARGETS))
def test_rows_agree_with_finite_differences(kind):
    model, cores = setting(kind, 1.0)
    nll, batch = dense_nll(kind, model), tiny_batch(2)
    step, allowed = (
        (5e-4, 2e-4) if kind == "qwen2_moe" else (1e-5, ROUNDING)
    )  # its router rounds to float32, 6e-8 / step
    with fisher_accumulate(model, "safety") as pass_:
        sequence_nll(model, batch).backward()
    for name in (next(iter(cores)), next(reversed(cores))):
        core = cores[name]
        numeric = torch.zeros(2, *core.shape, dtype=torch.float64)
        with torch.no_grad():
            for place in np.ndindex(*core.shape):
                for sign in (1, -1):
                    moved = core.clone()
                    moved[place] += sign * step
                    losses = [nll(cores | {name: moved}, sample) for sample in one_by_one(batch)]
                    numeric[(slice(None), *place)] += sign * torch.stack(losses) / (2 * step)
        assert error_ratio(pass_.fisher[name].rows, numeric.flatten(1)) < allowed


@pytest.mark.parametrize("scope", ["global", "module"])
def test_lambda_is_scipys_of_the_dense_model(scope):
    """F and the metric ‖ΔW‖² from dense weights, then eigh(A, B); the task adapter stays in place."""
    model, cores = setting("llama", 0.0)
    nll, patch = dense_nll("llama", model), changes(model, "safety")
    batches = [tiny_batch(6, seed=seed) for seed in (0, 1)]
    fishers, matrices = [], []
    for batch in batches:
        with fisher_accumulate(model, "safety", point="reference") as pass_:
            sequence_nll(model, batch).backward()
        fishers.append(pass_.fisher)
        gradients = [torch.func.grad(nll)(cores, sample) for sample in one_by_one(batch)]
        rows = torch.stack([torch.cat([g.flatten() for g in gradient.values()]) for gradient in gradients])
        matrices.append(rows.T @ rows / len(rows))
    jacobians = [
        torch.func.jacrev(patch[name])(core).reshape(-1, core.numel()) for name, core in cores.items()
    ]  # of vec ΔW with respect to vec S
    a, f, m = (x.numpy() for x in (*matrices, torch.block_diag(*(j.T @ j for j in jacobians))))
    space = subspace(*fishers, scope=scope, metric="frobenius", folds=2)
    if scope == "module":
        inside = torch.block_diag(*(torch.ones(core.numel(), core.numel()) for core in cores.values())).numpy()
        a, f = a * inside, f * inside
    epsilon = np.trace(np.linalg.solve(m, f)) / len(f)
    assert space.epsilon == pytest.approx(epsilon, rel=1e-5)
    expected = scipy.linalg.eigh(a, f + epsilon * m, eigvals_only=True)[::-1] + space.unseen
    np.testing.assert_allclose(space.values.numpy(), expected[: len(space.values)], rtol=1e-5, atol=1e-5 * expected[0])


@pytest.fixture(scope="module")
def single_passes():
    """A float32 model whose weights have the usual size, and the Fisher of one unpadded backward pass per sample."""
    model = tiny_lora()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data *= 0.1
    with fisher_accumulate(model, "safety") as pass_:
        for sample in one_by_one(tiny_batch(5)):
            model(**sample).loss.backward()
    return model, pass_.fisher


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(order=st.permutations(range(5)), cuts=st.sets(st.integers(1, 4)), padding=st.sampled_from(["right", "left"]))
def test_order_split_and_padding_of_a_float32_pass_change_nothing(single_passes, order, cuts, padding):
    (model, expected), batch = single_passes, tiny_batch(5, padding=padding)
    bounds = [0, *sorted(cuts), 5]
    with fisher_accumulate(model, "safety") as pass_:
        for begin, end in pairwise(bounds):
            part = {key: value[order[begin:end]] for key, value in batch.items()}
            model(**part, position_ids=position_ids(part)).loss.backward()
    assert pass_.fisher.counts == expected.counts
    assert error_ratio(pass_.fisher.joint.dense(), expected.joint.dense()) < 1e-6
