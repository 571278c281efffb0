"""Adapter folders and their algebra, against PEFT's own reading of the same folders."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from sst_kernels.testing import tolerance
from sst_merge.errors import AdapterError, ModelError, OutputError
from sst_merge.io.adapters import Adapter, LoraTerm, load_adapter, write_adapter
from sst_merge.io.fit import attach, check_fit
from sst_merge.io.output import output_file, output_folder
from sst_merge.merge.algebra import concatenate, inner, recompress, transform
from tests import merge_cases as cases

VARIED = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 4},
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 5, "down_proj": 2},
        "alpha_pattern": {"layers.1.mlp.up_proj": 11, ".*self_attn.v_proj": 1},
    },
    "few modules": {"target_modules": ["q_proj", "lm_head"]},
    "regex": {"target_modules": r".*\.1\.(self_attn\.o_proj|mlp\.gate_proj)"},
}


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("options", VARIED.values(), ids=VARIED)
def test_reads_what_peft_applies(tmp_path, options):
    folder = cases.adapter_folder(tmp_path / "a", **options)
    ours = load_adapter(folder).terms
    theirs = cases.peft_deltas(PeftModel.from_pretrained(cases.model(), folder))
    assert ours.keys() == theirs.keys()
    for name, delta in theirs.items():
        assert relative(ours[name].delta(), delta) < 1e-12


@pytest.mark.parametrize("other", list(VARIED)[1:])
def test_concatenation_is_exact_and_loads_in_peft(tmp_path, other):
    first = load_adapter(cases.adapter_folder(tmp_path / "a", seed=1))
    second = load_adapter(cases.adapter_folder(tmp_path / "b", seed=2, **VARIED[other]))
    merged = concatenate([(1.0, first), (-0.7, second)])
    with output_folder(tmp_path / "merged") as folder:
        write_adapter(merged, folder)
    loaded = cases.peft_deltas(PeftModel.from_pretrained(cases.model(), tmp_path / "merged"))
    assert loaded.keys() == first.terms.keys() | second.terms.keys()
    for name, delta in loaded.items():
        expected = sum(w * a.terms[name].delta() for w, a in ((1.0, first), (-0.7, second)) if name in a.terms)
        assert relative(delta, expected) < tolerance(1)  # one rounding of w·c·B to float32
    assert relative(load_adapter(tmp_path / "merged").terms["model.layers.0.self_attn.q_proj"].delta(),
                    merged.terms["model.layers.0.self_attn.q_proj"].delta()) == 0  # fmt: skip


def test_attached_adapter_computes_what_the_written_one_does(tmp_path):
    merged = load_adapter(cases.adapter_folder(tmp_path / "a", use_rslora=True, r=5))
    ids = torch.arange(24).reshape(2, 12)
    with output_folder(tmp_path / "out") as folder:
        write_adapter(merged, folder)
    expected = PeftModel.from_pretrained(cases.model(), tmp_path / "out")(input_ids=ids).logits
    model = attach(cases.model(), "task", load_adapter(cases.adapter_folder(tmp_path / "b", seed=5)))
    model = attach(attach(model, "x", merged), "x", merged)
    model.base_model.set_adapter("x")
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_conv1d_adapters_of_gpt2_keep_their_orientation(tmp_path):
    from tests.models import tiny_model

    made = get_peft_model(tiny_model("gpt2"), LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    made.save_pretrained(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    ids = torch.arange(10)[None]
    attached = attach(tiny_model("gpt2"), "x", concatenate([(2.0, adapter)]))
    plain = attach(tiny_model("gpt2"), "x", adapter)
    torch.testing.assert_close(plain(input_ids=ids).logits, made.eval()(input_ids=ids).logits)
    assert not torch.allclose(attached(input_ids=ids).logits, plain(input_ids=ids).logits)


ranks = st.integers(1, 4)


@settings(deadline=None, max_examples=30)
@given(ranks, ranks, st.integers(1, 9), st.integers(1, 9), st.floats(-3, 3), st.integers(0, 2**31))
def test_weighted_sums_and_norms(r1, r2, d_in, d_out, weight, seed):
    generator = torch.Generator().manual_seed(seed)

    def term(r, scaling):
        return LoraTerm(torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator), scaling)

    a, b = Adapter({"m": term(r1, 2.0), "only": term(r1, 0.3)}), Adapter({"m": term(r2, -0.4)})
    merged = concatenate([(1.5, a), (weight, b)])
    expected = 1.5 * a.terms["m"].delta() + weight * b.terms["m"].delta()
    bound = 1.5 * a.terms["m"].delta().abs().sum() + abs(weight) * b.terms["m"].delta().abs().sum() + 1e-30
    assert (merged.terms["m"].delta() - expected).abs().max() <= tolerance(r1 + r2) * bound + 1e-30
    assert merged.terms["only"].rank == r1
    assert inner(a, a)["m"] == pytest.approx(float(a.terms["m"].delta().square().sum()), rel=1e-9)


def test_transform_is_b_s_a_and_drops_what_is_zero():
    term = LoraTerm(torch.randn(3, 7), torch.randn(5, 3), 0.5)
    S = torch.randn(3, 3, dtype=torch.float64)
    adapter = Adapter({"m": term, "n": term})
    result = transform(adapter, {"m": S, "n": torch.zeros(3, 3)})
    expected = 0.5 * term.B.double() @ S @ term.A.double()
    assert list(result.terms) == ["m"]
    assert relative(result.terms["m"].delta(), expected) < tolerance(3)
    with pytest.raises(AdapterError, match=r"m: got shape \(2, 2\), the adapter has rank 3"):
        transform(adapter, {"m": S[:2, :2]})


def test_recompression_is_the_truncated_svd_and_states_its_error():
    torch.manual_seed(0)
    adapter = Adapter(
        {
            "m": LoraTerm(torch.randn(6, 20), torch.randn(15, 6), 0.3),
            "n": LoraTerm(torch.randn(2, 9), torch.randn(4, 2)),
        }
    )
    small, lost = recompress(adapter, 4)
    u, s, vh = torch.linalg.svd(adapter.terms["m"].delta(), full_matrices=False)
    assert relative(small.terms["m"].delta(), (u[:, :4] * s[:4]) @ vh[:4]) < 1e-6
    assert small.terms["n"] is adapter.terms["n"]
    whole = s.square().sum() + adapter.terms["n"].delta().square().sum()
    assert lost.relative_error == pytest.approx(float((s[4:].square().sum() / whole).sqrt()), rel=1e-6)
    assert (lost.worst_module, small.terms["m"].rank) == ("m", 4)
    assert recompress(adapter, 6)[1].relative_error < 1e-12


REFUSED = {
    "DoRA": {"use_dora": True},
    "trained biases": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "a LoRA bias": {"lora_bias": True},
    "trainable token embeddings": {"trainable_token_indices": [1, 2]},
    "pissa": {"init_lora_weights": "pissa"},
    "unknown option use_new_thing": {"use_new_thing": True},
    'expected peft_type "LORA"': {"peft_type": "IA3"},
    "gives rank 4": {"r": 4},
    "positive number": {"lora_alpha": None},
    "not a regular expression": {"rank_pattern": {"(": 3}},
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_refuses_other_adapters_by_name(tmp_path, change, request):
    folder = cases.adapter_folder(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match=next(k for k, v in REFUSED.items() if v is change)):
        load_adapter(folder)


def damage(folder, kind):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    key = next(k for k in state if "lora_A" in k)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-50])
    elif kind == "pickle":
        path.unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    elif kind == "huge header":
        path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    else:
        value = state.pop(key)
        replacement = {
            "no partner": {},
            "nan": {key: value * float("nan")},
            "integer": {key: value.int()},
            "convolution": {key: value[..., None, None]},
            "embedding": {key.replace("lora_A", "lora_embedding_A"): value},
            "magnitude": {key: value, key.replace("lora_A.weight", "lora_magnitude_vector"): value.clone()},
        }[kind]
        save_file(state | replacement, path)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("truncated", "not a readable safetensors file"),
        ("huge header", "not a readable safetensors file"),
        ("pickle", "is a pickle, which can run code"),
        ("no partner", "has lora_B but not its partner"),
        ("nan", "not finite"),
        ("integer", "expected float32"),
        ("convolution", "LoRA on convolutions"),
        ("embedding", "LoRA on an embedding"),
        ("magnitude", "DoRA magnitude"),
    ],
)
def test_refuses_damaged_weights(tmp_path, kind, text):
    folder = cases.adapter_folder(tmp_path / "a")
    damage(folder, kind)
    with pytest.raises(AdapterError, match=text):
        load_adapter(folder)


def test_missing_or_broken_config(tmp_path):
    with pytest.raises(AdapterError, match="expected a PEFT adapter folder"):
        load_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        load_adapter(tmp_path)


def test_adapters_of_another_model_are_refused(tmp_path):
    small, large = (load_adapter(cases.adapter_folder(tmp_path / str(h), base=cases.model(hidden=h))) for h in (32, 40))
    with pytest.raises(AdapterError, match="different base models"):
        concatenate([(1.0, small), (1.0, large)])
    with pytest.raises(ModelError, match="trained on another base model"):
        attach(cases.model(), "x", large)
    renamed = Adapter({"encoder.q": small.terms["model.layers.0.self_attn.q_proj"]})
    with pytest.raises(ModelError, match="no module encoder"):
        attach(cases.model(), "x", renamed)
    for weights, text in (((0.0,), "weight 0"), ((float("nan"),), "must be finite")):
        with pytest.raises(AdapterError, match=text):
            concatenate([(w, small) for w in weights])


def test_tied_embeddings_are_warned_about(tmp_path):
    for tied in (True, False):
        base = cases.model(tied=tied)
        adapter = load_adapter(cases.adapter_folder(tmp_path / str(tied), target_modules=["lm_head"], base=base))
        warnings = check_fit(cases.model(tied=tied), adapter)
        assert ["ties input and output embeddings" in w for w in warnings] == [True] * tied
        with pytest.raises(ModelError, match="brings its own lm_head"):
            check_fit(cases.model(tied=tied, seed=1), adapter)


def test_output_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), output_folder(tmp_path / "out") as folder:
        (folder / "report.json").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for text in ("first", "second"):
        with output_folder(tmp_path / "out", force=text == "second") as folder:
            (folder / "report.json").write_text(text)
    assert (tmp_path / "out/report.json").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError, match="pass --force"), output_folder(tmp_path / "out"):
        pass
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_text("")
    with pytest.raises(OutputError, match="not an earlier output"), output_folder(tmp_path / "photos", force=True):
        pass
    with pytest.raises(RuntimeError), output_file(tmp_path / "f.json") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert not (tmp_path / "f.json").exists()
    with output_file(tmp_path / "f.json") as partial:
        partial.write_text("whole")
    with pytest.raises(OutputError, match="exists already"), output_file(tmp_path / "f.json"):
        pass
