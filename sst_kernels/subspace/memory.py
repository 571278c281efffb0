"""What `subspace` takes in memory, known before it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sst_kernels.subspace.coordinates import module_width, neighbours_width

_DOUBLE = 8


def estimate_solve(
    sizes: Sequence[int],
    gain_rows: int,
    cost_rows: int,
    *,
    scope: str = "global",
    folds: int = 4,
    metric: str = "kronecker",
) -> int:
    """Peak bytes of `subspace` over modules of `sizes` = r² coordinates with that many rows each (0: no rows are kept)."""
    n, parts = sum(sizes), folds if gain_rows else 0
    kronecker = metric == "kronecker"
    rows = gain_rows + cost_rows
    turned = kronecker and rows > 0 and (scope == "global" or rows <= max(sizes))
    charts = 5 * n * (parts + 2 if turned else 1)  # of z, and moments of the folds beside them
    charts += 2 * n * (2 * max(parts, 1) + (parts + 1 if kronecker else 0))
    solving = _across(n, sizes, gain_rows, cost_rows, parts if kronecker else 0)
    if scope == "module":
        solving = _per_module(sizes, gain_rows, cost_rows, parts, kronecker)
    turning = 7 * n * (parts + 1) if turned else 0  # eigenvectors of the moments, before anything is solved
    copied = rows * n // 2 if parts else 0  # float32, the rows of a fold together
    return _DOUBLE * (charts + copied + max(turning, solving))


def _across(n: int, sizes: Sequence[int], gain: int, cost: int, charts: int) -> int:
    """Numbers of one pencil over all modules: inner products where there are fewer rows than coordinates, else the rows."""
    rows = gain + cost
    loaded = rows * neighbours_width(sizes)
    if rows > n:
        return (4 if charts else 3) * rows * n + 4 * n * n
    multiplying = (1 + charts) * rows * rows + 4 * loaded
    return max(multiplying, (1 + charts) * rows * rows + 3 * rows * rows + 2 * cost * rows)


def _per_module(sizes: Sequence[int], gain: int, cost: int, folds: int, kronecker: bool) -> int:
    """Numbers of one pencil per module: what is kept of all, and of the widest neighbourhood what solving it takes."""
    rows = gain + cost
    few = [bool(rows) and rows <= m for m in sizes]
    kept = sum(m * (min(m, gain) if f else m) for m, f in zip(sizes, few))
    directions = sum(min(m, gain) if f else m for m, f in zip(sizes, few))
    predictions = rows * directions if folds else 2 * sum(m * m for m in sizes)
    widest = 0
    for m in Counter(sizes):
        count = neighbours_width([s for s in sizes if s == m], module_width(sum(sizes))) // m
        if rows and rows <= m:
            solving = count * ((3 if kronecker else 2) * m * rows + 3 * rows * rows)
        else:
            solving = count * (m * rows + 9 * m * m + (folds * m * m if kronecker else 0))
        widest = max(widest, solving)
    return kept + (2 if folds else 1) * predictions + widest
