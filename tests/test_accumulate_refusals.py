"""Models and loops that would give wrong statistics, and files that are none, are refused by name."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sst_kernels import Fisher, fisher_accumulate, sequence_nll
from tests.models import lora_layers, tiny_batch, tiny_lora, tiny_model


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all!")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Fisher.load(path)


def refusals():
    def variant(**options):
        return get_peft_model(
            tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], **options), adapter_name="safety"
        ).eval()

    def inactive():
        model = tiny_lora(adapters=("task", "safety"))
        model.set_adapter("task")
        return model

    def merged():
        model = tiny_lora()
        model.merge_adapter()
        return model

    def tied():
        model = tiny_lora()
        layers = list(lora_layers(model, "safety").values())
        layers[0].lora_A["safety"].weight = layers[1].lora_A["safety"].weight
        return model

    def parameters():
        config = LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"])
        return get_peft_model(tiny_model(), config, adapter_name="safety").eval()

    def disabled():
        model = tiny_lora()
        model.base_model.disable_adapter_layers()
        return model

    yield (
        "unknown",
        lambda: tiny_lora(adapters=("other",)),
        r"no module carries the adapter 'safety'; this model has \['other'\]",
    )
    yield "inactive", inactive, "is not active"
    yield "merged", merged, "are merged into the base weight"
    yield "disabled", disabled, "adapters are disabled"
    yield "dora", lambda: variant(use_dora=True), "DoRA is not plain LoRA"
    yield "activated", lambda: variant(alora_invocation_tokens=[1, 2]), "ALoraLinearVariant is not plain LoRA"
    yield "bias", lambda: variant(lora_bias=True, init_lora_weights=True), "lora_bias=True"
    yield "dropout", lambda: variant(lora_dropout=0.1).train(), "dropout 0.1 is active"
    yield "tied", tied, "shares its LoRA weights"
    yield "parameters", parameters, "LoRA on the bare parameter 'weight'"
    yield (
        "embedding",
        lambda: get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["embed_tokens"]), adapter_name="safety"),
        "LoRA on an embedding",
    )


@pytest.mark.parametrize(("make", "message"), [pytest.param(m, t, id=n) for n, m, t in refusals()])
def test_models_that_would_give_wrong_statistics_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        fisher_accumulate(make(), "safety")


def test_misspelt_module_names_are_refused():
    names = ["model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q"]
    with pytest.raises(ValueError, match=r"modules= names \['model.layers.0.self_attn.q'\], which do not carry"):
        fisher_accumulate(tiny_lora(), "safety", modules=names)
    assert list(fisher_accumulate(tiny_lora(), "safety", modules=iter(names[:1])).fisher) == names[:1]


def test_loops_that_would_give_wrong_statistics_are_refused():
    model, batch = tiny_lora(), tiny_batch(3)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with pytest.raises(RuntimeError, match="no hook fired"), fisher_accumulate(model, "safety"):
        pass
    with pytest.raises(ValueError, match="the forward pass has no labels"), fisher_accumulate(model, "safety"):
        model(**inputs).logits.sum().backward()
    with pytest.raises(RuntimeError, match="its scale is unknown"), fisher_accumulate(model, "safety"):
        model(**batch).logits.sum().backward()
    with pytest.raises(RuntimeError, match="ran twice through the same forward"), fisher_accumulate(model, "safety"):
        loss = model(**batch).loss
        loss.backward(retain_graph=True)
        loss.backward()
    with pytest.raises(RuntimeError, match="call that model itself"), fisher_accumulate(model, "safety"):
        model.base_model(**batch).loss.backward()
    masked = batch | {"labels": torch.full_like(batch["labels"], -100)}
    with (
        pytest.raises(ValueError, match=r"samples \[0, 1, 2\] of this batch have no labels"),
        fisher_accumulate(model, "safety"),
    ):
        model(**masked).loss.backward()
    holes = batch | {"attention_mask": batch["attention_mask"].index_fill(1, torch.tensor([2]), 0)}
    with pytest.raises(ValueError, match="has holes"), fisher_accumulate(model, "safety"):
        model(**holes).loss.backward()
    with pytest.raises(ValueError, match="must not be mixed"), fisher_accumulate(model, "safety"):
        sequence_nll(model, batch, "mc").backward()
        sequence_nll(model, batch, "empirical").backward()


def test_a_module_without_gradient_is_named():
    model, batch = tiny_lora(), tiny_batch(2)
    target = model.base_model.model.model.layers[1].mlp.down_proj
    handle = target.register_forward_hook(lambda _m, _i, y: y.detach())
    with (
        pytest.raises(RuntimeError, match=r"no gradient arrived at .*layers\.1\.mlp"),
        fisher_accumulate(model, "safety"),
    ):
        model(**batch).loss.backward()
    handle.remove()


def test_a_module_used_twice_is_named():
    model, batch = tiny_lora(), tiny_batch(2)
    layers = model.base_model.model.model.layers
    layers[1].mlp.gate_proj = layers[0].mlp.gate_proj
    with pytest.raises(ValueError, match=r"gate_proj was called twice"), fisher_accumulate(model, "safety"):
        model(**batch).loss.backward()


def test_a_forward_without_backward_is_reported():
    model, batch = tiny_lora(), tiny_batch(2)
    with (
        pytest.warns(UserWarning, match="1 forward passes were never followed"),
        fisher_accumulate(model, "safety") as pass_,
    ):
        model(**batch)
        model(**batch).loss.backward()
    assert pass_.fisher.counts.sequences == 2
