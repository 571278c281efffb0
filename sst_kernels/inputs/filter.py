"""The soft filter over what modules read, before the pencil of the core: A' = A X_g (X_g + μ X_c)⁻¹, and a basis of all such A'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sst_kernels.fisher.lora import digest_of
from sst_kernels.fisher.structures.moment import Columns, Moment, dense
from sst_kernels.inputs.moments import InputMoments, MomentSums

_LEVEL = (
    1e-6  # share of the mean eigenvalue that is added everywhere: whole moments close directions that nobody has shown
)
_ROUNDING = (
    1e-4,
    1e-3,
    1e-2,
)  # shares of the diagonal added to it, the first that suffices: float32 sums round coordinate by coordinate
MUS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # where a basis is exact unless told otherwise
_DEPENDENT = (
    1e-10  # squared length, in the inputs' own metric, below which a direction of unit length adds nothing to a basis
)


def filter_inputs(gain: InputMoments, cost: InputMoments, mu: float) -> dict[str, Tensor]:
    """A' [r, d_in] per module, in A's dtype: what the patch reads, closed to inputs of the cost side.

    A' minimises E_g‖(A' − A)x‖² + μ E_c‖A'x‖² over the inputs x of both sides, and is A filtered by w = λ/(λ+μ) in the pencil
    X_g v = λ X_c v of their second moments, with the patch's row space as coordinates: the soft filter of `Subspace.soft`, for a
    Fisher I ⊗ E[x xᵀ] in the entries of A. It is RegMean (arXiv:2212.09849) between the patch and no patch. ΔW' = c·B A' does not
    depend on the gauge and keeps the rank; core coordinates, which leave A's row space as it is, cannot do this.

    Raises TypeError for anything but input moments, ValueError for a μ outside 0 … 1e100, for moments of different modules or adapters, and for a module that
    read nothing but zeros; FloatingPointError for sums that rounding has made useless.
    """
    for moments in (gain, cost):
        if not isinstance(moments, InputMoments):
            raise TypeError(f"expected the moments of two passes of input_moments, got {type(moments).__name__}")
    check_mu(mu)
    if gain.reads.keys() != cost.reads.keys() or any(not torch.equal(a, cost.reads[n]) for n, a in gain.reads.items()):
        raise ValueError("the input moments of the two sides belong to different adapters or modules: take both on one")
    found = filtered_reads(gain.reads, gain.sums, cost.sums, [mu])
    return {name: new.to(gain.reads[name]) for name, (new,) in found.items()}


def check_mu(mu: float) -> None:
    """ValueError unless the products of μ with moments stay within float64."""
    if not 0 <= mu <= 1e100:
        raise ValueError(f"mu must lie in 0 … 1e100, got {mu}")


def filtered_reads(
    reads: Mapping[str, Tensor], gain: MomentSums, cost: MomentSums, mus: Sequence[float]
) -> dict[str, list[Tensor]]:
    """Per module A' [r, d_in] float64 at each of the `mus`. Modules that read one tensor share a factorisation."""
    members: dict[str, list[str]] = {}
    for name in reads:
        members.setdefault(gain.shared[name], []).append(name)
    out: dict[str, list[Tensor]] = {name: [] for name in reads}
    for leader, names in members.items():
        of_gain, of_cost = gain[leader], cost[leader]
        wide = torch.cat([reads[name].to(of_gain.device, torch.float64) for name in names]).mT
        target = of_gain @ wide
        for mu in mus:
            new = _inverse(leader, of_gain, of_cost, mu)(target).mT
            for name, own in zip(names, new.split([len(reads[name]) for name in names])):
                out[name].append(own)
    return out


class Basis(Mapping[str, Tensor]):
    """Per module Q [m, d_in] float32: y = Q x holds, of what the module reads, all that A and the A' of some μ see of it.

    The rows of Q are orthonormal in the inputs' own metric X = X_g + X_c, so that the entries of y have unit second moment. Filters
    and gradients in y are exact for every A' whose rows lie in the span of Q: at the `mus` that made it, and near to them between
    (a rational Krylov space of the pencil of moments, in which the best A' has an error of the size of its square).

    `coordinates(A)` are those of A in Q: A ≈ coordinates · Q, exact where A lies in the span.
    """

    def __init__(self, columns: Mapping[str, Tensor], dual: Mapping[str, Tensor], mus: Sequence[float]):
        self.columns, self.dual, self.mus = dict(columns), dict(dual), tuple(mus)

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __iter__(self):
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def fingerprint(self) -> str:
        """SHA-256 of names and columns: rows in two bases add up exactly when these agree."""
        return digest_of((name, 1.0, self.columns[name], self.dual[name]) for name in self)

    def coordinates(self, name: str, reads: Tensor) -> Tensor:
        """[r, m] float64 of A [r, d_in]: its projection on the span in the metric X."""
        return reads.double() @ self.dual[name].double().to(reads.device).mT

    @classmethod
    def of(
        cls, reads: Mapping[str, Tensor], gain: MomentSums, cost: MomentSums, mus: Sequence[float]
    ) -> tuple[Basis, dict[str, tuple[Tensor, Tensor, Tensor]]]:
        """The basis spanned by A and its A' at each μ, and per module (X_g, R_g, R_c) in it: the gain's moments, and both sides' with the
        ridge that `filter_inputs` adds, [m, m] float64."""
        for mu in mus:
            check_mu(mu)
        found = filtered_reads(reads, gain, cost, mus)
        columns, dual, small = {}, {}, {}
        last: tuple[str, tuple] = ("", ())
        for name, own in reads.items():
            leader = gain.shared[name]
            if last[0] != leader:
                sides = gain[leader], cost[leader]
                ridges = tuple(_ridge(leader, side, _ROUNDING[0]) for side in sides)
                last = leader, (*sides, *ridges)
            x_gain, x_cost, r_gain, r_cost = last[1]
            stacked = torch.cat([own.to(x_gain.device, torch.float64), *found[name]])
            images = x_gain @ stacked.mT + x_cost @ stacked.mT + (r_gain + r_cost)[:, None] * stacked.mT
            lengths = (stacked * images.mT).sum(1).clamp_min(0).sqrt()
            lengths = torch.where(lengths > 0, lengths, 1)[:, None]
            stacked, images = stacked / lengths, images / lengths.mT
            values, turn = torch.linalg.eigh(stacked @ images)
            live = values > _DEPENDENT * values[-1]
            turn = (turn[:, live] / values[live].sqrt()).mT
            q = turn @ stacked
            columns[name], dual[name] = q.float(), (turn @ images.mT).float()
            q = columns[name].double()
            inner = (q @ (x_gain @ q.mT), q @ (x_cost @ q.mT))
            ridged = [x + (q * ridge) @ q.mT for x, ridge in zip(inner, (r_gain, r_cost))]
            small[name] = (inner[0], *ridged)
        return cls(columns, dual, mus), small


def basis_of(gain: InputMoments, cost: InputMoments, mus: Sequence[float] = MUS) -> Basis:
    """The basis of the filters at `mus`, from two passes of `input_moments` (a pilot over a share of the prompts, say)."""
    return Basis.of(gain.reads, gain.sums, cost.sums, mus)[0]


def filtered_in_basis(
    reads: Mapping[str, Tensor], small: Mapping[str, tuple[Tensor, Tensor, Tensor]], mu: float
) -> dict[str, Tensor]:
    """Per module A' [r, m] float64 of A [r, m], both in coordinates of a basis: the best A' in its span."""
    groups: dict[torch.Size, list[str]] = {}
    for name, own in reads.items():
        groups.setdefault(own.shape, []).append(name)
    out: dict[str, Tensor] = {}
    for names in groups.values():
        x, ridged, other = (torch.stack(part) for part in zip(*(small[name] for name in names)))
        factor = torch.linalg.cholesky(ridged + mu * other)
        new = torch.cholesky_solve(x @ torch.stack([reads[name].to(x) for name in names]).mT, factor).mT
        out |= dict(zip(names, new))
    return {name: out[name] for name in reads}


def read_loss(
    reads: Mapping[str, Tensor], other: Mapping[str, Tensor], gain: MomentSums, cost: MomentSums, mu: float
) -> dict[str, float]:
    """Per module E‖(A' − A″)x‖² over E‖A'x‖², x of both sides with cost weighing μ: what replacing A' = `reads` by A″ = `other` does."""
    lost = {}
    for name, a in reads.items():
        a, b = a.double(), other[name].double().to(a.device)
        x, y = gain[name], cost[name]

        def energy(z: Tensor, x: Moment = x, y: Moment = y) -> float:
            return float((z * ((x @ z.mT) + mu * (y @ z.mT)).mT).sum())

        whole = energy(a)
        lost[name] = energy(a - b) / whole if whole > 0 else 0.0
    return lost


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


def _ridge(name: str, moment: Moment, share: float) -> Tensor:
    """[d]: what `_inverse` adds to the diagonal of this side's moments."""
    if isinstance(moment, Columns):
        return _level(name, moment.trace(), len(moment.columns)).expand(len(moment.columns))
    diagonal = moment.diagonal()
    return share * diagonal + _level(name, (1 + share) * diagonal.sum(), len(diagonal))


def _level(name: str, trace: Tensor, d: int) -> Tensor:
    if not trace > 0:
        raise ValueError(
            f"what {name} reads is zero in every token that counts: are there tokens that are not padding?"
        )
    return _LEVEL * trace / d
