"""The doors of the command line: flags of mappings, spellings, JSON, init, exports, sampled refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sst_merge import cli
from sst_merge.errors import DataError, MergeError, ModelError
from sst_merge.evaluate import is_refusal
from sst_merge.io import refusals
from sst_merge.io.adapters import load_adapter
from sst_merge.io.models import resolve_device
from sst_merge.recipe import Recipe
from tests import merge_cases as cases


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    cases.model_folder(root / "base")
    cases.adapter_folder(root / "adapters/math", seed=1, r=2)
    cases.adapter_folder(root / "adapters/safety-lora", seed=2, target_modules=["q_proj", "o_proj"], scale=0.2)
    for name, n, word in (
        ("harm", 8, "steal"),
        ("benign", 10, "bake"),
        ("harm_eval", 4, "rob"),
        ("benign_test", 4, "fry"),
    ):
        cases.write_jsonl(root / f"{name}.jsonl", cases.pairs(n, word))
    (root / "notes.csv").write_text("a,b\n1,2\n")
    return root


def call(*arguments):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if isinstance(result.exception, MergeError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def flags(world, *more):
    given = ("--model", world / "base", "--safety", world / "adapters/safety-lora", "--task", world / "adapters/math")
    return (*given, "--benign-data", world / "benign.jsonl", "--device", "cpu", *more)


def test_init_writes_a_recipe_that_checks_and_merges(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    (world / "adapters/earlier").mkdir()
    for name in ("adapter_config.json", "report.html"):
        (world / "adapters/earlier" / name).write_text("{}")
    told = call("init", "-o", world / "recipe.yml")
    for line in ("model            base", "safety           adapters/safety-lora", "task             adapters/math"):
        assert line in told.splitlines()
    assert "left out         notes.csv" in told
    text = (world / "recipe.yml").read_text()
    entries = yaml.safe_load(text)
    assert entries == {
        "model": "base", "task": "adapters/math", "safety": "adapters/safety-lora", "harm_data": "harm.jsonl",
        "benign_data": "benign.jsonl", "eval_harm_data": "harm_eval.jsonl", "eval_benign_data": "benign_test.jsonl",
        "output": "merged", "kl_budget": 0.02,
    }  # fmt: skip
    assert [name for name in Recipe.model_fields if not re.search(rf"^(# )?{name}: ", text, re.M)] == []
    assert "nothing was written" in call("check", world / "recipe.yml")
    with pytest.raises(MergeError, match="exists already"):
        call("init", "-o", world / "recipe.yml")
    alone = json.loads(call("init", world / "adapters", "-o", tmp_path / "other.yml", "--json"))
    assert alone["missing"] == ["model", "harm_data", "benign_data"]
    (world / "recipe.yml").unlink()


def test_of_several_adapters_the_one_called_task_is_taken(tmp_path):
    for name in ("code", "my-task", "safety"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    told = json.loads(call("init", tmp_path, "-o", tmp_path / "recipe.yml", "--json"))
    assert (told["entries"]["safety"], told["entries"]["task"]) == (["safety"], ["my-task", "code"])


def test_flags_of_mappings_lists_and_other_spellings(world, tmp_path):
    asked = [{"question": p["prompt"], "said": p["response"]} for p in cases.pairs(8, "steal")]
    data = cases.write_jsonl(tmp_path / "asked.jsonl", asked)
    given = flags(world, "--harm-data", data, "-o", tmp_path / "x")
    with pytest.raises(DataError, match="for other names say which column"):
        call("check", *given)
    options = ("--map", "prompt=question,response=said", "--dtype", "fp32", "--filter", "top-k", "--k", 3)
    options += ("--harm-points", "reference,0.5", "--structure", "lowrank", "--structure-options", "rank=8")
    told = json.loads(call("check", *given, *options, "--json"))
    assert told["recipe"]["columns"] == {"prompt": "question", "response": "said"}
    assert told["recipe"]["harm_points"] == ["reference", 0.5]
    assert (told["recipe"]["filter"], told["recipe"]["structure_options"]) == ("top_k", {"rank": 8})
    with pytest.raises(MergeError, match="does not read 'enable_thinking'"):
        call("check", *given, *options, "--template", "enable_thinking=false")
    with pytest.raises(MergeError, match="--columns or --map: expected name=value"):
        call("check", *given, "--map", "question")
    with pytest.raises(MergeError, match="--seed: given 2 times"):
        call("check", *given, "--seed", "1", "--seed", "2")


def test_safe_data_are_read_for_the_guard_and_measured_on_by_evaluate(world):
    given = flags(
        world, "--harm-data", world / "harm.jsonl", "-o", "x", "--eval-safe-data", world / "benign_test.jsonl"
    )
    told = json.loads(call("check", *given, "--safe-data", world / "harm_eval.jsonl", "--json"))["recipe"]
    assert (told["safe_data"], told["eval_safe_data"]) == (
        str(world / "harm_eval.jsonl"),
        str(world / "benign_test.jsonl"),
    )
    assert json.loads(call("check", *given, "--safe-data", "builtin", "--json"))["recipe"]["safe_data"] == "builtin"
    measured = call("evaluate", "--model", world / "base", "--safe-data", world / "harm_eval.jsonl", "--json", "-q")
    assert json.loads(measured)["evaluation"]["reference"]["over_refusal"] is not None


@pytest.mark.parametrize(
    ("entry", "given", "kept"),
    [
        ("dtype", "fp16", "float16"), ("dtype", "BF16", "bfloat16"), ("filter", "top-k", "top_k"), ("metric", "kfac", "kronecker"),
        ("structure", "kfac", "kronecker"), ("structure", "kronecker-svd", "kronecker_svd"), ("scope", "Module", "module"),
    ],
)  # fmt: skip
def test_spellings(entry, given, kept):
    more = {"scope": "module"} if entry == "structure" else {}
    values = {"model": "m", "safety": "s", "harm_data": "h", "benign_data": "b", "output": "o", entry: given, **more}
    assert getattr(Recipe.parse(values), entry) == kept


def test_json_of_evaluate_compare_and_refusals(world, tmp_path):
    files = ("--harm-data", world / "harm_eval.jsonl", "--benign-data", world / "benign_test.jsonl")
    shown = json.loads(
        call("evaluate", *flags(world)[:6], *files, "--generate-tokens", 2, "--device", "cpu", "--json", "-q")
    )
    assert set(shown["evaluation"]) == {"reference", str(world / "adapters/safety-lora")}
    assert shown["evaluation"]["reference"]["benign_kl"] == 0
    recipe = {
        "model": str(world / "base"), "safety": str(world / "adapters/safety-lora"), "methods": [], "output": str(tmp_path / "c"),
        "eval_harm_data": str(world / "harm_eval.jsonl"), "eval_benign_data": str(world / "benign_test.jsonl"), "device": "cpu",
        "generate_tokens": 0, "strengths": {"plain": [1.0]},
        "harm_data": str(world / "harm.jsonl"), "benign_data": str(world / "benign.jsonl"),
    }  # fmt: skip
    (tmp_path / "c.yml").write_text(yaml.safe_dump(recipe))
    rows = json.loads(call("compare", "-c", tmp_path / "c.yml", "--json", "-q"))["rows"]
    assert [r["method"] for r in rows] == ["no patch", "plain"]
    (tmp_path / "p.txt").write_text("How to rob?\nHow to steal?\n")
    told = json.loads(call("refusals", tmp_path / "p.txt", "-o", tmp_path / "r.jsonl", "--json"))
    assert told == {"prompts": 2, "refused": 2, "output": str(tmp_path / "r.jsonl")}


def test_refusals_are_sampled_from_the_model_that_is_named(world, tmp_path, monkeypatch):
    """Greedy first, then drawn; what the model answers is left out; a turn cut short ends at a sentence."""
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    end, asked = 257, []
    said = {
        "one": ["I can't help with that. It would b"], "two": ["Sure!", "I'm sorry, no."], "three": ["Of course."] * 9,
    }  # fmt: skip
    text = cases.tokenizer()

    def generate(self, input_ids, attention_mask, generation_config):
        asked.append((len(input_ids), generation_config.do_sample))
        rows = []
        for ids in input_ids:
            name = text.decode(ids, skip_special_tokens=True).split("\n")[1].removesuffix("assistant")
            answer = said[name].pop(0)
            rows.append(text(answer)["input_ids"] + ([] if answer.endswith(" b") else [end]))
        width = max(map(len, rows))
        return torch.cat(
            [
                input_ids,
                torch.tensor(
                    [r + [end] * (width - len(r)) if r[-1] == end else (r + [97] * width)[:width] for r in rows]
                ),
            ],
            1,
        )

    kind = type(AutoModelForCausalLM.from_pretrained(world / "base"))
    monkeypatch.setattr(kind, "generate", generate)
    told = call(
        "refusals",
        tmp_path / "p.txt",
        "-o",
        tmp_path / "r.jsonl",
        "--from-model",
        world / "base",
        "--device",
        "cpu",
        "-q",
    )
    assert "2 prompts with refusals" in told
    assert "1 that" in told
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert rows == [
        {"prompt": "one", "response": "I can't help with that."},
        {"prompt": "two", "response": "I'm sorry, no."},
    ]
    assert all(is_refusal(row["response"]) for row in rows)
    assert asked == [(3, False), (2, True), (1, True), (1, True)]


def test_a_model_that_refuses_nothing_is_said_to(world, tmp_path):
    (tmp_path / "p.txt").write_text("one\n")
    with pytest.raises(DataError, match="refused none of 1 prompts"):
        call(
            "refusals",
            tmp_path / "p.txt",
            "-o",
            tmp_path / "r.jsonl",
            "--from-model",
            world / "base",
            "--device",
            "cpu",
            "-q",
        )
    assert not (tmp_path / "r.jsonl").exists()
    assert refusals._whole_sentences("One. Two! Thr") == "One. Two!"


def test_exports(world, tmp_path, monkeypatch):
    """The full model predicts what base and adapter do; llama.cpp's converter is called where it is, and told of where it is not."""
    given = flags(world, "--harm-data", world / "harm.jsonl", "-o", tmp_path / "out", "-q")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = call("merge", *given, "--export", "full", "--export", "gguf-lora")
    assert f"full model in {tmp_path / 'out/full'}" in told
    command = f"run: python convert_lora_to_gguf.py --base {world / 'base'} --outfile {tmp_path / 'out/adapter.gguf'} {tmp_path / 'out'}"
    assert command in told
    from sst_merge.io.fit import attach

    ids = torch.arange(12)[None]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out/full")(ids).logits
    patched = attach(cases.model(), "merged", load_adapter(tmp_path / "out"))(ids).logits
    assert torch.allclose(whole, patched, rtol=1e-4, atol=1e-5)

    (tmp_path / "llama").mkdir()
    converter = "import sys\na = sys.argv\nassert a[1] == '--base'\nopen(a[4], 'w').write('GGUF')\n"
    (tmp_path / "llama/convert_lora_to_gguf.py").write_text(converter)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama"))
    assert f"for llama.cpp: {tmp_path / 'out/adapter.gguf'}" in call(
        "merge", *given, "--export", "gguf-lora", "--force"
    )
    assert (tmp_path / "out/adapter.gguf").read_text() == "GGUF"
    (tmp_path / "llama/convert_lora_to_gguf.py").write_text("raise SystemExit('no such model')")
    with pytest.raises(
        MergeError, match=r"the adapter is written, an export is not: gguf-lora: .* status 1: no such model"
    ):
        call("merge", *given, "--export", "gguf-lora", "--force")
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    with pytest.raises(MergeError, match="model: is required for --export full"):
        call(
            "merge",
            *given[2:4],
            *given[4:6],
            "--evidence",
            tmp_path / "out/evidence.safetensors",
            "-o",
            tmp_path / "e",
            "--export",
            "full",
        )


def test_a_device_that_is_not_there_is_one_line():
    for name in ("mps", "cuda:7", "xla", "nowhere"):
        with pytest.raises(ModelError) as refused:
            resolve_device(name)
        assert str(refused.value).startswith(f"device {name!r} cannot be used here; give auto, or one of cpu")
        assert len(str(refused.value)) < 120


def test_version_completion_and_module():
    assert call("--version").startswith("sst-merge 0.")
    ended = subprocess.run([sys.executable, "-m", "sst_merge", "--help"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0
    for word in ("--install-completion", "merge", "check", "init", "refusals", "--version"):
        assert word in ended.stdout
