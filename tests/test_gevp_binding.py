"""The native CPU module by itself: what it refuses, and that other threads run beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from sst_kernels import _native
from sst_kernels.gevp.dense import empty_outputs, workspace_bytes

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 5}, "k must be between 1 and n"),
        ({"a": 0}, "A and B must have addresses"),
        ({"b_stride": 8}, "strides must be at least n"),
        ({"batch": 0}, "at least one problem"),
        ({"threads": 0}, "at least one thread"),
        ({"vectors": 0}, "every output must have an address"),
    ],
)
def test_the_binding_refuses_what_would_leave_the_tensors(change, message):
    a, b = (torch.eye(4, dtype=torch.float64)[None] for _ in range(2))
    names = ("values", "vectors", "bounds", "status", "cycles")
    outputs = dict(zip(names, empty_outputs((1,), 4, 2, a.device)))
    arguments = {
        "a": a.data_ptr(),
        "a_stride": 16,
        "b": b.data_ptr(),
        "b_stride": 16,
        "single": False,
        "batch": 1,
        "n": 4,
    }
    arguments |= {"k": 2, "threads": 1} | {name: tensor.data_ptr() for name, tensor in outputs.items()}
    _native.cpu().solve_direct(**arguments)
    with pytest.raises(RuntimeError, match=message):
        _native.cpu().solve_direct(**(arguments | change))


def test_the_binding_lets_other_threads_run():
    """Threads are switched only where one gives way, so that this one runs during a solve only if that does: on a busy machine not
    during each."""
    n, batch = 160, 20
    a = torch.randn(batch, n, n, dtype=torch.float64)
    a, b = a @ a.mT, torch.eye(n, dtype=torch.float64).expand(batch, n, n).contiguous()
    outputs = dict(zip(("values", "vectors", "bounds", "status", "cycles"), empty_outputs((batch,), n, 2, a.device)))
    addresses = {name: tensor.data_ptr() for name, tensor in outputs.items()}
    sizes = {"a_stride": n * n, "b_stride": n * n, "batch": batch, "n": n, "k": 2, "threads": 1, "single": False}

    def solve(begun: threading.Event, ended: list[bool]) -> None:
        begun.set()
        _native.cpu().solve_direct(a=a.data_ptr(), b=b.data_ptr(), **sizes, **addresses)
        ended.append(True)

    def early() -> bool:
        begun, ended = threading.Event(), []
        worker = threading.Thread(target=solve, args=(begun, ended))
        worker.start()
        begun.wait()
        ran = not ended
        worker.join()
        return ran

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        assert any(early() for _ in range(50))
    finally:
        sys.setswitchinterval(interval)
    assert outputs["status"].eq(0).all()


def test_a_gpu_is_current_when_its_workspace_is_asked_for(monkeypatch):
    """Handles and limits are those of the current device: asked outside of the guard they would be another GPU's."""
    entered: list[torch.device] = []
    asked: list[torch.device] = []

    class Guard:
        def __init__(self, device: torch.device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.pop()

    class Native:
        Options = _native.cpu().Options

        @staticmethod
        def workspace_bytes(*_):
            return asked.append(entered[-1]) or 1

        direct_workspace_bytes = workspace_bytes

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(_native, "cuda", Native)
    second = torch.device("cuda:1")
    for method in ("direct", "jacobi_davidson"):
        workspace_bytes(4, 300, 4, method, "cholesky", False, second)
    assert asked == [second, second]


def test_the_cuda_module_names_the_cusolver_that_it_lacks(tmp_path):
    """An empty library stands for a cuSOLVER without the batched eigensolver, and a name without a file for none."""
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    (tmp_path / "old.cpp").write_text(
        'extern "C" int cusolverGetVersion(int* version) { *version = 11603; return 0; }\n'
    )
    (tmp_path / "try.cpp").write_text(
        '#include <cstdio>\n#include "cuda/cusolver.hpp"\nint main() {\n'
        "    try { sst::cuda::CuSolver::get(); } catch (const std::exception& error) { std::puts(error.what()); }\n}\n"
    )
    old, program = tmp_path / "libold.so", tmp_path / "try"
    subprocess.run([compiler, "-shared", "-fPIC", tmp_path / "old.cpp", "-o", old], check=True)
    include = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include", "tests/cpp/emulation")]
    subprocess.run([compiler, "-std=c++17", *include, tmp_path / "try.cpp", "-o", program, "-ldl"], check=True)

    def said(library: str) -> str:
        return subprocess.run(
            [program], env={"SST_CUSOLVER": library}, capture_output=True, text=True, check=True
        ).stdout

    assert "cuSOLVER 11.6.3 has no cusolverDnCreate; 11.7.1 (CUDA 12.6.2) or newer is needed" in said(str(old))
    missing = said(str(tmp_path / "libnone.so"))
    assert "pip install nvidia-cusolver, or set SST_CUSOLVER" in missing
    assert "libnone.so: cannot open shared object file" in missing
