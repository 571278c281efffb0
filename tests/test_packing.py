"""Several sequences in one row: each sample's gradient as if it stood alone, or refused at the first batch by name."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from sst_kernels import fisher_accumulate, input_moments, sequence_nll
from sst_kernels.testing import error_ratio
from tests.models import ROUNDING, core_rows_by_definition, one_by_one, tiny_batch, tiny_lora

ALLOWED = 4 * ROUNDING  # eager attention rounds its softmax to float32


def packed(batch, *, first: int = 0, **more):
    """The samples of a padded batch in one row whose positions start again at `first`, 2·`first`, …"""
    samples = one_by_one(batch)
    lengths = [s["input_ids"].shape[1] for s in samples]
    return {
        "input_ids": torch.cat([s["input_ids"] for s in samples], 1),
        "labels": torch.cat([s["labels"] for s in samples], 1),
        "position_ids": torch.cat([torch.arange(n) + i * first for i, n in enumerate(lengths)])[None],
        **more,
    }


def boundaries(batch):
    return torch.cat([torch.zeros(1, dtype=torch.int64), batch["attention_mask"].sum(1).cumsum(0)]).to(torch.int32)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("first", [0, 3])
def test_restarts_at_any_value_part_samples(first, attention):
    """Rotary embeddings see distances only, so that alone and packed at 3, 6, 9 … the gradients agree."""
    model, batch = tiny_lora(attention=attention).double(), tiny_batch(4)
    for backward in (lambda inputs: model(**inputs, use_cache=False).loss, lambda inputs: sequence_nll(model, inputs)):
        with fisher_accumulate(model, "safety") as pass_:
            backward(packed(batch, first=first)).backward()
        assert pass_.fisher.counts.sequences == 4
        assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ALLOWED


def test_a_model_without_cache_needs_no_flag():
    model, batch = tiny_lora().double(), tiny_batch(3)
    model.get_base_model().config.use_cache = False
    with fisher_accumulate(model, "safety") as pass_:
        model(**packed(batch)).loss.backward()
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ALLOWED


def test_checkpointing_switches_the_cache_off():
    model, batch = tiny_lora().double(), tiny_batch(3)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    with fisher_accumulate(model.train(), "safety") as pass_:
        model(**packed(batch)).loss.backward()
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model.eval(), batch, "safety")) < ALLOWED


def multipack(batch):
    """Numbers of documents in the mask, as axolotl's multipack collator writes them."""
    whole = packed(batch)
    lengths = batch["attention_mask"].sum(1)
    return {**whole, "attention_mask": torch.repeat_interleave(torch.arange(len(lengths)) + 1, lengths)[None]}


def blocks(batch):
    """A [1, 1, T, T] mask that parts the documents."""
    owner = multipack(batch)["attention_mask"][0]
    seen = (owner[:, None] == owner).tril()
    return {**packed(batch, use_cache=False), "attention_mask": seen[None, None]}


REFUSED = {
    "the default cache": (lambda b: packed(b), "does not part while it fills a cache .*use_cache=False"),
    "a cache asked for": (lambda b: packed(b, use_cache=True), "use_cache=False"),
    "a mask of ones": (lambda b: packed(b, attention_mask=torch.ones(1, int(b["attention_mask"].sum()))), "start again within sample 0"),
    "multipack": (multipack, "other values than 0 and 1: numbers of documents"),
    "a mask in blocks": (blocks, r"attention_mask of shape \(1, 1, \d+, \d+\) parts or hides tokens"),
    "a mask by name": (lambda b: packed(b, attention_mask={"full_attention": None}), "attention_mask is a dict"),
    "boundaries alone": (
        lambda b: {k: v for k, v in packed(b, use_cache=False, cu_seq_lens_q=boundaries(b)).items() if k != "position_ids"},
        "sdpa attention does not part them by cu_seq_lens_q",
    ),
    "other boundaries": (
        lambda b: packed(b, use_cache=False, cu_seq_lens_q=torch.tensor([0, 3, int(b["attention_mask"].sum())])), "same places",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ["fisher", "inputs"])
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_model_would_not_part_is_refused_at_the_first_batch(make, message, what):
    model, batch = tiny_lora(), tiny_batch(3)
    inputs = make(batch)
    pass_ = fisher_accumulate(model, "safety") if what == "fisher" else input_moments(model, "safety")
    with pytest.raises(ValueError, match=message), pass_:
        model(**inputs)


def test_the_leak_is_real():
    """What the refusals are about: with a cache, a sample's loss depends on the sequences before it."""
    model, batch = tiny_lora(), tiny_batch(3)
    inputs = packed(batch)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, :3] = 60 - other["input_ids"][0, :3]
    with torch.no_grad():
        for cache in (True, False):
            last = [model(**i, use_cache=cache).logits[0, -1] for i in (inputs, other)]
            assert torch.equal(*last) is not cache


@pytest.mark.parametrize("seen", [torch.bool, torch.float32])
def test_causal_masks_of_four_dimensions_change_nothing(seen):
    model, batch = tiny_lora().double(), {k: v[:1] for k, v in tiny_batch(1).items()}
    length = batch["input_ids"].shape[1]
    kept = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    mask = (
        kept if seen == torch.bool else torch.zeros(kept.shape, dtype=torch.float64).masked_fill(~kept, float("-inf"))
    )
    sample = one_by_one(batch)[0]
    length = sample["input_ids"].shape[1]
    with fisher_accumulate(model, "safety") as pass_:
        model(**sample | {"attention_mask": mask[..., :length, :length]}).loss.backward()
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


def test_models_that_do_not_part_sequences_are_refused():
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1}
    mamba = MambaForCausalLM(MambaConfig(**sizes, state_size=4))
    bloom = BloomForCausalLM(BloomConfig(**sizes, n_head=4))
    batch = packed(tiny_batch(3), use_cache=False)
    for base, target, message in (
        (mamba, "in_proj", r"Mamba\w+ of MambaForCausalLM carries one into the next"),
        (bloom, "query_key_value", r"BloomForCausalLM with .* attention is not known to part them"),
    ):
        model = get_peft_model(base, LoraConfig(r=2, target_modules=[target]), adapter_name="safety")
        with pytest.raises(ValueError, match=message), fisher_accumulate(model, "safety"):
            model(**batch)


def test_positions_that_restart_at_padding_are_those_of_generation():
    """`position_ids.masked_fill(mask == 0, 1)`: 1 1 1 0 1 2 … is one sequence."""
    model, batch = tiny_lora().double(), tiny_batch(3, padding="left")
    positions = (batch["attention_mask"].cumsum(1) - 1).masked_fill(batch["attention_mask"] == 0, 1)
    with fisher_accumulate(model, "safety") as pass_:
        model(**batch, position_ids=positions).loss.backward()
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING


@pytest.mark.parametrize("by_config", [True, False])
def test_terms_of_a_router_are_refused_or_left_out(by_config):
    model, batch = tiny_lora("qwen2_moe").double(), tiny_batch(3)
    config = model.get_base_model().config
    config.router_aux_loss_coef, more = 1.0, {}
    if by_config:
        config.output_router_logits = True
    else:
        more = {"output_router_logits": True}
    with (
        pytest.raises(ValueError, match="adds a term for the balance of its experts"),
        fisher_accumulate(model, "safety"),
    ):
        model(**batch, **more)
    expected = core_rows_by_definition(model, batch, "safety")
    with fisher_accumulate(model, "safety") as pass_:
        sequence_nll(model, batch | more).backward()
    assert error_ratio(pass_.fisher.rows(), expected) < ROUNDING
    with fisher_accumulate(model, "safety") as pass_:
        model(**batch | {"output_router_logits": False}).loss.backward()
    assert error_ratio(pass_.fisher.rows(), expected) < ROUNDING
    with input_moments(model, "safety") as moments, torch.no_grad():
        model(**batch, **more)
    assert moments.tokens == batch["attention_mask"].sum()


def test_labels_that_are_shifted_already_are_refused():
    model, batch = tiny_lora(), tiny_batch(3)
    with pytest.raises(ValueError, match="the batch has shift_labels"), fisher_accumulate(model, "safety"):
        model(**batch, shift_labels=batch["labels"].roll(-1, 1))


def test_flash_attention_parts_by_its_own_rules():
    """By positions of 0 or by all four of its boundary arguments; it cannot run here, so that the rule alone is tested."""
    from sst_kernels.fisher.layout import refuse_leaks

    plain, batch = tiny_lora().get_base_model(), tiny_batch(3)
    plain.config._attn_implementation = "flash_attention_2"
    cuts = {f"cu_seq_lens_{side}": boundaries(batch) for side in "qk"}
    refuse_leaks(plain, packed(batch))
    refuse_leaks(plain, packed(batch, **cuts))
    everything = packed(batch, first=3, **cuts, max_length_q=12, max_length_k=12)
    refuse_leaks(plain, everything)
    for inputs, message in (
        (packed(batch, first=3), "parts at positions of 0 alone"),
        ({k: v for k, v in everything.items() if k not in ("max_length_q", "position_ids")}, "without cu_seq_lens_k"),
    ):
        with pytest.raises(ValueError, match=message):
            refuse_leaks(plain, inputs)
