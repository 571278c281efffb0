"""Jacobi-Davidson on operators: the solver is native, the products are the operators' own."""

from __future__ import annotations

from math import sqrt

import torch

from sst_kernels import _native
from sst_kernels.gevp.dense import affordable, empty_outputs, iteration_options, on_device
from sst_kernels.gevp.operators import Operator, power_of_two
from sst_kernels.gevp.pencils import STORED_LIMIT
from sst_kernels.gevp.result import GEVPResult, GEVPStatus, failed
from sst_kernels.gevp.settings import Settings


def operator_jacobi_davidson(gain: Operator, cost: Operator, k: int, settings: Settings, route: str) -> GEVPResult:
    """Top-k pairs of a pencil that is only known by its products.

    The native solver asks for A X, B X and K^-1 R on blocks that lie in one workspace tensor; each is answered by slicing
    that tensor, so that no data moves between the two sides.
    """
    n, device = gain.n, gain.device
    native = _native.cuda() if device.type == "cuda" else _native.cpu()
    probe = cost.solve(torch.zeros(n, 1, dtype=torch.float64, device=device))
    options = iteration_options(native, n, k, "diagonal" if probe is None else "exact", device.type == "cuda")
    options.tolerance, options.max_cycles, options.seed = settings.tol, settings.max_cycles, settings.seed
    if settings.method == "auto" and device.type == "cpu" and n <= STORED_LIMIT:
        options.afford = affordable(n, k)
    lanes = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 1
    with on_device(device):
        size = native.operator_workspace_bytes(n, options, lanes)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    base = workspace.data_ptr()

    def block(address: int, columns: int) -> torch.Tensor:
        start = address - base
        return workspace[start : start + 8 * n * columns].view(torch.float64).view(columns, n).mT

    # Products and their squares stay inside float64 for pencils of any size: powers of two, so that nothing is rounded.
    sample = torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    images = gain.matmul(sample), cost.matmul(sample)
    if not all(bool(torch.isfinite(image).all()) for image in images):
        return failed(n, k, GEVPStatus.non_finite, route, device)
    unit_a, unit_b = power_of_two(images[0]), power_of_two(images[1], even=True)
    weights = cost.diagonal()[:, None] / unit_b

    def precondition(x: torch.Tensor) -> torch.Tensor:
        solved = cost.solve(x)
        return x / weights if solved is None else solved * unit_b

    def apply(which: int, source: int, target: int, columns: int) -> None:
        x, y = block(source, columns), block(target, columns)
        match which:
            case 0:
                torch.div(gain.matmul(x), unit_a, out=y)
            case 1:
                torch.div(cost.matmul(x), unit_b, out=y)
            case _:
                y.copy_(precondition(x))

    outputs = empty_outputs((), n, k, device)
    with on_device(device):
        native.solve_operator(
            apply, n, options, *(tensor.data_ptr() for tensor in outputs), base, workspace.numel(), lanes
        )
    values, rows, bound, status, cycles = outputs
    values, bound = (x * (unit_a / unit_b) for x in (values, bound))
    if status != GEVPStatus.not_positive_definite and not bool(torch.isfinite(values).all()):
        return failed(n, k, GEVPStatus.non_finite, route, device)
    return GEVPResult(values, rows.mT / sqrt(unit_b), bound, status, route, cycles)
