"""Tiny random language models with LoRA adapters for the tests, and the definition of their core Fisher."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2MoeConfig

VOCAB = 61
# Error ratio of float32 rows against their definition; the models compute in float64 unless a test says otherwise.
ROUNDING = 1e-6
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "qwen2_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def tiny_model(kind: str = "llama", *, seed: int = 0, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(seed)
    if kind == "llama":  # grouped-query attention: 4 query heads on 2 key heads
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
        )  # fmt: skip
    elif kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, initializer_range=0.2,
        )  # fmt: skip
    else:
        config = Qwen2MoeConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, shared_expert_intermediate_size=24,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
            max_position_embeddings=64, initializer_range=0.2,
        )  # fmt: skip
    config._attn_implementation = attention
    config._experts_implementation = "eager"  # the grouped kernel has no double precision
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_lora(
    kind: str = "llama", *, adapters: tuple[str, ...] = ("safety",), r: int = 3, seed: int = 0, **options
) -> nn.Module:
    """A tiny model with random (non-zero) LoRA adapters, all active."""
    base = tiny_model(kind, seed=seed, attention=options.pop("attention", "sdpa"))
    model = None
    for i, name in enumerate(adapters):
        config = LoraConfig(
            **{"r": r + i, "lora_alpha": 2 * r, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"}
            | options
        )
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(list(adapters))
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_A" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tiny_batch(n: int = 4, *, padding: str = "right", seed: int = 0, longest: int = 12) -> dict[str, Tensor]:
    """`n` sequences of different lengths; the first third of each carries no loss."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest // 2, longest + 1, (n,), generator=generator)
    ids = torch.zeros(n, longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, length in enumerate(lengths.tolist()):
        where = slice(0, length) if padding == "right" else slice(longest - length, longest)
        tokens = torch.randint(1, VOCAB, (length,), generator=generator)
        ids[i, where], mask[i, where] = tokens, 1
        answer = tokens.clone()
        answer[: length // 3 + 1] = -100
        labels[i, where] = answer
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def position_ids(batch: dict[str, Tensor]) -> Tensor:
    return (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)


def one_by_one(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The batch as unpadded batches of one."""
    out = []
    for i in range(len(batch["input_ids"])):
        kept = batch["attention_mask"][i] != 0
        out.append({key: value[i][kept][None] for key, value in batch.items()})
    return out


def summed_loss(model: nn.Module, sample: dict[str, Tensor]) -> Tensor:
    """Σ −log p over the labels, in the model's own precision (transformers' loss narrows double to float)."""
    logits = model(**{k: v for k, v in sample.items() if k != "labels"}).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), sample["labels"][:, 1:].flatten(), reduction="sum")


def lora_layers(model: nn.Module, adapter: str) -> dict[str, nn.Module]:
    return {
        name.removeprefix("base_model.model."): m
        for name, m in model.named_modules()
        if hasattr(m, "lora_A") and adapter in getattr(m, "lora_A", {})
    }


def core_rows_by_definition(model: nn.Module, batch: dict[str, Tensor], adapter: str, core: float = 1.0) -> Tensor:
    """[N, Σ r²] by one backward per sample through an explicit S (LoRA-XS parametrisation: lora_B → S → lora_A)."""
    layers = lora_layers(model, adapter)
    cores = {
        n: (core * torch.eye(m.r[adapter], dtype=m.lora_A[adapter].weight.dtype)).requires_grad_()
        for n, m in layers.items()
    }
    handles = [
        m.lora_A[adapter].register_forward_hook(lambda _m, _i, h, s=cores[n]: h @ s.T) for n, m in layers.items()
    ]
    rows = []
    for sample in one_by_one(batch):
        gradients = torch.autograd.grad(summed_loss(model, sample), list(cores.values()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    for handle in handles:
        handle.remove()
    return torch.stack(rows)
