"""The measured front: its points, the knee, and the way from a point to its adapter."""

from __future__ import annotations

import json
import math
import shlex

import pytest
from safetensors.torch import load_file

from sst_merge.errors import MergeError, RecipeError
from sst_merge.evaluate import Evaluation
from sst_merge.merge import front, pipeline, trust
from sst_merge.recipe import DEFAULT_BUDGET, Recipe
from sst_merge.report import front_table, print_rows, spent
from tests import merge_cases as cases
from tests.test_cli import call
from tests.test_trust import QUIET, recipe

SCHEMA = {
    "allowed", "predicted_kl", "kl", "kl_low", "kl_high", "refused", "refused_low", "refused_high", "refusal_nll", "over_refusal", "filter",
    "parameter", "input_filter", "whole", "chosen", "command",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("front")
    cases.model_folder(root / "model")
    cases.adapter_folder(root / "task", seed=1, r=2)
    cases.adapter_folder(root / "safety", seed=2, scale=0.3)
    for name, n, word in (("harm", 20, "steal"), ("benign", 20, "bake"), ("safe", 4, "kill a process")):
        cases.write_jsonl(root / f"{name}.jsonl", cases.pairs(n, word))
    return root


@pytest.fixture(autouse=True, scope="module")
def tiny_refusals():
    """A random model refuses nothing; which of its answers count as refusals is as good as random, and the same each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sst_merge.evaluate.is_refusal", lambda answer: sum(map(ord, answer)) % 2 == 1)
        yield


def trial(kl, rate):
    return trust.Trial(None, Evaluation(benign_kl=kl, refusal_rate=rate))


def test_the_knee_lies_farthest_above_the_line_to_the_end():
    nothing = Evaluation(refusal_rate=0.2, benign_kl=0.0)
    points = [trial(0.001, 0.3), trial(0.01, 0.9), trial(0.03, 0.95), trial(0.1, 1.0), trial(0.2, 1.0)]
    assert front.knee(points, nothing).found.benign_kl == 0.01
    straight = [trial(0.1 * i, 0.2 + 0.08 * i) for i in range(1, 11)]
    assert front.knee(straight, nothing) in straight
    useless = [trial(0.1, 0.1), trial(0.2, 0.2)]
    assert front.knee(useless, nothing).found.benign_kl == 0.1  # nothing refuses more than no patch: the cheapest


@pytest.fixture(scope="module")
def swept(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept") / "out"
    given = {"kl_budget": 0.02, "sweep": True, "generate_tokens": 3, "eval_safe_data": world / "safe.jsonl"}
    return pipeline.merge(recipe(world, folder, **given), reporter=QUIET), folder


def test_a_front_has_measured_points_from_weak_to_whole(swept):
    report, folder = swept
    points = report["front"]
    assert json.loads((folder / "report.json").read_text())["front"] == points
    assert all(p.keys() == SCHEMA for p in points)
    assert len(points) >= front.POINTS
    assert [p["kl"] for p in points] == sorted(p["kl"] for p in points)
    assert sum(p["whole"] for p in points) >= 1
    assert all(p["kl_low"] <= p["kl"] <= p["kl_high"] for p in points)
    assert all(0 <= p["refused_low"] <= p["refused"] <= p["refused_high"] <= 1 for p in points)
    assert all(p["refusal_nll"] > 0 and 0 <= p["over_refusal"] <= 1 for p in points)
    (chosen,) = [p for p in points if p["chosen"]]
    assert chosen["kl"] == report["budget"]["kl"] == report["evaluation"]["merged"]["benign_kl"] <= 0.02
    assert chosen["refused"] == report["evaluation"]["merged"]["refusal_rate"]
    text = (folder / "report.md").read_text()
    assert all(p["command"] in text for p in points)
    assert sum(row[0].startswith("→") for row in front_table(points)) == 1


def test_every_point_becomes_its_adapter_without_a_model(swept, tmp_path, monkeypatch):
    report, folder = swept
    monkeypatch.setattr("sst_merge.session.load_model", None)  # whoever loads a model now fails
    for number, point in enumerate(report["front"], 1):
        words = shlex.split(point["command"])
        assert words[:2] == ["sst-merge", "merge"]
        assert words[-1] == f"{folder}-{number}"
        call(*words[1:-1], tmp_path / str(number), "--quiet")
        made = json.loads((tmp_path / str(number) / "report.json").read_text())
        assert made["patch"]["parameter"] == point["parameter"]
        assert made["patch"]["prediction"]["cost_per_label"] == pytest.approx(point["predicted_kl"], rel=1e-9)
        assert [p["chosen"] for p in made["front"]].index(True) == number - 1
        assert f"point {number} of a measured front: benign KL {point['kl']:.4g}" in spent(made)
        if point["chosen"]:
            written, again = (
                load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / str(number))
            )
            assert written.keys() == again.keys()
            assert all(written[name].equal(again[name]) for name in written)


def test_points_of_a_front_with_own_rows_safe_prompts_and_tasks_become_adapters_without_a_model(
    world, tmp_path, monkeypatch
):
    given = {
        "self_benign": 4,
        "safe_data": world / "safe.jsonl",
        "eval_task_data": world / "safe.jsonl",
        "task_tokens": 2,
    }
    given |= {"sweep": True, "generate_tokens": 3}
    report = pipeline.merge(recipe(world, tmp_path / "out", **given), reporter=QUIET)
    monkeypatch.setattr("sst_merge.session.load_model", None)
    words = shlex.split(report["front"][1]["command"])
    call(*words[1:], "--quiet")
    made = json.loads((tmp_path / "out-2/report.json").read_text())
    assert made["patch"]["prediction"]["cost_per_label"] == pytest.approx(report["front"][1]["predicted_kl"], rel=1e-9)


def test_picks_that_cannot_be(swept, world, tmp_path):
    _, folder = swept
    evidence = folder / "evidence.safetensors"
    for number in (0, 99):
        with pytest.raises(MergeError, match=r"the front of .* has the points 1 to"):
            front.picked(evidence, number)
    with pytest.raises(MergeError, match="cannot be read"):
        front.picked(tmp_path / "evidence.safetensors", 1)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(MergeError, match="has no front; merge with --sweep"):
        front.picked(tmp_path / "evidence.safetensors", 1)
    for more, text in (([], "--pick: takes --evidence"), (["--evidence", evidence, "--mu", 3], "leave out mu")):
        with pytest.raises(MergeError, match=text):
            call("merge", "--pick", 1, "-o", tmp_path / "x", *more)


def test_without_a_budget_or_a_rate_the_knee_is_taken(world, tmp_path):
    report = pipeline.merge(recipe(world, tmp_path / "out", generate_tokens=3), reporter=QUIET)
    assert report["recipe"]["kl_budget"] is None
    assert report["budget"] is None
    assert len(report["front"]) >= front.POINTS - 1
    (chosen,) = [p for p in report["front"] if p["chosen"]]
    assert (report["measured"]["kl"], report["measured"]["refused"]) == (chosen["kl"], chosen["refused"])
    assert "the knee of the measured curve" in spent(report)
    assert report["evaluation"]["merged"]["benign_kl"] == chosen["kl"]


def test_where_nothing_can_be_measured_the_default_budget_is_predicted(world, tmp_path):
    report = pipeline.merge(recipe(world, tmp_path / "out", holdout=0), reporter=QUIET)
    assert report["patch"]["prediction"]["cost_per_label"] <= DEFAULT_BUDGET
    assert f"not measured; budget {DEFAULT_BUDGET:g}, since nothing was asked for" in spent(report)


def test_a_knee_where_nothing_refuses_more_is_said_to_be_none(world, tmp_path, monkeypatch):
    monkeypatch.setattr("sst_merge.evaluate.is_refusal", lambda _: False)
    report = pipeline.merge(recipe(world, tmp_path / "out", generate_tokens=3), reporter=QUIET)
    assert "No strength refused more of these prompts than no patch does" in spent(report)
    assert report["measured"]["kl"] == min(p["kl"] for p in report["front"])


def test_the_front_is_whole_in_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    point = {
        "kl": 1.1e-05,
        "kl_low": 8.53e-06,
        "kl_high": 1.47e-05,
        "refused": 1.0,
        "refused_low": 0.95,
        "refused_high": 1.0,
    }
    point |= {"predicted_kl": 1.51e-05, "refusal_nll": 5.682, "over_refusal": 1.0, "chosen": True}
    print_rows(front_table([point]))
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "over-refusal"
    assert first.split()[-1] == "100%"


@pytest.mark.parametrize("target", [0.25, 1.0])
def test_a_target_ends_reached_or_with_the_most_there_is(world, tmp_path, target):
    report = pipeline.merge(recipe(world, tmp_path / "out", target_refusal=target, generate_tokens=3), reporter=QUIET)
    found = report["measured"]
    assert found["reached"] == (found["refused"] >= target)
    assert found["refused"] == report["evaluation"]["merged"]["refusal_rate"]
    assert found["kl"] == report["evaluation"]["merged"]["benign_kl"]
    assert found["prompts"] == 4
    assert ("cannot refuse as often as asked" in found["words"]) != found["reached"]
    assert found["words"] in (tmp_path / "out/README.md").read_text()


def test_a_target_without_prompts_to_measure_on_is_refused(world, tmp_path):
    for change in ({"holdout": 0}, {"generate_tokens": 0}):
        given = {"target_refusal": 0.9, "generate_tokens": 3} | change
        with pytest.raises(MergeError, match="target_refusal: is measured on held-out harmful prompts"):
            pipeline.merge(recipe(world, tmp_path / "out", **given), reporter=QUIET)
    with pytest.raises(RecipeError, match="give one of kl_budget, target_refusal, mu and k"):
        recipe(world, tmp_path / "out", target_refusal=0.9, kl_budget=0.1)
    with pytest.raises(RecipeError, match="model: is required to measure refusals"):
        Recipe.parse({"safety": "s", "evidence": "e", "output": "o", "target_refusal": 0.9})


def test_what_is_beyond_the_filtered_patch_is_the_patch_itself(world, tmp_path, monkeypatch):
    """Only the unfiltered patch refuses: inputs are filtered less until it does, and the report says how far."""
    saved = load_file(world / "safety/adapter_model.safetensors")
    own = next(t for name, t in saved.items() if "layers.1.mlp.down_proj.lora_A" in name)

    def rates(self, kind, data, adapter, label, tokens, records):
        found = dict(self.model.named_parameters()).get(
            f"base_model.model.model.layers.1.mlp.down_proj.lora_A.{adapter}.weight"
        )
        return float(adapter == "candidate" and found[2:].equal(own)), math.nan, math.nan  # the task's rank is 2

    monkeypatch.setattr("sst_merge.evaluate.Evaluator._refused", rates)
    report = pipeline.merge(recipe(world, tmp_path / "out", target_refusal=0.9, generate_tokens=3), reporter=QUIET)
    assert (report["measured"]["reached"], report["measured"]["refused"]) == (True, 1.0)
    assert report["patch"]["input_filter"] == 0
