"""What passes at the reference point leave undone: the patch's branch is not computed, and a batch's spans are copied once per device."""

from __future__ import annotations

import pytest
import torch

import sst_kernels as sst
from sst_kernels.fisher import hooks
from sst_kernels.inputs import moments as moments_module
from tests.models import lora_layers, tiny_batch, tiny_lora

ADAPTERS = ("task", "safety")


def evidence_pass(model, side="gain", **settings):
    evidence = sst.Evidence.of(model, "safety")
    with evidence.accumulate(side) as reading:
        for seed in range(2):
            reading.backward(tiny_batch(3, seed=seed), **settings)
    return evidence


def moments_pass(model):
    with torch.no_grad(), sst.input_moments(model, "safety") as pass_:
        for seed in range(2):
            model(**tiny_batch(3, seed=seed))
    return pass_


def fisher_pass(model, **options):
    with sst.fisher_accumulate(model, "safety", **options) as pass_:
        for seed in range(2):
            model(**tiny_batch(3, seed=seed)).loss.backward()
    return pass_


AT_THE_REFERENCE = {
    "evidence": evidence_pass,
    "evidence, drawn": lambda model: evidence_pass(model, "cost", labels="mc", draws=2),
    "moments": moments_pass,
    "core": lambda model: fisher_pass(model, point="reference"),
    "factor": lambda model: fisher_pass(model, point="reference", space="factor", structure="kronecker"),
}


@pytest.fixture
def counted():
    """A model, and how often each of its adapters' A and B have been called."""
    model, calls = tiny_lora(adapters=ADAPTERS), {}
    for adapter in ADAPTERS:
        for layer in lora_layers(model, adapter).values():
            for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
                forward = part.forward

                def counting(x, forward=forward, adapter=adapter):
                    calls[adapter] = calls.get(adapter, 0) + 1
                    return forward(x)

                part.forward = counting
    return model, calls


@pytest.mark.parametrize("kind", AT_THE_REFERENCE)
def test_the_branch_of_the_patch_is_not_computed(kind, counted):
    """Neither A nor B is called; those of other adapters are, in every forward pass."""
    model, calls = counted
    AT_THE_REFERENCE[kind](model)
    assert calls == {"task": 2 * 2 * 14}


@pytest.mark.parametrize("point", ["patched", 0.5])
def test_elsewhere_the_branch_is_computed(point, counted):
    model, calls = counted
    fisher_pass(model, point=point)
    assert calls == {"task": 2 * 2 * 14, "safety": 2 * 2 * 14}


class Elsewhere(torch.Tensor):
    """Spans that count how often they are sent to a device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    copies: list

    def to(self, *args, **kwargs):
        self.copies.append(args[0])
        return torch.Tensor.to(self.as_subclass(torch.Tensor), *args, **kwargs)


@pytest.fixture
def copies(monkeypatch):
    """Each copy of a batch's spans to a device, by batch."""
    made = []

    def watched(spans):
        out = spans.as_subclass(Elsewhere)
        out.copies = []
        made.append(out.copies)
        return out

    def layout(*args, read=hooks.read_layout):
        found = read(*args)
        found.spans = watched(found.spans)
        return found

    def spans(*args, read=moments_module.read_spans):
        n, length, found, packed = read(*args)
        return n, length, watched(found), packed

    monkeypatch.setattr(hooks, "read_layout", layout)
    monkeypatch.setattr(moments_module, "read_spans", spans)
    return made


@pytest.mark.parametrize("kind", AT_THE_REFERENCE)
def test_spans_are_copied_at_most_twice_a_batch(kind, copies):
    """However many modules, losses and draws there are, for rows and moments together."""
    AT_THE_REFERENCE[kind](tiny_lora())
    assert len(copies) == 2
    for batch in copies:
        assert 1 <= len(batch) <= 2
