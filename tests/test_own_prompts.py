"""Benign rows that the model writes itself: seeded, answered by the reference, without repetitions or what the patch takes for harmful."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoTokenizer

from sst_merge.errors import DataError, MergeError, RecipeError
from sst_merge.io.chat import Renderer
from sst_merge.io.data import load_dataset
from sst_merge.merge import pipeline
from sst_merge.progress import Reporter
from sst_merge.recipe import Recipe
from sst_merge.run import own_prompts
from sst_merge.run.own_prompts import write_rows
from sst_merge.session import open_session
from tests import merge_cases as cases

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    cases.model_folder(root / "model")
    cases.adapter_folder(root / "task", seed=1, r=2)
    cases.adapter_folder(root / "safety", seed=2, scale=0.3)
    cases.write_jsonl(root / "harm.jsonl", cases.pairs(8, "steal"))
    cases.write_jsonl(root / "benign.jsonl", cases.pairs(6, "bake"))
    return root


@pytest.fixture(scope="module")
def session(world):
    return open_session(str(world / "model"), world / "safety", world / "task", device="cpu", reporter=QUIET)


@pytest.fixture(scope="module")
def harm(world, session):
    return load_dataset(world / "harm.jsonl", session.tokenizer)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(own_prompts, "PROMPT_TOKENS", 24)
    monkeypatch.setattr(own_prompts, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(own_prompts, "PASSED", 0.95)


def recipe(world, output, **more):
    given = {"model": str(world / "model"), "safety": world / "safety", "task": world / "task", "device": "cpu"}
    given |= {"harm_data": world / "harm.jsonl", "output": output, "folds": 2, "tokens_per_batch": 400}
    return Recipe.parse({**given, "generate_tokens": 0, **more})


def test_rows_follow_from_the_seed_and_are_no_two_alike(session, harm, short):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    once, again, other = (write_rows(session, harm, 12, seed=seed) for seed in (0, 0, 1))
    assert once == again
    assert once.rows != other.rows
    assert torch.equal(torch.random.get_rng_state(), before)
    prompts = [row["prompt"] for row in once.rows]
    assert 0 < len(prompts) <= 12
    assert len({" ".join(p.casefold().split()) for p in prompts}) == len(prompts)
    assert all(row["prompt"].strip() and row["response"].strip() for row in once.rows)
    assert not any(mark in row["prompt"] for row in once.rows for mark in ("<|start|>", "<|end|>"))
    assert once.unusable > 0  # a random model does not end most of its turns
    assert str(once.threshold)[:3] in once.words()


def test_prompts_that_the_patch_takes_for_harmful_are_left_out(session, harm, short, monkeypatch):
    margins = own_prompts._Writer.margins

    def written(threshold):
        """With harmful prompts that all have this margin."""
        own = lambda self, data: torch.full((len(data),), threshold) if data is harm else margins(self, data)  # noqa: E731
        monkeypatch.setattr(own_prompts._Writer, "margins", own)
        return write_rows(session, harm, 60, seed=0)

    everything = written(1e6)
    writer = own_prompts._Writer(session, harm, Renderer(session.tokenizer), 1024)
    prompts = [row["prompt"] for row in everything.rows]
    own = dict(zip(prompts, margins(writer, writer.dataset(prompts)).tolist(), strict=True))
    middle = sorted(own.values())[len(own) // 2]
    some = written(middle)
    assert everything.harmful == 0
    assert some.harmful == sum(margin >= middle for margin in own.values()) > 3
    assert {row["prompt"] for row in some.rows} <= {prompt for prompt, margin in own.items() if margin < middle}
    with pytest.raises(MergeError, match="that look harmful"):
        written(-1e6)


def test_a_margin_is_the_log_odds_of_a_refusal_with_the_patch(session, harm):
    writer = own_prompts._Writer(session, harm, Renderer(session.tokenizer, None), 200)
    opening = {e.tokens[e.prompt_tokens] for e in harm}
    assert set(writer.openings.tolist()) == opening
    session.model.base_model.set_adapter(["task", "safety"])
    row = harm[3]
    with torch.no_grad():
        p = session.model(torch.tensor([row.tokens[: row.prompt_tokens]])).logits[0, -1].double().softmax(-1)
    share = float(p[sorted(opening)].sum())
    session.model.base_model.set_adapter("task")
    assert float(writer.margins(harm)[3]) == pytest.approx(math.log(share) - math.log1p(-share), abs=1e-4)
    assert session.model.active_adapters == ["task"]


def test_the_users_turn_is_what_the_template_writes(session):
    assert Renderer(session.tokenizer).user_turn() == ("<|start|>user\n", "<|end|>")
    plain = cases.tokenizer(None)
    with pytest.raises(DataError, match="no chat template"):
        Renderer(plain).user_turn()
    endless = cases.tokenizer("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}")
    with pytest.raises(DataError, match="whose end cannot be told"):
        Renderer(endless).user_turn()


def test_a_merge_without_benign_data_keeps_what_was_written(world, tmp_path, short):
    report = pipeline.merge(recipe(world, tmp_path / "out", self_benign=15), reporter=QUIET)
    rows = [json.loads(line) for line in (tmp_path / "out/self_benign.jsonl").read_text().splitlines()]
    counts = report["inputs"]["data"]
    assert len(rows) == counts["benign"]["sequences"] + counts["eval_benign"]["sequences"] > 5
    assert counts["eval_benign"]["sequences"] == report["budget"]["rows"] > 0
    assert f"{len(rows)} rows written by the model itself" in " ".join(counts["benign"]["notes"])
    again = recipe(world, tmp_path / "again", benign_data=tmp_path / "out/self_benign.jsonl", self_benign=0)
    repeated = pipeline.merge(again, reporter=QUIET)
    assert repeated["patch"]["prediction"] == report["patch"]["prediction"]
    assert repeated["budget"]["kl"] == report["budget"]["kl"]


def test_rows_of_the_users_and_the_models_own_are_told_apart_by_line(world, session, short):
    given = load_dataset(world / "benign.jsonl", session.tokenizer)
    own = own_prompts.own_rows(session, recipe(world, world / "x", self_benign=9), given, 9)
    both = own_prompts.joined(given, own)
    assert [e.line for e in both] == [*range(1, 7), *(6 + e.line for e in own)]
    assert both.examples[:6] == given.examples
    assert own_prompts.joined(None, own) is own


def test_recipes_need_benign_rows_of_some_kind(world):
    with pytest.raises(RecipeError, match="benign_data: is required, unless evidence or self_benign is given"):
        recipe(world, world / "x")
    with pytest.raises(RecipeError, match="self_benign: evidence holds the benign rows"):
        recipe(world, world / "x", evidence=world / "e.safetensors", self_benign=3)


def test_an_interrupted_run_goes_on_with_the_rows_it_has_written(world, session, tmp_path, short, monkeypatch):
    from sst_merge.run.checkpoints import Continuity

    made = recipe(world, tmp_path / "out", self_benign=5)
    keep = Continuity.beside(made.output, 1, False)
    first = own_prompts.own_rows(session, made, load_dataset(made.harm_data, session.tokenizer), 5, continuity=keep)
    keep.close()
    resumed = Continuity.beside(made.output, 1, True)
    monkeypatch.setattr(own_prompts, "write_rows", lambda *_, **__: pytest.fail("written again"))
    again = own_prompts.own_rows(session, made, load_dataset(made.harm_data, session.tokenizer), 5, continuity=resumed)
    resumed.close()
    assert again == first


def test_a_collection_leaves_the_rows_beside_its_file(world, tmp_path, short):
    pipeline.collect_to_file(recipe(world, tmp_path / "evidence.safetensors", self_benign=5), reporter=QUIET)
    kept = AutoTokenizer.from_pretrained(world / "model")
    assert len(load_dataset(tmp_path / "evidence-self_benign.jsonl", kept)) > 2


def test_a_plan_foresees_the_rows_without_writing_them(world, tmp_path):
    from sst_merge.merge.check import check

    made = check(recipe(world, tmp_path / "out", self_benign=10, holdout=0.2)).plan
    length = own_prompts.PROMPT_TOKENS + own_prompts.ANSWER_TOKENS
    assert made.passes["reading, benign"][0] == 8 * length
    assert not (tmp_path / "out").exists()
