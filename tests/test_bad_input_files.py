"""Hostile files for sst-merge: adapters, data, recipes, outputs. Nothing is executed, followed, overwritten or left behind."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sst_merge import cli
from sst_merge.adapters import CONFIG, WEIGHTS, load_adapter
from sst_merge.data import load_dataset
from sst_merge.errors import AdapterError, DataError, MergeError, OutputError, RecipeError
from sst_merge.models import check_fit
from sst_merge.output import output_file, output_folder
from sst_merge.recipe import Recipe, read_yaml
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
        (lambda s: s.update({k: v.to(torch.int32) for k, v in s.items()}), "not finite floating-point"),
        (lambda s: s.update({k: v * float("nan") for k, v in s.items()}), "not finite floating-point"),
        (lambda s: s.update({k: v * float("inf") for k, v in s.items()}), "not finite floating-point"),
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


def test_adapters_of_another_base_model_are_named(tmp_path):
    other = cases.adapter_folder(tmp_path / "wide", base=cases.model(hidden=64))
    with pytest.raises(MergeError, match="trained on another base model"):
        check_fit(cases.model(), load_adapter(other))


GOOD = json.dumps({"prompt": "how?", "response": "so."})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\xff\xfe", "response": "x"}', r":2: not UTF-8"),
        (b"{", r":2: not JSON"),
        (b"[" * 100_000, r":2: not JSON"),
        (b'{"prompt": "a"}', r":2: expected an object"),
        (b'["a", "b"]', r":2: expected an object"),
        (b'{"prompt": 1, "response": 2}', r":2: expected two or more messages"),
        (b'{"prompt": "a", "response": ""}', r":2: the answer is empty"),
        (b'{"messages": []}', r":2: expected two or more"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', r":2: expected two or more"),
        (b'{"messages": "no"}', r":2: expected two or more"),
        (json.dumps({"prompt": "x" * 5000, "response": "y"}).encode(), r":2: the prompt alone has"),
        (b'{"prompt": "\\ud800", "response": "x"}', r":2: .*(UTF-8|surrogate|Unicode)"),
        (b'{"prompt": NaN, "response": "x"}', r":2: expected two or more"),
    ],
)
def test_bad_lines_are_named_or_skipped_and_counted(line, message, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode() + b"\n")
    tokenizer = cases.tokenizer(None)
    with pytest.raises(DataError, match=message):
        load_dataset(path, tokenizer)
    kept = load_dataset(path, tokenizer, skip_bad_lines=True)
    assert len(kept) == 2
    assert kept.summary()["skipped_lines"] == [2]


def test_files_without_a_good_line_are_refused_even_when_skipping(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"nonsense\n")
    with pytest.raises(DataError, match="holds no examples"):
        load_dataset(path, cases.tokenizer(None), skip_bad_lines=True)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch /tmp/owned']",
        "model: !!python/name:os.system",
        "- a\n- b",
        "42",
        "",
        "model: [unclosed",
        "a: &a [*a]",
        "\x00",
    ],
)
def test_recipes_that_are_not_plain_mappings(text, tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError):
        Recipe.load(path)


def test_deeply_nested_recipes_do_not_crash(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text("a: " + "[" * 5000, encoding="utf-8")
    with pytest.raises(RecipeError):
        read_yaml(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"kl_bugdet": 0.1}, "did you mean 'kl_budget'"),
        ({"damping": -1}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"damping": float("inf")}, "damping"),
        ({"kl_budget": float("nan")}, "kl_budget"),
        ({"folds": 1}, "folds"),
        ({"k": 4, "mu": 1.0}, "give one of"),
        ({"scope": "world"}, "scope"),
        ({"seed": "x"}, "seed"),
        ({"limit": 0}, "limit"),
    ],
)
def test_recipes_with_wrong_entries(entries, message, tmp_path):
    base = {"model": "m", "safety": "s", "harm_data": "h", "benign_data": "b", "output": "o"}
    with pytest.raises(RecipeError, match=message):
        Recipe.parse({**base, **entries})


def test_outputs_appear_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), output_folder(tmp_path / "out") as folder:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise KeyError
    with pytest.raises(KeyError), output_file(tmp_path / "out.json") as file:
        file.write_bytes(b"half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_what_stands_there_is_not_replaced(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    link = tmp_path / "link"
    link.symlink_to(precious)
    for path in (precious, link, precious / "thesis.tex"):
        for force in (False, True):
            with pytest.raises(OutputError), output_folder(path, force=force):
                pytest.fail("must not begin")
    with pytest.raises(OutputError), output_file(precious / "thesis.tex"):
        pytest.fail("must not begin")
    assert (precious / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge"],
        ["merge", "--config", "/nowhere.yml"],
        [
            "merge",
            "--model",
            "/nowhere",
            "--safety",
            "/nowhere",
            "--harm-data",
            "/n",
            "--benign-data",
            "/n",
            "-o",
            "{tmp}/o",
        ],
        ["merge", "--folds", "many"],
        ["fisher", "--model", "/nowhere", "--safety", "/nowhere", "--data", "/nowhere", "-o", "{tmp}/f"],
        ["fisher", "--model", "m"],
        ["evaluate", "--model", "/nowhere"],
        ["no-such-command"],
        ["merge", "--checkpoint-every", "0"],
    ],
)
def test_commands_fail_with_a_text_and_leave_nothing(arguments, tmp_path):
    result = CliRunner().invoke(cli.app, [a.format(tmp=tmp_path) for a in arguments])
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit | MergeError), result.exception
    assert list(tmp_path.iterdir()) == []
