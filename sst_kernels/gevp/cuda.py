"""The direct route on CUDA tensors: torch owns the workspace, the native module works on the caller's stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sst_kernels import _native


def solve_direct(
    where: tuple[int, int, int, int, bool, int, int], k: int, outputs: Sequence[int], device: torch.device
) -> None:
    """Solves stored pencils by Cholesky and a full eigendecomposition; asynchronous on the current stream.

    Args:
        where: address of A, its stride, address of B, its stride, whether both are float32, batch, n.
        k: pairs per problem.
        outputs: addresses of values, vectors (rows), bounds, status and cycles on `device`.
        device: the GPU that holds all of them.
    """
    single, batch, n = where[4:]
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        size = direct_bytes(batch, n, k, single, device)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        _native.cuda().solve_direct(*where, k, *outputs, workspace.data_ptr(), size, stream)


def direct_bytes(batch: int, n: int, k: int, single: bool, device: torch.device) -> int:
    """Bytes of workspace that `solve_direct` takes on `device`."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        return _native.cuda().direct_workspace_bytes(batch, n, k, single, stream)
