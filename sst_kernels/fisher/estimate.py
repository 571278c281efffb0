"""How structures tell what they will take in memory: bytes, before the first batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sst_kernels.ops.spans import CACHED_ELEMENTS

SINGLE, DOUBLE = 4, 8


@dataclass(frozen=True)
class Estimate:
    """Bytes: of the state at the end of a pass, and the most that it and its own temporaries take at any time."""

    state: int
    peak: int

    def __add__(self, other: Estimate) -> Estimate:
        """Of two structures side by side: states add; temporaries live one at a time."""
        temporary = max(self.peak - self.state, other.peak - other.state)
        return Estimate(self.state + other.state, self.state + other.state + temporary)


def estimate_moments(shapes: Sequence[tuple[int, int]]) -> Estimate:
    """The memory of running second moments Σ x xᵀ [d, d] of tokens, each kept as [d, columns]: a sketch where columns < d."""
    drawn = {(d, columns): d * columns for d, columns in shapes if columns < d}  # test matrices, drawn as integers
    drawing = SINGLE * sum(drawn.values()) + (2 * DOUBLE + SINGLE) * max(drawn.values(), default=0)
    state = sum(SINGLE * (d + columns * (columns < d)) * columns + DOUBLE for d, columns in shapes)
    return Estimate(state, state + drawing)


def doubled(rows: int, batch: int) -> tuple[int, int]:
    """Rows that a doubling buffer has room for in the end, and the most that it holds while it is copied."""
    capacity, peak = 0, 0
    while capacity < rows:
        wanted = max(min(rows, capacity // batch * batch + batch), 2 * capacity)
        peak, capacity = max(peak, capacity + wanted), wanted
    return capacity, peak


def gradients_held(p: int, q: int, batch: int) -> int:
    """How many times p·q numbers a CPU holds to add up the gradients of a batch: as many as its cache does, and their sum where they
    may be turned."""
    at_once = min(batch, max(1, CACHED_ELEMENTS // (p * q)))
    return at_once + (at_once > 1 and p > q)
