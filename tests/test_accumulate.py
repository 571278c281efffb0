"""`fisher_accumulate` against one backward per sample, for every way of running the same samples."""

from __future__ import annotations

import pytest
import torch

from sst_kernels import Fisher, fisher_accumulate, sequence_nll
from sst_kernels.testing import error_ratio
from tests.models import (
    ROUNDING,
    TARGETS,
    core_rows_by_definition,
    lora_layers,
    one_by_one,
    position_ids,
    summed_loss,
    tiny_batch,
    tiny_lora,
)


@pytest.mark.parametrize(("point", "core"), [("patched", 1.0), ("reference", 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", list(TARGETS))
def test_rows_are_the_gradients_of_single_samples(kind, padding, point, core):
    model = tiny_lora(kind, adapters=("task", "safety")).double()
    batch = tiny_batch(5, padding=padding)
    with fisher_accumulate(model, "safety", point=point) as pass_:
        model(**batch, position_ids=position_ids(batch)).loss.backward()
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety", core)) < ROUNDING
    assert pass_.fisher.counts.sequences == 5
    assert pass_.fisher.counts.labels == (batch["labels"][:, 1:] != -100).sum()
    assert pass_.fisher.counts.tokens == batch["attention_mask"].sum()


def test_single_precision_models_agree_to_their_own_rounding():
    model, batch = tiny_lora(), tiny_batch(5)
    with fisher_accumulate(model, "safety") as pass_:
        model(**batch).loss.backward()
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model.double(), batch, "safety")) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_agree_with_double_within_their_ulp(dtype):
    model, batch = tiny_lora().to(dtype), tiny_batch(5)
    with fisher_accumulate(model, "safety") as pass_:
        model(**batch).loss.backward()
    assert pass_.fisher.rows().dtype == torch.float32
    assert (
        error_ratio(pass_.fisher.rows(), core_rows_by_definition(model.double(), batch, "safety"))
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
    assert error_ratio(pass_.fisher.rows(), expected) < ROUNDING


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
    assert error_ratio(pass_.fisher.rows(), expected) < ROUNDING


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
    allowed = 4 * ROUNDING if by == "position_ids" else ROUNDING  # eager attention rounds its softmax to float32
    with fisher_accumulate(model, "safety") as pass_:
        model(**packed).loss.backward()
    assert pass_.fisher.counts.sequences == 4
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < allowed


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
        assert error_ratio(fisher, dense if structure == "full" else dense.diag().diag()) < ROUNDING


def test_module_scope_folds_rows_and_agrees():
    model, batch = tiny_lora().double(), tiny_batch(20)
    with fisher_accumulate(model, "safety") as aligned:
        model(**batch).loss.backward()
    with fisher_accumulate(model, "safety", scope="module") as folded:
        model(**batch).loss.backward()
    for name in aligned.fisher:
        assert folded.fisher[name].folded
        assert error_ratio(folded.fisher[name].dense(), aligned.fisher[name].dense()) < ROUNDING
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
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")[kept]) < ROUNDING
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
    assert error_ratio(loaded.rows(), core_rows_by_definition(model, batch, "safety", 0.0)) < ROUNDING
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
    assert error_ratio(fishers[0]["model.layers.0.self_attn.q_proj"].dense(), sum(dense) / 2) < ROUNDING
    with fisher_accumulate(model, "safety", point=0.5) as other:
        sequence_nll(model, batch, groups=[0, 1, 2]).backward()
    with pytest.raises(ValueError, match="the groups of the two passes differ"):
        fishers[0].merge(other.fisher, mix_points=True)
