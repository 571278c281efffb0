"""Reading a trade-off fairly: at equal refusal, and as dominated area, with bootstrap intervals over prompts.

A curve is a method along its strength: per-prompt sums and label counts, harm [S, N, 2] and benign [S, M, 2]. Means are per
label token. Harmful and benign prompts are resampled together for everything that is compared, so intervals of ratios
respect that all methods were measured on the same prompts.
"""

from __future__ import annotations

import math

import numpy as np

Interval = tuple[float, float, float]  # value, lower and upper 95 % bound


class Resample:
    """`draws` bootstrap weights over harmful and benign prompts; row 0 is the sample itself."""

    def __init__(self, harmful: int, benign: int, *, draws: int = 1000, seed: int = 0):
        random = np.random.default_rng(seed)
        self.harm, self.benign = (
            np.concatenate([np.ones((1, n)), random.multinomial(n, np.full(n, 1 / n), draws)])
            for n in (harmful, benign)
        )

    def means(self, harm: np.ndarray, benign: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(refusal NLL, KL), each [draws + 1] for one point, [draws + 1, S] for a curve."""
        return _mean(self.harm, harm), _mean(self.benign, benign)


def interval(values: np.ndarray) -> Interval:
    """Value of the sample and the 2.5 % and 97.5 % quantiles of the resamples; NaN where undefined in the sample."""
    finite = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (math.nan, math.nan)
    return float(values[0]), float(low), float(high)


def kl_at(nll: float, curve_nll: np.ndarray, curve_kl: np.ndarray) -> float:
    """KL of a curve at a refusal NLL: log-linear between its non-dominated points, NaN outside their range."""
    order = np.lexsort((curve_kl, curve_nll))
    best = [order[0]]
    for i in order[1:]:
        if curve_kl[i] < curve_kl[best[-1]]:
            best.append(i)
    x, y = curve_nll[best], np.log(np.maximum(curve_kl[best], 1e-12))
    return float(np.exp(np.interp(nll, x, y))) if len(x) > 1 and x[0] <= nll <= x[-1] else math.nan


def equal_refusal(
    point: tuple[np.ndarray, np.ndarray], plain: tuple[np.ndarray, np.ndarray], resample: Resample
) -> dict[str, Interval]:
    """refusal_nll, kl, and ratio: the KL of plain addition at this point's refusal NLL over this point's KL."""
    nll, kl = resample.means(*point)
    plain_nll, plain_kl = resample.means(*plain)
    at = np.array([kl_at(x, c, k) for x, c, k in zip(nll, plain_nll, plain_kl)])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(kl > 0, at / kl, math.nan)
    return {"refusal_nll": interval(nll), "kl": interval(kl), "ratio": interval(ratio), "plain_kl": interval(at)}


def hypervolume(curve: tuple[np.ndarray, np.ndarray], corner: tuple[float, float], resample: Resample) -> Interval:
    """Share of the rectangle 0 ≤ NLL ≤ corner[0], 0 ≤ KL ≤ corner[1] that the curve's points dominate."""
    nll, kl = resample.means(*curve)
    return interval(np.array([_area(x, y, corner) for x, y in zip(nll, kl)]))


def non_dominated(nll: np.ndarray, kl: np.ndarray) -> np.ndarray:
    """Which points no other point beats in one figure without losing in the other, [S] bool."""
    no_worse = (nll[:, None] <= nll) & (kl[:, None] <= kl)
    better = (nll[:, None] < nll) | (kl[:, None] < kl)
    return ~np.asarray((no_worse & better).any(0))


def _area(nll: np.ndarray, kl: np.ndarray, corner: tuple[float, float]) -> float:
    area, ceiling = 0.0, corner[1]
    for x, y in sorted(zip(nll, kl)):
        if x < corner[0] and y < ceiling:
            area += (corner[0] - x) * (ceiling - y)
            ceiling = y
    return area / (corner[0] * corner[1])


def _mean(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    return (weights @ sums[..., 0].T) / (weights @ sums[..., 1].T)
