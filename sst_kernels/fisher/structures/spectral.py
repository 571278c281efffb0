"""A Kronecker product known by its leading eigenvectors only, as an operator of a pencil."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sst_kernels.gevp.operators import Operator


class SpectralKronecker(Operator):
    """The symmetric matrix of order p·q that has the eigenvalues

        s [k, l]       on  u_left ⊗ u_right,                      u_left [p, k], u_right [q, l] with orthonormal columns
        s_left [k]     on  u_left ⊗ (complement of u_right)
        s_right [l]    on  (complement of u_left) ⊗ u_right
        s_rest []      on  both complements.

    No p×p or q×q matrix is formed, and with all eigenvalues positive the inverse is as cheap as the product.
    """

    def __init__(self, u_left: Tensor, u_right: Tensor, s: Tensor, s_left: Tensor, s_right: Tensor, s_rest: Tensor):
        self.u_left, self.u_right = u_left.double(), u_right.double()
        self.s, self.s_left, self.s_right, self.s_rest = s, s_left, s_right, s_rest
        self.n, self.device = len(u_left) * len(u_right), s.device

    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.s, self.s_left, self.s_right, self.s_rest

    def _apply(self, spectrum: Sequence[Tensor], x: Tensor) -> Tensor:
        s, s_left, s_right, s_rest = spectrum
        u, v = self.u_left, self.u_right
        x = x.double().T.reshape(-1, len(u), len(v))
        rows, columns = u.mT @ x, x @ v
        both = rows @ v
        rows, columns = rows - both @ v.mT, columns - u @ both
        rest = x - u @ both @ v.mT - u @ rows - columns @ v.mT
        out = u @ (s * both) @ v.mT + u @ (s_left[:, None] * rows) + (columns * s_right) @ v.mT + s_rest * rest
        return out.reshape(-1, self.n).T

    def matmul(self, x: Tensor) -> Tensor:
        return self._apply(self._spectrum(), x)

    def diagonal(self) -> Tensor:
        a, b = self.u_left.square(), self.u_right.square()
        na, nb = (1 - h.sum(1)[:, None] for h in (a, b))
        inner = a @ self.s @ b.mT + (a @ self.s_left[:, None]) @ nb.mT + na @ (b @ self.s_right[:, None]).mT
        return (inner + self.s_rest * na @ nb.mT).reshape(-1)

    def solve(self, x: Tensor) -> Tensor | None:
        full_left, full_right = (u.shape[0] == u.shape[1] for u in (self.u_left, self.u_right))
        unused = (False, full_right, full_left, full_left or full_right)
        used = [torch.ones_like(t) if skip else t for t, skip in zip(self._spectrum(), unused, strict=True)]
        if not all(bool((t > 0).all()) for t in used):
            return None
        return self._apply([1 / t for t in used], x)

    def damped(self, damping: float) -> SpectralKronecker:
        return SpectralKronecker(self.u_left, self.u_right, *(t + damping for t in self._spectrum()))
