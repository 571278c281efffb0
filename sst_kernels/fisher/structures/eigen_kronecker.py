"""EK-FAC: the second moments of the per-sample gradients in the Kronecker eigenbasis of a first pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from sst_kernels.distributed import Reduction, Sum
from sst_kernels.fisher.base import Structure, TokenBatch
from sst_kernels.fisher.estimate import DOUBLE, SINGLE, Estimate, gradients_held
from sst_kernels.fisher.structures.algebra import kron_times
from sst_kernels.fisher.structures.kronecker import TwoSided


class EigenKronecker(Structure):
    """F = (U_L ⊗ U_R) diag(s) (U_L ⊗ U_R)ᵀ with s = 1/count · Σ_n (U_Lᵀ G_n U_R)² (George et al., 1806.03884).

    The second of two passes: `basis` is the `kronecker` or `kronecker_lowrank` structure of the first, and gives U_L
    [p, p'] and U_R [q, q'] with orthonormal columns. Of all matrices diagonal in this basis, F is the closest to the
    exact Fisher in Frobenius norm. A truncated basis (p' < p from a low-rank first pass) keeps Fisher mass only inside
    its span.

    State: `u_left`, `u_right` float32, `moments` [p', q'] float32 raw sums. Without `basis`, load a state before use.
    """

    kind = "eigen_kronecker"

    def __init__(self, shape: tuple[int, int], *, basis: TwoSided | None = None, **options: Any):
        super().__init__(shape, **options)
        self._set_basis(torch.empty(self.shape[0], 0), torch.empty(self.shape[1], 0))
        if basis is not None:
            if basis.shape != self.shape:
                raise ValueError(f"basis: expected a structure of shape {self.shape}, got {basis.shape}")
            self._set_basis(*basis.eigenbases())

    @classmethod
    def estimate(cls, shape: tuple[int, int], samples: int, batch: int = 1, **options: Any) -> Estimate:
        p, q = shape
        state = SINGLE * (p * p + q * q + p * q)
        bases = DOUBLE * (3 * max(p, q) ** 2 + min(p, q) ** 2)  # while they are found
        return Estimate(state, state + max(bases, SINGLE * p * q * (gradients_held(p, q, batch) + 2)))

    def _set_basis(self, left: Tensor, right: Tensor) -> None:
        self._u_left = left.to(self.device, torch.float32).contiguous()
        self._u_right = right.to(self.device, torch.float32).contiguous()
        self._moments = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float32, device=self.device)

    def share(self, device: torch.device) -> Self:
        share = super().share(device)
        share._set_basis(self._u_left, self._u_right)
        return share

    def _require_basis(self) -> None:
        if not self._moments.numel():
            raise RuntimeError(
                "this eigen_kronecker Fisher has no eigenbases: pass basis=<the kronecker structure of a first pass>"
            )

    def _update(self, batch: TokenBatch) -> None:
        from sst_kernels.ops import eigen_moments

        self._require_basis()
        eigen_moments(batch.left, batch.right, batch.spans, batch.scale, self._u_left, self._u_right, self._moments)

    def _merge(self, other: Self) -> None:
        self._require_basis()
        other._require_basis()
        for mine, theirs in ((self._u_left, other._u_left), (self._u_right, other._u_right)):
            if not torch.equal(mine, theirs.to(self.device)):
                raise ValueError("cannot merge eigen_kronecker Fishers of different eigenbases: share one first pass")
        self._moments += other._moments.to(self.device)

    def reduction(self) -> Reduction:
        """Add the moments over ranks: exact, given that all ranks were constructed from the same (reduced) basis."""
        self._require_basis()
        yield Sum([self._moments])

    def state_dict(self) -> dict[str, Tensor]:
        return {"u_left": self._u_left, "u_right": self._u_right, "moments": self._moments}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._set_basis(state["u_left"], state["u_right"])
        self._moments.copy_(state["moments"])

    def eigenvalues(self) -> Tensor:
        """s [p', q'], float64."""
        self._require_basis()
        return self._moments.double() / self.normaliser

    def eigenbases(self) -> tuple[Tensor, Tensor]:
        """U_L [p, p'] and U_R [q, q'], float64, orthonormal to float64 although they are stored in float32."""
        self._require_basis()
        return _orthonormal(self._u_left.double()), _orthonormal(self._u_right.double())

    def matvec(self, vectors: Tensor) -> Tensor:
        s, (left, right) = self.eigenvalues(), self.eigenbases()
        inside = kron_times(left.mT, right.mT, vectors.to(self.device, torch.float64))
        return kron_times(left, right, s.reshape(-1, *[1] * (inside.ndim - 1)) * inside)

    def operator(self) -> Any:
        """`EigenKronecker(u_left, u_right, s)`, undamped; a `SpectralKronecker` where the basis is truncated."""
        s, (left, right) = self.eigenvalues(), self.eigenbases()
        if left.shape[0] == left.shape[1] and right.shape[0] == right.shape[1]:
            from sst_kernels.gevp.operators import EigenKronecker as EigenKroneckerOperator

            return EigenKroneckerOperator(left, right, s)
        from sst_kernels.fisher.structures.spectral import SpectralKronecker

        return SpectralKronecker(left, right, s, s.new_zeros(s.shape[0]), s.new_zeros(s.shape[1]), s.new_zeros(()))


def _orthonormal(u: Tensor) -> Tensor:
    """One Newton step to the polar factor, which squares the departure of UᵀU from I."""
    return 1.5 * u - 0.5 * u @ (u.mT @ u)
