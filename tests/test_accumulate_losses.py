"""Whatever the loss, its reduction and its labels, rows are the gradients of each sample's summed −log p."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import RobertaConfig, RobertaForCausalLM

from sst_kernels import declared_loss, fisher_accumulate, label_logits, sequence_nll
from sst_kernels.testing import error_ratio
from tests.models import ROUNDING, core_rows_by_definition, lora_layers, position_ids, tiny_batch, tiny_lora


@pytest.mark.parametrize("factor", [1.0, 0.25, 65536.0])
def test_factors_on_the_loss_are_measured(factor):
    model, batch = tiny_lora().double(), tiny_batch(3)
    with fisher_accumulate(model, "safety") as pass_:
        (model(**batch).loss * factor).backward()
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


def test_losses_of_several_forwards_in_one_backward():
    model, batch = tiny_lora().double(), tiny_batch(4)
    with fisher_accumulate(model, "safety") as pass_:
        losses = [sequence_nll(model, {k: v[i : i + 2] for k, v in batch.items()}, groups=[i, i + 1]) for i in (0, 2)]
        (sum(losses) / 2).backward()
    expected = core_rows_by_definition(model, batch, "safety")
    assert sorted(pass_.fisher.groups) == [0, 1, 2, 3]
    assert error_ratio(pass_.fisher.rows(), expected[pass_.fisher.groups]) < ROUNDING


def test_own_losses_are_declared():
    model, batch = tiny_lora().double(), tiny_batch(3)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with fisher_accumulate(model, "safety") as pass_, declared_loss(batch["labels"], reduction="mean") as declared:
        logits = model(**inputs).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        declared.loss(loss).backward()
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


def test_the_mean_of_a_declared_loss_is_over_its_own_labels():
    model, batch = tiny_lora().double(), tiny_batch(3)
    inputs = {k: v for k, v in batch.items() if k != "labels"} | {"num_items_in_batch": 100}
    with fisher_accumulate(model, "safety") as pass_, declared_loss(batch["labels"], reduction="mean") as declared:
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        declared.loss(nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())).backward()
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


def test_models_whose_own_loss_is_a_sum():
    model, batch = tiny_lora().double(), tiny_batch(3)

    def summed(logits, labels, **_):
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    model.get_base_model().loss_function = summed
    with fisher_accumulate(model, "safety", reduction="sum") as pass_:
        model(**batch).loss.backward()
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


def test_declared_sums_and_stated_scales():
    model, batch = tiny_lora().double(), tiny_batch(3)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with fisher_accumulate(model, "safety", grad_scale=8.0) as pass_, declared_loss(batch["labels"], reduction="sum"):
        logits = model(**inputs).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        (8.0 * loss).backward()
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


def test_sequence_nll_with_data_labels():
    model, batch = tiny_lora().double(), tiny_batch(3)
    with fisher_accumulate(model, "safety") as pass_:
        sequence_nll(model, batch).backward()
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING
    assert pass_.fisher.meta["labels"] == "data"


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("by_model", [True, False])
def test_labels_on_first_tokens_count_nowhere(padding, by_model):
    """No label is predicted for a first token; behind left padding the model's mean counts it all the same."""
    model, batch = tiny_lora().double(), tiny_batch(4, padding=padding)
    batch["labels"] = torch.where(batch["attention_mask"] != 0, batch["input_ids"], -100)
    inputs = {**batch, "position_ids": position_ids(batch)}
    with fisher_accumulate(model, "safety") as pass_:
        (model(**inputs).loss if by_model else sequence_nll(model, inputs)).backward()
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING
    assert pass_.fisher.counts.labels == batch["attention_mask"].sum() - 4


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_only_label_columns_meet_the_vocabulary_unless_the_head_is_adapted(targets, padding):
    model = tiny_lora(target_modules=targets).double()
    batch = tiny_batch(3, padding=padding)
    positions = position_ids(batch)
    widths = []
    handle = (
        model.get_base_model()
        .get_output_embeddings()
        .register_forward_hook(lambda _m, _i, out: widths.append(out.shape[1]))
    )
    with fisher_accumulate(model, "safety") as pass_:
        sequence_nll(model, {**batch, "position_ids": positions}).backward()
    handle.remove()
    labelled = int((batch["labels"][:, 1:] != -100).any(0).sum())
    assert widths == [batch["labels"].shape[1] if "lm_head" in targets else labelled]
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


def test_heads_with_adapted_layers_see_every_token():
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, is_decoder=True,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "eager"  # the float64 mask of transformers 4.56 overflows with sdpa
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(RobertaForCausalLM(config), lora, adapter_name="safety").double().eval()
    batch = tiny_batch(3)
    with fisher_accumulate(model, "safety") as pass_:
        sequence_nll(model, batch).backward()
    assert any("lm_head.dense" in name for name in pass_.fisher)
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


def test_models_whose_logits_are_not_those_asked_for_are_named():
    class Deaf(nn.Module):
        base_model = nn.Identity()

        def forward(self, input_ids, logits_to_keep=0):
            return (torch.zeros(*input_ids.shape, 61),)

    batch = {k: v for k, v in tiny_batch(3).items() if k != "attention_mask"}
    with pytest.raises(ValueError, match="Deaf gave logits of 12 columns where logits_to_keep asked for"):
        label_logits(Deaf(), batch)


def test_model_labels_give_the_curvature_of_the_kl_divergence():
    """½ φᵀFφ with sampled labels ≈ KL(p_ref ‖ p_φ), so F from many draws is the Hessian of the KL, up to Monte-Carlo error."""
    model, batch = tiny_lora(attention="eager").double(), tiny_batch(1, longest=6)
    name, layer = next(iter(lora_layers(model, "safety").items()))
    generator = torch.Generator().manual_seed(0)
    draws = 3000
    repeated = {k: v.repeat(100, 1) for k, v in batch.items()}
    with fisher_accumulate(model, "safety", point="reference", modules=name) as pass_:
        for _ in range(draws // 100):
            sequence_nll(model, repeated, "mc", generator=generator).backward()
    core = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    mask = batch["labels"][0, 1:] != -100
    handle = layer.lora_A["safety"].register_forward_hook(lambda _m, _i, h: h @ core.T)

    def log_probabilities() -> torch.Tensor:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return logits[0, :-1][mask].log_softmax(-1)

    reference = log_probabilities().detach()
    kl = (reference.exp() * (reference - log_probabilities())).sum()
    gradient = torch.autograd.grad(kl, core, create_graph=True)[0].flatten()
    hessian = torch.stack([torch.autograd.grad(g, core, retain_graph=True)[0].flatten() for g in gradient])
    handle.remove()
    assert pass_.fisher.meta["labels"] == "model"
    assert error_ratio(pass_.fisher[name].dense(), hessian) < 5 / draws**0.5
