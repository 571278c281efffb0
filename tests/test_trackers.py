"""Situations from public trackers, each with the right value; `docs/reliability.md` has them as a table, with where they were reported."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from sst_merge.errors import AdapterError, DataError, ModelError
from sst_merge.io.adapters import load_adapter
from sst_merge.io.data import load_dataset
from sst_merge.io.fit import attach, check_fit, fitted
from sst_merge.io.models import load_model, load_skeleton
from sst_merge.io.serving import commands
from sst_merge.merge.check import check
from sst_merge.recipe import Recipe
from tests import merge_cases as cases

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("trackers")
    cases.model_folder(root / "model")
    cases.adapter_folder(root / "task", seed=1, r=2)
    cases.adapter_folder(root / "safety", seed=2, target_modules=["q_proj", "o_proj"], scale=0.2)
    for name, word in (("harm", "steal"), ("benign", "bake")):
        cases.write_jsonl(root / f"{name}.jsonl", cases.pairs(40, word))
    return root


@pytest.fixture
def adapter(world, tmp_path):
    """A copy of the safety adapter with other tensors or configuration."""

    def make(state=None, config=None):
        folder = tmp_path / "adapter"
        shutil.copytree(world / "safety", folder)
        if state is not None:
            tensors = load_file(folder / "adapter_model.safetensors")
            save_file(dict(state(k, v) for k, v in tensors.items()), folder / "adapter_model.safetensors")
        if config is not None:
            path = folder / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    return make


def notes_of(world, **change):
    given = {
        "model": str(world / "model"),
        "device": "cpu",
        "output": world / "out",
        "task": world / "task",
        "safety": world / "safety",
    }
    given |= {"harm_data": world / "harm.jsonl", "benign_data": world / "benign.jsonl"}
    return [f.text for f in check(Recipe.parse(given | change)).findings]


# Adapters that are plain LoRA, whatever their keys say


def renamed(old, new):
    return lambda key, value: (key.replace(old, new, 1), value)


@pytest.mark.parametrize(
    "state",
    [
        renamed("base_model.model.", "base_model.model.base_model.model."),  # a PeftModel in a PeftModel: trl 742
        renamed(".weight", ".default.weight"),  # a state dict with adapter names: llama.cpp 3640
        renamed("base_model.model.", ""),  # module names alone: redai-studio/Relax 262
        renamed("model.model.layers", "model.model.language_model.layers"),  # trained beside a vision tower: vllm 38844
        renamed("model.model.layers", "model.language_model.model.layers"),  # the same, before transformers 4.52
    ],
)
def test_keys_of_other_wrappers_give_the_same_change(world, adapter, state):
    model = cases.model()
    expected, found = load_adapter(world / "safety"), fitted(model, load_adapter(adapter(state)))
    check_fit(model, found)
    assert found.terms.keys() == expected.terms.keys()
    for name, term in expected.terms.items():
        assert torch.equal(found.terms[name].delta(), term.delta())
    deltas = cases.peft_deltas(attach(model, "x", found), "x")
    assert all(torch.allclose(deltas[n], t.delta(), rtol=1e-5, atol=1e-9) for n, t in expected.terms.items())


@pytest.mark.parametrize(
    "config",
    [
        {
            "enable_lora": None,
            "merge_weights": False,
            "layer_replication": None,
        },  # of PEFT 0.2, and of later ones: lmdeploy 2020
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"some_option_of_the_future": False, "another": []},
        {"r": 3.0},
    ],
)
def test_entries_that_change_nothing_change_nothing(world, adapter, config):
    expected, found = load_adapter(world / "safety"), load_adapter(adapter(config=config))
    assert all(torch.equal(found.terms[n].delta(), t.delta()) for n, t in expected.terms.items())


def test_an_adapter_called_lora(tmp_path):
    """PEFT warns of the name (peft 2699); what it saves is read rightly."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(cases.model(), config, adapter_name="lora")
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    deltas = cases.peft_deltas(model, "lora")
    terms = load_adapter(tmp_path / "lora").terms
    assert terms.keys() == deltas.keys()
    assert all(torch.allclose(term.delta(), deltas[name], rtol=1e-5, atol=1e-8) for name, term in terms.items())


def test_weights_of_the_head_beside_its_lora(tmp_path):
    """PEFT stores lm_head.base_layer.weight (llama.cpp 5602); vLLM and llama.cpp take such adapters of few models (vllm 21500)."""
    cases.adapter_folder(tmp_path / "a", seed=3, target_modules=["q_proj", "lm_head"])
    found = load_adapter(tmp_path / "a")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "a/adapter_model.safetensors")
    check_fit(cases.model(), found)
    assert found.summary()["heads"] == ["lm_head"]
    assert "vLLM takes LoRA on lm_head of few models" in commands("base", "a", 3, found.summary()["heads"])
    with pytest.raises(ModelError, match="brings its own lm_head"):
        check_fit(cases.model(seed=1), found)


# Adapters that are refused, with the true cause


@pytest.mark.parametrize(
    ("state", "config", "message"),
    [
        (
            lambda k, v: (k, v.T.contiguous()),
            None,
            "they are transposed, as other libraries",
        ),  # MLX: osaurus-ai/vmlx-swift 320
        (None, {"lora_alpha": 0}, "expected a positive number"),
        (
            None,
            {"modules_to_save": ["lm_head", "embed_tokens"]},
            "fully trained modules",
        ),  # vllm 9280, LlamaFactory 3125
        (None, {"trainable_token_indices": [1]}, "trainable token embeddings"),  # vllm 36501
        (None, {"r": 16}, "gives rank 16"),
    ],
)
def test_adapters_that_cannot_be_merged(adapter, state, config, message):
    with pytest.raises(AdapterError, match=message):
        load_adapter(adapter(state, config))


@pytest.mark.parametrize("name", ["model.visual.blocks", "model.vision_tower.layers", "model.blocks"])
def test_modules_that_the_model_does_not_have(adapter, name):
    """vLLM serves the base model then, in silence (vllm 34186, 55193)."""
    folder = adapter(renamed("model.model.layers", f"model.{name}"))
    with pytest.raises(ModelError, match=f"the model has no module {name}"):
        check_fit(cases.model(), fitted(cases.model(), load_adapter(folder)))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_of_the_adapter_in_place_of_its_folder(world, file):
    with pytest.raises(AdapterError, match=f"it is a file: give the folder that holds it, {world / 'safety'}"):
        load_adapter(world / "safety" / file)


def test_pointers_of_git_lfs(world, adapter, tmp_path):
    """HeaderTooLarge (transformers 27923)."""
    folder = adapter()
    (folder / "adapter_model.safetensors").write_text(LFS)
    with pytest.raises(AdapterError, match="pointer of Git LFS"):
        load_adapter(folder)
    shutil.copytree(world / "model", tmp_path / "m")
    (tmp_path / "m/model.safetensors").write_text(LFS)
    for read in (load_model, load_skeleton):
        with pytest.raises(ModelError, match=r"model\.safetensors: it is a pointer of Git LFS"):
            read(tmp_path / "m", device="cpu")


# Adapters that were trained on something else


def test_tokenizers_that_adapters_bring(world, adapter):
    """Trainers save theirs beside the adapter, and vLLM uses it (vllm 6227, llama.cpp 9948)."""
    folder = adapter()
    cases.tokenizer().save_pretrained(folder)
    assert notes_of(world, safety=folder) == []
    other = cases.tokenizer(cases.CHAT.replace("'<|start|>'", "'<|start|>role: '"))
    other.add_tokens(["<new>"])
    other.save_pretrained(folder)
    notes = notes_of(world, safety=folder)
    assert notes[0].startswith("the safety adapter brings a chat template that is not the model's")
    assert notes[1].startswith(
        "the safety adapter brings tokens that the model's tokenizer does not have, '<new>' among 1"
    )


def test_adapters_of_another_task(adapter):
    assert load_adapter(adapter(config={"task_type": "SEQ_CLS"})).notes == (
        "trained for SEQ_CLS, not for CAUSAL_LM: what it does to answers was not its training's aim",
    )


# Models


def test_a_model_folder_that_holds_an_adapter(world, tmp_path):
    """transformers would load both as one (unsloth 1061, transformers 43781)."""
    shutil.copytree(world / "model", tmp_path / "m")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(world / "task" / name, tmp_path / "m")
    with pytest.raises(ModelError, match="the folder holds an adapter beside the model"):
        load_model(tmp_path / "m", device="cpu")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("task", "it is an adapter: give the model that it was trained on"),
        ("model/model.safetensors", "it is a file: give the folder of a model"),
    ],
)
def test_what_is_no_model_folder(world, place, message):
    with pytest.raises(ModelError, match=message):
        load_model(world / place, device="cpu")


def test_models_that_are_incomplete_are_known_before_they_are_loaded(world, tmp_path):
    cases.model().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    with pytest.raises(ModelError, match="has no tokenizer; copy its tokenizer files"):
        load_skeleton(tmp_path / "shards")
    cases.tokenizer().save_pretrained(tmp_path / "shards")
    assert load_skeleton(tmp_path / "shards")[0].lm_head.weight.is_meta
    next(tmp_path.glob("shards/model-00003*")).unlink()
    with pytest.raises(ModelError, match=r"the file model-00003-of-.* is missing"):
        load_skeleton(tmp_path / "shards")
    shutil.copytree(world / "model", tmp_path / "c")
    (tmp_path / "c/model.safetensors").rename(tmp_path / "c/consolidated.safetensors")
    with pytest.raises(ModelError, match=r"the file model\.safetensors is missing"):
        load_skeleton(tmp_path / "c")


def test_classifiers_are_no_language_models(tmp_path):
    LlamaForSequenceClassification(cases.model().config).save_pretrained(tmp_path)
    cases.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a LlamaForSequenceClassification, which answers with classes"):
        load_model(tmp_path, device="cpu")


def test_weights_of_half_precision_and_tied_heads_load(tmp_path):
    cases.model(tied=True).half().save_pretrained(tmp_path)
    cases.tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, device="cpu")
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight


# Data

USER = "<|start|>user\na<|end|>\n<|start|>assistant\n"
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
ASK, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "no"}
BOS = "{{ bos_token }}" + cases.CHAT.replace("'<|start|>'", "'<|end|>'")


@pytest.mark.parametrize(
    ("row", "chat", "prompt", "labels"),
    [
        # from: system (axolotl 1179); only the last answer carries loss (axolotl 1761)
        ({"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "no"}]}, cases.CHAT,
         "<|start|>system\nS<|end|>\n" + USER, "no<|end|>"),
        ({"messages": [ASK, {"role": "assistant", "content": "one"}, ASK, ANSWER]}, cases.CHAT, USER + "one<|end|>\n" + USER, "no<|end|>"),
        # a call of a tool in between (transformers 45290), and LLaMA-Factory's roles for it (LlamaFactory 6521)
        ({"messages": [ASK, CALL, {"role": "tool", "content": "42"}, ANSWER]}, cases.CHAT,
         USER + "<|end|>\n<|start|>tool\n42<|end|>\n<|start|>assistant\n", "no<|end|>"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "42"},
                            {"from": "gpt", "value": "no"}]}, cases.CHAT,
         USER + "{}<|end|>\n<|start|>tool\n42<|end|>\n<|start|>assistant\n", "no<|end|>"),
        # one beginning of text, from the template or from the tokenizer (trl 1401)
        ({"prompt": "a", "response": "no"}, BOS, "<|start|><|end|>user\na<|end|>\n<|end|>assistant\n", "no<|end|>"),
        # the end of turn in the data as well, padding that is the end of turn (unsloth 416, trl 6357): one label
        ({"prompt": "a", "response": "no<|end|>"}, cases.CHAT, USER, "no<|end|>"),
        # rendered before, for a tokenizer without a template
        ({"prompt": USER, "response": "no<|end|>"}, None, USER, "no<|end|>"),
        # conversational prompt and completion of TRL, and preferences by their column
        ({"prompt": [ASK], "completion": [ANSWER]}, cases.CHAT, USER, "no<|end|>"),
        ({"prompt": "a", "response": " no"}, cases.CHAT, USER, " no<|end|>"),
    ],
)  # fmt: skip
def test_prompts_and_labels(tmp_path, row, chat, prompt, labels):
    data = load_dataset(cases.write_jsonl(tmp_path / "d.jsonl", [row]), cases.tokenizer(chat))
    assert data.shown == (prompt, labels)


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"prompt": "prompt", "response": "chosen"}, {"prompt": "a", "chosen": "no", "rejected": "yes"}),
        ({"messages": "chosen"}, {"chosen": [ASK, ANSWER], "rejected": []}),
        ({"prompt": "query"}, {"query": "a", "response": "no"}),
        ({"prompt": "input", "response": "output"}, {"input": "a", "output": "no"}),
    ],
)
def test_other_names_are_told_by_columns(tmp_path, columns, row):
    path = cases.write_jsonl(tmp_path / "d.jsonl", [row])
    with pytest.raises(DataError, match="for other names say which column is what"):
        load_dataset(path, cases.tokenizer())
    if "response" not in columns and "prompt" in columns:
        columns = {**columns, "response": "response"}
    assert load_dataset(path, cases.tokenizer(), columns=columns).shown == (USER, "no<|end|>")


SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + cases.CHAT
)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASK, ANSWER, ASK]}, "the last message is the user's"),
        ({"messages": [ASK, CALL]}, "the last answer is a call of a tool"),
        ({"messages": [ASK, {**ANSWER, "weight": 0}]}, "marked as not to be learnt"),
        ({"messages": [ASK, {**ANSWER, "train": False}]}, "marked as not to be learnt"),
        ({"messages": [ASK, {**ANSWER, "trainable": False}]}, "marked as not to be learnt"),
        ({"messages": [ASK, {**ANSWER, "loss_mask": 0}]}, "marked as not to be learnt"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}, ANSWER]},
            "one has parts of type image",
        ),
        ({"text": "<s>[INST] a [/INST] no</s>"}, "a text alone does not say where its answer begins"),
        (
            {"messages": [{"role": "system", "content": "S"}, ASK, ANSWER]},
            "put the text of the system message into the first user message",
        ),
        ({"prompt": "a", "response": 42}, "with text in role and content"),
    ],
)
def test_rows_that_cannot_be_learnt_from(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        load_dataset(cases.write_jsonl(tmp_path / "d.jsonl", [row]), cases.tokenizer(SYSTEM))


def test_prompts_that_are_rendered_already_are_told_of(tmp_path):
    rows = [{"prompt": USER, "response": "no"}, {"prompt": "a", "response": "no"}]
    (note,) = load_dataset(cases.write_jsonl(tmp_path / "d.jsonl", rows), cases.tokenizer()).notes
    assert note.startswith("50% of the prompts hold '<|start|>', which the tokenizer reads as a special token")
