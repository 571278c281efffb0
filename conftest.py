"""Test session set-up: import paths of both packages, Triton's interpreter where there is no GPU, and no luck in what is drawn."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]
pytest_plugins = ["tests.gevp_backends"]

# What the terminal and the job say in which the tests run: outputs, their widths and ranks are those that a test asks for.
for name in (
    *("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "SST_MEMORY", "SST_CACHE"),
):
    os.environ.pop(name, None)

# Read by triton when it is first imported: kernels then run on CPU tensors, element by element, in NumPy.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run, and none too slow for a busy machine: a failure is one of the change. `make test-all` draws others.
settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fixed")


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="run and time the benchmarks of bench/")


def pytest_configure(config):
    if config.getoption("--benchmark") and config.args_source is config.ArgsSource.TESTPATHS:
        config.args = [str(ROOT / "bench")]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What a test draws without a generator of its own is the same alone, in any order and on any worker."""
    torch.manual_seed(0)
