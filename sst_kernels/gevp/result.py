"""What a solve returns: values, vectors, bounds, one status per problem, and the route that was taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class GEVPStatus(IntEnum):
    """Outcome of one problem; the numbers are those of csrc/include/sst/status.h.

    Example:
        >>> result = sst.gevp(torch.eye(3), torch.eye(3), k=1)
        >>> result.statuses()
        [<GEVPStatus.converged: 0>]
    """

    converged = 0
    max_iterations = 1
    not_positive_definite = 2
    non_finite = 3
    rank_deficient = 4
    not_symmetric = 5

    @property
    def advice(self) -> str:
        """What the status means and what to do about it."""
        return _ADVICE[self]

    @property
    def usable(self) -> bool:
        """Whether values and vectors answer the question (padding included)."""
        return self in (GEVPStatus.converged, GEVPStatus.rank_deficient)


_ADVICE = {
    GEVPStatus.converged: "every pair is within its error bound.",
    GEVPStatus.max_iterations: (
        "some pair is not within the tolerance; its error_bound says how far. Leave method at 'auto' or use 'direct' (above n = 4096 as "
        "stored matrices, and with a memory_budget that holds it), or raise tol to what you need."
    ),
    GEVPStatus.not_positive_definite: (
        "B has a non-positive eigenvalue, in exact arithmetic or to rounding. Raise damping (a natural size is "
        "1e-3 * trace(B)/n), or check that A and B are not swapped."
    ),
    GEVPStatus.non_finite: "A or B contains NaN or Inf (look for the sample that brought it), or an eigenvalue exceeds float64 (rescale A or B).",
    GEVPStatus.rank_deficient: (
        "fewer than k values can be told from zero. Those are returned as 0 with B-orthonormal vectors; k above rank(A) is harmless."
    ),
    GEVPStatus.not_symmetric: "A or B is not symmetric beyond rounding. Pass (A + A.mT) / 2, or mirror the triangle that was written.",
}


LEFT = "; too slow, so direct"
"""What `GEVPResult.route` says of an iteration that was given up."""


def left_note(rerouted: Tensor | None) -> str:
    """The end of `GEVPResult.route`: which problems left the iteration."""
    members = [] if rerouted is None else rerouted.reshape(-1).nonzero()[:, 0].tolist()
    if rerouted is None or not members:
        return ""
    if rerouted.ndim == 0:
        return LEFT
    shown = ", ".join(map(str, members[:8])) + (", ..." if len(members) > 8 else "")
    return f"; {len(members)} of {rerouted.numel()} (problem {shown}){LEFT[1:]}"


class GEVPError(RuntimeError):
    """Raised by `GEVPResult.raise_if_failed`; the message names the failed problems, their status and the advice.

    Example:
        >>> from sst_kernels.gevp import GEVPError, gevp
        >>> try:
        ...     gevp(torch.eye(3), -torch.eye(3), k=1).raise_if_failed()
        ... except GEVPError as error:
        ...     print("not_positive_definite" in str(error))
        True
    """


@dataclass(frozen=True, repr=False)
class GEVPResult:
    """Top-k pairs of A v = lambda B v for every problem of a batch.

    Attributes:
        values: [..., k] float64, descending. NaN where the status is not usable.
        vectors: [..., n, k] float64, V' B V = I, largest component of each column positive.
        error_bound: [..., k] float64, sqrt(r' B^-1 r) with r = A v - lambda B v: an eigenvalue lies within this distance.
        status: [...] int32, see `GEVPStatus`.
        route: which algorithm was taken, and why.
        cycles: [...] int32 restart cycles of an iterative solve, 0 for a direct one and for one that was given up within the first.
        rerouted: [...] bool, which problems of a batch left the iteration for the direct route; None where none did.

    Example:
        >>> result = sst.gevp(torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.eye(3), k=2)
        >>> result.values, result.ok
        (tensor([3., 2.], dtype=torch.float64), True)
    """

    values: Tensor
    vectors: Tensor
    error_bound: Tensor
    status: Tensor
    route: str
    cycles: Tensor
    rerouted: Tensor | None = None

    @property
    def ok(self) -> bool:
        """Whether every problem has an answer."""
        return not self._failed()

    def statuses(self) -> list[GEVPStatus]:
        """The statuses of the flattened batch."""
        return [GEVPStatus(code) for code in self.status.reshape(-1).tolist()]

    def __iter__(self) -> Iterator[GEVPResult]:
        """The problems of the leading batch dimension, one result each."""
        if self.status.ndim == 0:
            raise TypeError("the result of a single problem cannot be iterated; read its values and vectors")
        columns = zip(self.values, self.vectors, self.error_bound, self.status, self.cycles)
        route = self.route.removesuffix(left_note(self.rerouted))
        for index, (values, vectors, bound, status, cycles) in enumerate(columns):
            left = None if self.rerouted is None or not bool(self.rerouted[index].any()) else self.rerouted[index]
            yield GEVPResult(values, vectors, bound, status, route + left_note(left), cycles, left)

    def _failed(self) -> list[tuple[int, GEVPStatus]]:
        return [(index, status) for index, status in enumerate(self.statuses()) if not status.usable]

    def raise_if_failed(self) -> GEVPResult:
        """Returns self when every problem has an answer.

        Raises:
            GEVPError: at least one problem failed; the message groups them by status, with advice.
        """
        failed = self._failed()
        if not failed:
            return self
        lines = [f"{len(failed)} of {self.status.numel()} generalized eigenproblems failed ({self.route}):"]
        for status in sorted({status for _, status in failed}):
            members = [index for index, own in failed if own is status]
            shown = ", ".join(map(str, members[:8])) + (", ..." if len(members) > 8 else "")
            lines.append(f"  {status.name} (problem {shown}): {status.advice}")
        raise GEVPError("\n".join(lines))

    def __repr__(self) -> str:
        n, k = self.vectors.shape[-2:]
        counts = Counter(status.name for status in self.statuses())
        outcome = ", ".join(f"{count} {name}" for name, count in counts.items()) or "empty"
        finite = self.values[torch.isfinite(self.values)]
        span = f", values {finite.min():.4g} .. {finite.max():.4g}" if finite.numel() else ""
        return f"GEVPResult(batch={tuple(self.status.shape)}, n={n}, k={k}, {outcome}{span}, route={self.route!r})"


def failed(n: int, k: int, status: GEVPStatus, route: str, device: torch.device) -> GEVPResult:
    """NaN results of one problem, with a reason."""
    values = torch.full((k,), torch.nan, dtype=torch.float64, device=device)
    vectors = torch.full((n, k), torch.nan, dtype=torch.float64, device=device)
    code = torch.tensor(int(status), dtype=torch.int32)
    return GEVPResult(values, vectors, values.clone(), code, route, no_cycles())


def no_cycles() -> Tensor:
    """`GEVPResult.cycles` of one direct solve."""
    return torch.tensor(0, dtype=torch.int32)
