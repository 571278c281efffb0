"""Streaming second moments of tokens, Σ x xᵀ: dense, or a Nyström sketch where that is smaller."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sst_kernels.fisher.later import Later
from sst_kernels.fisher.structures.algebra import psd_eigh, symmetric
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

    def __matmul__(self, x: Tensor) -> Tensor:
        """This factor times x [d, m]."""
        return self.vectors @ (self.values[:, None] * (self.vectors.mT @ x)) + self.rest * x

    @property
    def norm(self) -> Tensor:
        """Largest eigenvalue."""
        return self.values[0] + self.rest

    @property
    def trace(self) -> Tensor:
        return self.values.sum() + self.rest * len(self.vectors)


@dataclass(frozen=True)
class Columns:
    """F Fᵀ + rest·I, PSD: F = columns [d, k], float64."""

    columns: Tensor
    rest: Tensor

    def __matmul__(self, x: Tensor) -> Tensor:
        """This times x [d, m]."""
        return self.columns @ (self.columns.mT @ x) + self.rest * x

    def dense(self) -> Tensor:
        """[d, d]."""
        whole = self.columns @ self.columns.mT
        whole.diagonal().add_(self.rest)
        return whole

    def trace(self) -> Tensor:
        return self.columns.square().sum() + self.rest * len(self.columns)

    @property
    def device(self) -> torch.device:
        return self.columns.device


@dataclass(frozen=True)
class Triangle:
    """A symmetric matrix by its lower triangle [d, d] float64, zeros above: what Cholesky reads, without a mirrored copy."""

    lower: Tensor

    def __matmul__(self, x: Tensor) -> Tensor:
        """This times x [d, m]."""
        return self.lower @ x + self.lower.mT @ x - self.lower.diagonal()[:, None] * x

    def dense(self) -> Tensor:
        """[d, d]."""
        return symmetric(self.lower)

    def diagonal(self) -> Tensor:
        return self.lower.diagonal()

    @property
    def device(self) -> torch.device:
        return self.lower.device


Moment = Tensor | Columns  # a mean of x xᵀ: whole [d, d], float64, or out of its sketch


def dense(moment: Moment) -> Tensor:
    """[d, d] float64."""
    return moment if isinstance(moment, Tensor) else moment.dense()


def add_moment(x: Tensor, spans: Tensor | None, scale: Tensor | None, out: Tensor, later: Later | None) -> None:
    """Add the lower triangle of Σ scale² x xᵀ over the spans to `out` [d, d]; where there is a `later`, a narrow one at its end."""
    from sst_kernels.ops import gram

    if spans is not None and later is not None and later.takes(x, spans):
        later.gram(x, spans, scale, out)
    else:
        gram(x, spans, scale, out)


_last_input = Memo()  # (its sketch, its trace): modules that read one tensor (q, k, v; gate, up) come one after another


class SecondMoment:
    """The running second moment M = Σ x xᵀ of one side.

    `sum` float32 is M [d, d] (its lower triangle) while d ≤ ℓ, else [d + ℓ, ℓ]: Y = M Ω above its core C = Ωᵀ M Ω, as
    `ops.sketch` adds them up, with `trace`, that of M (0 of a dense one).
    """

    def __init__(self, d: int, rank: int, seed: int, device: torch.device):
        self.dense = d <= rank
        self.seed = seed
        self.sum = torch.zeros(d if self.dense else d + rank, min(d, rank), dtype=torch.float32, device=device)
        self.trace = torch.zeros((), dtype=torch.float64, device=device)

    def sums(self) -> list[Tensor]:
        """What adds up over data and ranks."""
        return [self.sum] if self.dense else [self.sum, self.trace]

    def add(self, x: Tensor, spans: Tensor | None, scale: Tensor | None, later: Later | None = None) -> None:
        from sst_kernels.ops import sketch

        if self.dense:
            add_moment(x, spans, scale, self.sum, later)
            return
        rank = self.sum.shape[1]
        omega = sign_matrix(x.shape[1], rank, self.seed, x.device, x.dtype)
        if scale is not None:
            sketch(x, omega, spans, scale, self.sum, trace=self.trace)
            return
        if not _last_input.holds(x, spans, rank, self.seed):
            size = self.sum.numel() + self.sum.numel() % 2
            both = torch.zeros(size + 2, dtype=torch.float32, device=x.device)  # one launch for the two
            product, trace = both[: self.sum.numel()].view_as(self.sum), both[size:].view(torch.float64).squeeze(0)
            sketch(x, omega, spans, None, product, trace=trace)
            _last_input.keep((product, trace), x, spans, rank, self.seed)
        if later is None:
            for total, product in zip(self.sums(), _last_input.value):
                total += product
        else:
            later.add(self.sums(), _last_input.value)

    def mean(self, count: float) -> Moment:
        """M / count; where it is kept whole, PSD but for the rounding of float32 sums."""
        if self.dense:
            return symmetric(self.sum) / count
        columns = _shortened(*self._nystrom())
        energy, trace = columns.square().sum().clamp_min(1e-300), self.trace.clamp_min(0)
        rest = (trace - energy).clamp_min(0) / len(columns)
        return Columns(columns * ((trace / energy).clamp_max(1) / count).sqrt(), rest / count)

    def half(self, count: float) -> Triangle | Columns:
        """`mean` for products and Cholesky factors."""
        mean = None if self.dense else self.mean(count)
        return mean if isinstance(mean, Columns) else Triangle(self.sum.tril().double().div_(count))

    def factor(self, count: float) -> LowRankFactor:
        """M / count, reconstructed."""
        if self.dense:
            zero = torch.zeros((), dtype=torch.float64, device=self.sum.device)
            values, vectors = psd_eigh(symmetric(self.sum) / count)
            return LowRankFactor(vectors, values, zero, zero)
        columns, shift = self._nystrom()
        vectors, sigma, _ = torch.linalg.svd(columns, full_matrices=False)
        values = (sigma.square() - shift).clamp_min(0)
        trace = self.trace.clamp_min(0)
        values = values * (trace / values.sum().clamp_min(1e-300)).clamp_max(1)
        missing = trace - values.sum()
        rest = missing / len(vectors)
        return LowRankFactor(vectors, values / count, rest / count, torch.maximum(rest, missing - rest) / count)

    def _nystrom(self) -> tuple[Tensor, Tensor]:
        rank = self.sum.shape[1]
        d = len(self.sum) - rank
        omega = sign_matrix(d, rank, self.seed, self.sum.device, torch.float64)
        return nystrom(self.sum[:d], self.sum[d:], omega)


def nystrom(sketch: Tensor, core: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """F [d, ℓ] float64 with F Fᵀ = Y C⁺ Yᵀ ⪯ M, the Nyström approximation of M from Y = MΩ [d, ℓ] and C = ΩᵀMΩ [ℓ, ℓ], by Cholesky of C
    where rounding leaves that positive definite (an eigendecomposition takes ten times as long); and the stabilising shift of
    Tropp et al. (1706.05736, algorithm 3), at float32 level, by which the eigenvalues of F Fᵀ are too large: M + shift·I stands for M."""
    y, core, eps = sketch.double(), core.double(), torch.finfo(torch.float32).eps
    shift = eps * torch.linalg.matrix_norm(y) / omega.shape[0] ** 0.5
    # A core that is too large makes F Fᵀ smaller: the ridge outweighs the rounding of C, which a nearly square Ω would amplify.
    core = (core + core.mT) / 2 + shift * (omega.mT @ omega)
    core.diagonal().add_(eps * torch.linalg.matrix_norm(core))
    y = y + shift * omega
    factor, failed = torch.linalg.cholesky_ex(core)
    if not failed:
        return torch.linalg.solve_triangular(factor.mT, y, upper=True, left=False), shift
    values, vectors = torch.linalg.eigh(core)
    floor = values[-1].clamp_min(0) * torch.finfo(torch.float64).eps * len(values)
    root = torch.where(values > floor, values, torch.inf).rsqrt()
    return y @ (vectors * root), shift


def _shortened(columns: Tensor, shift: Tensor) -> Tensor:
    """F' with F'F'ᵀ = F Fᵀ less `shift` on its range, and eigenvalues that would be negative 0."""
    gram = columns.mT @ columns
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        rest = -shift * torch.cholesky_inverse(factor)
        rest.diagonal().add_(1)
        root, failed = torch.linalg.cholesky_ex(rest)
        if not failed:
            return columns @ root
    values, turn = torch.linalg.eigh(gram)
    return (columns @ turn) * ((values - shift).clamp_min(0) / values.clamp_min(1e-300)).sqrt()
