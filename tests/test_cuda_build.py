"""The CUDA sources without a GPU: they compile for three architectures with warnings as errors and without spills, and the
module they make loads as far as a machine without a driver allows."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
SLOW = {"gemm.cu", "solve_direct.cu", "solve_iterative.cu"}
ARCHITECTURES = (80, 90, 100)
# Registers a thread may use so that the CTAs which each kernel counts on fit an SM's 65536 (thin_rows: one of 256 threads).
REGISTERS = {"gemm_tile_kernel": 168, "thin_rows_kernel": 255, "thin_columns_kernel": 128, "jacobi_kernel": 80}


def compile_device_code(source: str, architecture: int, target: Path) -> str:
    """ptxas's resource report of one source at one architecture."""
    command = [
        *("nvcc", "-std=c++17", "-O3", "--extended-lambda", "--expt-relaxed-constexpr", "--Werror=all-warnings"),
        *("-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v", f"-arch=sm_{architecture}", "-cubin", "-o", str(target)),
        *(f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"),
        str(ROOT / "csrc" / "cuda" / source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return done.stderr


def cases() -> list:
    out = []
    for source in SOURCES:
        for architecture in ARCHITECTURES:
            slow = source in SLOW or architecture != 90
            out.append(pytest.param(source, architecture, marks=[pytest.mark.slow] if slow else []))
    return out


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize(("source", "architecture"), cases())
def test_kernels_compile_without_spills(source: str, architecture: int, tmp_path: Path):
    report = compile_device_code(source, architecture, tmp_path / "code.cubin")
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        flags=re.DOTALL,
    )
    assert kernels, f"ptxas reported no kernel:\n{report[:2000]}"
    for name, stores, loads, registers in kernels:
        assert (stores, loads) == ("0", "0"), f"{name} spills {stores} + {loads} bytes on sm_{architecture}"
        limit = next((limit for part, limit in REGISTERS.items() if part in name), 255)
        assert int(registers) <= limit, f"{name} uses {registers} registers on sm_{architecture}, allowed {limit}"
    if source == "gemm.cu":
        sass = subprocess.run(
            ["cuobjdump", "--dump-sass", str(tmp_path / "code.cubin")], capture_output=True, text=True
        )
        assert "DMMA" in sass.stdout, f"no fp64 tensor-core instruction on sm_{architecture}"


def test_module_loads_and_names_the_failing_call_without_a_driver():
    import torch

    native = pytest.importorskip("sst_kernels._native_cuda", reason="the CUDA module is not built here")
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    assert native.Options.for_problem(1024, 16).basis >= 64
    with pytest.raises(RuntimeError, match=r"cuda\w+\(.*failed: cudaError\w+"):
        native.direct_workspace_bytes(2, 100, 4, False, 0)
