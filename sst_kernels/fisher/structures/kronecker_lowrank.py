"""K-FAC whose large factors are streamed as Nyström sketches, d×ℓ instead of d×d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sst_kernels.fisher.base import whole
from sst_kernels.fisher.later import Later
from sst_kernels.fisher.structures.kronecker import TwoSided
from sst_kernels.fisher.structures.moment import LowRankFactor, SecondMoment


class KroneckerLowRank(TwoSided):
    """K-FAC with each factor wider than ℓ kept as the sketch Y = (Σ x xᵀ) Ω [d, ℓ]; no d×d matrix is ever formed.

    Laplace-LoRA (2308.13111) keeps an SVD of the wide factors and truncates it after every batch; a fixed Ω truncates
    once, at the end, and lets sketches add.

    Reading gives each factor as its Nyström approximation plus the missing trace spread evenly,
    M̃ = M_nys + (tr M − tr M_nys)/d · I: PSD by construction, tr M̃ = tr M exactly, and since 0 ⪯ M − M_nys,
    ‖M − M̃‖₂ ≤ tr M − tr M_nys. Sketches over other data add, so merging is exact.

    State: `left`, `right` float32 (dense [d, d] where d ≤ ℓ, else Y above Ωᵀ(Σ x xᵀ)Ω, [d + ℓ, ℓ]), their traces (float64; 0 of a
    dense one, which has its own), `terms` int64.
    """

    kind = "kronecker_lowrank"

    def __init__(self, shape: tuple[int, int], *, rank: int = 64, seed: int = 0, **options: Any):
        super().__init__(shape, **options)
        self.rank, self.seed = whole("rank", rank), whole("seed", seed, 0)
        self._left = SecondMoment(self.shape[0], self.rank, self.seed, self.device)
        self._right = SecondMoment(self.shape[1], self.rank, self.seed, self.device)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "rank": self.rank, "seed": self.seed}

    @classmethod
    def _columns(cls, d: int, **options: Any) -> int:
        return min(d, whole("rank", options.get("rank", 64)))

    def _add_left(self, x: Tensor, spans: Tensor | None, scale: Tensor | None, later: Later | None) -> None:
        self._left.add(x, spans, scale, later)

    def _add_right(self, x: Tensor, spans: Tensor | None, scale: Tensor | None, later: Later | None) -> None:
        self._right.add(x, spans, scale, later)

    def factors(self) -> tuple[LowRankFactor, LowRankFactor]:
        """G̃ and Ã with F̃ = G̃ ⊗ Ã."""
        return self._left.factor(self.normaliser), self._right.factor(max(1, int(self._terms)))

    @property
    def error_bound(self) -> float:
        """A bound of ‖G ⊗ A − F̃‖₂, the distance to the dense K-FAC over the same tokens."""
        left, right = self.factors()
        return float(left.bound * (right.norm + right.bound) + left.norm * right.bound)

    def eigenbases(self) -> tuple[Tensor, Tensor]:
        left, right = self.factors()
        return left.vectors, right.vectors

    def state_dict(self) -> dict[str, Tensor]:
        left, right = self._left, self._right
        return {
            "left": left.sum,
            "left_trace": left.trace,
            "right": right.sum,
            "right_trace": right.trace,
            "terms": self._terms,
        }

    def matvec(self, vectors: Tensor) -> Tensor:
        left, right = self.factors()
        (p, q), v = self.shape, vectors.to(self.device, torch.float64)
        out = (left @ v.reshape(p, -1)).reshape(p, q, -1)
        return (right @ out.transpose(0, 1).reshape(q, -1)).reshape(q, p, -1).transpose(0, 1).reshape(v.shape)

    def operator(self) -> Any:
        """`SpectralKronecker` on the eigenvectors of both factors: product and damped inverse without a d×d matrix."""
        from sst_kernels.fisher.structures.spectral import SpectralKronecker

        left, right = self.factors()
        a, b = left.values + left.rest, right.values + right.rest
        return SpectralKronecker(
            left.vectors, right.vectors, torch.outer(a, b), a * right.rest, left.rest * b, left.rest * right.rest
        )
