"""What `gevp` refuses before it computes, and the one outcome that only shows afterwards."""

from __future__ import annotations

from math import isfinite
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from sst_kernels.gevp.operators import Dense, Operator
from sst_kernels.gevp.result import GEVPStatus


def operand(name: str, value: Any) -> Operator:
    """A or B as an operator. TypeError for what is no tensor with data in it."""
    if isinstance(value, Operator):
        return value
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch tensor or an operator, got {type(value).__name__}; use torch.as_tensor"
        )
    if value.is_meta or value.layout is not torch.strided:
        kind = "a meta tensor" if value.is_meta else f"of layout {value.layout}"
        raise TypeError(f"{name} is {kind}; expected a dense tensor with data")
    return Dense(value)


def check_settings(k: Any, damping: Any, tol: Any, max_cycles: Any, seed: Any, memory_budget: Any) -> None:
    """TypeError or ValueError for numbers that no solve can use."""
    budget = 1 if memory_budget is None else memory_budget
    for name, value, least in (
        ("k", k, 0),
        ("max_cycles", max_cycles, 1),
        ("seed", seed, 0),
        ("memory_budget", budget, 1),
    ):
        if type(value) is not int and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if not least <= int(value) < 2**63:
            raise ValueError(f"{name} must be an integer from {least} on, got {value}")
    if not 0 < tol < 1:
        raise ValueError(f"tol must lie between 0 and 1 (it is relative to the largest eigenvalue), got {tol}")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping must be finite and not negative, got {damping}")


def overflowed(values: Tensor, status: Tensor) -> Tensor:
    """`status` [batch] with `non_finite` where values [batch, k] beyond float64 came out of finite matrices."""
    if isfinite(values.sum()):
        return status
    usable = (
        (status == GEVPStatus.converged) | (status == GEVPStatus.rank_deficient) | (status == GEVPStatus.max_iterations)
    )
    return torch.where(usable & ~values.isfinite().all(-1), int(GEVPStatus.non_finite), status).to(status.dtype)
