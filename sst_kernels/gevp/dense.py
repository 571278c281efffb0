"""Stored pencils [batch, n, n]: hands addresses to the native modules. The one place that knows their calling convention."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sst_kernels import _native
from sst_kernels.gevp import cuda

Preconditioner = Literal["cholesky", "cholesky_single", "diagonal", "none"]
PRECONDITIONERS = {name: code for code, name in enumerate((*get_args(Preconditioner), "exact"))}
DOUBLE = 8

_LIBRARY = torch.library.Library("sst_kernels", "FRAGMENT")
_LIBRARY.define(
    "gevp_dense(Tensor a, Tensor b, int k, str method, str preconditioner, float tol, int max_cycles, int seed, "
    "bool leave) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.needs_fixed_stride_order,
)


def _solve(
    a: Tensor,
    b: Tensor,
    k: int,
    method: str,
    preconditioner: str,
    tol: float,
    max_cycles: int,
    seed: int,
    leave: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values [..., k], vectors as rows [..., k, n], bounds [..., k], status [...], cycles [...] for a, b [..., n, n].

    `a` and `b` share a dtype, float32 or float64, and are contiguous; `method` is "direct" or "jacobi_davidson".
    With `leave` a problem on which the iteration seems dearer than the direct route goes over to that, and its cycles c become -1 - c; on
    a GPU, or without an fp64 factor, it ends as `max_iterations`.
    """
    shape, n = a.shape[:-2], a.shape[-1]
    batch, outputs = shape.numel(), empty_outputs(shape, n, k, a.device)
    if batch == 0 or n == 0 or k == 0:
        outputs[3].zero_(), outputs[4].zero_()
        return outputs
    where = (a.data_ptr(), n * n, b.data_ptr(), n * n, a.dtype is torch.float32, batch, n)
    addresses = [tensor.data_ptr() for tensor in outputs]
    if method == "direct" and not a.is_cuda:
        _native.cpu().solve_direct(*where, k, *addresses, threads())
        return outputs
    if method == "direct":
        cuda.solve_direct(where, k, addresses, a.device)
        return outputs
    with on_device(a.device):
        native, options, lanes = _iteration(n, k, preconditioner, a.device)
        options.tolerance, options.max_cycles, options.seed = tol, max_cycles, seed
        options.afford = affordable(n, k) if leave and not a.is_cuda else 0.0
        size = native.workspace_bytes(batch, n, options, a.dtype is torch.float32, lanes)
        workspace = torch.empty(size, dtype=torch.uint8, device=a.device)
        native.solve_dense(*where, options, *addresses, workspace.data_ptr(), size, lanes)
    return outputs


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Makes a GPU the current one: the native module takes handles, attributes and streams of that, already when it is asked for sizes."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _iteration(n: int, k: int, preconditioner: str, device: torch.device) -> tuple[Any, Any, int]:
    """The native module, the options that decide the workspace, and the stream or the number of threads."""
    on_gpu = device.type == "cuda"
    native = _native.cuda() if on_gpu else _native.cpu()
    options = iteration_options(native, n, k, preconditioner, on_gpu)
    return native, options, torch.cuda.current_stream(device).cuda_stream if on_gpu else threads()


def iteration_options(native: Any, n: int, k: int, preconditioner: str, on_gpu: bool) -> Any:
    """What decides the workspace of `native`'s solve of order n."""
    options = native.Options.for_problem(n, k, on_gpu)
    options.preconditioner = PRECONDITIONERS[preconditioner]
    options.inner_steps = 20 if preconditioner in ("diagonal", "none") else 0
    return options


def workspace_bytes(
    batch: int, n: int, k: int, method: str, preconditioner: str, single: bool, device: torch.device
) -> int:
    """Bytes that solving [batch, n, n] takes at most beside its matrices (`single`: float32) and outputs."""
    if method != "direct":
        with on_device(device):
            native, options, lanes = _iteration(n, k, preconditioner, device)
            return native.workspace_bytes(batch, n, options, single, lanes)
    if device.type == "cuda":
        return cuda.direct_bytes(batch, n, k, single, device)
    # A worker of csrc/cpu/direct.hpp: B's factor and the reduced A, and where divide and conquer steps in its basis and scratch.
    work = max(64 * max(n, k + 65), 2 * k * n + 64 * n)
    return DOUBLE * min(batch, threads()) * (4 * n * n + work + (k + 16) * n + k * k)


def affordable(n: int, k: int) -> float:
    """Cycles of Jacobi-Davidson that cost as much on a CPU as the direct route does at this order."""
    return n / 100


def _fake(a: Tensor, b: Tensor, k: int, *how: object):
    return empty_outputs(a.shape[:-2], a.shape[-1], k, a.device)


# torch.library.custom_op would do the same and take 35 us a call instead of 7: a third of a small problem.
_LIBRARY.impl("gevp_dense", _solve, "CompositeExplicitAutograd")
torch.library.register_fake("sst_kernels::gevp_dense", _fake, lib=_LIBRARY)
_op = torch.ops.sst_kernels.gevp_dense.default


def gevp_dense(a: Tensor, b: Tensor, *how: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_solve`: plainly where its tensors are, as an op of torch's where its compiler or a fake tensor asks."""
    plain = type(a) is Tensor and type(b) is Tensor and not torch.compiler.is_compiling()
    return _solve(a, b, *how) if plain else _op(a, b, *how)


def empty_outputs(
    batch: Sequence[int], n: int, k: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values, vectors (rows), bounds, status and cycles of problems in the shape `batch`, for a native solve to fill."""
    values, bounds = (torch.empty((*batch, k), dtype=torch.float64, device=device) for _ in range(2))
    status, cycles = (torch.empty(batch, dtype=torch.int32, device=device) for _ in range(2))
    return values, torch.empty((*batch, k, n), dtype=torch.float64, device=device), bounds, status, cycles


@cache
def threads() -> int:
    """Threads over which a CPU batch is spread: OMP_NUM_THREADS where it is set, else the cores this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else os.cpu_count() or 1
