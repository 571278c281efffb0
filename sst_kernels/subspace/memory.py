"""What `subspace` takes in memory, known before it runs."""

from __future__ import annotations

from collections.abc import Sequence

from sst_kernels.subspace.coordinates import neighbours_width

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
    n, rows = sum(sizes), gain_rows + cost_rows
    parts = folds if rows else 0
    kronecker = metric == "kronecker"
    widths = [min(m, rows) if rows else m for m in ([n] if scope == "global" else sizes)]
    reflectors = rows * sum(m for m, w in zip([n] if scope == "global" else sizes, widths) if w < m)
    held = reflectors + rows * sum(widths)
    loaded = rows * neighbours_width(sizes)
    reducing = rows * n + max(3 * loaded, held + max(widths) ** 2)
    if scope == "module":
        spectra = sum(w * w for w in widths)
        solving, directions = 5 * spectra, sum(widths)
    else:
        directions = min(n, gain_rows)
        spectra = widths[0] * directions
        solving = widths[0] * (4 * gain_rows + 3 * cost_rows) + rows * rows
    charts = 5 * n * (parts + 2 if kronecker else 1) + 4 * n * max(parts, 1)  # coordinates, and moments of the folds
    if not rows:
        predicting = 0
    elif scope == "global" and rows <= n:  # inner products alone (crossfit)
        grams = rows * rows * (folds if kronecker else 1)
        predicting = held + spectra + grams + max(4 * loaded if kronecker else 0, 4 * rows * rows)
    else:  # a system for every fold, beside the one before it
        again = max(held + reducing, held + solving + spectra) if kronecker else solving + spectra
        predicting = held + spectra + again + cost_rows * directions
    return _DOUBLE * (charts + max(reducing, held + spectra + solving, predicting))
