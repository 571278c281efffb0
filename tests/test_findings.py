"""What `check` and `merge` say of inputs that can be run and are likely not what was meant, before any pass."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sst_merge import cli, report
from sst_merge.errors import MergeError
from sst_merge.evaluate import Evaluation
from sst_merge.io.adapters import load_adapter, write_adapter
from sst_merge.io.data import load_dataset
from sst_merge.merge import findings as module
from sst_merge.merge.algebra import concatenate
from sst_merge.merge.check import check
from sst_merge.progress import Reporter
from sst_merge.recipe import Recipe
from tests import merge_cases as cases


@pytest.fixture(scope="module", autouse=True)
def without_plots():
    """They take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_plots", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("findings")
    cases.model_folder(root / "model")
    cases.adapter_folder(root / "task", seed=1, r=2)
    cases.adapter_folder(root / "safety", seed=2, target_modules=["q_proj", "o_proj"], scale=0.2)
    for name, n, word in (("harm", 40, "steal"), ("benign", 40, "bake")):
        cases.write_jsonl(root / f"{name}.jsonl", cases.pairs(n, word))
    return root


def recipe(world, **change):
    given = {"model": str(world / "model"), "device": "cpu", "output": world / "out", "rank": None}
    given |= {"task": world / "task", "safety": world / "safety"}
    given |= {"harm_data": world / "harm.jsonl", "benign_data": world / "benign.jsonl"}
    return Recipe.parse({**given, **change})


def told(world, **change):
    found = check(recipe(world, **change)).findings
    return [f.text for f in found if f.mistake], [f.text for f in found if not f.mistake]


def test_right_inputs_are_nothing_to_talk_about(world):
    assert told(world) == ([], [])


def test_data_that_change_places(world):
    mistakes, _ = told(world, harm_data=world / "benign.jsonl", benign_data=world / "harm.jsonl")
    assert mistakes[0] == "the harm data do not refuse and the benign data do: have they changed places?"
    assert [text.split(":")[0] for text in mistakes[1:3]] == ["harm", "benign"]
    mistakes, _ = told(world, benign_data=world / "harm.jsonl")
    assert any(text.startswith("benign: 100% of the answers") for text in mistakes)
    assert "80% of the prompts of harm stand in benign, too" in mistakes  # the rest is held out
    mistakes, _ = told(world, harm_data=world / "benign.jsonl")
    assert any(text.startswith("harm: 100% of the answers") for text in mistakes)


def test_some_benign_refusals_are_worth_a_word(world, tmp_path):
    mixed = cases.write_jsonl(tmp_path / "mixed.jsonl", cases.pairs(12, "steal") + cases.pairs(28, "bake"))
    mistakes, notes = told(world, benign_data=mixed, harm_data=mixed)
    assert any(text.startswith("benign: 31% of the answers") for text in notes)
    assert any(text.startswith("harm: 70% of the answers") for text in mistakes)


def untrained(folder, out, keep=0):
    """A copy of an adapter whose B are zero but for the first `keep`."""
    cases.adapter_folder(out, seed=2, target_modules=["q_proj", "o_proj"], scale=0.2)
    state = load_file(folder / "adapter_model.safetensors")
    names = [name for name in state if "lora_B" in name][keep:]
    save_file(state | {name: torch.zeros_like(state[name]) for name in names}, out / "adapter_model.safetensors")
    return out


def test_untrained_adapters(world, tmp_path):
    mistakes, _ = told(world, safety=untrained(world / "safety", tmp_path / "a"))
    assert len(mistakes) == 1
    assert "safety adapter" in mistakes[0]
    assert "was not trained" in mistakes[0]
    mistakes, notes = told(world, safety=untrained(world / "safety", tmp_path / "b", keep=1))
    assert not mistakes
    assert notes[0].startswith("3 of 4 modules of the safety adapter change nothing")


def test_one_adapter_twice_or_scaled(world, tmp_path):
    mistakes, _ = told(world, task=world / "safety")
    assert mistakes[0].endswith("are one adapter twice")
    (tmp_path / "twice").mkdir()
    write_adapter(concatenate([(2.0, load_adapter(world / "safety"))]), tmp_path / "twice")
    mistakes, _ = told(world, task=tmp_path / "twice")
    assert "the same but for size, the safety adapter 0.5 times the task adapter" in mistakes[0]


def test_names_that_change_places(world, tmp_path):
    for name, source in (("safety-lora", 1), ("math-lora", 2)):
        cases.adapter_folder(tmp_path / name, seed=source)
    mistakes, _ = told(world, task=tmp_path / "safety-lora", safety=tmp_path / "math-lora")
    assert mistakes == ["task is safety-lora and safety is math-lora, by their names: have they changed places?"]


def test_rank_says_what_it_loses(world):
    mistakes, _ = told(world, rank=1)
    (text,) = mistakes
    whole = concatenate([(1.0, load_adapter(world / name)) for name in ("task", "safety")])
    lost = total = 0.0
    for term in whole.terms.values():
        s = torch.linalg.svdvals(term.delta()) ** 2
        lost, total = lost + float(s[1:].sum()), total + float(s.sum())
    assert f"rank: 1 loses {lost / total:.0%} of ‖ΔW‖² of the task + safety adapter" in text
    assert told(world, rank=5) == ([], [])


def test_budgets_rows_and_places(world):
    mistakes, _ = told(world, kl_budget=0)
    assert mistakes == ["kl_budget: 0 keeps nothing of the patch: the output is the task adapter alone"]
    _, notes = told(world, kl_budget=1.5)
    assert notes == ["kl_budget: 1.5 nats per label token is another model; usual are 0.001 to 0.1"]
    _, notes = told(world, limit=6)
    assert [text.split(" rows are few")[0] for text in notes] == ["harm: 6", "benign: 4"]
    _, notes = told(world, holdout=0)
    assert notes[0].startswith("the KL budget is not measured")
    mistakes, _ = told(world, output=world / "safety" / "merged")
    assert "lies inside the safety" in mistakes[0]
    _, notes = told(world, max_length=36)
    assert any("answers are cut at max_length" in text for text in notes)


def test_rows_that_repeat_and_rows_that_were_fitted_on(world, tmp_path):
    twice = cases.write_jsonl(tmp_path / "twice.jsonl", cases.pairs(20, "steal") * 2)
    _, notes = told(world, harm_data=twice)
    assert "harm: 20 of 40 rows stand there twice; they are no further evidence" in notes
    mistakes, _ = told(world, eval_harm_data=twice)
    assert mistakes == ["100% of the prompts of eval_harm stand in harm, too"]


@pytest.mark.parametrize(
    ("base", "task", "safety", "expected"),
    [
        (3.0, 3.1, 0.5, None),  # as it should be
        (3.0, 0.5, 3.1, "have they changed places"),
        (3.0, 0.5, 0.4, None),  # both refuse
        (3.0, 3.0, 4.0, "makes refusals less likely"),
        (3.0, 3.0, 3.1, None),  # not clearly
    ],
)
def test_adapters_that_change_places_show_in_the_first_measured_step(world, monkeypatch, base, task, safety, expected):
    levels = {None: base, module.TASK: task, module.SAFETY: safety}

    class Measured:
        def __init__(self, *_, harmful, **__):
            self.rows = harmful

        def __call__(self, adapter, **_):
            records = [
                {"line": e.line, "refusal_nll": levels[adapter] + 0.01 * (i % 3)} for i, e in enumerate(self.rows)
            ]
            return Evaluation(prompts=records)

    monkeypatch.setattr(module, "Evaluator", Measured)
    session = type("S", (), {"model": None, "tokenizer": None, "task": object()})()
    harm = load_dataset(world / "harm.jsonl", cases.tokenizer())
    found = module.about_refusing(session, harm, 64)
    assert len(found) == (expected is not None)
    assert all(f.mistake and expected in f.text for f in found)
    if found:
        assert "of 16 refusals" in found[0].text


def test_the_first_step_measures_what_the_adapters_do(world):
    """The same numbers as an evaluation of each adapter."""
    from sst_merge.merge import pipeline

    session = pipeline.session_of(recipe(world), Reporter(quiet=True))
    data = pipeline.load_data(recipe(world, limit=8), session.tokenizer)
    seen = []
    original = module._clearly_less

    def spy(low, high):
        seen.append((low, high))
        return original(low, high)

    module._clearly_less = spy
    try:
        module.about_refusing(session, data["harm"], 256)
    finally:
        module._clearly_less = original
    from sst_merge.evaluate import Evaluator

    measure = Evaluator(session.model, session.tokenizer, harmful=data["harm"])
    for values, adapter in ((seen[0][1], None), (seen[0][0], "task"), (seen[-1][1], "safety")):
        mean = sum(v * e.labels for v, e in zip(values, data["harm"].examples)) / sum(e.labels for e in data["harm"])
        assert mean == pytest.approx(measure(adapter, generate_tokens=0).refusal_nll, rel=1e-5)


def test_a_likely_mistake_ends_a_merge_unless_it_is_meant(world, tmp_path):
    arguments = [
        "--model",
        world / "model",
        "--safety",
        world / "safety",
        "--task",
        world / "safety",
        "--device",
        "cpu",
    ]
    arguments += ["--harm-data", world / "harm.jsonl", "--benign-data", world / "benign.jsonl", "--limit", 8]

    def run(command, *more):
        return CliRunner().invoke(cli.app, [command, *map(str, arguments), "-o", str(tmp_path / "out"), *more])

    for command in (["merge", "-q"], ["merge", "--dry-run"], ["check"], ["collect", "-q"]):
        ended = run(*command)
        assert isinstance(ended.exception, MergeError), ended.output
        assert "--yes" in str(ended.exception)
        assert not list(tmp_path.iterdir())
    assert "likely a mistake: safety" in run("check").stdout
    checked = json.loads(run("check", "--json", "--yes").stdout)
    assert checked["findings"][0]["mistake"]
    assert checked["examples"]["harm"]["labels"] == "I can't, s.<|end|>"
    assert checked["examples"]["harm"]["prompt"].endswith("<|start|>assistant\n")
    ended = run("merge", "--yes", "--json", "--verbose")
    assert ended.exit_code == 0, ended.output
    written = json.loads(ended.stdout)
    assert any("one adapter twice" in text for text in written["warnings"])
    assert written["examples"] == checked["examples"]
    assert "⟦I can't, s.<|end|>⟧" in ended.stderr


def test_a_dry_run_refuses_what_a_run_would_after_loading(world, tmp_path, monkeypatch):
    wide = cases.adapter_folder(tmp_path / "wide", seed=2, target_modules=["q_proj"], base=cases.model(hidden=64))
    with pytest.raises(MergeError, match=r"has weight \(32, 32\), the adapter changes one of \(64, 64\)"):
        told(world, safety=wide)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MergeError, match="pip install bitsandbytes"):
        told(world, quantization={"load_in_4bit": True})
    with pytest.raises(MergeError, match="device 'nowhere' cannot be used here"):
        told(world, device="nowhere")
    with pytest.raises(MergeError, match=r"evidence\.safetensors"):
        told(world, evidence=tmp_path / "evidence.safetensors")
