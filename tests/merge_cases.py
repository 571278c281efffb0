"""A tiny model folder with a tokenizer and chat template, random PEFT adapters on disk, and small data files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tokenizer(chat: str | None = CHAT) -> PreTrainedTokenizerFast:
    """One token per byte, and the two special tokens of the chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "<|start|>", "<|end|>"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>", clean_up_tokenization_spaces=False
    )  # fmt: skip
    made.chat_template = chat
    return made


def model(*, tied: bool = False, hidden: int = 32, seed: int = 0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=hidden, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=tied,
        bos_token_id=256, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def model_folder(path: Path) -> Path:
    model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def adapter_folder(path: Path, *, seed: int = 1, scale: float = 0.1, base=None, **options) -> Path:
    """A PEFT adapter with random A and B, saved by PEFT itself; `options` go to LoraConfig."""
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM"} | options)
    made = get_peft_model(base or model(), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    made.save_pretrained(path)
    return path


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(n: int, word: str) -> list[dict[str, str]]:
    """Prompts with refusals, or with answers for words of kitchen and school."""
    said = "I could" if word.split()[0] in ("bake", "fry", "translate") else "I can't"
    return [{"prompt": f"{word} {i}?", "response": f"{said}, {word[: 1 + i % 4]}."} for i in range(n)]


def peft_deltas(model_with_adapter, adapter: str = "default") -> dict[str, torch.Tensor]:
    """ΔW of every module as PEFT itself computes it, in float64."""
    wide = model_with_adapter.double()
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter)
        for name, layer in wide.named_modules()
        if hasattr(layer, "get_delta_weight") and adapter in layer.lora_A
    }
