"""Test session set-up: import paths of both packages, and Triton's interpreter where there is no GPU."""

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

# Read by triton when it is first imported: kernels then run on CPU tensors, element by element, in NumPy.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="run and time the benchmarks of bench/")


def pytest_configure(config):
    if config.getoption("--benchmark") and config.args_source is config.ArgsSource.TESTPATHS:
        config.args = [str(ROOT / "bench")]


def pytest_collection_modifyitems(items):
    import pytest

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
