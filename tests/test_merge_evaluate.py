"""Evaluation against per-example definitions on a tiny model, and its invariances."""

from __future__ import annotations

import math

import pytest
import torch

from sst_merge.evaluate import Evaluator, active, is_refusal, kl_divergence
from sst_merge.io.adapters import load_adapter
from sst_merge.io.data import load_dataset
from sst_merge.io.fit import attach
from sst_merge.merge.algebra import concatenate
from tests import merge_cases as cases


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    task, safety = (load_adapter(cases.adapter_folder(root / str(s), seed=s)) for s in (1, 2))
    model = attach(cases.model(), "task", task)
    model = attach(model, "merged", concatenate([(1.0, task), (1.0, safety)]))
    harm = load_dataset(cases.write_jsonl(root / "h.jsonl", cases.pairs(5, "steal")), cases.tokenizer())
    benign = load_dataset(cases.write_jsonl(root / "b.jsonl", cases.pairs(7, "bake a cake")), cases.tokenizer())
    return model, harm, benign


def log_probs(model, adapter, example):
    """[labels, V] log-probabilities of one example alone, unpadded, in the definition's own words."""
    with active(model, adapter), torch.no_grad():
        logits = model(input_ids=torch.tensor([example.tokens])).logits[0]
    return logits[example.prompt_tokens - 1 : -1].double().log_softmax(-1)


def nll(model, adapter, example):
    targets = torch.tensor(example.tokens[example.prompt_tokens :])
    return -log_probs(model, adapter, example).gather(1, targets[:, None]).sum()


@pytest.mark.parametrize("reference", ["task", None])
@pytest.mark.parametrize("tokens_per_batch", [1, 200, 4096])
def test_means_are_those_of_one_example_at_a_time(setting, reference, tokens_per_batch):
    model, harm, benign = setting
    measure = Evaluator(
        model, cases.tokenizer(), harmful=harm, benign=benign, reference=reference, tokens_per_batch=tokens_per_batch
    )
    result = measure("merged", generate_tokens=0)
    labels = sum(e.labels for e in benign)
    kl = sum(
        (p.exp() * (p - q)).sum()
        for p, q in ((log_probs(model, reference, e), log_probs(model, "merged", e)) for e in benign)
    )
    assert result.benign_kl == pytest.approx(float(kl) / labels, rel=1e-4)
    assert result.benign_nll == pytest.approx(float(sum(nll(model, "merged", e) for e in benign)) / labels, rel=1e-5)
    harm_labels = sum(e.labels for e in harm)
    assert result.refusal_nll == pytest.approx(
        float(sum(nll(model, "merged", e) for e in harm)) / harm_labels, rel=1e-5
    )
    assert math.isnan(result.refusal_rate)
    assert {(r["set"], r["line"]) for r in result.prompts} == {
        (kind, e.line) for kind, data in (("harmful", harm), ("benign", benign)) for e in data
    }
    first = next(r for r in result.prompts if r["set"] == "benign" and r["line"] == 1)
    assert first["benign_nll"] == pytest.approx(float(nll(model, "merged", benign[0])) / benign[0].labels, rel=1e-5)


def test_the_reference_is_at_distance_zero_and_nothing_is_left_changed(setting):
    model, _, benign = setting
    model.base_model.set_adapter("merged")
    result = Evaluator(model, cases.tokenizer(), benign=benign, reference="task")("task")
    assert result.benign_kl == 0
    assert math.isnan(result.refusal_nll)
    assert list(model.active_adapters) == ["merged"]


def test_greedy_answers_equal_unbatched_generation(setting):
    model, harm, _ = setting
    result = Evaluator(model, cases.tokenizer(), harmful=harm)("merged", generate_tokens=6)
    with active(model, "merged"):
        for record in result.prompts:
            example = harm[record["line"] - 1]
            prompt = torch.tensor([example.tokens[: example.prompt_tokens]])
            out = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=257)
            text = cases.tokenizer().decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip()
            assert record["answer"] == text
    assert result.refusal_rate == sum(r["refused"] for r in result.prompts) / len(harm)


def test_kl_of_known_distributions():
    p = torch.tensor([[0.5, 0.25, 0.25]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert float(kl_divergence(p, q + 3)) == pytest.approx(0.25 * math.log(2), rel=1e-6)
    big = torch.randn(1000, 7)
    torch.testing.assert_close(
        kl_divergence(big, big.flip(1)),
        torch.nn.functional.kl_div(
            big.flip(1).double().log_softmax(-1), big.double().softmax(-1), reduction="none"
        ).sum(-1),
        rtol=1e-4,
        atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "refused"),
    [("I’m sorry, but no.", True), ("Sure! First,", False), ("I cannot help", True), ("x" * 300 + "I can't", False)],
)
def test_refusal_phrases(answer, refused):
    assert is_refusal(answer) is refused


def test_answers_end_where_the_context_of_the_model_does(setting, tmp_path):
    """Positions beyond it were never trained, and some models have no more."""
    model, _, _ = setting
    tokenizer = cases.tokenizer()
    tokenizer.model_max_length = 60
    data = load_dataset(cases.write_jsonl(tmp_path / "h.jsonl", cases.pairs(3, "steal")), tokenizer)
    widths = []
    hook = (
        model.get_base_model().model.layers[0].register_forward_hook(lambda _, args, out: widths.append(out[0].shape))
    )
    try:
        with torch.no_grad():
            Evaluator(model, tokenizer, harmful=data)("merged", generate_tokens=10**9)
    finally:
        hook.remove()
    answers = [size for size in widths if size[-2] == 1]
    assert 0 < len(answers) < 60 - min(e.prompt_tokens for e in data)


HOSTILE = {
    "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True,
    "min_new_tokens": 3, "suppress_tokens": list(range(40, 90)), "forced_bos_token_id": 7, "forced_eos_token_id": 9, "do_sample": True,
    "temperature": 5.0, "bad_words_ids": [[i] for i in range(90, 130)], "encoder_repetition_penalty": 1.4, "num_return_sequences": 2,
    "exponential_decay_length_penalty": [1, 9.0], "sequence_bias": [[[60], 9.0]], "stop_strings": "a", "max_length": 3, "max_time": 1e-9,
    "renormalize_logits": True, "penalty_alpha": 0.6, "top_k": 4, "guidance_scale": 3.0, "use_cache": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "names", [[n] for n in HOSTILE] + [["num_beams", "num_return_sequences", "return_dict_in_generate"]]
)
def test_answers_are_greedy_whatever_the_model_folder_says(setting, names):
    """`generation_config.json` of published models holds penalties (Qwen2.5), samplers and formats."""
    from transformers import GenerationConfig

    model, harm, _ = setting
    expected = [
        r["answer"] for r in Evaluator(model, cases.tokenizer(), harmful=harm)("merged", generate_tokens=6).prompts
    ]
    before = model.generation_config, model.get_base_model().generation_config
    foreign = GenerationConfig(eos_token_id=[257])
    for name in names:
        setattr(foreign, name, HOSTILE[name])
    model.generation_config = model.get_base_model().generation_config = foreign
    try:
        found = Evaluator(model, cases.tokenizer(), harmful=harm)("merged", generate_tokens=6).prompts
        assert model.generation_config is model.get_base_model().generation_config is foreign
    finally:
        model.generation_config, model.get_base_model().generation_config = before
    assert [r["answer"] for r in found] == expected


def test_answers_are_greedy_where_the_models_own_configuration_says_otherwise(setting):
    """As config.json of older models, which transformers refuses to generate from."""
    model, harm, _ = setting
    expected = [
        r["answer"] for r in Evaluator(model, cases.tokenizer(), harmful=harm)("merged", generate_tokens=6).prompts
    ]
    config = model.get_base_model().config
    config.repetition_penalty = 5.0
    try:
        found = Evaluator(model, cases.tokenizer(), harmful=harm)("merged", generate_tokens=6).prompts
    finally:
        del config.repetition_penalty
    assert [r["answer"] for r in found] == expected


def test_answers_end_at_the_models_own_ends(setting):
    model, harm, _ = setting
    free = Evaluator(model, cases.tokenizer(), harmful=harm)("merged", generate_tokens=6).prompts
    letter = next(c for r in free for c in r["answer"][1:5] if c.isascii() and c.isalnum())
    (stop,) = cases.tokenizer()(letter, add_special_tokens=False)["input_ids"]
    config = model.get_base_model().generation_config
    before, config.eos_token_id = config.eos_token_id, [257, stop]
    try:
        ended = Evaluator(model, cases.tokenizer(), harmful=harm)("merged", generate_tokens=6).prompts
    finally:
        config.eos_token_id = before
    for one, whole in zip(ended, free):
        assert one["answer"] == (
            whole["answer"].partition(letter)[0] + letter if letter in whole["answer"] else whole["answer"]
        )


def test_a_failed_measurement_is_a_line_beside_what_was_measured(setting, monkeypatch):
    model, harm, benign = setting
    measure = Evaluator(model, cases.tokenizer(), harmful=harm, benign=benign, forgiving=True)
    monkeypatch.setattr(
        type(model), "generate", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no such kernel\nmore"))
    )
    result = measure("merged")
    assert result.failed == "RuntimeError: no such kernel"
    assert result.refusal_nll > 0
    assert result.benign_kl >= 0
    assert result.summary()["refusal_rate"] is None
    assert "failed" not in result.summary()
    assert measure.attempt("x", lambda: (_ for _ in ()).throw(MemoryError)).failed == "MemoryError"
    with pytest.raises(RuntimeError, match="no such kernel"):
        Evaluator(model, cases.tokenizer(), harmful=harm)("merged")


def test_no_measurement_costs_the_merge(tmp_path, monkeypatch):
    from peft import PeftModelForCausalLM

    from sst_merge.merge import pipeline
    from sst_merge.progress import Reporter
    from sst_merge.recipe import Recipe

    cases.model_folder(tmp_path / "model")
    cases.adapter_folder(tmp_path / "safety", seed=2, scale=0.2)
    data = {
        name: str(cases.write_jsonl(tmp_path / f"{name}.jsonl", cases.pairs(6, name))) for name in ("harm", "benign")
    }
    recipe = Recipe.parse(
        {
            "model": str(tmp_path / "model"), "safety": str(tmp_path / "safety"), "output": str(tmp_path / "out"), "device": "cpu",
            "kl_budget": 0.01,
        }
        | {f"{name}_data": path for name, path in data.items()} | {f"eval_{name}_data": path for name, path in data.items()}
    )  # fmt: skip
    monkeypatch.setattr(PeftModelForCausalLM, "generate", lambda *_, **__: 1 / 0)
    report = pipeline.merge(recipe, yes=True, reporter=Reporter(quiet=True))
    assert report["failed_evaluations"]["merged"] == "ZeroDivisionError: division by zero"
    assert report["evaluation"]["merged"]["refusal_nll"] > 0
    assert report["evaluation"]["merged"]["refusal_rate"] is None
    assert load_adapter(tmp_path / "out").terms
