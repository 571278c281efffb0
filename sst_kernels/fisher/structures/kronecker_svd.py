"""KPSVD: the nearest Kronecker product to the Fisher in Frobenius norm, and sums of a few of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from scipy.optimize import nnls
from torch import Tensor

from sst_kernels.distributed import Reduction
from sst_kernels.fisher.base import Counts, Structure, TokenBatch, whole
from sst_kernels.fisher.estimate import Estimate
from sst_kernels.fisher.structures.algebra import kron_times, nearest_psd, psd_eigh
from sst_kernels.fisher.structures.lowrank import LowRank

GAP = 1e-9  # eigenvalues of the rearrangement's Gram matrix closer than this, relatively, count as equal


class KroneckerSVD(Structure):
    """F ≈ Σ_k X_k ⊗ Y_k with X_k [p, p], Y_k [q, q] PSD (Koroko et al., 2201.10285; Van Loan & Pitsianis 1993).

    Streaming keeps a Frequent Directions sketch B_1 … B_m of the rows (`LowRank`, ℓ = `sketch`), and everything below
    is exact for the sketched F̃ = Σ_i vec(B_i) vec(B_i)ᵀ; ℓ ≥ p·q, or no more than 2ℓ samples, loses nothing. The
    rearrangement R(F̃) = Σ_i B_i ⊗ B_i [p², q²] is an isometry and is never formed: its Gram matrix on the smaller side
    (p² × p², 256×256 for r = 16) comes from the inner products B_i B_jᵀ alone.

    R maps PSD matrices to PSD matrices, so its leading singular space holds a PSD pair: the limit of a power iteration
    that starts at the K-FAC factor Σ_i B_i B_iᵀ, computed as the projection of that factor onto the space. This fixes
    sign, symmetry and the choice among equal singular values. `rank` R > 1 splits the next R − 1 singular pairs into
    their positive parts and weighs all terms by non-negative least squares: up to 2R − 1 terms, each PSD, and an error
    that never exceeds that of fewer terms.

    State: that of the sketch.
    """

    kind = "kronecker_svd"

    def __init__(self, shape: tuple[int, int], *, rank: int = 1, sketch: int | None = None, **options: Any):
        super().__init__(shape, **options)
        self.rank = whole("rank", rank)
        if self.rank > min(self.shape) ** 2:
            raise ValueError(f"rank: expected 1 to {min(self.shape) ** 2} for shape {self.shape}, got {rank}")
        self.sketch = min(self.size, 256) if sketch is None else whole("sketch", sketch)
        self._rows = LowRank(shape, rank=self.sketch, **options)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "rank": self.rank, "sketch": self.sketch}

    @property
    def certificate(self) -> float:
        """The certificate Δ of the sketch: 0 ⪯ F − F̃ ⪯ Δ·I."""
        return float(self._rows._shrinkage + self._rows._rounding) / self.normaliser

    @classmethod
    def estimate(cls, shape: tuple[int, int], samples: int, batch: int = 1, **options: Any) -> Estimate:
        n = shape[0] * shape[1]
        return LowRank._sized(n, samples, options.get("sketch") or min(n, 256))

    def append(self, rows: Tensor, counts: Counts | None = None) -> None:
        """Add per-sample gradients [M, p·q], and their `counts` unless the caller keeps those."""
        self._rows.append(rows)
        if counts is not None:
            self.counts += counts

    def _update(self, batch: TokenBatch) -> None:
        self._rows._update(batch)

    def _merge(self, other: Self) -> None:
        self._rows._merge(other._rows)

    def reduction(self) -> Reduction:
        yield from self._rows.reduction()

    def state_dict(self) -> dict[str, Tensor]:
        return self._rows.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._rows.load_state_dict(state)

    def terms(self) -> list[tuple[Tensor, Tensor]]:
        """The PSD pairs (X_k [p, p], Y_k [q, q]), float64, with F ≈ Σ_k X_k ⊗ Y_k; of the pair, ‖X_k‖_F = 1."""
        p, q = self.shape
        b = self._rows.rows.double().reshape(-1, p, q) / self.normaliser**0.5
        if not b.any():
            return []
        flipped = p > q
        pairs = nearest_products(b.mT if flipped else b, self.rank)
        return [(y / y.norm(), x * y.norm()) for x, y in pairs] if flipped else pairs

    def matvec(self, vectors: Tensor) -> Tensor:
        v = vectors.to(self.device, torch.float64)
        return sum((kron_times(x, y, v) for x, y in self.terms()), torch.zeros_like(v))

    def operator(self) -> Any:
        """`Kronecker(X, Y)` for one term, else `KroneckerSum` of such."""
        from sst_kernels.gevp.operators import Kronecker, KroneckerSum

        terms = self.terms()
        return Kronecker(*terms[0]) if len(terms) == 1 else KroneckerSum(terms)


def nearest_products(b: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
    """PSD pairs from the `rank` leading singular pairs of Σ_i B_i ⊗ B_i for b [m, p, q], p ≤ q; the first is the nearest
    single product, and more of them together come no further. Costs m²·p²·q and p⁶ operations."""
    values, vectors = psd_eigh(_gram(b))
    pairs = [_leading_pair(b, vectors[:, values >= values[0] * (1 - GAP)])]
    if rank == 1:
        return pairs
    for vector in vectors.mT[1:rank]:
        left = vector.reshape(b.shape[1], -1)
        left = (left + left.mT) / 2
        pairs += _positive_parts(left, _right(b, left))
    weights = _weights(b, pairs)
    return [(x, w * y) for w, (x, y) in zip(weights, pairs, strict=True) if w > 0]


def _gram(b: Tensor) -> Tensor:
    """R Rᵀ [p², p²] for R = Σ_i B_i ⊗ B_i: Σ_ij (B_i B_jᵀ) ⊗ (B_i B_jᵀ), rearranged, on symmetric matrices."""
    p = b.shape[1]
    gram = torch.zeros(p * p, p * p, dtype=b.dtype, device=b.device)
    for row in b:
        inner = (row @ b.mT).reshape(len(b), p * p)
        gram += inner.mT @ inner
    gram = gram.reshape(p, p, p, p).transpose(1, 2).reshape(p * p, p * p)
    swap = torch.arange(p * p, device=b.device).reshape(p, p).mT.reshape(-1)
    gram = (gram + gram[swap]) / 2
    gram = (gram + gram[:, swap]) / 2
    return (gram + gram.mT) / 2


def _right(b: Tensor, left: Tensor) -> Tensor:
    """Rᵀ vec(X): Σ_i B_iᵀ X B_i [q, q]."""
    m, p, q = b.shape
    return b.reshape(m * p, q).mT @ (left @ b).reshape(m * p, q)


def _leading_pair(b: Tensor, leading: Tensor) -> tuple[Tensor, Tensor]:
    """The PSD pair in the leading singular space (columns of `leading`) on which the K-FAC factor falls, ‖X‖_F = 1."""
    kfac = (b @ b.mT).sum(0).reshape(-1)
    x = (leading @ (leading.mT @ kfac)).reshape(b.shape[1], -1)
    values, vectors = psd_eigh((x + x.mT) / 2)
    values = values / values.norm()
    root = (vectors * values.sqrt()).mT
    half = (root @ b).flatten(0, 1)
    return root.mT @ root, half.mT @ half


def _positive_parts(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The PSD products X₊ ⊗ Y₊ and X₋ ⊗ Y₋ of an indefinite X ⊗ Y, left factors of unit norm."""
    parts = [(nearest_psd(x), nearest_psd(y)), (nearest_psd(-x), nearest_psd(-y))]
    return [(u / u.norm(), v) for u, v in parts if u.norm() > 0 and v.norm() > 0]


def _weights(b: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Non-negative w that minimise ‖Σ_i B_i ⊗ B_i − Σ_k w_k vec(X_k) vec(Y_k)ᵀ‖_F."""
    xs = torch.stack([x for x, _ in pairs]).flatten(1)
    ys = torch.stack([y for _, y in pairs]).flatten(1)
    normal = (xs @ xs.mT) * (ys @ ys.mT)
    target = torch.stack([(_right(b, x) * y).sum() for x, y in pairs])
    size = normal.diagonal().sqrt()
    values, vectors = psd_eigh(normal / size[:, None] / size)
    keep = values > values[0] * 1e-14
    root = values[keep].sqrt()
    matrix, rhs = root[:, None] * vectors[:, keep].mT, (vectors[:, keep].mT @ (target / size)) / root
    return [float(w) for w in torch.from_numpy(nnls(matrix.cpu().numpy(), rhs.cpu().numpy())[0]) / size.cpu()]
