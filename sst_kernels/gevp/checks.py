"""What `gevp` refuses before it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sst_kernels.gevp.operators import Dense, Operator


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
