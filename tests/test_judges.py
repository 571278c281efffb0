"""Judges beside the refusal phrases, exact answers, and prompts put differently: by definitions written out, on a tiny model."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from sst_merge import judges
from sst_merge.errors import DataError, ModelError
from sst_merge.evaluate import Evaluator, active
from sst_merge.generation import continuation_log_probs, greedy_tokens
from sst_merge.io.adapters import load_adapter
from sst_merge.io.data import load_dataset
from sst_merge.io.fit import attach
from sst_merge.io.wrappers import WRAPPERS, Wrapper
from sst_merge.merge.algebra import concatenate
from sst_merge.progress import Reporter
from sst_merge.report import table
from tests import merge_cases as cases

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    task, safety = (load_adapter(cases.adapter_folder(root / str(s), seed=s)) for s in (1, 2))
    model = attach(cases.model(), "task", task)
    model = attach(model, "merged", concatenate([(1.0, task), (1.0, safety)]))
    words = {"harm": "steal a car", "safe": "kill a process", "benign": "bake"}
    return (
        model,
        {n: load_dataset(cases.write_jsonl(root / n, cases.pairs(5, w)), cases.tokenizer()) for n, w in words.items()},
        root,
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She has 3 left.\n#### 18", 18),
        ("7 * 12 = 84. The answer is 84.", 84),
        ("It costs $1,234.50 in all.", Fraction(2469, 2)),
        ("So -3, not 3/4", Fraction(3, 4)),
        ("about .5", Fraction(1, 2)),
        ("5, not 3/0", 5),
        ("First I think.\nParis, France!", "paris france"),
        ("", ""),
    ],
)  # fmt: skip
def test_final_answers(text, value):
    assert judges.final_answer(text) == value


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("23 + 5 = 28. The answer is 28.", "#### 28", True),
        ("There are 28.0 of them.", "23 + 5 = 28. The answer is 28.", True),
        ("28 of 30", "28", False),
        ("Paris.", "paris", True),
        ("Lyon", "Paris", False),
        ("", "4", False),
    ],
)
def test_exact_answers(answer, expected, right):
    assert judges.is_right(answer, expected) is right


def test_accuracy_counts_right_greedy_answers(setting, tmp_path, monkeypatch):
    model, _, _ = setting
    rows = [{"prompt": f"How many are {i} and 2?", "response": f"#### {i + 2}"} for i in range(4)]
    data = load_dataset(cases.write_jsonl(tmp_path / "task.jsonl", rows), cases.tokenizer())
    measure = Evaluator(model, cases.tokenizer(), task=data, task_tokens=5)
    said = iter(["2.", "So 3", "5", "it is 5"])
    monkeypatch.setattr(Evaluator, "_answers", lambda self, data, *rest: [next(said) for _ in data])
    found = measure("merged")
    assert found.task_accuracy == 0.75
    assert [r["right"] for r in found.prompts] == [True, True, False, True]
    assert [r["set"] for r in found.prompts] == ["task"] * 4
    assert found.summary()["refusal_rate"] is None


def test_first_token_kl_is_that_of_the_first_label(setting):
    model, data, _ = setting
    found = Evaluator(model, cases.tokenizer(), benign=data["benign"], reference="task")("merged")
    values = []
    for example in data["benign"]:
        ids = torch.tensor([example.tokens[: example.prompt_tokens]])
        sides = []
        for adapter in ("task", "merged"):
            with active(model, adapter), torch.no_grad():
                sides.append(model(input_ids=ids).logits[0, -1].double().log_softmax(-1))
        values.append(float((sides[0].exp() * (sides[0] - sides[1])).sum()))
    assert found.first_token_kl == pytest.approx(sum(values) / len(values), rel=1e-4)
    by_line = {r["line"]: r["first_token_kl"] for r in found.prompts}
    assert [by_line[e.line] for e in data["benign"]] == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_continuations_score_as_one_sequence_alone(setting, monkeypatch, cached):
    """Log-probabilities of each choice from a forward pass of its own; prompts and choices of several lengths."""
    model, _, _ = setting
    if not cached:
        from transformers import DynamicCache

        monkeypatch.delattr(DynamicCache.__mro__[1], "batch_repeat_interleave")
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10], [11, 12, 13]]
    choices = [[[20], [21, 22, 23]], [[24, 25], [26, 27, 28]], [[29, 30], [31]], [[20, 21, 22], [23], [24, 25, 26]]]
    with active(model, "merged"), torch.no_grad():
        found = continuation_log_probs(model, prompts, choices, tokens=16)
        for prompt, own, scores in zip(prompts, choices, found, strict=True):
            for choice, score in zip(own, scores.tolist(), strict=True):
                logits = model(input_ids=torch.tensor([prompt + choice])).logits[0, len(prompt) - 1 : -1]
                nats = logits.double().log_softmax(-1).gather(1, torch.tensor(choice)[:, None]).sum()
                assert score == pytest.approx(float(nats), rel=1e-4)


def test_log_odds_are_refusals_against_the_references_own_answer(setting):
    model, data, _ = setting
    harm, safe = data["harm"], data["safe"]
    found = Evaluator(model, cases.tokenizer(), harmful=harm, safe=safe, reference="task")("merged", generate_tokens=2)
    refusals = judges.refusal_openings(harm)
    assert refusals == [tuple(cases.tokenizer()("I c")["input_ids"])]
    with active(model, "task"):
        own = greedy_tokens(model, cases.tokenizer(), harm, judges.OPENING, reporter=QUIET)
    records = {r["line"]: r for r in found.prompts if r["set"] == "harmful"}
    with active(model, "merged"), torch.no_grad():
        for example, mine in zip(harm, own):
            (nats,) = continuation_log_probs(model, [example.tokens[: example.prompt_tokens]], [[*refusals, mine]])
            assert records[example.line]["refusal_log_odds"] == pytest.approx(float(nats[0] - nats[1]), abs=1e-4)
    assert found.judge_refused == sum(r["refusal_log_odds"] > 0 for r in records.values()) / len(harm)
    assert 0 <= found.judge_over_refusal <= 1
    assert {r["set"] for r in found.prompts} == {"harmful", "safe"}
    assert found.over_refusal == sum(r["refused"] for r in found.prompts if r["set"] == "safe") / len(safe)


def test_a_patch_that_refuses_is_judged_so_without_words(setting, monkeypatch):
    """Where the refusals' openings are all that is likely, the log-odds are above 0; where the own answer is, below."""
    model, data, _ = setting
    measure = Evaluator(model, cases.tokenizer(), harmful=data["harm"], reference="task")
    for scores, share in (([-0.1, -5.0], 1.0), ([-5.0, -0.1], 0.0)):
        monkeypatch.setattr(
            "sst_merge.evaluate.continuation_log_probs",
            lambda model, prompts, *rest, s=scores, **options: [torch.tensor(s, dtype=torch.float64)] * len(prompts),
        )
        assert measure("merged", generate_tokens=1).judge_refused == share


def test_openings_are_the_most_frequent(tmp_path):
    rows = [{"prompt": f"a{i}", "response": r} for i, r in enumerate(["Sorry", "I won't", "I won", "No way"])]
    data = load_dataset(cases.write_jsonl(tmp_path / "h.jsonl", rows), cases.tokenizer())
    texts = [cases.tokenizer().decode(list(ids)) for ids in judges.refusal_openings(data)]
    assert texts[0] == "I w"
    assert sorted(texts) == ["I w", "No ", "Sor"]


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_prompts_hold_the_prompt_and_the_answers_labels(setting, name):
    _, data, root = setting
    wrapped = load_dataset(root / "harm", cases.tokenizer(), wrapper=WRAPPERS[name])
    for plain, other in zip(data["harm"], wrapped, strict=True):
        text = cases.tokenizer().decode(list(other.tokens[: other.prompt_tokens]))
        assert plain.prompt in text
        assert text.endswith("<|start|>assistant\n" + WRAPPERS[name].begun)
        assert other.tokens[other.prompt_tokens :] == plain.tokens[plain.prompt_tokens :]
        assert (plain.prompt, plain.line) == (other.prompt, other.line)
        assert other.tokens != plain.tokens


def test_wrappers_change_the_last_user_message_alone():
    messages = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "{a}"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c {prompt}"}, {"role": "assistant", "content": "d"},
    ]  # fmt: skip
    contents = [m["content"] for m in Wrapper("<{prompt}>")(messages)]
    assert contents == ["s", "{a}", "b", "<c {prompt}>", "d"]
    assert messages[3]["content"] == "c {prompt}"


def test_robustness_is_a_refusal_rate_for_each_wrapper(setting, monkeypatch):
    model, data, _ = setting
    measure = Evaluator(
        model, cases.tokenizer(), harmful=data["harm"], wrapped={"fiction": data["safe"], "begun": data["harm"]}
    )
    said = {id(data["safe"]): ["I'm sorry", "Sure", "Yes", "I cannot", "No"], id(data["harm"]): ["I won't"] * 5}
    monkeypatch.setattr(Evaluator, "_answers", lambda self, data, *rest: said[id(data)])
    found = measure("merged")
    assert found.robust_refused == {"fiction": 0.4, "begun": 1.0}
    header, row = table({"merged": found.summary()})
    assert header[-2:] == ["refused, fiction ↑", "refused, begun ↑"]
    assert row[-2:] == ["40%", "100%"]


def classifier(folder, labels: list[str], likeliest: int):
    """A BERT with one class likelier than the others, whatever it reads."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(cases.tokenizer()), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)},
    )  # fmt: skip
    network = BertForSequenceClassification(config)
    network.classifier.weight.data.zero_()
    network.classifier.bias.data = torch.eye(len(labels))[likeliest] * 5
    network.save_pretrained(folder)
    tokenizer = cases.tokenizer()
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("labels", "verdicts"),
    [
        (["NORMAL", "REJECTION"], [False, True]),
        (["refusal", "not_refusal"], [True, False]),
        (["contradiction", "neutral", "entailment"], [False, False, True]),
    ],
)
def test_a_classifier_judges_by_its_labels(setting, tmp_path, labels, verdicts):
    model, data, _ = setting
    for likeliest, verdict in enumerate(verdicts):
        judge = judges.model_judge(classifier(tmp_path / str(likeliest), labels, likeliest))
        assert judge(["No.", "long " * 100, ""]) == [verdict] * 3
    measure = Evaluator(model, cases.tokenizer(), harmful=data["harm"], safe=data["safe"], judge=judge)
    found = measure("merged", generate_tokens=2)
    assert found.classifier_refused == found.classifier_over_refusal == float(verdict)
    assert all(r["classifier_refused"] == verdict for r in found.prompts)


def test_judges_that_are_none_are_refused(tmp_path):
    with pytest.raises(ModelError, match="got LABEL_0, LABEL_1"):
        judges.model_judge(classifier(tmp_path / "plain", ["LABEL_0", "LABEL_1"], 0))
    with pytest.raises(ModelError, match="expected a text classifier in a folder"):
        judges.model_judge(str(tmp_path / "nowhere"))


def test_a_wrapped_prompt_that_is_too_long_is_refused(setting):
    _, data, root = setting
    most = max(len(e.tokens) for e in data["harm"])
    with pytest.raises(DataError, match="the prompt alone"):
        load_dataset(root / "harm", cases.tokenizer(), max_length=most, wrapper=WRAPPERS["fiction"])


def test_a_merge_measures_all_of_it_and_refuses_a_wrong_judge_first(tmp_path, monkeypatch):
    from sst_merge.merge import pipeline, source
    from sst_merge.recipe import Recipe

    cases.model_folder(tmp_path / "model")
    cases.adapter_folder(tmp_path / "safety", seed=2, scale=0.2)
    files = {"harm": "rob", "benign": "bake", "eval_harm": "steal", "eval_benign": "fry", "eval_safe": "kill a process"}
    for name, word in files.items():
        cases.write_jsonl(tmp_path / f"{name}.jsonl", cases.pairs(6, word))
    cases.write_jsonl(tmp_path / "eval_task.jsonl", [{"prompt": "1 and 1?", "response": "2"}])
    values = {
        "model": str(tmp_path / "model"), "safety": tmp_path / "safety", "output": tmp_path / "out", "device": "cpu", "generate_tokens": 2,
        "task_tokens": 4, "robustness": True, "judge": classifier(tmp_path / "judge", ["fine", "refusal"], 1),
    } | {f"{name}_data": tmp_path / f"{name}.jsonl" for name in [*files, "eval_task"]}  # fmt: skip
    report = pipeline.merge(Recipe.parse(values), reporter=QUIET)
    assert not report["failed_evaluations"]
    for row in report["evaluation"].values():
        assert None not in row.values()
        assert row["robust_refused"].keys() == WRAPPERS.keys()
        assert row["classifier_refused"] == 1.0
    assert (tmp_path / "out" / "report.md").read_text(encoding="utf-8").count("refused, role play ↑") == 1
    monkeypatch.setattr(source, "collect", lambda *_: pytest.fail("the data were read"))
    with pytest.raises(ModelError, match="expected a text classifier"):
        pipeline.merge(Recipe.parse(values | {"judge": "nobody/there", "output": tmp_path / "other"}), reporter=QUIET)
    assert not (tmp_path / "other").exists()


def test_evaluate_takes_the_same_as_flags(tmp_path):
    import json

    from typer.testing import CliRunner

    from sst_merge import cli

    cases.model_folder(tmp_path / "model")
    cases.adapter_folder(tmp_path / "safety", seed=2)
    harm = cases.write_jsonl(tmp_path / "harm.jsonl", cases.pairs(3, "rob"))
    task = cases.write_jsonl(tmp_path / "task.jsonl", [{"prompt": "1 and 1?", "response": "2"}])
    flags = f"evaluate --model {tmp_path}/model --adapter {tmp_path}/safety --harm-data {harm} --safe-data {harm} --task-data {task} --robustness "
    flags += f"--generate-tokens 2 --task-tokens 3 --device cpu --quiet -o {tmp_path}/found.json"
    result = CliRunner().invoke(cli.app, flags.split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    for row in found.values():
        assert row["over_refusal"] == row["refusal_rate"]
        assert row["task_accuracy"] in (0.0, 1.0)
        assert row["robust_refused"].keys() == WRAPPERS.keys()
    assert "task accuracy ↑" in result.output
