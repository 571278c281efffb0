"""The demo's own steps on the tiny model: its rows, equal cost, and what it leaves and says."""

from __future__ import annotations

import importlib.resources
import json

import pytest
from peft import PeftModel

from sst_merge import demo
from sst_merge.progress import Reporter
from tests import merge_cases as cases


def test_the_demo_compares_at_equal_cost_and_says_where_everything_is(tmp_path, monkeypatch, capsys):
    shipped = tmp_path / "demo_data"
    cases.adapter_folder(shipped / "task", seed=1)
    cases.adapter_folder(shipped / "safety", seed=2)
    for name, n, word in (
        ("harmful_fisher", 40, "rob"),  # as many as let SST spend what plain addition costs
        ("benign_fisher", 12, "bake"),
        ("harmful_eval", 2, "steal"),
        ("benign_eval", 4, "fry"),
        ("task_eval", 3, "solve"),
    ):
        cases.write_jsonl(shipped / f"{name}.jsonl", cases.pairs(n, word))
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(demo, "WHEEL", str(cases.model_folder(tmp_path / "model")))
    report = demo.run(tmp_path / "out", {"device": "cpu"}, reporter=Reporter())
    shown = capsys.readouterr()

    rows = report["evaluation"]
    assert list(rows) == [
        "no patch",
        *(f"plain addition, α = {alpha:g}" for alpha in demo.ALPHAS),
        *(f"SST, {budget:g} nats predicted" for budget in demo.BUDGETS),
        *(f"SST, KL matched to α = {alpha:g}" for alpha in demo.MATCHED),
    ]
    for alpha in demo.MATCHED:
        target = rows[f"plain addition, α = {alpha:g}"]["benign_kl"]
        assert rows[f"SST, KL matched to α = {alpha:g}"]["benign_kl"] == pytest.approx(target, rel=demo.TOLERANCE)
    assert [point["measured_kl"] for point in report["calibration"]] == [
        rows[name]["benign_kl"] for name in rows if name.startswith("SST")
    ]
    assert all(name.split(",")[0] in shown.out for name in rows)
    assert all(0 <= row["task_accuracy"] <= 1 for row in rows.values())
    assert all(str(tmp_path / path) in shown.out for path in ("out", "out/report.html"))
    assert "left" in shown.err
    assert json.loads((tmp_path / "out/prompts.json").read_text()).keys() == rows.keys()
    PeftModel.from_pretrained(cases.model(), tmp_path / "out")
