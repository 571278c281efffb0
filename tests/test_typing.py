"""What a type checker makes of a user's script."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from inspect import Parameter, signature
from pathlib import Path
from typing import get_args

import pytest

from sst_kernels.fisher import STRUCTURES
from sst_kernels.fisher.accumulate import StructureName, StructureOptions
from sst_kernels.gevp import Settings, gevp
from sst_merge.recipe import options_of

ROOT = Path(__file__).parent.parent
RIGHT = """
import torch

import sst_kernels as sst
from sst_kernels.gevp import Diagonal, gevp

model, eye = torch.nn.Linear(3, 3), torch.eye(3)
with sst.fisher_accumulate(model, "safety", structure="lowrank", rank=8, point="reference", space="core") as seen:
    sst.sequence_nll(model, {}, labels="mc").backward()
space = sst.subspace(seen.fisher, seen.fisher, scope="module", metric="frobenius")
shares: dict[str, float] = space.soft(kl_budget=0.02).kept
evidence = sst.Evidence.of(model, adapter="safety", dtype="bfloat16")
with evidence.accumulate("gain", sequences=3) as reading:
    reading.backward({}, labels="mc", draws=2)
path: list[sst.Patch] = evidence.subspace(3.0, scope="module").path([0.01, 0.02])
gevp(eye, eye, 1, method="direct", preconditioner="none").raise_if_failed().values
routes: list[str] = [result.route for result in gevp([eye], [eye], 1, damping=0.1)]
gevp(Diagonal(eye[0]), Diagonal(eye[0]), 1, tol=1e-9, max_cycles=5, seed=1, memory_budget=None).cycles
"""
WRONG = {
    'sst.fisher_accumulate(model, point="referense")': 'Argument "point"',
    'sst.fisher_accumulate(model, structure="ful")': 'Argument "structure"',
    'sst.fisher_accumulate(model, adaptor="safety")': 'Unexpected keyword argument "adaptor"',
    "sst.fisher_accumulate(modell=model)": 'Unexpected keyword argument "modell"',
    'sst.fisher_accumulate(model, rank="8")': 'Argument "rank"',
    'sst.sequence_nll(model, {}, labels="modle")': 'Argument "labels"',
    'sst.subspace(seen.fisher, seen.fisher, scope="globl")': 'Argument "scope"',
    "sst.subspace(seen.fisher, seen.fisher, dampng=0.1)": 'Unexpected keyword argument "dampng"',
    "space.soft(0.02)": "Too many positional arguments",
    'evidence.accumulate("harm")': "Argument 1",
    'evidence.subspace(3.0, metric="frobenus")': 'Argument "metric"',
    'gevp(eye, eye, 1, method="dirct")': "No overload variant",
    'gevp(eye, eye, 1, preconditioner="exact")': "No overload variant",
    "gevp(eye, eye, 1, tolerance=1e-8)": 'Unexpected keyword argument "tolerance"',
    "gevp(eye, eye, 1, dampng=0.1)": 'Unexpected keyword argument "dampng"',
    'gevp(eye, eye, 1, max_cycles="3")': "No overload variant",
    "gevp(eye, eye)": "No overload variant",
    "gevp(eye, eye, 1, 0.1)": "No overload variant",
    "gevp(Diagonal(eye[0]), Diagonal(eye[0]), 1).valeus": 'no attribute "valeus"',
}


def checked(script: str, folder: Path) -> list[str]:
    """mypy's errors on a user's script; torch is skipped, which takes a second instead of twelve."""
    (folder / "mypy.ini").write_text(
        "[mypy]\nignore_missing_imports = True\n[mypy-torch.*]\nfollow_imports = skip\n[mypy-sst_kernels.*]\nfollow_imports = silent\n"
    )
    (folder / "script.py").write_text(script)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        "mypy.ini",
        "--cache-dir",
        str(folder / "cache"),
        "script.py",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"MYPYPATH": str(ROOT), "PATH": ""})
    assert not done.stderr, done.stderr
    return [line for line in done.stdout.splitlines() if ": error: " in line]


def test_typos_are_errors(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    assert checked(RIGHT, tmp_path) == []
    lines = RIGHT.count("\n")
    errors = checked(RIGHT + "\n".join(WRONG) + "\n", tmp_path)
    for number, (call, message) in enumerate(WRONG.items(), lines + 1):
        assert any(error.startswith(f"script.py:{number}: ") and message in error for error in errors), (call, errors)
    assert {int(error.split(":")[1]) for error in errors} == set(range(lines + 1, lines + 1 + len(WRONG)))


def test_gevp_takes_what_settings_hold():
    taken = {name: x.default for name, x in signature(gevp).parameters.items() if x.kind is Parameter.KEYWORD_ONLY}
    assert taken == {field.name: field.default for field in fields(Settings)}


def test_fisher_accumulate_takes_what_structures_hold():
    taken = {name for kind in STRUCTURES for name in options_of(kind)} - {"device", "sample", "count"}
    assert set(StructureOptions.__annotations__) == taken
    assert set(get_args(StructureName)) == set(STRUCTURES)
