"""Three lines of Python: merges of paths and of objects, `Patch.apply`, `Patch.save`, and an import that costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sst_kernels as sst
import sst_merge
from sst_merge.errors import MergeError
from sst_merge.io.adapters import load_adapter
from tests import merge_cases as cases
from tests.models import tiny_batch, tiny_lora


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("python")
    cases.model_folder(root / "model")
    cases.adapter_folder(root / "task", seed=1, r=2)
    cases.adapter_folder(root / "safety", seed=2, target_modules=["q_proj", "o_proj"], scale=0.2)
    for name, n, word in (("harm", 8, "steal"), ("benign", 10, "bake")):
        cases.write_jsonl(root / f"{name}.jsonl", cases.pairs(n, word))
    return root


@pytest.fixture(scope="module")
def of_paths(world):
    given = {name: world / name for name in ("task", "safety")} | {n: world / f"{n}.jsonl" for n in ("harm", "benign")}
    return sst_merge.merge(model=world / "model", **given, kl_budget=0.02, device="cpu")


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_objects_give_what_paths_give_and_stay_as_they_are(world, of_paths, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    model = PeftModel.from_pretrained(base, world / "task", adapter_name="task")
    model.load_adapter(world / "safety", "safety")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    data = {"harm": cases.pairs(8, "steal"), "benign": (row for row in cases.pairs(10, "bake"))}
    merged = sst_merge.merge(
        model=model, tokenizer=cases.tokenizer(), task="task", safety="safety", **data, kl_budget=0.02, device="cpu"
    )
    assert tensors(merged.folder).keys() == tensors(of_paths.folder).keys()
    for name, value in tensors(of_paths.folder).items():
        assert torch.equal(value, tensors(merged.folder)[name]), name
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert model.training
    assert sorted(model.peft_config) == ["safety", "task"]

    out = merged.save(tmp_path / "out")
    for file in ("recipe.yml", "report.json", "README.md", "adapter_model.safetensors", "evidence.safetensors"):
        assert (out / file).is_file()
    texts = "".join(p.read_text() for p in out.iterdir() if p.suffix in (".md", ".json", ".yml"))
    assert "sst-merge-" not in texts
    assert json.loads((out / "report.json").read_text())["recipe"]["harm_data"] == str(out / "inputs/harm.jsonl")
    again = sst_merge.merge(
        model=base, tokenizer=cases.tokenizer(), task=out / "inputs/task/task", safety=out / "inputs/safety/safety",
        harm=out / "inputs/harm.jsonl", benign=out / "inputs/benign.jsonl", kl_budget=0.02, device="cpu",
    )  # fmt: skip
    assert all(torch.equal(value, tensors(out)[name]) for name, value in tensors(again.folder).items())
    with pytest.raises(MergeError, match="--force"):
        merged.save(out)


def test_a_merge_goes_on_a_model(world, of_paths):
    model = of_paths.apply(cases.model())
    deltas = cases.peft_deltas(model, "merged")
    for name, term in load_adapter(of_paths.folder).terms.items():
        assert torch.allclose(deltas[name], term.delta(), rtol=1e-5, atol=1e-9)
    assert "Merged(" in repr(of_paths)
    assert "benign KL" in repr(of_paths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"safety": 3}, "safety: expected an adapter's folder"),
        ({"harm": 3}, "harm: expected a path, or rows"),
        ({"harm": [{"prompt": "a"}, 3]}, "harm: expected a path, or rows"),
        ({"benign": [{"prompt": "a", "response": object()}]}, "benign: rows of text are expected"),
        ({"model": object()}, "model: expected a path, or a causal language model"),
        ({"kl_buget": 0.1}, "did you mean 'kl_budget'"),
        ({"output": "x"}, r"output: give harm, benign, .* save\(\) the result"),
        ({"harm": []}, "holds no examples"),
    ],
)
def test_what_is_no_input_is_said(world, change, message):
    given = {"model": world / "model", "safety": world / "safety", "harm": cases.pairs(8, "steal"), "device": "cpu"}
    with pytest.raises(MergeError, match=message):
        sst_merge.merge(**{**given, "benign": cases.pairs(8, "bake"), **change})


def test_importing_costs_nothing():
    script = "import sys, sst_merge; print([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip() == "[]", ended.stderr


@pytest.fixture(scope="module")
def evidence():
    model = tiny_lora()
    found = sst.Evidence.of(model, adapter="safety")
    for side, seeds, labels in (("gain", range(3), {}), ("cost", range(3, 6), {"labels": "mc"})):
        with found.accumulate(side) as reading:
            for seed in seeds:
                reading.backward(tiny_batch(4, seed=seed), **labels)
    return found


def test_a_patch_goes_on_the_model_it_was_read_from(evidence):
    patch = evidence.subspace(mu=3.0).soft(kl_budget=0.01)
    model = tiny_lora()
    assert patch.apply(model) is model
    first = {name: value.clone() for name, value in model.state_dict().items()}
    patch.apply(model)  # a second time changes nothing
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    filtered = evidence.filter(3.0)
    for name, s in patch.coordinates.items():
        layer = model.get_base_model().get_submodule(name)
        expected = (
            filtered.weights.scaling[name] * evidence.weights.b[name].double() @ s @ filtered.lora_A[name].double()
        )
        assert torch.allclose(layer.get_delta_weight("safety").double(), expected, rtol=1e-5, atol=1e-8)


def test_a_patch_is_saved_as_an_adapter_of_one_rank(evidence, tmp_path):
    patch = evidence.subspace(mu=3.0).soft(kl_budget=0.01)
    folder = patch.save(tmp_path / "patch", base_model="base")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(a.shape[0] for a, _, _ in patch.factors().values())
    assert config["base_model_name_or_path"] == "base"
    terms = load_adapter(folder).terms
    for name, (a, b, scaling) in patch.factors().items():
        assert torch.allclose(terms[name].delta(), scaling * b.double() @ a.double(), rtol=1e-5, atol=1e-9)
    with pytest.raises(FileExistsError, match="holds an adapter"):
        patch.save(folder)


def test_patches_that_do_not_fit_change_nothing(evidence):
    patch = evidence.subspace(mu=3.0).soft(kl_budget=0.01)
    model = tiny_lora()
    name = next(iter(patch.coordinates))
    model.get_base_model().get_submodule(list(patch.coordinates)[-1]).scaling["safety"] *= 2
    before = {n: value.clone() for n, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="it is another adapter"):
        patch.apply(model)
    with pytest.raises(
        ValueError, match=f"{name} does not carry the adapter 'other'; it is on no module of this model"
    ):
        patch.apply(model, "other")
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    of_fishers = sst.subspace(evidence.filter(3.0).gain, evidence.filter(3.0).cost).soft(mu=1.0)
    with pytest.raises(ValueError, match="make the pencil with Evidence"):
        of_fishers.save("nowhere")


def test_a_number_alone_is_no_strength(evidence):
    with pytest.raises(TypeError):
        evidence.subspace().soft(0.02)
    with pytest.raises(TypeError):
        evidence.subspace().threshold(0.02)
