"""Bounds for a pencil of which only a sketch is at hand: A~ <= A <= A~ + gain_slack I, B~ <= B <= B~ + cost_slack I.

Frequent Directions gives such a sketch and its slack (`LowRank.certificate` of a Fisher): what is computed from the sketch then says
something about the Fisher that was never stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sst_kernels.gevp.operators import Operator
from sst_kernels.gevp.result import GEVPResult
from sst_kernels.gevp.solve import gevp


@dataclass(frozen=True)
class Certified:
    """Two-sided bounds on the top-k values of the pencil behind a sketch.

    Attributes:
        result: the pairs of the sketched pencil itself.
        lower, upper: [k] float64, lower[j] <= lambda_j(A, B + damping I) <= upper[j], both descending.

    Example:
        >>> from sst_kernels.gevp import LowRank, certified
        >>> rows = torch.eye(8)[:2]
        >>> bounds = certified(LowRank(rows), LowRank(rows), k=1, damping=1.0, gain_slack=0.1)
        >>> bool(bounds.lower <= bounds.result.values) and bool(bounds.result.values <= bounds.upper)
        True
    """

    result: GEVPResult
    lower: Tensor
    upper: Tensor


def certified(
    A: Operator,
    B: Operator,
    k: int,
    *,
    damping: float,
    gain_slack: float = 0.0,
    cost_slack: float = 0.0,
    rounding: float = 0.0,
    seed: int = 0,
) -> Certified:
    """Bounds on the k largest values of (A', B' + damping I) for every A' and B' that the sketches A and B may stand for.

    By min-max the values rise with A' and fall with B'. So the least are those of (A, B + (damping + cost_slack) I); and since
    gain_slack I <= gain_slack / damping (B + damping I), the largest exceed those of (A, B + damping I) by gain_slack / damping at most.

    Args:
        A, B: positive semi-definite operators of one pencil (Frequent Directions: gevp.LowRank(rows / sqrt(normaliser))).
        k: values.
        damping: positive; on top of what B carries.
        gain_slack, cost_slack: the certificates of A and B, not negative.
        rounding: how far A and B may exceed A' and B' all the same, `rounding` of the sketches; below damping.
        seed: of the padding vectors.

    Raises:
        ValueError: a slack is negative, damping does not exceed rounding.
        GEVPError: the sketched pencil has no answer.

    Example:
        >>> from sst_kernels.gevp import LowRank, certified
        >>> bounds = certified(LowRank(torch.eye(8)[:2]), LowRank(torch.eye(8)[2:4]), k=2, damping=0.5, gain_slack=0.1)
        >>> bounds.upper
        tensor([2.2000, 2.2000], dtype=torch.float64)
    """
    if min(gain_slack, cost_slack, rounding) < 0:
        raise ValueError(f"slacks must not be negative, got {gain_slack}, {cost_slack} and rounding {rounding}")
    if not damping > rounding:
        raise ValueError(f"damping must exceed rounding = {rounding} to bound anything, got {damping}")
    result = gevp(A, B, k, damping=damping, seed=seed).raise_if_failed()
    least = gevp(A, B, k, damping=damping + cost_slack, seed=seed).raise_if_failed() if cost_slack else result
    highest = result
    if rounding:
        highest = gevp(A, B, k, damping=damping - rounding, seed=seed).raise_if_failed()
    lower = (least.values - least.error_bound - rounding / damping).clamp_min(0)
    upper = highest.values + highest.error_bound + gain_slack / (damping - rounding)
    return Certified(result, lower, upper)


def quadratic_bounds(form: Tensor, squared_norm: Tensor, slack: float, rounding: float = 0.0) -> tuple[Tensor, Tensor]:
    """Between what x' F x lies when the sketch gives x' F~ x = form: what a step x costs, or gains, at least and at most.

    Args:
        form: [...] values of the sketched form.
        squared_norm: [...] |x|^2.
        slack: the certificate of the sketch.
        rounding: its rounding allowance, included in the slack's other side.

    Example:
        >>> from sst_kernels.gevp import quadratic_bounds
        >>> quadratic_bounds(torch.tensor(2.0), torch.tensor(4.0), slack=0.25)
        (tensor(2.), tensor(3.))
    """
    return (form - rounding * squared_norm).clamp_min(0), form + slack * squared_norm
