"""The guard of an evidence: gradients of the gain where it is not wanted join the cost, and keep a patch from it."""

from __future__ import annotations

import json

import pytest
import torch

import sst_kernels as sst
from sst_merge.errors import RecipeError
from sst_merge.io.data import load_dataset
from sst_merge.merge import pipeline
from sst_merge.progress import Reporter
from sst_merge.recipe import SAFE, Recipe
from sst_merge.run.collect import unwanted
from tests import merge_cases as cases
from tests.models import tiny_lora
from tests.test_evidence import ADAPTERS, batches, collect

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def model():
    return tiny_lora(adapters=ADAPTERS, r=3, seed=3)


def guarded(model, **options):
    evidence = collect(sst.Evidence.of(model, "safety", **options), batches(10), batches(20))
    with evidence.accumulate("guard") as reading:
        for batch in batches(30, n=2):
            reading.backward(batch)
    return evidence


def moment(fisher):
    rows = fisher.rows().double()
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("share", [0.01, 0.5, 20.0])
def test_the_cost_holds_the_guard_with_a_share_of_its_own_trace(model, share):
    evidence = guarded(model)
    before, after = (evidence.filter(3.0, guard=g).cost for g in (0.0, share))
    alone = collect(sst.Evidence.of(model, "safety"), batches(30, n=2), batches(20), weigh=None)
    columns = evidence.filter(3.0).lora_A
    of_guard = alone.gain.rows["loss"].rows()
    rows = torch.cat(
        [
            (of_guard[:, evidence.gain.columns[n]].view(len(of_guard), -1, a.shape[1]).double() @ a.double().T).flatten(
                1
            )
            for n, a in columns.items()
        ],
        1,
    )
    unwanted_fisher = rows.T @ rows / len(rows)
    expected = moment(before) + share * moment(before).trace() / unwanted_fisher.trace() * unwanted_fisher
    torch.testing.assert_close(moment(after), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert after.counts.labels / after.counts.sequences == pytest.approx(
        before.counts.labels / before.counts.sequences, rel=1e-2
    )
    assert len(after.groups) == len(before.rows()) + len(rows)
    assert not set(after.groups[: len(before.rows())]) & set(after.groups[len(before.rows()) :])


def test_a_patch_does_less_to_the_guard_the_more_it_weighs(model):
    """Energy of the guard's own rows over that of the gain's, of the strongest directions."""
    evidence, answers = guarded(model), []
    unwanted_rows = evidence.filter(3.0, guard=1e9).cost.rows().double()[-8:]
    for share in (0.0, 0.1, 10.0):
        filtered = evidence.filter(3.0, guard=share)
        space = filtered.subspace(folds=2, metric="frobenius")
        patch = space.soft(mu=float(space.values[0]))
        at = torch.cat([patch.coordinates[n].flatten() for n in filtered.lora_A]).double()
        gained = (filtered.gain.rows().double() @ at).square().mean()
        answers.append(float((unwanted_rows @ at).square().mean() / gained))
    assert answers[2] < answers[1] < answers[0]
    assert answers[2] < 0.1 * answers[0]


def test_a_guard_survives_saving_condensing_and_merging(model, tmp_path):
    evidence = guarded(model)
    evidence.save(tmp_path / "evidence.safetensors")
    loaded = sst.Evidence.load(tmp_path / "evidence.safetensors")
    assert torch.equal(loaded.filter(3.0).cost.rows(), evidence.filter(3.0).cost.rows())
    small = evidence.condense()
    torch.testing.assert_close(moment(small.filter(3.0).cost), moment(evidence.filter(3.0).cost), rtol=1e-3, atol=1e-4)
    assert small.guard.counts == evidence.guard.counts
    plain = collect(sst.Evidence.of(model, "safety"), batches(10), batches(20))
    assert "guard" not in repr(plain)
    plain.save(tmp_path / "plain.safetensors")
    assert not sst.Evidence.load(tmp_path / "plain.safetensors").guard.rows
    evidence.merge(guarded(model))
    assert evidence.guard.counts.sequences == 16
    evidence.merge(plain)
    assert evidence.guard.counts.sequences == 16
    plain.merge(loaded)
    assert plain.guard.counts.sequences == 8


def test_wrong_guards_are_refused(model):
    evidence = guarded(model)
    for wrong in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="guard: expected a finite number that is not negative"):
            evidence.filter(3.0, guard=wrong)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("guard")
    cases.model_folder(root / "model")
    cases.adapter_folder(root / "safety", seed=2, scale=0.3)
    for name, n, word in (("harm", 8, "steal"), ("benign", 12, "bake"), ("safe", 5, "kill a process")):
        cases.write_jsonl(root / f"{name}.jsonl", cases.pairs(n, word))
    return root


def recipe(world, output, **more):
    given = {"model": str(world / "model"), "safety": world / "safety", "device": "cpu", "output": output}
    given |= {"harm_data": world / "harm.jsonl", "benign_data": world / "benign.jsonl", "generate_tokens": 0}
    return Recipe.parse({**given, "folds": 2, "tokens_per_batch": 400, **more})


def test_unwanted_refusals_are_safe_prompts_with_a_refusals_first_token(world):
    safe, harm = (load_dataset(world / f"{n}.jsonl", cases.tokenizer()) for n in ("safe", "harm"))
    found = unwanted(safe, harm)
    for given, made in zip(safe, found, strict=True):
        assert made.tokens[: made.prompt_tokens] == given.tokens[: given.prompt_tokens]
        assert made.labels == 1
        assert made.tokens[-1] in {e.tokens[e.prompt_tokens] for e in harm}


def test_a_merge_reads_safe_prompts_where_it_is_told_to(world, tmp_path):
    reports = {
        name: pipeline.merge(recipe(world, tmp_path / name, **more), reporter=QUIET)
        for name, more in (
            ("builtin", {"limit": 8, "safe_data": "builtin"}),
            ("own", {"safe_data": world / "safe.jsonl"}),
            ("none", {"guard": 0, "safe_data": "builtin"}),
            ("null", {}),
        )
    }
    assert [report["evidence"]["guard"] for report in reports.values()] == [8, 5, 0, 0]
    assert reports["none"]["patch"]["prediction"] == reports["null"]["patch"]["prediction"]
    assert reports["none"]["patch"]["prediction"] != reports["own"]["patch"]["prediction"]
    assert {report["fisher"]["benign"]["sequences"] for report in reports.values()} == {20, 12}
    again = Recipe.load(tmp_path / "builtin/recipe.yml")
    assert again.files["safe"] == SAFE
    evidence = tmp_path / "own/evidence.safetensors"
    decided = Recipe.parse(
        {
            "safety": world / "safety",
            "evidence": evidence,
            "output": tmp_path / "decided",
            "folds": 2,
            "kl_budget": 0.02,
        }
    )
    weaker = decided.model_copy(update={"guard": 0.0, "output": tmp_path / "weaker"})
    predictions = [pipeline.merge(r, reporter=QUIET)["patch"]["prediction"] for r in (decided, weaker)]
    assert predictions[0] != predictions[1]


def test_safe_prompts_are_refused_where_nothing_reads_them(world, tmp_path):
    for more in ({"evidence": world / "evidence"}, {"structure": "lowrank"}):
        with pytest.raises(RecipeError, match="safe_data: is read with the evidence"):
            recipe(world, tmp_path / "out", safe_data=world / "safe.jsonl", **more)
        assert "safe" not in recipe(world, tmp_path / "out", **more).files


def test_the_prompts_that_come_along_are_questions_and_no_two_alike():
    prompts = [json.loads(line)["prompt"] for line in SAFE.read_text(encoding="utf-8").splitlines()]
    assert len(set(prompts)) == len(prompts) == 40
