"""The native CPU module by itself: what it refuses, and that other threads run beside it."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from sst_kernels import _native
from sst_kernels.gevp.dense import empty_outputs


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
