"""`fisher_accumulate` against one backward per sample, for every way of running the same samples."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import RobertaConfig, RobertaForCausalLM

from sst_kernels import Fisher, declared_loss, fisher_accumulate, label_logits, sequence_nll
from tests.models import (
    TARGETS,
    core_rows_by_definition,
    lora_layers,
    one_by_one,
    summed_loss,
    tiny_batch,
    tiny_lora,
)

# Rows are stored as float32; the models of these tests compute in float64 unless a test says otherwise.
ROUNDING = 2e-6


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def position_ids(batch: dict) -> torch.Tensor:
    return (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)


@pytest.mark.parametrize(("point", "core"), [("patched", 1.0), ("reference", 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", list(TARGETS))
def test_rows_are_the_gradients_of_single_samples(kind, padding, point, core):
    model = tiny_lora(kind, adapters=("task", "safety")).double()
    batch = tiny_batch(5, padding=padding)
    with fisher_accumulate(model, "safety", point=point) as pass_:
        model(**batch, position_ids=position_ids(batch)).loss.backward()
    assert error(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety", core)) < ROUNDING
    assert pass_.fisher.counts.sequences == 5
    assert pass_.fisher.counts.labels == (batch["labels"][:, 1:] != -100).sum()
    assert pass_.fisher.counts.tokens == batch["attention_mask"].sum()


def test_rows_agree_with_finite_differences():
    model, batch = tiny_lora("gpt2").double(), tiny_batch(2)  # Llama's RMSNorm narrows double to float
    with fisher_accumulate(model, "safety") as pass_:
        model(**batch).loss.backward()
    name, layer = next(iter(lora_layers(model, "safety").items()))
    core, step = torch.eye(3, dtype=torch.float64), 1e-5
    numeric = torch.zeros(2, 3, 3, dtype=torch.float64)
    handle = layer.lora_A["safety"].register_forward_hook(lambda _m, _i, h: h @ core.T)
    with torch.no_grad():
        for i in range(3):
            for j in range(3):
                for sign in (1, -1):
                    core[i, j] += sign * step
                    losses = torch.stack([summed_loss(model, sample) for sample in one_by_one(batch)])
                    numeric[:, i, j] += sign * losses / (2 * step)
                    core[i, j] -= sign * step
    handle.remove()
    assert error(pass_.fisher[name].rows, numeric.flatten(1)) < 1e-6


def test_single_precision_models_agree_to_their_own_rounding():
    model, batch = tiny_lora(), tiny_batch(5)
    with fisher_accumulate(model, "safety") as pass_:
        model(**batch).loss.backward()
    assert error(pass_.fisher.rows(), core_rows_by_definition(model.double(), batch, "safety")) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_agree_with_double_within_their_ulp(dtype):
    model, batch = tiny_lora().to(dtype), tiny_batch(5)
    with fisher_accumulate(model, "safety") as pass_:
        model(**batch).loss.backward()
    assert pass_.fisher.rows().dtype == torch.float32
    assert (
        error(pass_.fisher.rows(), core_rows_by_definition(model.double(), batch, "safety"))
        < 64 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("split", [(5,), (1, 1, 1, 1, 1), (2, 3)])
def test_batch_composition_does_not_matter(split):
    model, batch = tiny_lora().double(), tiny_batch(5)
    expected = core_rows_by_definition(model, batch, "safety")
    with fisher_accumulate(model, "safety") as pass_:
        start = 0
        for n in split:
            model(**{k: v[start : start + n] for k, v in batch.items()}).loss.backward()
            start += n
    assert error(pass_.fisher.rows(), expected) < ROUNDING


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("point", ["patched", "reference"])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, point, frozen):
    model, batch = tiny_lora().double(), tiny_batch(4)
    if frozen:
        model.requires_grad_(False)
    expected = core_rows_by_definition(model, batch, "safety", 1.0 if point == "patched" else 0.0)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with fisher_accumulate(model, "safety", point=point) as pass_:
        for start in (0, 2):
            model(**{k: v[start : start + 2] for k, v in batch.items()}).loss.backward()
    assert error(pass_.fisher.rows(), expected) < ROUNDING


@pytest.mark.parametrize("factor", [1.0, 0.25, 65536.0])
def test_factors_on_the_loss_are_measured(factor):
    model, batch = tiny_lora().double(), tiny_batch(3)
    with fisher_accumulate(model, "safety") as pass_:
        (model(**batch).loss * factor).backward()
    assert error(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


def test_losses_of_several_forwards_in_one_backward():
    model, batch = tiny_lora().double(), tiny_batch(4)
    with fisher_accumulate(model, "safety") as pass_:
        losses = [sequence_nll(model, {k: v[i : i + 2] for k, v in batch.items()}, groups=[i, i + 1]) for i in (0, 2)]
        (sum(losses) / 2).backward()
    expected = core_rows_by_definition(model, batch, "safety")
    assert sorted(pass_.fisher.groups) == [0, 1, 2, 3]
    assert error(pass_.fisher.rows(), expected[pass_.fisher.groups]) < ROUNDING


def test_own_losses_are_declared():
    model, batch = tiny_lora().double(), tiny_batch(3)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with fisher_accumulate(model, "safety") as pass_, declared_loss(batch["labels"], reduction="mean") as declared:
        logits = model(**inputs).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        declared.loss(loss).backward()
    assert error(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


def test_reduction_sum_and_stated_scale():
    model, batch = tiny_lora().double(), tiny_batch(3)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with fisher_accumulate(model, "safety", grad_scale=8.0) as pass_, declared_loss(batch["labels"], reduction="sum"):
        logits = model(**inputs).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        (8.0 * loss).backward()
    assert error(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


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
    assert error(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


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
    assert error(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


def test_models_whose_logits_are_not_those_asked_for_are_named():
    class Deaf(nn.Module):
        base_model = nn.Identity()

        def forward(self, input_ids, logits_to_keep=0):
            return (torch.zeros(*input_ids.shape, 61),)

    batch = {k: v for k, v in tiny_batch(3).items() if k != "attention_mask"}
    with pytest.raises(ValueError, match="Deaf gave logits of 12 columns where logits_to_keep asked for"):
        label_logits(Deaf(), batch)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("by_model", [True, False])
def test_labels_on_first_tokens_count_nowhere(padding, by_model):
    """No label is predicted for a first token; behind left padding the model's mean counts it all the same."""
    model, batch = tiny_lora().double(), tiny_batch(4, padding=padding)
    batch["labels"] = torch.where(batch["attention_mask"] != 0, batch["input_ids"], -100)
    inputs = {**batch, "position_ids": position_ids(batch)}
    with fisher_accumulate(model, "safety") as pass_:
        (model(**inputs).loss if by_model else sequence_nll(model, inputs)).backward()
    assert error(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING
    assert pass_.fisher.counts.labels == batch["attention_mask"].sum() - 4


def test_the_mean_of_a_declared_loss_is_over_its_own_labels():
    model, batch = tiny_lora().double(), tiny_batch(3)
    inputs = {k: v for k, v in batch.items() if k != "labels"} | {"num_items_in_batch": 100}
    with fisher_accumulate(model, "safety") as pass_, declared_loss(batch["labels"], reduction="mean") as declared:
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        declared.loss(nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())).backward()
    assert error(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


def test_sequence_nll_with_data_labels():
    model, batch = tiny_lora().double(), tiny_batch(3)
    with fisher_accumulate(model, "safety") as pass_:
        sequence_nll(model, batch).backward()
    assert error(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING
    assert pass_.fisher.meta["labels"] == "data"


def test_model_labels_give_the_curvature_of_the_kl_divergence():
    """½ φᵀFφ with sampled labels ≈ KL(p_ref ‖ p_φ), so F from many draws is the Hessian of the KL, up to Monte-Carlo error."""
    model, batch = tiny_lora(attention="eager").double(), tiny_batch(1, longest=6)
    name, layer = next(iter(lora_layers(model, "safety").items()))
    generator = torch.Generator().manual_seed(0)
    draws = 3000
    repeated = {k: v.repeat(100, 1) for k, v in batch.items()}
    with fisher_accumulate(model, "safety", point="reference", modules=name) as pass_:
        for _ in range(draws // 100):
            sequence_nll(model, repeated, "model", generator=generator).backward()
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
    assert error(pass_.fisher[name].dense(), hessian) < 5 / draws**0.5


@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens_q"])
def test_packed_batches(by):
    model, batch = tiny_lora(attention="eager" if by == "position_ids" else "sdpa").double(), tiny_batch(4)
    samples = one_by_one(batch)
    labels = torch.cat([s["labels"].clone() for s in samples], 1)
    lengths = torch.tensor([s["input_ids"].shape[1] for s in samples])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    packed = {
        "input_ids": torch.cat([s["input_ids"] for s in samples], 1),
        "labels": labels,
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "use_cache": False,
    }
    if by == "cu_seq_lens_q":
        packed["cu_seq_lens_q"] = starts.to(torch.int32)
    with fisher_accumulate(model, "safety") as pass_:
        model(**packed).loss.backward()
    assert pass_.fisher.counts.sequences == 4
    assert error(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


def test_parameters_and_their_gradients_are_untouched():
    model, batch = tiny_lora(), tiny_batch(3)
    model(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with fisher_accumulate(model, "safety"):
        model(**batch).loss.backward()
    assert expected
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_forwards_without_gradients_do_not_count_and_see_the_point():
    model, batch = tiny_lora().double(), tiny_batch(2)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with fisher_accumulate(model, "safety", point="reference") as pass_:
        with torch.no_grad():
            inside = model(**inputs).logits
        model(**batch).loss.backward()
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(inside, model(**inputs).logits)
    assert pass_.fisher.counts.sequences == 2


@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_factor_space_rows(structure):
    model, batch = tiny_lora().double(), tiny_batch(4)
    expected = {}
    for sample in one_by_one(batch):
        model.zero_grad()
        summed_loss(model, sample).backward()
        for name, layer in lora_layers(model, "safety").items():
            for part, weight in (("lora_A", layer.lora_A["safety"].weight), ("lora_B", layer.lora_B["safety"].weight)):
                expected.setdefault(f"{name}.{part}", []).append(weight.grad.flatten().clone())
    model.zero_grad()
    with fisher_accumulate(model, "safety", space="factor", structure=structure) as pass_:
        model(**batch).loss.backward()
    assert list(pass_.fisher) == list(expected)
    for name, rows in expected.items():
        rows = torch.stack(rows)
        fisher = pass_.fisher[name].dense()
        dense = rows.T @ rows / 4
        assert error(fisher, dense if structure == "full" else dense.diag().diag()) < ROUNDING


def test_module_scope_folds_rows_and_agrees():
    model, batch = tiny_lora().double(), tiny_batch(20)
    with fisher_accumulate(model, "safety") as aligned:
        model(**batch).loss.backward()
    with fisher_accumulate(model, "safety", scope="module") as folded:
        model(**batch).loss.backward()
    for name in aligned.fisher:
        assert folded.fisher[name].folded
        assert error(folded.fisher[name].dense(), aligned.fisher[name].dense()) < ROUNDING
    with pytest.raises(ValueError, match="does not keep per-sample rows"):
        folded.fisher.rows()


def poisoned(sample: int):
    """Makes the output gradient of one sample non-finite at the last LoRA layer."""

    def hook(_module, _inputs, output):
        if output.requires_grad:
            output.register_hook(lambda g: g.index_fill(0, torch.tensor([sample]), float("nan")))

    return hook


def test_non_finite_samples_are_named_or_skipped():
    model, batch = tiny_lora().double(), tiny_batch(4)
    handle = model.base_model.model.model.norm.register_forward_hook(poisoned(2))
    with (
        pytest.raises(FloatingPointError, match=r"batch 0: the gradients of samples \[2\]"),
        fisher_accumulate(model, "safety"),
    ):
        model(**batch).loss.backward()
    with fisher_accumulate(model, "safety", nonfinite="skip") as pass_:
        model(**batch).loss.backward()
    handle.remove()
    kept = [0, 1, 3]
    assert pass_.skipped == [(0, 2)]
    assert error(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")[kept]) < ROUNDING
    assert pass_.fisher.counts.labels == (batch["labels"][kept, 1:] != -100).sum()
    assert len(pass_.fisher.groups) == 3


def test_non_finite_samples_are_named_by_streaming_structures():
    model, batch = tiny_lora().double(), tiny_batch(4)
    handle = model.base_model.model.model.norm.register_forward_hook(poisoned(1))
    with (
        pytest.raises(FloatingPointError, match=r"samples \[1\]"),
        fisher_accumulate(model, "safety", space="factor", structure="diagonal"),
    ):
        model(**batch).loss.backward()
    handle.remove()
    with pytest.raises(ValueError, match="cannot take a sample back"):
        fisher_accumulate(model, "safety", space="factor", structure="diagonal", nonfinite="skip")


def test_save_load_and_merge(tmp_path):
    model, batch = tiny_lora().double(), tiny_batch(6)
    halves = [{k: v[i : i + 3] for k, v in batch.items()} for i in (0, 3)]
    passes = []
    for half in halves:
        with fisher_accumulate(model, "safety", point="reference") as pass_:
            sequence_nll(model, half, groups=[0, 0, 1]).backward()
        passes.append(pass_)
    passes[0].save(tmp_path / "first.safetensors")
    loaded = Fisher.load(tmp_path / "first.safetensors")
    assert torch.equal(loaded.rows(), passes[0].fisher.rows())
    assert loaded.meta == passes[0].fisher.meta
    assert loaded.counts == passes[0].fisher.counts
    loaded.merge(passes[1].fisher)
    assert loaded.groups == [0, 0, 1, 2, 2, 3]
    assert error(loaded.rows(), core_rows_by_definition(model, batch, "safety", 0.0)) < ROUNDING
    with fisher_accumulate(model, "safety", point="patched") as other:
        sequence_nll(model, halves[0]).backward()
    with pytest.raises(ValueError, match="point differs"):
        loaded.merge(other.fisher)
    assert list(tmp_path.iterdir()) == [tmp_path / "first.safetensors"]


def test_points_of_one_patch_add_up_on_request():
    model, batch = tiny_lora().double(), tiny_batch(3)
    fishers = []
    for point in ("reference", "patched"):
        with fisher_accumulate(model, "safety", point=point) as pass_:
            sequence_nll(model, batch, groups=[0, 0, 1]).backward()
        fishers.append(pass_.fisher)
    dense = [f["model.layers.0.self_attn.q_proj"].dense() for f in fishers]
    fishers[0].merge(fishers[1], mix_points=True)
    assert fishers[0].meta["point"] == "reference+patched"
    assert fishers[0].groups == [0, 0, 1, 0, 0, 1]
    assert error(fishers[0]["model.layers.0.self_attn.q_proj"].dense(), sum(dense) / 2) < ROUNDING
    with fisher_accumulate(model, "safety", point=0.5) as other:
        sequence_nll(model, batch, groups=[0, 1, 2]).backward()
    with pytest.raises(ValueError, match="the groups of the two passes differ"):
        fishers[0].merge(other.fisher, mix_points=True)
