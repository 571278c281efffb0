"""Several patches, several tasks: one adapter of larger rank, exactly their weighted sum, from recipes and from flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sst_kernels.testing import assert_close
from sst_merge import cli
from sst_merge.errors import AdapterError, RecipeError
from sst_merge.io.adapters import load_adapter
from sst_merge.merge import pipeline
from sst_merge.merge.algebra import load_sum
from sst_merge.progress import Reporter
from sst_merge.recipe import Recipe
from tests import merge_cases as cases

DATA = {"harm_data": "harm.jsonl", "benign_data": "benign.jsonl"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sums")
    cases.model_folder(folder / "model")
    cases.adapter_folder(folder / "one", seed=1, r=2)
    cases.adapter_folder(folder / "two", seed=2, r=3, target_modules=["q_proj", "up_proj"], use_rslora=True)
    cases.adapter_folder(folder / "task", seed=3)
    for name, word in (("harm", "steal"), ("benign", "bake")):
        cases.write_jsonl(folder / f"{name}.jsonl", cases.pairs(8, word))
    return folder


def test_a_sum_is_exact_and_knows_its_parts(root):
    one, two = (load_adapter(root / n) for n in ("one", "two"))
    total = load_sum({root / "one": 1.0, root / "two": 0.5})
    assert total.terms.keys() == one.terms.keys() | two.terms.keys()
    for name, term in total.terms.items():
        expected = one.terms[name].delta() + (0.5 * two.terms[name].delta() if name in two.terms else 0)
        assert_close(name, term.delta(), expected, 1e-6)
        assert term.rank == 2 + (3 if name in two.terms else 0)
    assert total.path == f"{root}/one + 0.5 · {root}/two"
    others = [load_sum({root / "one": 1.0, root / "two": w}).sha256 for w in (0.5, 0.25)]
    assert others[0] == total.sha256 != others[1]
    assert load_sum(root / "one").sha256 == one.sha256


def test_patches_of_other_models_do_not_add_up(root, tmp_path):
    cases.adapter_folder(tmp_path / "wide", base=cases.model(hidden=40))
    with pytest.raises(AdapterError, match="different base models"):
        load_sum({root / "one": 1.0, tmp_path / "wide": 1.0})


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("one", "one"),
        (["one"], "one"),
        (["one", "two"], {"one": 1.0, "two": 1.0}),
        (["one", "two=0.5"], {"one": 1.0, "two": 0.5}),
        ({"one": 2, "two": -0.5}, {"one": 2.0, "two": -0.5}),
        (["a=b/one"], "a=b/one"),
    ],
)
def test_recipes_say_what_adds_up(tmp_path, given, made):
    text = {"model": "m", "output": "out", "safety": given, "task": given, **DATA}
    (tmp_path / "recipe.yml").write_text(json.dumps(text), encoding="utf-8")
    recipe = Recipe.load(tmp_path / "recipe.yml")
    expected = tmp_path / made if isinstance(made, str) else {tmp_path / n: w for n, w in made.items()}
    assert recipe.safety == recipe.task == expected
    (tmp_path / "again.yml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(tmp_path / "again.yml").safety == recipe.safety


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "safety: expected an adapter folder, a list of them, or a mapping"),
        (["one", "one=2"], "safety: names a folder twice"),
        ({"one": 0}, "the weight of one: expected a number other than 0"),
        ({"one": "much"}, "the weight of one: expected a number other than 0, got 'much'"),
        ([["one"]], "expected an adapter folder"),
        (["out/one", "two"], "output out holds the safety out/one"),
    ],
)
def test_what_adds_up_to_nothing_is_refused(given, text):
    with pytest.raises(RecipeError, match=text):
        Recipe.parse({"model": "m", "output": "out", "safety": given, **DATA})


def test_two_patches_over_two_tasks_stand_in_one_pencil(root, tmp_path):
    """What is added to the sum of the tasks lies in the columns and the rows that the patches have together."""
    flags = f"merge --model {root}/model --safety {root}/one --safety {root}/two=0.5 --task {root}/task --task {root}/one=0.25 "
    flags += f"--harm-data {root}/harm.jsonl --benign-data {root}/benign.jsonl --mu 0 --input-filter 0 --device cpu --quiet -o {tmp_path}/out"
    result = CliRunner().invoke(cli.app, flags.split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    merged = load_adapter(tmp_path / "out").terms
    tasks, patches = (
        load_sum({root / "task": 1.0, root / "one": 0.25}).terms,
        load_sum({root / "one": 1.0, root / "two": 0.5}).terms,
    )
    for name, term in merged.items():
        added = term.delta() - tasks[name].delta()
        left = torch.linalg.qr(patches[name].B.double())[0]
        right = torch.linalg.qr(patches[name].A.double().T)[0]
        assert_close(name, left @ (left.T @ added @ right) @ right.T, added, 1e-4)
    assert max(float((t.delta() - tasks[n].delta()).norm()) for n, t in merged.items()) > 1e-3
    assert f"1 · {root}/one + 0.5 · {root}/two" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["inputs"]["safety"]["ranks"] == [2, 5]


def test_evidence_of_a_sum_belongs_to_that_sum(root, tmp_path):
    values = {"model": str(root / "model"), "output": tmp_path / "evidence", "device": "cpu"}
    values |= {name: root / file for name, file in DATA.items()}
    patches = {root / "one": 1.0, root / "two": 0.5}
    quiet = Reporter(quiet=True)
    pipeline.collect_to_file(Recipe.parse(values | {"safety": patches}), reporter=quiet)
    given = {"evidence": tmp_path / "evidence", "output": tmp_path / "out", "kl_budget": 0.01}
    pipeline.merge(Recipe.parse(given | {"safety": patches}), reporter=quiet)
    whole = pipeline.merge(Recipe.parse(values | {"safety": patches, "output": tmp_path / "whole", "kl_budget": 0.01, "holdout": 0.2}), reporter=quiet)  # fmt: skip
    assert whole["inputs"]["safety"]["sha256"] == load_sum(patches).sha256
    from sst_merge.errors import MergeError

    with pytest.raises(MergeError, match="safety"):
        pipeline.merge(Recipe.parse(given | {"safety": root / "one", "output": tmp_path / "other"}), reporter=quiet)
    assert torch.isfinite(load_adapter(tmp_path / "out").terms["model.layers.0.self_attn.q_proj"].A).all()
