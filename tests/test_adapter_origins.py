"""Adapters as other programs and releases save them: the same ΔW as PEFT gives them, or refused with the true cause."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    SiglipVisionConfig,
)

import sst_kernels as sst
from sst_kernels.testing import error_ratio
from sst_merge.errors import AdapterError, ModelError
from sst_merge.io.adapters import CONFIG, WEIGHTS, load_adapter, write_adapter
from sst_merge.io.fit import attach, check_fit, fitted
from sst_merge.io.models import load_model
from sst_merge.io.output import output_folder
from sst_merge.io.serving import export_full
from sst_merge.merge.algebra import concatenate
from tests import merge_cases as cases
from tests.models import ROUNDING, core_rows_by_definition, lora_layers, tiny_batch, tiny_model


def edit(folder, rename=lambda key: key, change=lambda tensor: tensor, **config):
    state = {rename(key): change(tensor) for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS)
    entries = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(entries | config))
    return folder


WRAPPED = {
    "torch.compile": lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
    "torch.compile outside": lambda k: "_orig_mod." + k,
    "DistributedDataParallel": lambda k: "module." + k,
    "both": lambda k: "module._orig_mod." + k,
    "FSDP and checkpointing": lambda k: k.replace(
        "layers.0.", "_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module."
    ),
    "no prefix": lambda k: k.removeprefix("base_model.model."),
    "adapter name": lambda k: k.replace(".weight", ".safety.weight"),
}


@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_names_of_wrapped_models_are_read_without_their_wrappers(tmp_path, rename, request):
    plain = load_adapter(cases.adapter_folder(tmp_path / "a"))
    other = load_adapter(edit(cases.adapter_folder(tmp_path / "b"), rename))
    assert other.terms.keys() == plain.terms.keys()
    assert all(torch.equal(other.terms[n].B, t.B) for n, t in plain.terms.items())
    said = request.node.callspec.id not in ("no prefix", "adapter name")
    assert ["saved from a wrapped model" in note for note in other.notes] == [True] * said


REFUSED = {
    "ZeRO-3": (lambda f: edit(f, change=lambda t: t.new_empty(0)), "ZeRO-3 keeps weights in shards, .*zero_to_fp32.py"),
    "experts": (lambda f: edit(f, change=lambda t: t[None].contiguous()), "experts that are kept as one parameter"),
    "parameters": (lambda f: edit(f, target_parameters=["mlp.experts.down_proj"]), "LoRA on bare parameters"),
    "convolution": (lambda f: edit(f, change=lambda t: t[..., None, None].contiguous()), "LoRA on convolutions"),
    "kohya": (
        lambda f: edit(f, lambda k: k.replace("lora_A", "lora_down").replace("lora_B", "lora_up")),
        "kohya or diffusers",
    ),
    "MLX": (
        lambda f: edit(f, lambda k: k.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")),
        "MLX, torchtune",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_other_adapters_are_refused_with_the_true_cause(tmp_path, spoil, message):
    with pytest.raises(AdapterError, match=message):
        load_adapter(spoil(cases.adapter_folder(tmp_path / "a")))


def test_where_the_adapter_may_be_is_said(tmp_path, monkeypatch):
    cases.adapter_folder(tmp_path / "run/safety")
    with pytest.raises(AdapterError, match=r"these below it are: .*run/safety"):
        load_adapter(tmp_path / "run")
    cases.model_folder(tmp_path / "merged")
    with pytest.raises(AdapterError, match=r"this is a model, .* give the folder of the adapter"):
        load_adapter(tmp_path / "merged")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match="hf download someone/adapter --local-dir adapter"):
        load_adapter("someone/adapter")


def gemma3():
    torch.manual_seed(0)
    text = Gemma3TextConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ).eval()


def test_prefixes_of_earlier_releases_are_renamed_as_peft_does(tmp_path):
    """Gemma 3 before transformers 4.52: language_model.model.layers, since then model.language_model.layers."""
    folder = cases.adapter_folder(
        tmp_path / "a", base=gemma3(), target_modules=r".*language_model.*\.(q_proj|down_proj)"
    )
    edit(folder, lambda k: k.replace("model.language_model.layers", "language_model.model.layers"))
    assert any("language_model.model.layers" in key for key in load_file(folder / WEIGHTS))
    base = gemma3()
    adapter = fitted(base, load_adapter(folder))
    check_fit(base, adapter)
    assert "4 modules are named otherwise in this release of transformers" in adapter.notes[0]
    theirs = cases.peft_deltas(PeftModel.from_pretrained(gemma3(), folder))
    assert adapter.terms.keys() == theirs.keys()
    for name, delta in theirs.items():
        assert float((adapter.terms[name].delta() - delta).norm()) <= 1e-12 * float(delta.norm())
    ids = torch.arange(1, 11)[None]
    expected = PeftModel.from_pretrained(gemma3(), folder).eval()(input_ids=ids).logits
    assert torch.equal(attach(gemma3(), "x", load_adapter(folder))(input_ids=ids).logits, expected)
    with output_folder(tmp_path / "out") as out:
        write_adapter(concatenate([(1.0, adapter)]), out)
    torch.testing.assert_close(
        PeftModel.from_pretrained(gemma3(), tmp_path / "out").eval()(input_ids=ids).logits, expected
    )


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=2, initializer_range=0.2,
    )  # fmt: skip
    config._experts_implementation = "eager"
    return MixtralForCausalLM(config).eval()


def per_expert(folder, *, modules=("w1", "w2", "w3"), r=2):
    """An adapter of Mixtral as transformers 4 named its modules, one linear per expert and projection."""
    folder.mkdir()
    generator, state = torch.Generator().manual_seed(3), {}
    sizes = {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48), "q_proj": (32, 32)}
    names = [f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}" for i in range(2) for e in range(2) for w in modules]
    for name in [*names, *[f"model.layers.{i}.self_attn.q_proj" for i in range(2)]]:
        out, into = sizes[name.rsplit(".", 1)[-1]]
        state[f"base_model.model.{name}.lora_A.weight"] = 0.3 * torch.randn(r, into, generator=generator)
        state[f"base_model.model.{name}.lora_B.weight"] = 0.3 * torch.randn(out, r, generator=generator)
    save_file(state, folder / WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": 3,
        "target_modules": [*modules, "q_proj"],
    }
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(
    not hasattr(mixtral().model.layers[0].mlp, "experts"), reason="transformers 4 keeps linears per expert"
)
def test_experts_that_were_linears_are_fused_as_peft_does(tmp_path):
    """As a task adapter, and merged with a patch of other modules: PEFT loads what is written to the same function."""
    folder, ids = per_expert(tmp_path / "task"), torch.arange(1, 11)[None]
    expected = PeftModel.from_pretrained(mixtral(), folder).eval()(input_ids=ids).logits
    assert not torch.allclose(expected, mixtral()(input_ids=ids).logits, atol=1e-2)
    base = mixtral()
    task = fitted(base, load_adapter(folder))
    assert len(task.experts) == 12
    assert "12 linears of single experts" in task.notes[0]
    torch.testing.assert_close(attach(base, "task", task)(input_ids=ids).logits, expected)

    safety = load_adapter(
        cases.adapter_folder(tmp_path / "safety", base=mixtral(), target_modules=["q_proj", "o_proj"], r=3)
    )
    merged = concatenate([(1.0, task), (0.5, safety)])
    with output_folder(tmp_path / "out") as out:
        write_adapter(merged, out)
    written = PeftModel.from_pretrained(mixtral(), tmp_path / "out").eval()(input_ids=ids).logits
    torch.testing.assert_close(attach(mixtral(), "merged", merged)(input_ids=ids).logits, written)
    both = attach(attach(mixtral(), "task", task), "safety", concatenate([(0.5, safety)]))
    both.base_model.set_adapter(["task", "safety"])
    torch.testing.assert_close(both(input_ids=ids).logits, written, rtol=1e-4, atol=1e-4)


def test_experts_that_peft_cannot_fuse_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"a single expert, .*which PEFT does not make of this adapter"):
        attach(mixtral(), "x", load_adapter(per_expert(tmp_path / "a", modules=("w1", "w2"))))
    folder = edit(per_expert(tmp_path / "b"), lambda k: k.replace("block_sparse_moe", "moe_of_another_model"))
    with pytest.raises(
        ModelError, match=r"this model keeps its experts as one parameter, model.layers.0.mlp.experts.gate_up_proj"
    ):
        check_fit(base := mixtral(), fitted(base, load_adapter(folder)))


@pytest.mark.parametrize("flag", [True, False])
def test_conv1d_of_gpt2_implies_fan_in_fan_out(tmp_path, flag):
    made = get_peft_model(tiny_model("gpt2"), LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    made.save_pretrained(tmp_path / "a")
    edit(tmp_path / "a", fan_in_fan_out=flag)
    ids = torch.arange(10)[None]
    expected = made.eval()(input_ids=ids).logits
    adapter = fitted(tiny_model("gpt2"), load_adapter(tmp_path / "a"))
    check_fit(tiny_model("gpt2"), adapter)
    assert adapter.fan_in_fan_out
    torch.testing.assert_close(
        attach(tiny_model("gpt2"), "x", load_adapter(tmp_path / "a"))(input_ids=ids).logits, expected
    )
    with output_folder(tmp_path / "out") as out:
        write_adapter(concatenate([(1.0, adapter)]), out)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["fan_in_fan_out"] is True
    turned = load_adapter(
        cases.adapter_folder(tmp_path / "b", base=tiny_model("gpt2"), target_modules=["c_proj"], fan_in_fan_out=True)
    )
    wide = {n: type(t)(t.A[:, :-1], t.B) for n, t in turned.terms.items()}
    with pytest.raises(ModelError, match="trained on another base model"):
        check_fit(tiny_model("gpt2"), type(turned)(wide))


class Int8(torch.nn.Linear):
    """A frozen layer of eight bits: integers, and a scale for every row."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = torch.nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x) * self.scale.to(x))


def quantised(model):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and name != "lm_head":
                setattr(module, name, Int8(child))
    return model.requires_grad_(False)


def test_passes_over_a_quantised_base(tmp_path):
    """Weights frozen in eight bits, adapters float: the Fisher is that of the quantised function."""
    folder = cases.adapter_folder(tmp_path / "a", base=tiny_model(), target_modules=["q_proj", "down_proj"], scale=0.3)
    model = attach(quantised(tiny_model().double()), "safety", load_adapter(folder))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double()
    model.base_model.set_adapter("safety")
    batch = tiny_batch(4)
    with sst.fisher_accumulate(model, "safety") as pass_:
        sst.sequence_nll(model, batch).backward()
    assert pass_.fisher.counts.sequences == 4
    assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(model, batch, "safety")) < ROUNDING
    plain = attach(tiny_model().double(), "safety", load_adapter(folder))
    assert error_ratio(core_rows_by_definition(plain, batch, "safety"), pass_.fisher.rows()) > 1e-3
    with pytest.raises(ModelError, match="trained on another base model"):
        check_fit(
            quantised(tiny_model()),
            load_adapter(
                cases.adapter_folder(tmp_path / "b", target_modules=["down_proj"], base=cases.model(hidden=64))
            ),
        )


METHODS = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
    "hqq": "hqq",
}


@pytest.mark.parametrize(("method", "package"), METHODS.items())
def test_quantised_bases_name_the_package_that_is_missing(tmp_path, monkeypatch, method, package):
    cases.model_folder(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(entries | {"quantization_config": {"quant_method": method, "load_in_4bit": True}})
    )
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(ModelError, match=rf"quantised by {method}, .*pip install {package}"):
        load_model(tmp_path, device="cpu")
    with pytest.raises(ModelError, match=f"quantised by {method} already"):
        load_model(tmp_path, device="cpu", quantization={"load_in_4bit": True})


def test_quantization_on_loading_is_checked(tmp_path, monkeypatch):
    cases.model_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        load_model(tmp_path, device="cpu", quantization={"load_in_4bit": True})
    monkeypatch.setattr("sst_merge.io.quantised.installed", lambda _: True)
    with pytest.raises(ModelError, match=r"expected arguments of BitsAndBytesConfig .*got load_in_4bits"):
        load_model(tmp_path, device="cpu", quantization={"load_in_4bits": True})
    with pytest.raises(ModelError, match="expected load_in_4bit: true or load_in_8bit: true"):
        load_model(tmp_path, device="cpu", quantization={"load_in_4bit": False})


def test_models_of_the_hub_come_from_the_cache_or_are_told_how_to_come(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="hf download someone/model"):
        load_model("someone/model", device="cpu")
    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    cases.model_folder(snapshot)
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text("0" * 40)
    import huggingface_hub

    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **more: download(name, cache_dir=tmp_path, **more)
    )
    assert load_model("someone/model", device="cpu")[0].config.hidden_size == 32


def rows_of_one_forward(model, batch):
    """[N, Σ r²] by a backward per sample through one forward of the batch: which columns stay in float16 depends on the whole of it."""
    layers = lora_layers(model, "safety")
    cores = {n: torch.eye(m.r["safety"], requires_grad=True) for n, m in layers.items()}
    hooks = [m.lora_A["safety"].register_forward_hook(lambda _m, _i, h, s=cores[n]: h @ s.T) for n, m in layers.items()]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    rows = []
    for predicted, labels in zip(logits, batch["labels"][:, 1:]):
        loss = torch.nn.functional.cross_entropy(predicted, labels, reduction="sum")
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(cores.values()), retain_graph=True)])
        )
    for hook in hooks:
        hook.remove()
    return torch.stack(rows)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_passes_over_a_base_that_bitsandbytes_quantises(tmp_path, kind):
    """Where the package is installed (it runs on the CPU, too). Eight bits round activations to float16."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    cases.model(hidden=64).save_pretrained(tmp_path / "model")
    cases.tokenizer().save_pretrained(tmp_path / "model")
    options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"} if kind == "4bit" else {"load_in_8bit": True}
    base, _ = load_model(tmp_path / "model", device="cpu", quantization=options)
    assert not base.model.layers[0].self_attn.q_proj.weight.is_floating_point()
    folder = cases.adapter_folder(tmp_path / "a", base=cases.model(hidden=64), scale=0.3)
    model = attach(base, "safety", load_adapter(folder))
    model.base_model.set_adapter("safety")
    batch = tiny_batch(4)
    with sst.fisher_accumulate(model, "safety") as pass_:
        sst.sequence_nll(model, batch).backward()
    assert error_ratio(pass_.fisher.rows(), rows_of_one_forward(model, batch)) < 10 * ROUNDING
    if kind == "4bit":  # the same function with the weights that the four bits stand for
        plain = cases.model(hidden=64)
        for name, module in base.named_modules():
            if hasattr(module.weight if hasattr(module, "weight") else None, "quant_state"):
                whole = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
                plain.get_submodule(name.removesuffix(".base_layer")).weight.data = whole
        plain = attach(plain, "safety", load_adapter(folder))
        assert error_ratio(pass_.fisher.rows(), core_rows_by_definition(plain, batch, "safety")) < 10 * ROUNDING
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = True
        with pytest.raises(ValueError, match="gradients do not pass it"), sst.fisher_accumulate(model, "safety"):
            sst.sequence_nll(model, batch).backward()
    with pytest.raises(ModelError, match="quantised or not in memory"):
        export_full(model, load_adapter(folder), tmp_path / "full")
