"""`sst-merge compare` killed, terminated or out of disk at random points, and run again: the same table, nothing else left."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest

from tests import merge_cases as cases
from tests import merge_faults as faults

FILES = {"rows", "report.json", "report.md", "compare.html"}


def table(output: Path) -> dict:
    """The report, but for its seconds, its own place, and the commit, which may be another when work goes on beside the tests."""
    report = json.loads((output / "report.json").read_text())
    report["context"]["recipe"].pop("output")
    report["context"]["versions"].pop("commit")
    for row in report["rows"]:
        row.pop("merge_seconds")
        row.pop("evaluation_seconds")
    return report


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The inputs, the table of an undisturbed run, and its seconds."""
    folder = faults.inputs(tmp_path_factory.mktemp("compare"))
    for name, word in (("eval_harm", "rob"), ("eval_benign", "fry")):
        cases.write_jsonl(folder / f"{name}.jsonl", cases.pairs(8, word))
    recipe = {k: v for k, v in faults.RECIPE.items() if k != "kl_budget"} | {
        "eval_harm_data": "eval_harm.jsonl", "eval_benign_data": "eval_benign.jsonl", "generate_tokens": 2,
        "methods": ["sst", "ties"], "strengths": {"plain": [0.5, 1.0], "sst": [0.01, 0.1], "ties": [0.5]},
    }  # fmt: skip
    (folder / "compare.yml").write_text(json.dumps(recipe))
    faults.run(folder, folder / "warm-up", comparison=True)  # starts the fork server
    start = time.monotonic()
    code, text = faults.run(folder, folder / "expected", comparison=True)
    assert code == 0, text
    return folder, table(folder / "expected"), time.monotonic() - start


def scenario(undisturbed, output: Path, seed: int) -> None:
    folder, expected, seconds = undisturbed
    draw, happened = random.Random(seed), []
    for i in range(draw.randint(1, 3)):
        kind, point = faults.KINDS[(seed + i) % 3], draw.random()
        code, text = faults.run(folder, output, kind, point, seconds, comparison=True)
        happened.append((kind, round(point, 2), code))
        assert "Traceback" not in text, (happened, text)
        if kind == "disk full" and code:
            assert code == 2, happened
            assert "could not be written" in text
    code, text = faults.run(folder, output, comparison=True)
    assert code == 0, (happened, text)
    assert table(output) == expected, happened
    assert {p.name for p in output.iterdir() if not p.name.startswith(".")} == FILES, happened
    if tally := os.environ.get("FAULT_TALLY"):
        with open(tally, "a") as file:
            file.write("".join(f"{kind} {code}\n" for kind, _, code in happened))


@pytest.mark.parametrize("seed", range(3))
def test_a_comparison_goes_on_to_the_same_table(seed, undisturbed, tmp_path):
    scenario(undisturbed, tmp_path / "out", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_many_random_faults(seed, undisturbed, tmp_path):
    scenario(undisturbed, tmp_path / "out", seed)
