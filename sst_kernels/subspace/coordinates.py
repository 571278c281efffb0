"""Core coordinates in which the Frobenius norm of ΔW is the Euclidean norm.

With M = (c²BᵀB) ⊗ (AAᵀ) = R², ΔW(S) = c·B S A has ‖ΔW(S)‖_F = ‖R vec S‖. In z = R vec(S) gradients become R⁻¹g, the
damping metric M becomes the identity, and nothing depends on the gauge (B X⁻¹, X A) of the adapter any more. Directions of S
that do not reach ΔW (rank-deficient A or B) are dropped by the pseudo-inverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sst_kernels.fisher.base import Block


class FrobeniusCoordinates:
    """z [n], n = Σ r² over the modules in order; `slices[module]` are a module's coordinates."""

    def __init__(self, blocks: Sequence[Block], metric: Mapping[str, tuple[Tensor, Tensor]], device: torch.device):
        self.slices: dict[str, slice] = {}
        self._ranks: dict[str, int] = {}
        modules: dict[str, str] = {}
        start = 0
        for block in blocks:
            self.slices[block.name] = slice(start, start + block.size)
            start += block.size
            self._ranks[block.name] = block.shape[0]
            modules[block.name] = block.module
        pairs: dict[str, Tensor] = {}
        for rank in set(self._ranks.values()):
            names = [name for name, r in self._ranks.items() if r == rank]
            sides = torch.stack([torch.stack(metric[modules[name]]) for name in names]).to("cpu", torch.float64)
            # Hundreds of r x r problems: one batch on the CPU, since a GPU would take them one by one.
            pairs |= zip(names, torch.stack(_roots(sides), 1).to(device))
        self._roots = {name: pairs[name][0].unbind() for name in self.slices}
        self._inverse = {name: pairs[name][1].unbind() for name in self.slices}
        self.size = start

    def patch(self) -> Tensor:
        """z [n] of the whole patch, S = I."""
        return self.from_cores({name: torch.eye(r, dtype=torch.float64) for name, r in self._ranks.items()})

    def from_cores(self, cores: Mapping[str, Tensor]) -> Tensor:
        """z [n] of S [r, r] per module."""
        return torch.cat(
            [(left @ cores[name].to(left) @ right).flatten() for name, (left, right) in self._roots.items()]
        )

    def to_cores(self, z: Tensor) -> dict[str, Tensor]:
        """S [r, r] float64 per module, of z [n]."""
        cores = {}
        for name, (left, right) in self._inverse.items():
            r = self._ranks[name]
            cores[name] = left @ z[self.slices[name]].reshape(r, r) @ right
        return cores

    def gradients(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Per-sample gradients [N, n] with respect to S (any float dtype) -> with respect to z, float64; into `out` if given."""
        out = torch.empty(rows.shape, dtype=torch.float64, device=rows.device) if out is None else out
        for name, (left, right) in self._inverse.items():
            r, columns = self._ranks[name], self.slices[name]
            out[:, columns] = (left @ rows[:, columns].double().reshape(-1, r, r) @ right).flatten(1)
        return out

    def matrix(self, name: str, fisher: Tensor) -> Tensor:
        """A module's Fisher [r², r²] in S coordinates -> in z coordinates."""
        left, right = self._inverse[name]
        inverse = torch.kron(left, right)
        return inverse @ fisher @ inverse


def _roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots and their pseudo-inverses of PSD matrices [..., r, r]."""
    values, vectors = torch.linalg.eigh(matrices)
    live = values > values[..., -1:].clamp_min(0) * values.shape[-1] * torch.finfo(values.dtype).eps * 8
    root = torch.where(live, values, 0).sqrt()
    inverse = torch.where(live, 1 / torch.where(live, root, 1), 0)
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors * inverse[..., None, :]) @ vectors.mT
