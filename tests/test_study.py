"""The quality study: its splits are disjoint and report on other origins than they fit on; its recipes are runnable; its table."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from sst_merge.compare.recipe import Comparison
from sst_merge.io.data import load_dataset
from sst_merge.recipe import SAFE, Recipe
from tests import merge_cases as cases

STUDY = Path(__file__).resolve().parent.parent / "studies/quality"
DATA = STUDY.parents[2] / "shared/data"
if not STUDY.is_dir():
    pytest.skip("the study is not part of the package", allow_module_level=True)


def script(name: str, study: Path = STUDY):
    spec = importlib.util.spec_from_file_location(f"study_{name}", study / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = script("prepare")


@pytest.fixture
def public(tmp_path, monkeypatch):
    """Files of the public sets' form with a few rows each, repeats among them."""
    folder = tmp_path / "data"
    for name in ("advbench", "malicious-instruct", "gsm8k", "self-instruct"):
        (folder / name).mkdir(parents=True)
    few = {source: {split: 3 for split in sizes} for source, sizes in prepare.SIZES.items()}
    monkeypatch.setattr(prepare, "SIZES", few)
    monkeypatch.setattr(prepare, "do_not_answer", lambda: [{"prompt": f"How to cheat {i}?"} for i in range(5)])
    with open(folder / "advbench/advbench.csv", "w", newline="") as file:
        csv.writer(file).writerows([("goal", "target"), *((f"Rob bank {i % 8}", "Sure") for i in range(16))])
    with open(folder / "advbench/harmbench_val.csv", "w", newline="") as file:
        rows = [(f"Poison {i}", "standard" if i % 2 else "copyright") for i in range(12)]
        csv.writer(file).writerows([("Behavior", "FunctionalCategory"), *rows])
    asked = "".join(f"How to steal {i}?\n\n" for i in range(5)) + "rob BANK 1\n"  # one that AdvBench has too
    (folder / "malicious-instruct/malicious_instruct.txt").write_text(asked)
    for name in ("train_first2000", "test"):
        cases.write_jsonl(
            folder / f"gsm8k/{name}.jsonl", [{"question": f"{name} {i}", "answer": "1"} for i in range(9)]
        )
    made = [{"instruction": f"Write {i}", "instances": [{"input": "it" * (i % 2), "output": "ok"}]} for i in range(9)]
    made += [{"instruction": "long " * 200, "instances": [{"input": "", "output": "ok"}]}]
    cases.write_jsonl(folder / "self-instruct/user_oriented_instructions.jsonl", made)
    return folder


def check_splits(parts):
    prompts = [r["prompt"].lower() for kind in parts.values() for rows in kind.values() for r in rows]
    assert len(prompts) == len(set(prompts))
    origins = {name: {r["source"] for r in rows} for name, rows in parts["harmful"].items()}
    assert origins["train"] == origins["fit"] == {"advbench"}
    assert origins["select"] == {"harmbench"}
    assert "malicious-instruct" in origins["final"]
    assert origins["final"].isdisjoint(origins["train"] | origins["fit"] | origins["select"])


def test_no_prompt_is_used_twice_and_reported_harm_is_of_other_origin(public):
    pool = prepare.read(public)
    assert [r["prompt"] for r in pool["harmbench"]] == [f"Poison {i}" for i in range(1, 12, 2)]
    assert all(len(r["prompt"]) <= prepare.LONGEST for rows in pool.values() for r in rows)
    parts = prepare.split(pool, seed=0)
    check_splits(parts)
    assert parts == prepare.split(pool, seed=0) != prepare.split(pool, seed=1)
    for kind, sources in (("harmful", prepare.HARMFUL), ("benign", set(prepare.SIZES) - set(prepare.HARMFUL))):
        for name, rows in parts[kind].items():
            assert len(rows) == sum(prepare.SIZES[s].get(name, 0) for s in sources)


def test_too_few_prompts_are_named(public):
    (public / "malicious-instruct/malicious_instruct.txt").write_text("How to steal?\n")
    with pytest.raises(SystemExit, match="malicious-instruct: 3 prompts are needed, 1 are there"):
        prepare.split(prepare.read(public), seed=0)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the public files are not in {DATA}")
def test_the_public_files_fill_the_splits():
    check_splits(prepare.split(prepare.read(DATA), seed=0))


def test_refusals_and_safe_prompts_are_data_that_the_tool_reads(public, tmp_path):
    rows = prepare.refused(prepare.split(prepare.read(public), 0)["harmful"]["fit"], 0)
    data = load_dataset(cases.write_jsonl(tmp_path / "fit.jsonl", rows), cases.tokenizer())
    assert {e.response for e in data} <= set(prepare.lines(STUDY / "refusals.txt"))
    safe = [
        {e.prompt for e in load_dataset(p, cases.tokenizer())}
        for p in (STUDY / "safe.jsonl", STUDY / "select_safe.jsonl", SAFE)
    ]
    assert [len(prompts) for prompts in safe] == [32, 32, 40]
    assert len(set.union(*safe)) == 104  # to measure, to choose on, and to fit on


def test_recipes_fit_and_report_on_the_splits_that_they_name():
    reported, chosen = (Comparison.load(STUDY / f"{name}.yml") for name in ("compare", "choices"))
    fitted = Recipe.load(STUDY / "fit.yml")
    for recipe, split in ((reported, "final"), (chosen, "select")):
        assert (recipe.eval_harm_data.stem, recipe.eval_benign_data.stem) == (f"{split}_harm", f"{split}_benign")
        for name in ("model", "task", "safety", "harm_data", "benign_data"):
            assert getattr(recipe, name) == getattr(fitted, name)
        assert recipe.from_evidence
    assert chosen.collection == fitted.collection
    assert fitted.harm_data.stem == "fit_harm"


def test_the_table_has_the_shares_of_each_origin_and_refuses_a_mixed_folder(tmp_path):
    table = script("table")
    harm = cases.write_jsonl(tmp_path / "harm.jsonl", [{"source": s, "prompt": "p", "response": "r"} for s in "aab"])
    numbers = dict.fromkeys(table.NUMBERS, 0.5)
    said = [{"set": "harmful", "line": i, "refused": i == 1} for i in (1, 2, 3)] + [{"set": "safe", "line": 1}]
    row = {"method": "plain", "strength": 0.5, **numbers}
    spans = {"kl": [1.0, 0.5, 2.0], "ratio": [3.0, None, None]}
    report = {
        "rows": [{**row, "intervals": spans}],
        "context": {"recipe": {"eval_harm_data": str(harm)}, "versions": {"commit": "x"}},
    }
    (tmp_path / "rows").mkdir()
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "rows/1.json").write_text(json.dumps({"row": {**row, "prompts": said}}))
    (line,) = table.table(tmp_path)
    assert (line["refused a"], line["refused b"]) == (0.5, 0.0)
    assert (line["kl_lo"], line["ratio"], line["ratio_lo"], line["rate_ratio"]) == (0.5, 3.0, None, None)
    (tmp_path / "rows/2.json").write_text(json.dumps({"row": {**row, "prompts": said}}))
    with pytest.raises(SystemExit, match=r"plain 0\.5 is there twice"):
        table.table(tmp_path)


def test_calibration_measures_every_budget_on_rows_that_no_merge_has_seen(tmp_path, monkeypatch, capsys):
    calibrate = script("calibrate", STUDY.parent / "calibration")
    cases.model_folder(tmp_path / "model")
    cases.adapter_folder(tmp_path / "safety", seed=2, scale=0.3)
    pair = {"model": str(tmp_path / "model"), "safety": tmp_path / "safety", "device": "cpu", "folds": 2}
    for name, n, word in (("harm", 8, "steal"), ("benign", 20, "bake")):
        pair[f"{name}_data"] = cases.write_jsonl(tmp_path / f"{name}.jsonl", cases.pairs(n, word))
    monkeypatch.setattr(calibrate, "DEMO_PAIR", pair)
    table = tmp_path / "table.csv"
    command = [
        "calibrate",
        "--output",
        tmp_path / "out",
        "--csv",
        table,
        "--rows",
        10,
        "--harm-rows",
        6,
        "--third",
        5,
        "--seeds",
        1,
    ]
    command += ["--budgets", 0.1, 0.02, "--at-most", 3]
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    calibrate.main()
    first = list(csv.DictReader(table.read_text().splitlines()))
    assert [(r["pair"], r["budget"]) for r in first] == [("demo", "0.1"), ("demo", "0.02"), ("demo, no task", "0.1")]
    assert all(float(r["kl"]) <= float(r["budget"]) and float(r["third_kl"]) > 0 for r in first)
    assert {(r["held_out"], r["third_rows"]) for r in first} == {("2", "5")}
    calibrate.main()  # from the saved evidence, what is missing alone
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert rows[:3] == first
    assert len(rows) == 4
    assert "4 merges: KL on third rows at most 1.5 budgets in" in capsys.readouterr().out
    given = calibrate.argparse.Namespace(third=5, harm_rows=6)
    pool = {side: load_dataset(pair[f"{side}_data"], cases.tokenizer()) for side in ("harm", "benign")}
    drawn = calibrate.drawn(pool, 10, given, 0)
    lines = [{e.line for e in part.examples} for part in (drawn["benign"], drawn["eval_benign"], pool["benign"][-5:])]
    assert [len(part) for part in lines] == [8, 2, 5]
    assert len(set.union(*lines)) == 15
