"""The corpus of the fuzzers, replayed; and, slowly, searched for more with coverage guidance (needs atheris)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
SECONDS = int(os.environ.get("FUZZ_SECONDS", "20"))


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_inputs_found_before(path):
    TARGETS[path.parent.name](path.read_bytes())


def test_every_target_has_a_corpus():
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_new_is_found(name, tmp_path):
    """What it writes when it fails belongs into the corpus, once it is repaired."""
    pytest.importorskip("atheris", reason="atheris is not installed: pip install -e .[fuzz]")
    found = tmp_path / "corpus"
    shutil.copytree(CORPUS / name, found)
    limits = [f"-max_total_time={SECONDS}", f"-artifact_prefix={tmp_path}/", "-rss_limit_mb=4096", "-timeout=30"]
    command = [sys.executable, "-m", "tests.fuzz", name, found, *limits]
    done = subprocess.run(command, cwd=CORPUS.parents[2], capture_output=True, text=True)
    crashes = [path.read_bytes() for path in tmp_path.glob("*-*")]
    assert done.returncode == 0, f"{crashes}\n{done.stderr[-3000:]}"
