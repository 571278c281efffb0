"""The environment report: complete, robust, and the one list of environment variables."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sst_kernels
from sst_kernels import _native, env

ROOT = Path(__file__).parents[1]
READ = re.compile(r"""(?:environ(?:\.get\(|\.setdefault\(|\[)|getenv\()\s*["']([A-Z][A-Z0-9_]*)["']""")


def run(*arguments: str) -> str:
    call = [sys.executable, "-m", "sst_kernels.env", *arguments]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout


def test_json_is_the_report_of_this_machine():
    import torch

    facts = json.loads(run("--json"))
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["system"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["modules"].keys() == {"_native_cpu", "_native_cuda", "triton kernels"}
    assert facts["variables"].keys() == env.VARIABLES.keys()


def test_the_page_names_everything_that_the_json_holds():
    facts = env.report()
    page = "\n".join(env.lines(facts))
    for title, part in facts.items():
        assert title in page
        for name in part:
            assert name in page


def test_a_missing_module_says_why(monkeypatch):
    def missing():
        raise ImportError("libcublas.so.13: cannot open shared object file")

    monkeypatch.setattr(_native, "cuda", missing)
    facts = env.report()
    assert facts["modules"]["_native_cuda"] == "unavailable: libcublas.so.13: cannot open shared object file"
    assert facts["modules"]["_native_cpu"].startswith("loaded from")


@pytest.mark.parametrize("part", ["_torch", "_devices", "_cpu", "_memory_gib", "_commit"])
def test_no_part_can_bring_the_report_down(monkeypatch, part):
    def broken():
        raise RuntimeError("driver is older than the runtime")

    monkeypatch.setattr(env, part, broken)
    assert "unavailable: driver is older than the runtime" in "\n".join(env.lines(env.report()))


def test_every_environment_variable_that_is_read_is_listed():
    sources = [ROOT / "setup.py", *(ROOT / "sst_kernels").rglob("*.py"), *(ROOT / "python").rglob("*.py")]
    read = {name for path in sources for name in READ.findall(path.read_text(encoding="utf-8"))}
    assert read
    assert read <= env.VARIABLES.keys()


def test_a_source_tree_in_front_of_an_installed_package_is_said_to_be(tmp_path):
    """As from the root of a fresh clone beside `pip install .`."""
    unbuilt = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(sst_kernels.__file__).parent, tmp_path / "tree/sst_kernels", ignore=unbuilt)
    site = tmp_path / "site"
    (site / "sst_kernels").mkdir(parents=True)
    (site / "sst_kernels/_native_cpu.so").touch()
    (site / "sst_kernels-0.1.0.dist-info").mkdir()
    (site / "sst_kernels-0.1.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: sst-kernels\nVersion: 0.1.0\n"
    )
    script = (
        "import sys\nsys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        "import sst_kernels._native as n\ntry: n.cpu()\nexcept ImportError as e: print(e)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "tree", env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    told = f"the source tree {tmp_path / 'tree'}, where nothing was compiled, shadows the installed package {site / 'sst_kernels'}"
    assert ended.stdout.startswith(told)
    assert f"RuntimeWarning: {told}" in ended.stderr
