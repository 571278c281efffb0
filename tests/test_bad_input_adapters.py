"""Hostile adapters and models: nothing in their folders is executed or followed."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sst_merge.errors import AdapterError, MergeError, ModelError
from sst_merge.io.adapters import CONFIG, WEIGHTS, load_adapter
from sst_merge.io.fit import check_fit
from sst_merge.io.models import load_model
from tests import merge_cases as cases


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return cases.adapter_folder(tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture
def adapter(pristine, tmp_path) -> Path:
    """A copy to be spoiled."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((pristine / name).read_bytes())
    return folder


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_never_opened(adapter, tmp_path):
    for name in ("adapter_model.bin", WEIGHTS):
        (adapter / WEIGHTS).unlink(missing_ok=True)
        (adapter / name).write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
        with pytest.raises(AdapterError, match=r"is a pickle|not a readable safetensors file"):
            load_adapter(adapter)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("keep", [0, 1, 8, 40, 0.5, 0.99])
def test_truncated_weights(adapter, keep):
    raw = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        load_adapter(adapter)


@pytest.mark.parametrize("size", [0, 1 << 40, (1 << 64) - 1])
def test_malicious_headers(adapter, size):
    (adapter / WEIGHTS).write_bytes(struct.pack("<Q", size) + b"{}")
    with pytest.raises(AdapterError):
        load_adapter(adapter)


def change(adapter: Path, edit) -> None:
    state = load_file(adapter / WEIGHTS)
    edit(state)
    save_file(state, adapter / WEIGHTS)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.clear(), "no LoRA weights"),
        (lambda s: s.pop(next(iter(s))), "not its partner"),
        (lambda s: s.update({"../../escape": torch.ones(1)}), "only LoRA on linear layers"),
        (lambda s: s.update({k: v.to(torch.int32) for k, v in s.items()}), "expected float32, bfloat16"),
        (lambda s: s.update({k: v.to(torch.float8_e4m3fn) for k, v in s.items()}), "expected float32, bfloat16"),
        (
            lambda s: s.update({k.replace(".weight", ".other.weight"): 2 * v for k, v in s.items()}),
            "is a second lora_A",
        ),
        (lambda s: s.update({k.removeprefix("base_model.model."): 2 * v for k, v in s.items()}), "is a second lora_A"),
        (lambda s: s.update({k: v * float("nan") for k, v in s.items()}), "not finite"),
        (lambda s: s.update({k: v * float("inf") for k, v in s.items()}), "not finite"),
        (lambda s: s.update({k: v[:1].contiguous() for k, v in s.items() if "lora_A" in k}), "gives rank"),
        (lambda s: s.update({k: v[None].contiguous() for k, v in s.items()}), "has shape"),
        (lambda s: s.update({k: v[:0].contiguous() for k, v in s.items()}), "gives rank"),
    ],
)
def test_spoiled_weights(adapter, edit, message):
    change(adapter, edit)
    with pytest.raises(AdapterError, match=message):
        load_adapter(adapter)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{", '{"peft_type": "LORA"', '{"peft_type": "IA3"}', "\ufeff{}", "[" * 100_000,
        json.dumps({"peft_type": "LORA", "r": "8", "lora_alpha": 16}),
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": None}),
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": -6}),
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": float("nan")}),
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": float("inf")}),
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 1e308}),
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "use_rslora": "no"}),
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "rank_pattern": {"(([a-z]|.)+)+X": 3}}),
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "rank_pattern": {".*.*.*.*.*.*.*.*.*X": 3}}),
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "rank_pattern": {"(": 3}}),
        json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "rank_pattern": [3]}),
    ],
)  # fmt: skip
def test_spoiled_configurations(adapter, text):
    (adapter / CONFIG).write_text(text, encoding="utf-8")
    with pytest.raises(AdapterError):
        load_adapter(adapter)


def test_configurations_that_are_not_utf8(adapter):
    (adapter / CONFIG).write_bytes(b'{"peft_type": "\xff\xfe"}')
    with pytest.raises(AdapterError, match="JSON"):
        load_adapter(adapter)


@pytest.mark.parametrize("what", [CONFIG, WEIGHTS])
def test_links_out_of_an_adapter_folder_are_refused(adapter, tmp_path, what):
    """A downloaded adapter must not be able to name files of this machine."""
    outside = tmp_path / "outside"
    (adapter / what).rename(outside)
    (adapter / what).symlink_to(outside)
    with pytest.raises(AdapterError, match="link"):
        load_adapter(adapter)


def test_links_inside_a_hub_cache_are_followed(adapter, tmp_path):
    """snapshots/<commit>/file -> ../../blobs/<hash>, as huggingface_hub stores downloads."""
    repository = tmp_path / "models--someone--adapter"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "abc").mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (adapter / name).rename(repository / "blobs" / name)
        (repository / "snapshots" / "abc" / name).symlink_to(Path("../../blobs") / name)
    assert load_adapter(repository / "snapshots" / "abc").terms


def test_folders_and_devices_in_place_of_files(adapter):
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).mkdir()
    with pytest.raises(AdapterError):
        load_adapter(adapter)


def test_a_loop_of_links_is_no_adapter(tmp_path):
    (tmp_path / CONFIG).symlink_to(CONFIG)
    with pytest.raises(AdapterError, match="expected a PEFT adapter folder"):
        load_adapter(tmp_path)


def entry(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(folder: Path, edit) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def code(folder: Path) -> None:
    entry(folder, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    (folder / "evil.py").write_text(f"open({str(folder / 'owned')!r}, 'w')")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(folder / "owned")))


def fewer_tokens(state) -> None:
    state.update({k: v[:250].contiguous() for k, v in state.items() if "embed_tokens" in k or "lm_head" in k})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (code, "code that travels with a model is never run"),
        (pickled, "in safetensors"),
        (lambda f: entry(f, model_type="nonsense"), "cannot be loaded"),
        (lambda f: entry(f, model_type="t5"), "cannot be loaded"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda f: (f / "tokenizer.json").unlink(), "cannot be loaded"),
        (lambda f: weights(f, lambda s: s.pop("model.norm.weight")), r"its files lack \['model.norm.weight'\]"),
        (
            lambda f: [weights(f, fewer_tokens), entry(f, vocab_size=250, pad_token_id=None)],
            "the tokenizer has 258 tokens and the model embeds 250",
        ),
    ],
)
def test_models_that_cannot_be_used(spoil, message, tmp_path):
    spoil(cases.model_folder(tmp_path))
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, device="cpu")
    assert not (tmp_path / "owned").exists()


def test_adapters_of_another_base_model_are_named(tmp_path):
    other = cases.adapter_folder(tmp_path / "wide", base=cases.model(hidden=64))
    with pytest.raises(MergeError, match="trained on another base model"):
        check_fit(cases.model(), load_adapter(other))
