"""The soft filter over what modules read, before the pencil of the core: A' = A X_g (X_g + μ X_c)⁻¹."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sst_kernels.inputs.moments import InputMoments
from sst_kernels.fisher.structures.moment import Moment, dense

_LEVEL = (
    1e-6  # share of the mean eigenvalue that is added everywhere: whole moments close directions that nobody has shown
)
_ROUNDING = (
    1e-4,
    1e-3,
    1e-2,
)  # shares of the diagonal added to it, the first that suffices: float32 sums round coordinate by coordinate


def filter_inputs(gain: InputMoments, cost: InputMoments, mu: float) -> dict[str, Tensor]:
    """A' [r, d_in] per module, in A's dtype: what the patch reads, closed to inputs of the cost side.

    A' minimises E_g‖(A' − A)x‖² + μ E_c‖A'x‖² over the inputs x of both sides, and is A filtered by w = λ/(λ+μ) in the pencil
    X_g v = λ X_c v of their second moments, with the patch's reads as coordinates: the soft filter of `Subspace.soft`, for a Fisher
    I ⊗ E[x xᵀ] in the entries of A. It is RegMean (arXiv:2212.09849) between the patch and no patch. ΔW' = c·B A' does not depend on
    the gauge and keeps the rank; core coordinates, which leave A's row space as it is, cannot do this.

    Raises TypeError for anything but input moments, ValueError for a μ outside 0 … 1e100, for moments of different modules or adapters, and for a module that
    read nothing but zeros; FloatingPointError for sums that rounding has made useless.
    """
    for moments in (gain, cost):
        if not isinstance(moments, InputMoments):
            raise TypeError(f"expected the moments of two passes of input_moments, got {type(moments).__name__}")
    if not 0 <= mu <= 1e100:  # its products with the moments stay within float64
        raise ValueError(f"mu must lie in 0 … 1e100, got {mu}")
    if gain.reads.keys() != cost.reads.keys() or any(not torch.equal(a, cost.reads[n]) for n, a in gain.reads.items()):
        raise ValueError("the input moments of the two sides belong to different adapters or modules: take both on one")
    out: dict[str, Tensor] = {}
    kept: dict[str, tuple[Moment, Callable[[Tensor], Tensor]]] = {}
    for name, reads in gain.reads.items():
        leader = gain.shared[name]
        if leader not in kept:
            moment = gain[name]
            kept = {leader: (moment, _inverse(leader, moment, cost[name], mu))}
        moment, inverse = kept[leader]
        wide = reads.to(moment.device, torch.float64).mT
        out[name] = inverse(moment @ wide).mT.to(reads)
    return out


def _inverse(name: str, gain: Moment, cost: Moment, mu: float) -> Callable[[Tensor], Tensor]:
    """x [d, m] -> (X_g + μ X_c + ε)⁻¹ x: by Cholesky of d×d, or through the columns of two sketches (Woodbury)."""
    if isinstance(gain, Tensor) or isinstance(cost, Tensor):
        both = dense(gain) + mu * dense(cost)
        diagonal = both.diagonal().clone()
        for share in _ROUNDING:
            wider = (1 + share) * diagonal
            both.diagonal().copy_(wider + _level(name, wider.sum(), len(both)))
            factor, failed = torch.linalg.cholesky_ex(both)
            if not failed:
                return lambda x: torch.cholesky_solve(x, factor)
        raise FloatingPointError(
            f"the sums of what {name} reads are not positive definite, by more than float32 sums round: take a sketch (rank=), or fewer tokens"
        )
    rest = gain.rest + mu * cost.rest + _level(name, gain.trace() + mu * cost.trace(), len(gain.columns))
    columns = torch.cat([gain.columns, mu**0.5 * cost.columns], 1)
    inner = columns.mT @ columns
    inner.diagonal().add_(rest)
    factor = torch.linalg.cholesky(inner)
    return lambda x: (x - columns @ torch.cholesky_solve(columns.mT @ x, factor)) / rest


def _level(name: str, trace: Tensor, d: int) -> Tensor:
    if not trace > 0:
        raise ValueError(
            f"what {name} reads is zero in every token that counts: are there tokens that are not padding?"
        )
    return _LEVEL * trace / d
