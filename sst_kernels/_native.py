"""Lazy access to the compiled modules: importing sst_kernels stays cheap, and a missing build says how to get one."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType


@cache
def cpu() -> ModuleType:
    """The CPU routes of the eigensolver.

    Raises:
        ImportError: the extension was not built.
    """
    try:
        return importlib.import_module("sst_kernels._native_cpu")
    except ImportError as error:
        raise ImportError(
            f"sst_kernels._native_cpu is not importable ({error}). Build it with `pip install .` (or `pip install -e .`) in the "
            "repository; that needs a C++17 compiler and nothing else."
        ) from error


@cache
def cuda() -> ModuleType:
    """The CUDA routes. torch is imported first: its wheels bring cuSOLVER into the process, where the module finds it when it needs it.

    Raises:
        ImportError: the extension was not built.
    """
    import torch  # noqa: F401

    try:
        return importlib.import_module("sst_kernels._native_cuda")
    except ImportError as error:
        raise ImportError(
            f"sst_kernels._native_cuda is not importable ({error}). It is built by `pip install .` where nvcc is found; the build "
            "log says what was missing."
        ) from error


def cuda_available() -> bool:
    """Whether the CUDA module can be loaded."""
    try:
        cuda()
    except ImportError:
        return False
    return True
