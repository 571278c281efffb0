"""Lazy access to the compiled modules: importing sst_kernels stays cheap, and a missing build says how to get one."""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import cache
from pathlib import Path
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
        if (other := shadowed()) is not None:
            raise ImportError(_hides(other)) from error
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


def shadowed(here: Path = Path(__file__).parent) -> Path | None:
    """The installed package that the one in folder `here`, which was not built, stands in front of; None where there is none."""
    if any(here.glob("_native_cpu*")):
        return None
    for found in importlib.metadata.distributions(name="sst-kernels"):
        other = Path(str(found.locate_file("sst_kernels")))
        if other.resolve() != here.resolve() and any(other.glob("_native_cpu*")):
            return other
    return None


def warn_if_shadowed() -> None:
    """A warning where a source tree without compiled parts hides an installed package that has them."""
    if (other := shadowed()) is not None:
        import warnings

        warnings.warn(_hides(other), RuntimeWarning, stacklevel=3)


def _hides(other: Path) -> str:
    return (
        f"the source tree {Path(__file__).parents[1]}, where nothing was compiled, shadows the installed package {other}: start Python in "
        "another folder, or build the tree with `pip install -e .`"
    )
