"""VILA: which weights matter for one behaviour and not for another, from gradient variances of a LoRA pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sst_kernels.fisher.estimate import Estimate
from sst_kernels.fisher.structures.diagonal import Diagonal

DAMPING = 1e-5


class Vila(Diagonal):
    """F = diag(Var[g]): the Fisher as the *variance* of the score (Kim et al., COLM 2025, 2508.21300).

    The identity F = E[g gᵀ] takes E[g] = 0 for granted, which empirical labels break; VILA subtracts the mean. One
    structure per factor block, `<module>.lora_A` and `<module>.lora_B`; `vila_ratio` joins the pairs of two passes.

    The authors' code (github.com/kyj93790/VILA, TOFU/vila.py) lets the gradient of a *batch's* mean loss over its L labels stand
    for L samples, so that its result depends on how the data was batched; here it is the variance over samples, as in the paper.

    State: that of a centred `diagonal`.
    """

    kind = "vila"

    def __init__(self, shape: tuple[int, int], **options: Any):
        if options.pop("centred", True) is not True:
            raise ValueError("centred: VILA is a variance; use the diagonal structure for uncentred moments")
        super().__init__(shape, centred=True, **options)

    def options(self) -> dict[str, Any]:
        options = super().options()
        del options["centred"]
        return options

    @classmethod
    def estimate(cls, shape: tuple[int, int], samples: int, batch: int = 1, **options: Any) -> Estimate:
        return super().estimate(shape, samples, batch, **{**options, "centred": True})

    def diagonal(self) -> Tensor:
        """The diagonal of F, which here is the variance [p, q], float64; the normaliser is always the samples."""
        return self.variance()


def importance_row_sums(var_a: Tensor, var_b: Tensor) -> Tensor:
    """Row sums [d_out] of Var(B) @ Var(A), for Var(A) [r, d_in] and Var(B) [d_out, r]: two mat-vecs."""
    return var_b.double() @ var_a.double().sum(1)


def vila_ratio(forget: tuple[Vila, Vila], retain: tuple[Vila, Vila], *, damping: float = DAMPING) -> Tensor:
    """Importance of every output row of a module for `forget` relative to `retain`, [d_out], float64.

    Both are pairs of structures (A [r, d_in], B [d_out, r]) over the two data sets. With I = Var(B) Var(A) it is
    Σ_j I^f_ij / (damping·d_in + Σ_j I^r_ij): two mat-vecs, no d_out×d_in matrix.
    """
    (fa, fb), (ra, rb) = (tuple(s.variance() for s in pair) for pair in (forget, retain))
    return importance_row_sums(fa, fb) / (damping * fa.shape[1] + importance_row_sums(ra, rb))


def select_top(importance: Tensor, p: float) -> Tensor:
    """Boolean mask of the ⌈p·n⌉ most important of n entries (any shape), ties broken by position. 0 ≤ p ≤ 1."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected a share between 0 and 1, got {p}")
    flat = importance.reshape(-1)
    keep = -int(-p * flat.numel() // 1)
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[torch.argsort(flat, descending=True, stable=True)[:keep]] = True
    return mask.reshape(importance.shape)
