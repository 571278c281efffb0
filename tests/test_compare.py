"""`sst-merge compare` on a tiny model: same table twice, resumed rows, intervals and areas by their definitions, the page."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from sst_merge.compare import compare as comparing
from sst_merge.compare.compare import compare, summarise
from sst_merge.compare.pareto import Resample, equal_refusal, hypervolume, interval, kl_at, non_dominated
from sst_merge.compare.recipe import Comparison
from sst_merge.compare.report import markdown
from sst_merge.errors import MergeError, OutputError, RecipeError
from sst_merge.io.data import load_dataset
from sst_merge.merge import source
from sst_merge.progress import Reporter
from tests import merge_cases as cases

QUIET = Reporter(quiet=True)
TIMES = ("merge_seconds", "evaluation_seconds")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    cases.model_folder(root / "model")
    cases.adapter_folder(root / "task", seed=1, r=2)
    cases.adapter_folder(root / "safety", seed=2, target_modules=["q_proj", "o_proj", "up_proj"], scale=0.2)
    files = {"harm": "steal", "benign": "bake", "eval_harm": "rob", "eval_benign": "fry", "safe": "kill a process"}
    for name, word in files.items():
        cases.write_jsonl(root / f"{name}.jsonl", cases.pairs(8, word))
    (root / "compare.yml").write_text(
        "model: model\nsafety: safety\ntask: task\nharm_data: harm.jsonl\nbenign_data: benign.jsonl\n"
        "eval_harm_data: eval_harm.jsonl\neval_benign_data: eval_benign.jsonl\neval_safe_data: safe.jsonl\noutput: out\n"
        "device: cpu\ngenerate_tokens: 2\ntokens_per_batch: 512\nmethods: [sst, ties, tsv-m]\n"
        "strengths: {plain: [0.2, 0.6, 1.0], sst: [0.005, 0.05], ties: [0.5], tsv-m: [0.5]}\n"
    )
    return root


@pytest.fixture(scope="module")
def first(world):
    return compare(Comparison.load(world / "compare.yml"), reporter=QUIET)


def untimed(report):
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in report["rows"]]
    return json.loads(json.dumps({"rows": rows, "methods": report["methods"]}))


def test_the_table_comes_out_twice(first, world):
    again = compare(Comparison.load(world / "compare.yml", output=world / "again"), reporter=QUIET)
    assert untimed(again) == untimed(first)


def test_finished_rows_are_not_measured_again(first, world, monkeypatch):
    def never(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(comparing._Bench, "_measure", never)
    assert compare(Comparison.load(world / "compare.yml"), reporter=QUIET) == first


def test_no_patch_and_plain_are_always_there(first):
    methods = [row["method"] for row in first["rows"]]
    assert methods == ["no patch", "plain", "plain", "plain", "sst", "sst", "ties", "tsv-m"]
    assert abs(first["rows"][0]["benign_kl"]) < 1e-6  # rounding of the float32 log-probabilities
    assert all(row["benign_kl"] > 0 and row["over_refusal"] is not None for row in first["rows"][1:])


def test_plain_costs_what_plain_costs(first):
    for row in first["rows"]:
        if row["method"] == "plain":
            assert row["intervals"]["kl"][0] == pytest.approx(row["benign_kl"], rel=1e-9)
            ratio = row["intervals"]["ratio"][0]
            assert ratio is None or ratio == pytest.approx(1.0, rel=1e-9)


def test_the_unpatched_model_is_no_point_of_the_plain_curve(first):
    """Its KL is zero up to rounding, whose logarithm would decide what lies between it and the first α."""
    plain = [row["intervals"] for row in first["rows"] if row["method"] == "plain"]
    lowest = min(p["kl"][0] for p in plain)
    assert all(
        row["intervals"]["plain_kl"][0] is None or row["intervals"]["plain_kl"][0] >= lowest * (1 - 1e-9)
        for row in first["rows"]
    )


def test_at_equal_rate_plain_addition_costs_its_own_kl_over_that_of_the_row(first, world):
    recipe = Comparison.load(world / "compare.yml")
    files = sorted((world / "out" / "rows").glob("*.json"))
    kept = {(r["method"], r["strength"]): r for r in (json.loads(f.read_text())["row"] for f in files)}
    rows = [kept[row["method"], row["strength"]] for row in first["rows"]]
    shares = {"no patch": 0, ("plain", 0.2): 2, ("plain", 0.6): 4, ("plain", 1.0): 7, "sst": 4, "ties": 3, "tsv-m": 1}
    for row in rows:
        harmful = [p for p in row["prompts"] if p["set"] == "harmful"]
        refused = shares.get(row["method"], shares.get((row["method"], row["strength"])))
        for number, prompt in enumerate(harmful):
            prompt["refused"] = number < refused
    data = {name: load_dataset(world / f"{name}.jsonl", cases.tokenizer()) for name in ("eval_harm", "eval_benign")}
    found = {(r["method"], r["strength"]): r for r in summarise(recipe, rows, data)["rows"]}
    kl = {key: row["benign_kl"] for key, row in found.items()}
    ratio = {key: row["intervals"]["rate_ratio"][0] for key, row in found.items()}
    assert ratio["sst", 0.05] == pytest.approx(kl["plain", 0.6] / kl["sst", 0.05], rel=1e-9)
    between = (kl["plain", 0.2] * kl["plain", 0.6]) ** 0.5  # half way from 2 to 4 of 8, log-linear
    assert ratio["ties", 0.5] == pytest.approx(between / kl["ties", 0.5], rel=1e-9)
    assert ratio["tsv-m", 0.5] is None  # plain addition was not measured at so few
    silent = summarise(recipe.model_copy(update={"generate_tokens": 0}), rows, data)
    assert all("rate_ratio" not in row["intervals"] for row in silent["rows"])


def test_report_files(first, world):
    out = world / "out"
    assert {p.name for p in out.iterdir()} == {"rows", "report.json", "report.md", "compare.html"}
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(first))
    text = markdown(first)
    assert text.count("\n| plain") == 4
    assert "95 % bootstrap" in text


def test_the_page_has_every_row_and_its_answers(first, world):
    page = (world / "out" / "compare.html").read_text()
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert len(data["points"]) == len(first["rows"]) - 1  # what has no patch is a line in the chart
    assert {p["answers"] for p in data["points"]} < set(data["answers"]["names"])
    assert {r["set"] for r in data["answers"]["rows"]} == {"harmful", "safe", "benign"}
    assert all(set(r["of"]) == set(data["answers"]["names"]) for r in data["answers"]["rows"])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("methods: [tsv_m]", "did you mean 'tsv-m'"),
        ("methods: [SST]", "did you mean 'sst'"),
        ("methods: sst", "methods: Input should be a valid list"),
        ("methods: [[sst]]", "methods.0: Input should be a valid string"),
        ("methods: [null]", "methods.0: Input should be a valid string"),
        ("metods: [sst]", "did you mean 'methods'"),
        ("strengths: {plain: 1}", "strengths.plain: Input should be a valid list"),
        ("strengths: {plain: []}", "at least 1 item"),
        ("strengths: {plain: [.nan]}", "finite number"),
        ("strengths: {plain: [.inf]}", "finite number"),
        ("strengths: {plain: [half]}", "valid number"),
        ("strengths: {plain: [1, 1.0]}", "a number twice"),
        ("strengths: {plan: [1]}", "did you mean 'plain'"),
        ("strengths: {dare-ties: [1]}", "not among the methods"),
        ("strengths: {no patch: [1]}", "has none"),
        ("eval_harm_data: null", "eval_harm_data"),
        ("eval_safe_data: 1", "eval_safe_data"),
        ("kl_budget: 0.05", "kl_budget: which patches are compared is said by `methods` and `strengths`"),
        ("filter: top_k", "filter: which patches"),
    ],
)
def test_wrong_recipes_are_refused(world, line, text):
    key = line.split(":")[0]
    lines = [row for row in (world / "compare.yml").read_text().splitlines() if not row.startswith(key)]
    path = world / "wrong.yml"
    path.write_text("\n".join([*lines, line]) + "\n")
    with pytest.raises(RecipeError, match=text):
        Comparison.load(path)


DAMAGES = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no JSON": lambda text: "\0" + text,
    "a list": lambda text: "[1]",
    "nested": lambda text: "[" * 100_000,
    "a number changed": lambda text: re.sub(r'("benign_kl": )[\d.e-]+', r"\g<1>0.5", text),
    "a key lost": lambda text: text.replace('"refusal_nll"', '"refusal"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_rows_are_measured_again(first, world, tmp_path, monkeypatch, damage):
    shutil.copytree(world / "out", tmp_path / "out")
    rows = sorted((tmp_path / "out" / "rows").iterdir())
    rows[3].write_text(DAMAGES[damage](rows[3].read_text()))
    shutil.copy(rows[4], rows[5])  # another configuration's row is no better
    measured, measure = [], comparing._Bench._measure

    def counted(self, adapter, label):
        measured.append(label)
        return measure(self, adapter, label)

    monkeypatch.setattr(comparing._Bench, "_measure", counted)
    again = compare(Comparison.load(world / "compare.yml", output=tmp_path / "out"), reporter=QUIET)
    assert len(measured) == 2
    assert untimed(again) == untimed(first)


def test_rows_belong_to_data_settings_and_weights(first, world, tmp_path):
    """Nothing of one comparison is taken over by another with a longer patch, other data or another model at the same place."""
    for name in ("model", "safety", "task"):
        shutil.copytree(world / name, tmp_path / name)
    for file in [*world.glob("*.jsonl"), world / "compare.yml"]:
        shutil.copy(file, tmp_path)
    names = set()

    def rows() -> int:
        compare(Comparison.load(tmp_path / "compare.yml", methods=[], strengths={"plain": [1.0]}), reporter=QUIET)
        found = {p.name for p in (tmp_path / "out" / "rows").iterdir()}
        new = len(found - names)
        names.update(found)
        return new

    assert rows() == 2
    assert rows() == 0
    cases.model(seed=1).save_pretrained(tmp_path / "model")
    assert rows() == 2
    cases.write_jsonl(tmp_path / "eval_harm.jsonl", cases.pairs(8, "loot"))
    assert rows() == 2
    cases.write_jsonl(tmp_path / "harm.jsonl", cases.pairs(9, "forge"))
    assert rows() == 0  # no method here is fitted to data


def test_rows_of_fitted_methods_belong_to_what_they_were_fitted_with(first, world, tmp_path):
    def files(**settings) -> set[str]:
        given = {"methods": ["tsv-m", "sst"], "strengths": {"plain": [1.0], "sst": [0.05], "tsv-m": [0.5]}}
        compare(Comparison.load(world / "compare.yml", output=tmp_path / "out", **given, **settings), reporter=QUIET)
        return {p.name for p in (tmp_path / "out" / "rows").iterdir()}

    kept = files()
    assert len(kept) == 4
    assert len(files(damping=0.5) - kept) == 1


def test_other_folders_are_left_alone(world, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for place in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError):
            compare(Comparison.load(world / "compare.yml", output=place), reporter=QUIET)
    assert {p.name for p in tmp_path.iterdir()} == {"thesis.tex", "file"}


def test_methods_that_cannot_be_made_say_why(world, tmp_path):
    """One row to fit on is too little for held-out folds; a KL budget is not negative. The other rows stand."""
    cases.write_jsonl(tmp_path / "one.jsonl", cases.pairs(1, "bake"))
    given = {"methods": ["sst", "tsv-m", "sst-diagonal"], "strengths": {"plain": [0.5], "sst": [0.1], "tsv-m": [0.5], "sst-diagonal": [-1]}}  # fmt: skip
    one = {"harm_data": tmp_path / "one.jsonl", "benign_data": tmp_path / "one.jsonl", "output": tmp_path / "out"}
    report = compare(Comparison.load(world / "compare.yml", **given, **one), reporter=QUIET)
    assert [r["method"] for r in report["rows"]] == ["no patch", "plain", "tsv-m"]
    sst, diagonal = (r["error"] for r in report["refused"])
    assert "fewer than folds=4" in sst
    assert "must not be negative" in diagonal
    assert "fewer than folds=4" in markdown(report)
    with pytest.raises(MergeError, match="nothing can be compared without 'plain'"):
        compare(Comparison.load(world / "compare.yml", methods=[], strengths={"plain": [-1]}, output=tmp_path / "minus"), reporter=QUIET)  # fmt: skip


def test_each_fisher_is_accumulated_once(world, tmp_path, monkeypatch):
    passes, run, read, collect = [], source.fisher_pass, [], source.collect

    def counted(session, data, **options):
        filtered = session.patch is not session.safety
        passes.append((options["structure"], options["space"], options["name"], options.get("opening"), filtered))
        return run(session, data, **options)

    monkeypatch.setattr(source, "fisher_pass", counted)
    monkeypatch.setattr(source, "collect", lambda *given: read.append(given) or collect(*given))
    names = ["sst", "sst-core", "sst-patched", "sst-frobenius", "sst-module", "sst-top-k", "random-subspace", "diagonal-sst", "fisher-average"]  # fmt: skip
    given = {"methods": names, "strengths": {"plain": [0.5]} | {n: [0.05, 0.1] for n in names}}
    report = compare(Comparison.load(world / "compare.yml", output=tmp_path / "out", **given), reporter=QUIET)
    assert not report["refused"]
    assert len(passes) == len(set(passes))
    assert {p[:2] for p in passes} == {("full", "core"), ("diagonal", "factor")}
    assert len(read) == 1
    assert {p[2] for p in passes if p[0] == "full"} == {"harm-patched"}  # all others follow from the one reading


def test_kl_at_is_log_linear_between_non_dominated_points():
    nll, kl = np.array([2.0, 1.0, 0.5, 0.8]), np.array([1e-3, 1e-1, 1.0, 5.0])
    assert kl_at(1.5, nll, kl) == pytest.approx(1e-2)
    assert kl_at(0.75, nll, kl) == pytest.approx(10**-0.5)
    assert np.isnan(kl_at(0.4, nll, kl))
    assert np.isnan(kl_at(2.1, nll, kl))


def test_equal_refusal_of_a_known_pair():
    """A point at plain's refusal NLL with a quarter of its KL, whatever the prompts weigh: the ratio is 4, without doubt."""
    random = np.random.default_rng(0)
    labels = random.integers(1, 9, 20).astype(float)
    base = random.random(20)
    plain_harm = np.stack([np.stack([base * labels * f, labels], 1) for f in (2.0, 1.0)])
    plain_benign = np.stack([np.stack([base * labels * f, labels], 1) for f in (0.1, 0.4)])
    point = plain_harm[1], np.stack([base * labels * 0.1, labels], 1)
    found = equal_refusal(point, (plain_harm, plain_benign), Resample(20, 20, draws=200))
    assert found["ratio"] == pytest.approx((4.0, 4.0, 4.0))
    low, high = found["kl"][1:]
    assert low < found["kl"][0] < high


def test_hypervolume_of_a_staircase():
    harm = np.array([[[1.0, 1.0]], [[0.5, 1.0]], [[0.9, 1.0]]])
    benign = np.array([[[0.1, 1.0]], [[0.4, 1.0]], [[0.9, 1.0]]])
    value, low, high = hypervolume((harm, benign), (2.0, 0.5), Resample(1, 1, draws=5))
    assert value == low == high == pytest.approx((1.5 * 0.1 + 1.0 * 0.3) / 1.0)


def test_interval_of_a_mean_covers_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 1.0, 400)
    sums = np.stack([values, np.ones(400)], 1)
    mean, low, high = interval(Resample(400, 400, draws=4000).means(sums, sums)[0])
    error = values.std() / 20
    assert (mean - low, high - mean) == pytest.approx((1.96 * error, 1.96 * error), rel=0.1)


def test_non_dominated_keeps_ties():
    assert non_dominated(np.array([1.0, 1.0, 2.0, 0.5]), np.array([1.0, 1.0, 1.0, 3.0])).tolist() == [
        True,
        True,
        False,
        True,
    ]
