"""How much of each direction a filter keeps: weights [p, G] in [0, 1] of λ [p], one column for each of its parameters [G]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Filter = Literal["soft", "threshold", "top_k"]
Weights = Callable[[Tensor, Tensor], Tensor]


def soft(values: Tensor, mu: Tensor) -> Tensor:
    """λ/(λ + μ); at μ = 0 its limit, 1 where λ > 0."""
    column = values[:, None]
    return torch.where(mu > 0, column / (column + mu), (column > 0).to(values))


def threshold(values: Tensor, mu: Tensor) -> Tensor:
    """1 where λ > μ."""
    return (values[:, None] > mu).to(values)


def top_k(values: Tensor, k: Tensor) -> Tensor:
    """1 for the k largest λ, the first of equal ones."""
    rank = values.argsort(descending=True, stable=True).argsort()
    return (rank[:, None] < k).to(values)


WEIGHTS: dict[Filter, Weights] = {"soft": soft, "threshold": threshold, "top_k": top_k}
