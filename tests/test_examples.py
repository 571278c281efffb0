"""The examples of the docstrings, run: every public name has one, and prints what it says."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any, get_origin

import pytest
import torch

import sst_kernels
import sst_merge
from tests import merge_cases as cases
from tests.models import tiny_batch, tiny_lora

MODULES = (
    *("sst_kernels", "sst_kernels.evidence", "sst_kernels.fisher", "sst_kernels.gevp", "sst_kernels.inputs"),
    *("sst_kernels.ops", "sst_kernels.subspace", "sst_merge"),
)


def public() -> dict[str, Any]:
    """Every public class and function once, by the name of the last module that exports it."""
    found: dict[int, tuple[str, Any]] = {}
    for module in MODULES:
        own = importlib.import_module(module)
        for name in getattr(own, "__all__", ()):
            value = getattr(own, name)
            if callable(value) and get_origin(value) is None:  # no constants, no Literals
                found[id(value)] = f"{module}.{name}", value
    return dict(found.values())


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    """What the examples take for given (docs/api/index.md)."""
    torch.manual_seed(0)
    model = tiny_lora()
    harm, benign = ([tiny_batch(4, seed=s) for s in seeds] for seeds in ((0, 1), (2, 3, 4)))
    evidence = sst_kernels.Evidence.of(model, "safety")
    fishers = []
    for side, batches in (("gain", harm), ("cost", benign)):
        with evidence.accumulate(side) as reading:
            for batch in batches:
                reading.backward(batch)
        with sst_kernels.fisher_accumulate(model, "safety", point="reference") as accumulator:
            for batch in batches:
                model(**batch).loss.backward()
        fishers.append(accumulator.fisher)
    given = {"sst": sst_kernels, "torch": torch, "model": model, "harm_batches": harm, "benign_batches": benign}
    return given | {"evidence": evidence, "gain": fishers[0], "cost": fishers[1]}


def on_disk() -> dict[str, Any]:
    """What the examples of the tool take for given: folders "base", "task" and "safety" here, and rows of two kinds."""
    cases.model_folder(Path("base"))
    for folder, seed in (("task", 1), ("safety", 2)):
        cases.adapter_folder(Path(folder), seed=seed)
    return {"sst_merge": sst_merge, "rows": cases.pairs(6, "rob"), "others": cases.pairs(6, "bake")}


@pytest.mark.parametrize("name", public())
def test_the_example(name, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(public()[name]) or ""
    given = world | {"model": copy.deepcopy(world["model"])}  # some examples change it
    if name.startswith("sst_merge."):
        given |= on_disk()
    example = doctest.DocTestParser().get_doctest(text, given, name, None, 0)
    skipped = doctest.OPTIONFLAGS_BY_NAME["SKIP"]
    assert [e for e in example.examples if not e.options.get(skipped)], f"{name} has no example that runs"
    assert not doctest.DocTestRunner().run(example, out=sys.stdout.write).failed
