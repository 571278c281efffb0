"""Evidence, chosen afterwards, against the two passes over a model that carries the filtered patch."""

from __future__ import annotations

import pytest
import torch

import sst_kernels as sst
from tests.models import lora_layers, tiny_batch, tiny_lora

ADAPTERS = ("task", "safety")


def batches(seed, n=3, size=4, **options):
    return [tiny_batch(size, seed=seed + i, **options) for i in range(n)]


def read(model, harm, benign, **options):
    evidence = sst.Evidence.of(model, "safety", **options)
    with evidence.accumulate("gain") as reading:
        for batch in harm:
            reading.backward(batch, weights=sst.opening_weights(batch["labels"]))
    with evidence.accumulate("cost") as reading:
        for batch in benign:
            reading.backward(batch)
    return evidence


def two_passes(model, harm, benign, mu):
    """Input moments, filtered reads on the model, then both Fishers: (A', gain, cost)."""
    sides = []
    for data in (harm, benign):
        with torch.no_grad(), sst.input_moments(model, "safety", rank=512) as moments:
            for batch in data:
                model(**{k: v for k, v in batch.items() if k != "labels"})
        sides.append(moments)
    reads = sst.filter_inputs(*sides, mu)
    layers = lora_layers(model, "safety")
    before = {name: layer.lora_A["safety"].weight.data.clone() for name, layer in layers.items()}
    for name, a in reads.items():
        layers[name].lora_A["safety"].weight.data = a
    fishers = []
    for data, weighted in ((harm, True), (benign, False)):
        with sst.fisher_accumulate(model, "safety", point="reference") as pass_:
            for batch in data:
                weights = sst.opening_weights(batch["labels"]) if weighted else None
                sst.sequence_nll(model, batch, weights=weights).backward()
        fishers.append(pass_.fisher)
    for name, a in before.items():
        layers[name].lora_A["safety"].weight.data = a
    return reads, *fishers


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_the_adapter_is_that_of_two_passes(kind, padding):
    model = tiny_lora(kind, adapters=ADAPTERS)
    harm, benign = batches(1, padding=padding), batches(20, padding=padding)
    evidence = read(model, harm, benign)
    for mu in (0.3, 3.0):
        reads, gain, cost = two_passes(model, harm, benign, mu)
        chosen = evidence.filter(mu)
        for name, a in reads.items():
            torch.testing.assert_close(chosen.reads[name], a, rtol=1e-5, atol=1e-6)
        patch = chosen.subspace(folds=2).soft(mu=0.1)
        expected = sst.subspace(gain, cost, folds=2).soft(mu=0.1)
        layers = lora_layers(model, "safety")
        for name, (a, b, c) in chosen.factors(patch.coordinates).items():
            old = layers[name].lora_B["safety"].weight.data.double() @ expected.coordinates[name] @ reads[name].double()
            new = b.double() @ a.double()
            assert float((new - old).norm()) <= 1e-5 * float(old.norm()), name
            assert c == layers[name].scaling["safety"]
