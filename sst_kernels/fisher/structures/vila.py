"""VILA: which weights matter for one behaviour and not for another, from gradient variances of a LoRA pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sst_kernels.fisher.base import TokenBatch
from sst_kernels.fisher.structures.diagonal import Diagonal

DAMPING = 1e-5
BLOCK = 1 << 22  # entries of Var(B) Var(A) formed at once


class Vila(Diagonal):
    """F = diag(Var[g]): the Fisher as the *variance* of the score (Kim et al., COLM 2025, 2508.21300).

    The identity F = E[g gᵀ] takes E[g] = 0 for granted, which empirical labels break; VILA subtracts the mean. One
    structure per factor block, `<module>.lora_A` and `<module>.lora_B`; `vila_ratio` joins the pairs of two passes.

    `estimator="sample"` (default) is the paper: the variance over samples. `estimator="public"` is what the authors'
    code computes (github.com/kyj93790/VILA, TOFU/vila.py): the gradient ḡ of a *batch's* mean loss over its L labels
    stands for L samples, Var = Σ L ḡ²/Σ L − (Σ L ḡ/Σ L)², so the result depends on how the data was batched. The code
    also accumulates in the parameters' bfloat16 and measures in train mode at A, B ~ N(0, σ²); these are not copied.

    State: that of a centred `diagonal`.
    """

    kind = "vila"

    def __init__(self, shape: tuple[int, int], *, estimator: str = "sample", **options: Any):
        if options.pop("centred", True) is not True:
            raise ValueError("centred: VILA is a variance; use the diagonal structure for uncentred moments")
        super().__init__(shape, centred=True, **options)
        if estimator not in ("sample", "public"):
            raise ValueError(f'estimator: expected "sample" or "public", got {estimator!r}')
        if estimator == "public" and self.sample != "sequence":
            raise ValueError('estimator="public" takes whole batches: it cannot be combined with sample="token"')
        self.estimator = estimator

    def options(self) -> dict[str, Any]:
        options = {**super().options(), "estimator": self.estimator}
        del options["centred"]
        return options

    def _update(self, batch: TokenBatch) -> None:
        if self.estimator == "sample":
            super()._update(batch)
            return
        if not batch.counts.labels:
            raise ValueError('estimator="public" weighs a batch by its labels, and this batch counts none')
        total = batch.gradients().sum(0).reshape(self.shape)
        self._join(total, torch.zeros_like(total), batch.counts.labels)

    def diagonal(self) -> Tensor:
        """The diagonal of F, which here is the variance [p, q], float64; the normaliser is always the samples."""
        return self.variance()


def importance_row_sums(var_a: Tensor, var_b: Tensor) -> Tensor:
    """Row sums [d_out] of Var(B) @ Var(A), for Var(A) [r, d_in] and Var(B) [d_out, r]: two mat-vecs."""
    return var_b.double() @ var_a.double().sum(1)


def vila_ratio(
    forget: tuple[Vila, Vila],
    retain: tuple[Vila, Vila],
    *,
    rows: str = "ratio_of_sums",
    damping: float = DAMPING,
    renormalise: bool = False,
) -> Tensor:
    """Importance of every output row of a module for `forget` relative to `retain`, [d_out], float64.

    Both are pairs of structures (A [r, d_in], B [d_out, r]) over the two data sets. With I = Var(B) Var(A),

    rows="ratio_of_sums"   Σ_j I^f_ij / (damping·d_in + Σ_j I^r_ij): mat-vecs only
    rows="sum_of_ratios"   Σ_j I^f_ij / (damping + I^r_ij): the authors' code, streamed here over blocks of rows, so
                           that the d_out×d_in matrices never exist

    `renormalise` divides I by the count of the pass once more, as the authors' code does when it reads its own already
    normalised file; `damping` (1e-5, as there) then dominates the denominator. Raises ValueError for other options.
    """
    (fa, fb), (ra, rb) = (tuple(s.variance() for s in pair) for pair in (forget, retain))
    if renormalise:
        fb, rb = fb / forget[1]._samples, rb / retain[1]._samples
    d_in = fa.shape[1]
    if rows == "ratio_of_sums":
        return importance_row_sums(fa, fb) / (damping * d_in + importance_row_sums(ra, rb))
    if rows != "sum_of_ratios":
        raise ValueError(f'rows: expected "ratio_of_sums" or "sum_of_ratios", got {rows!r}')
    step = max(1, BLOCK // d_in)
    pieces = [(fb[i : i + step] @ fa / (damping + rb[i : i + step] @ ra)).sum(1) for i in range(0, len(fb), step)]
    return torch.cat(pieces)


def select_top(importance: Tensor, p: float) -> Tensor:
    """Boolean mask of the ⌈p·n⌉ most important of n entries (any shape), ties broken by position. 0 ≤ p ≤ 1."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected a share between 0 and 1, got {p}")
    flat = importance.reshape(-1)
    keep = -int(-p * flat.numel() // 1)
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[torch.argsort(flat, descending=True, stable=True)[:keep]] = True
    return mask.reshape(importance.shape)
