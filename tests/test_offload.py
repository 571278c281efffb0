"""Layers that accelerate keeps elsewhere (main memory, a disk) give the Fisher of one place."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

from sst_kernels import fisher_accumulate, sequence_nll
from tests.models import tiny_batch, tiny_lora

LAYERS = "base_model.model.model.layers"
PLACES = {
    "model on the CPU": lambda model, folder: cpu_offload(model, "cpu"),
    "model on disk": lambda model, folder: disk_offload(model, folder, "cpu"),
    "one layer on disk": lambda model, folder: dispatch_model(
        model, _map(model, f"{LAYERS}.1", "disk"), main_device="cpu", offload_dir=folder
    ),
}


def _map(model: nn.Module, where: str, device: str) -> dict[str, str]:
    """`device` for the module at `where`, the CPU for all others: accelerate's device_map names every leaf."""
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    return {where: device} | {name: "cpu" for name in leaves if not name.startswith(f"{where}.")}


def blocks(model: nn.Module, device: str = "cpu", **options) -> list[torch.Tensor]:
    with fisher_accumulate(model, "safety", **options) as pass_:
        for seed in range(2):
            batch = {name: tensor.to(device) for name, tensor in tiny_batch(3, seed=seed).items()}
            sequence_nll(model, batch).backward()
    return [pass_.fisher[name].dense() for name in pass_.fisher]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", [{}, {"structure": "kronecker", "space": "factor"}, {"point": 0.5}], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_offloaded_models_give_the_same_bits(place, options, checkpointing, tmp_path):
    model, moved = tiny_lora(), tiny_lora()
    if checkpointing:
        for each in (model, moved):
            each.gradient_checkpointing_enable({"use_reentrant": False})
            each.train()
    PLACES[place](moved, tmp_path)
    assert any(parameter.is_meta for parameter in moved.parameters())
    for actual, expected in zip(blocks(moved, **options), blocks(model, **options), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"structure": "kronecker", "space": "factor"}], ids=str)
def test_a_layer_in_main_memory_beside_a_gpu(options, tmp_path):
    """A device map over places: one layer rests on the host, and all compute on the GPU."""
    model, moved = tiny_lora().to("cuda"), tiny_lora()
    leaves = {name: 0 for name in _map(moved, f"{LAYERS}.1", "cpu")}
    dispatch_model(moved, leaves | {f"{LAYERS}.1": "cpu"}, main_device=0, offload_dir=tmp_path)
    assert any(parameter.is_meta for parameter in moved.parameters())
    for actual, expected in zip(blocks(moved, "cuda", **options), blocks(model, "cuda", **options), strict=True):
        assert (actual.cpu() - expected.cpu()).norm() <= 1e-6 * expected.norm()
