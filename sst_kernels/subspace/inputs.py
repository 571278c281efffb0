"""The soft filter over what modules read, before the pencil of the core: A' = A X_g (X_g + μ X_c)⁻¹."""

from __future__ import annotations

import torch
from torch import Tensor

from sst_kernels.fisher.inputs import InputMoments
from sst_kernels.fisher.structures.moment import LowRankFactor

_LEVEL = 1e-6  # share of the mean eigenvalue that is added everywhere: directions that nobody has shown are closed


def filter_inputs(gain: InputMoments, cost: InputMoments, mu: float) -> dict[str, Tensor]:
    """A' [r, d_in] per module, in A's dtype: what the patch reads, closed to inputs of the cost side.

    A' minimises E_g‖(A' − A)x‖² + μ E_c‖A'x‖² over the inputs x of both sides, and is A filtered by w = λ/(λ+μ) in the pencil
    X_g v = λ X_c v of their second moments, with the patch's reads as coordinates: the soft filter of `Subspace.soft`, for a Fisher
    I ⊗ E[x xᵀ] in the entries of A. It is RegMean (arXiv:2212.09849) between the patch and no patch. ΔW' = c·B A' does not depend on
    the gauge and keeps the rank; core coordinates, which leave A's row space as it is, cannot do this.

    Raises ValueError for a negative μ and for moments of different modules or adapters.
    """
    if not mu >= 0:
        raise ValueError(f"mu must not be negative, got {mu}")
    if gain.reads.keys() != cost.reads.keys() or any(not torch.equal(a, cost.reads[n]) for n, a in gain.reads.items()):
        raise ValueError("the input moments of the two sides belong to different adapters or modules: take both on one")
    out: dict[str, Tensor] = {}
    kept: dict[str, tuple[LowRankFactor, _Inverse]] = {}
    for name, reads in gain.reads.items():
        leader = gain.shared[name]
        if leader not in kept:
            kept = {leader: (gain[name], _Inverse(gain[name], cost[name], mu))}
        moment, inverse = kept[leader]
        wide = reads.to(moment.vectors.device, torch.float64).mT
        out[name] = inverse.times(moment.times(wide)).mT.to(reads)
    return out


class _Inverse:
    """(X_g + μ X_c + ε I)⁻¹: through d×d where the factors have as many columns, else through theirs (Woodbury)."""

    def __init__(self, gain: LowRankFactor, cost: LowRankFactor, mu: float):
        d = len(gain.vectors)
        level = _LEVEL * float(gain.trace + mu * cost.trace) / d
        if level == 0:
            raise ValueError("the inputs of a module are zero in every token of both sides")
        self.rest = float(gain.rest + mu * cost.rest) + level
        self.columns = torch.cat([gain.vectors * gain.values.sqrt(), cost.vectors * (mu * cost.values).sqrt()], 1)
        self.wide = self.columns.shape[1] >= d
        inner = self.columns @ self.columns.mT if self.wide else self.columns.mT @ self.columns
        inner.diagonal().add_(self.rest)
        self.factor = torch.linalg.cholesky(inner)

    def times(self, x: Tensor) -> Tensor:
        """The inverse times x [d, m]."""
        if self.wide:
            return torch.cholesky_solve(x, self.factor)
        return (x - self.columns @ torch.cholesky_solve(self.columns.mT @ x, self.factor)) / self.rest
