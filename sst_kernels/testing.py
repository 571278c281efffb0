"""How this library compares numbers: one scale-free ratio, one tolerance, both from the arithmetic.

The ratio is ‖actual − expected‖ / ‖expected‖ over the whole tensor, so it means the same at every scale and does not
punish elements that cancel. The tolerance is a count of units in the last place: a sum of `length` float32 terms loses
about √length half-ulps when rounding errors are independent, and a result stored in a shorter type half an ulp of it.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Room for the constant that the √length law leaves open (correlated roundings, truncating tensor-core adders).
SAFETY = 4.0


def half_ulp(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def tolerance(length: int, *, stored: torch.dtype = torch.float32, summed: torch.dtype = torch.float32) -> float:
    """Allowed error ratio of sums of `length` products accumulated in `summed` and stored in `stored`."""
    rounding = half_ulp(summed) * (1 + max(length, 1) ** 0.5)
    return SAFETY * (rounding + (half_ulp(stored) if stored != summed else 0.0))


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; the plain norm of `actual` where nothing was expected."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    norm = torch.linalg.vector_norm(expected).item()
    return torch.linalg.vector_norm(actual - expected).item() / (norm or 1.0)


def assert_close(name: str, actual: Tensor, expected: Tensor, allowed: float) -> float:
    """Assert equal shapes, finite numbers, and an error ratio of at most `allowed`; the ratio is logged always."""
    assert actual.shape == expected.shape, f"{name}: expected shape {list(expected.shape)}, got {list(actual.shape)}"
    ratio = error_ratio(actual, expected)
    log.info("%s: error ratio %.2e, allowed %.2e", name, ratio, allowed)
    bad = int((~torch.isfinite(actual)).sum())
    assert bad == 0, f"{name}: {bad} of {actual.numel()} elements are not finite"
    assert ratio <= allowed, f"{name}: error ratio {ratio:.3e} exceeds {allowed:.3e}"
    return ratio


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """A NaN-filled buffer: an element that an overwriting kernel skips shows itself."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)
