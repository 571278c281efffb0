"""K-FAC whose large factors are streamed as Nyström sketches, d×ℓ instead of d×d."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sst_kernels.fisher.structures.algebra import psd_eigh, symmetric
from sst_kernels.fisher.structures.kronecker import TwoSided
from sst_kernels.memo import Memo


@lru_cache(maxsize=32)
def sign_matrix(d: int, rank: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Ω [d, ℓ] of independent signs ±1: the same for every block, rank and machine that names the same seed.

    Signs are exact in bfloat16, so the matrix that multiplied the tokens is the matrix the reconstruction uses.
    """
    bits = torch.randint(0, 2, (d, rank), generator=torch.Generator().manual_seed(seed))
    return (2 * bits - 1).to(device, dtype)


@dataclass(frozen=True)
class LowRankFactor:
    """U diag(s) Uᵀ + rest·I, PSD: U [d, k] orthonormal, s [k] descending, float64. `bound` ≥ ‖exact − this‖₂."""

    vectors: Tensor
    values: Tensor
    rest: Tensor
    bound: Tensor

    def times(self, x: Tensor) -> Tensor:
        """This factor times x [d, m]."""
        return self.vectors @ (self.values[:, None] * (self.vectors.mT @ x)) + self.rest * x

    @property
    def norm(self) -> Tensor:
        """Largest eigenvalue."""
        return self.values[0] + self.rest

    @property
    def trace(self) -> Tensor:
        return self.values.sum() + self.rest * len(self.vectors)


_last_input = Memo()  # (its sketch, its trace): modules that read one tensor (q, k, v; gate, up) come one after another


class _Side:
    """The running second moment M = Σ x xᵀ of one side: dense while d ≤ ℓ, else Y = M Ω with the exact trace of M (else 0)."""

    def __init__(self, d: int, rank: int, seed: int, device: torch.device):
        self.dense = d <= rank
        self.seed = seed
        self.sum = torch.zeros(d, min(d, rank), dtype=torch.float32, device=device)
        self.trace = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, spans: Tensor | None, scale: Tensor | None) -> None:
        from sst_kernels.ops import gram, sketch

        if self.dense:
            gram(x, spans, scale, self.sum)
            return
        rank = self.sum.shape[1]
        omega = sign_matrix(x.shape[1], rank, self.seed, x.device, x.dtype)
        if scale is not None:
            sketch(x, omega, spans, scale, self.sum, trace=self.trace)
            return
        if not _last_input.holds(x, spans, rank, self.seed):
            product, trace = torch.zeros_like(self.sum), torch.zeros_like(self.trace)
            sketch(x, omega, spans, None, product, trace=trace)
            _last_input.keep((product, trace), x, spans, rank, self.seed)
        product, trace = _last_input.value
        self.sum += product
        self.trace += trace

    def factor(self, count: float) -> LowRankFactor:
        """M / count, reconstructed."""
        zero = torch.zeros((), dtype=torch.float64, device=self.sum.device)
        if self.dense:
            values, vectors = psd_eigh(symmetric(self.sum) / count)
            return LowRankFactor(vectors, values, zero, zero)
        vectors, values = nystrom(self.sum, sign_matrix(*self.sum.shape, self.seed, self.sum.device, torch.float64))
        trace = self.trace.clamp_min(0)
        values = values * (trace / values.sum().clamp_min(1e-300)).clamp_max(1)
        missing = trace - values.sum()
        rest = missing / len(vectors)
        return LowRankFactor(vectors, values / count, rest / count, torch.maximum(rest, missing - rest) / count)


def nystrom(sketch: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors U [d, ℓ] and eigenvalues s [ℓ] ≥ 0, float64, of the Nyström approximation Y (ΩᵀY)⁺ Yᵀ of M from
    Y = MΩ [d, ℓ], with the stabilising shift of Tropp et al. (1706.05736, algorithm 3) at float32 level."""
    y = sketch.double()
    shift = torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(y) / omega.shape[0] ** 0.5
    y = y + shift * omega
    core = omega.mT @ y
    values, vectors = torch.linalg.eigh((core + core.mT) / 2)
    floor = values[-1].clamp_min(0) * torch.finfo(torch.float64).eps * len(values)
    root = torch.where(values > floor, values, torch.inf).rsqrt()
    u, sigma, _ = torch.linalg.svd(y @ (vectors * root), full_matrices=False)
    return u, (sigma.square() - shift).clamp_min(0)


class KroneckerLowRank(TwoSided):
    """K-FAC with each factor wider than ℓ kept as the sketch Y = (Σ x xᵀ) Ω [d, ℓ]; no d×d matrix is ever formed.

    Laplace-LoRA (2308.13111) keeps an SVD of the wide factors and truncates it after every batch; a fixed Ω truncates
    once, at the end, and lets sketches add.

    Reading gives each factor as its Nyström approximation plus the missing trace spread evenly,
    M̃ = M_nys + (tr M − tr M_nys)/d · I: PSD by construction, tr M̃ = tr M exactly, and since 0 ⪯ M − M_nys,
    ‖M − M̃‖₂ ≤ tr M − tr M_nys. Sketches over other data add, so merging is exact.

    State: `left`, `right` float32 (dense [d, d] where d ≤ ℓ, else [d, ℓ]), their traces (float64; 0 of a dense one, which
    has its own), `terms` int64.
    """

    kind = "kronecker_lowrank"

    def __init__(self, shape: tuple[int, int], *, rank: int = 64, seed: int = 0, **options: Any):
        super().__init__(shape, **options)
        if rank < 1:
            raise ValueError(f"rank: expected a positive number of sketch columns, got {rank}")
        self.rank, self.seed = int(rank), int(seed)
        self._left = _Side(self.shape[0], self.rank, self.seed, self.device)
        self._right = _Side(self.shape[1], self.rank, self.seed, self.device)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "rank": self.rank, "seed": self.seed}

    def _add_left(self, x: Tensor, spans: Tensor | None, scale: Tensor | None) -> None:
        self._left.add(x, spans, scale)

    def _add_right(self, x: Tensor, spans: Tensor | None, scale: Tensor | None) -> None:
        self._right.add(x, spans, scale)

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
        out = left.times(v.reshape(p, -1)).reshape(p, q, -1)
        return right.times(out.transpose(0, 1).reshape(q, -1)).reshape(q, p, -1).transpose(0, 1).reshape(v.shape)

    def operator(self) -> Any:
        """`SpectralKronecker` on the eigenvectors of both factors: product and damped inverse without a d×d matrix."""
        from sst_kernels.fisher.structures.spectral import SpectralKronecker

        left, right = self.factors()
        a, b = left.values + left.rest, right.values + right.rest
        return SpectralKronecker(
            left.vectors, right.vectors, torch.outer(a, b), a * right.rest, left.rest * b, left.rest * right.rest
        )
