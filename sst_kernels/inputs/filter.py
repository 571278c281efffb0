"""The soft filter over what modules read, before the pencil of the core: A' = A X_g (X_g + μ X_c)⁻¹, and a basis of all such A'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite

import torch
from scipy.linalg import lapack
from torch import Tensor

from sst_kernels.fisher.lora import digest_of
from sst_kernels.fisher.structures.moment import Columns, Moment, Triangle, dense
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
_HELD = 1e-2  # relative distance of A from the span of a basis of it: 5e-4 was met in bfloat16, 0.8 of another adapter
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

    Example:
        >>> sides = []
        >>> for batches in (harm_batches, benign_batches):
        ...     with torch.no_grad(), sst.input_moments(model, "safety") as moments:
        ...         for batch in batches:
        ...             _ = model(**batch)
        ...     sides.append(moments)
        >>> sst.filter_inputs(*sides, mu=3.0)["model.layers.0.self_attn.q_proj"].shape
        torch.Size([3, 32])
    """
    _check_pair(gain, cost)
    check_mu(mu)
    found = filtered_lora_A(gain.lora_A, gain.sums, cost.sums, [mu])
    return {name: new.to(gain.lora_A[name]) for name, (new,) in found.items()}


def check_mu(mu: float) -> None:
    """ValueError unless the products of μ with moments stay within float64."""
    if not 0 <= mu <= 1e100:
        raise ValueError(f"mu must lie in 0 … 1e100, got {mu}")


def filtered_lora_A(
    reads: Mapping[str, Tensor], gain: MomentSums, cost: MomentSums, mus: Sequence[float]
) -> dict[str, list[Tensor]]:
    """Per module A' [r, d_in] float64 at each of the `mus`. Modules that read one tensor share a factorisation."""
    members: dict[str, list[str]] = {}
    for name in reads:
        members.setdefault(gain.shared[name], []).append(name)
    out: dict[str, list[Tensor]] = {name: [] for name in reads}
    for leader, names in members.items():
        of_gain, of_cost = gain.half(leader), cost.half(leader)
        wide = torch.cat([reads[name].to(of_gain.device, torch.float64) for name in names]).mT
        target = of_gain @ wide
        for mu in mus:
            new = _inverse(leader, of_gain, of_cost, mu)(target).mT
            for name, own in zip(names, new.split([len(reads[name]) for name in names])):
                out[name].append(own)
    return out


class Basis(Mapping[str, Tensor]):
    """Per module Q [m, d_in] float32: y = Q x holds, of what the module reads, all that A and the A' of some μ see of it.

    The rows of Q are orthonormal in the inputs' own metric X = X_g + X_c with the ridge R_g + R_c that `filter_inputs` adds. Filters and
    gradients in y are exact for every A' whose rows lie in the span of Q: at the `mus` that made it, and near to them between (a
    rational Krylov space of the pencil of moments, in which the best A' has an error of the size of its square). R_g and R_c, in
    coordinates of Q, belong to the basis: the data that made it say how well coordinates of x are known.

    `coordinates(A)` are those of A in Q: A ≈ coordinates · Q, exact where A lies in the span.

    Entries of Q are up to 100 times (1/√ridge) larger than their combination in y: products with x in bfloat16 take Q as the sum
    of two parts.

    Example:
        >>> condensed = evidence.condense(mus=(1.0, 3.0))
        >>> condensed.basis["model.layers.0.self_attn.q_proj"].shape  # up to (1 + number of μ's) · r columns
        torch.Size([9, 32])
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor],
        dual: Mapping[str, Tensor],
        ridges: Mapping[str, tuple[Tensor, Tensor]],
        mus: Sequence[float],
    ):
        self.columns, self.dual, self.ridges, self.mus = dict(columns), dict(dual), dict(ridges), tuple(mus)

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

    def check_holds(self, reads: Mapping[str, Tensor]) -> None:
        """ValueError unless A [r, d_in] of every module lies in the span, to the rounding of half precision."""
        if list(reads) != list(self):
            raise ValueError("the basis belongs to other modules: make it of moments of the same model and adapter")
        for name, a in reads.items():
            q = self[name].double().to(a.device)
            if q.shape[1] != a.shape[1] or (self.coordinates(name, a) @ q - a).norm() > _HELD * a.norm():
                raise ValueError(
                    f"the basis does not hold what {name} reads: make it of moments of the same model and adapter"
                )

    @classmethod
    def of(cls, reads: Mapping[str, Tensor], gain: MomentSums, cost: MomentSums, mus: Sequence[float]) -> Basis:
        """The basis spanned by A and its A' at each μ.

        Raises ValueError for a μ outside 0 … 1e100 and a module that read nothing but zeros; FloatingPointError for sums that rounding
        has made useless.
        """
        for mu in mus:
            check_mu(mu)
        found = filtered_lora_A(reads, gain, cost, mus)
        columns, dual, small = {}, {}, {}
        last: tuple[str, tuple] = ("", ())
        for name, own in reads.items():
            leader = gain.shared[name]
            if last[0] != leader:
                sides = gain.half(leader), cost.half(leader)
                last = leader, (*sides, *(_ridge(leader, side, _ROUNDING[0]) for side in sides))
            x_gain, x_cost, r_gain, r_cost = last[1]
            stacked = torch.cat([own.to(x_gain.device, torch.float64), *found[name]])
            images = x_gain @ stacked.mT + x_cost @ stacked.mT + (r_gain + r_cost)[:, None] * stacked.mT
            lengths = (stacked * images.mT).sum(1).clamp_min(0).sqrt()
            lengths = torch.where(lengths > 0, lengths, 1)[:, None]
            stacked, images = stacked / lengths, images / lengths.mT
            values, turn = torch.linalg.eigh(stacked @ images)
            live = values > _DEPENDENT * values[-1]
            turn = (turn[:, live] / values[live].sqrt()).mT
            columns[name], dual[name] = (turn @ stacked).float(), (turn @ images.mT).float()
            q = columns[name].double()
            small[name] = ((q * r_gain) @ q.mT, (q * r_cost) @ q.mT)
        return cls(columns, dual, small, mus)


def basis_of(gain: InputMoments, cost: InputMoments, mus: Sequence[float] = MUS) -> Basis:
    """The basis of the filters at `mus`, for `Evidence.of(model, basis=...)`, from a pilot: two passes of `input_moments` over a share of
    both sides' prompts. Raises what `filter_inputs` raises.

    Example:
        >>> from sst_kernels.inputs import basis_of, input_moments
        >>> sides = []
        >>> for batches in (harm_batches, benign_batches):  # a share of the prompts, forward only
        ...     with torch.no_grad(), input_moments(model, "safety") as moments:
        ...         for batch in batches:
        ...             _ = model(**batch)
        ...     sides.append(moments)
        >>> basis = basis_of(*sides)
        >>> sst.Evidence.of(model, "safety", basis=basis).basis is basis
        True
    """
    _check_pair(gain, cost)
    return Basis.of(gain.lora_A, gain.sums, cost.sums, mus)


def _check_pair(gain: InputMoments, cost: InputMoments) -> None:
    for moments in (gain, cost):
        if not isinstance(moments, InputMoments):
            raise TypeError(f"expected the moments of two passes of input_moments, got {type(moments).__name__}")
    if gain.lora_A.keys() != cost.lora_A.keys() or any(
        not torch.equal(a, cost.lora_A[n]) for n, a in gain.lora_A.items()
    ):
        raise ValueError("the input moments of the two sides belong to different adapters or modules: take both on one")


def filtered_in_basis(
    reads: Mapping[str, Tensor], basis: Basis, gain: MomentSums, cost: MomentSums, mu: float
) -> dict[str, Tensor]:
    """Per module A' [r, m] float64 of A [r, m], both in coordinates of `basis` as the moments are: the best A' in its span."""
    groups: dict[torch.Size, list[str]] = {}
    for name, own in reads.items():
        groups.setdefault(own.shape, []).append(name)
    out: dict[str, Tensor] = {}
    for names in groups.values():
        x, y = (torch.stack([dense(side[name]) for name in names]) for side in (gain, cost))
        r_gain, r_cost = (torch.stack([basis.ridges[name][i] for name in names]).to(x) for i in (0, 1))
        factor = torch.linalg.cholesky(x + r_gain + mu * (y + r_cost))
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


def _inverse(name: str, gain: Moment | Triangle, cost: Moment | Triangle, mu: float) -> Callable[[Tensor], Tensor]:
    """x [d, m] -> (X_g + μ X_c + ε)⁻¹ x: by Cholesky of d×d, or through the columns of two sketches (Woodbury)."""
    if not (isinstance(gain, Columns) and isinstance(cost, Columns)):
        both = torch.add(_lower(gain), _lower(cost), alpha=mu)
        diagonal = both.diagonal().clone()
        for share in _ROUNDING:
            wider = (1 + share) * diagonal
            both.diagonal().copy_(wider + _level(name, wider.sum(), len(both)))
            solve = _cholesky(both)
            if solve is not None:
                return solve
        raise FloatingPointError(
            f"the sums of what {name} reads are not positive definite, by more than float32 sums round: take a sketch (rank=), or fewer tokens"
        )
    rest = gain.rest + mu * cost.rest + _level(name, gain.trace() + mu * cost.trace(), len(gain.columns))
    columns = torch.cat([gain.columns, mu**0.5 * cost.columns], 1)
    inner = columns.mT @ columns
    inner.diagonal().add_(rest)
    factor = torch.linalg.cholesky(inner)
    return lambda x: (x - columns @ torch.cholesky_solve(columns.mT @ x, factor)) / rest


def _cholesky(lower: Tensor) -> Callable[[Tensor], Tensor] | None:
    """x ↦ X⁻¹ x of X [d, d] float64, given by its lower triangle; None where X is not positive definite, or not finite."""
    if lower.device.type != "cpu":
        factor, failed = torch.linalg.cholesky_ex(lower)
        return None if failed else lambda x: torch.cholesky_solve(x, factor)
    # Without the copies and the cleared triangle of torch's, and by SciPy's LAPACK: two to three times as fast at d = 1536.
    packed, info = lapack.dpotrf(lower.numpy().T, lower=0, clean=0)
    if info or not isfinite(packed.diagonal().sum()):  # OpenBLAS takes NaN for positive
        return None
    return lambda x: torch.from_numpy(lapack.dpotrs(packed, x.numpy(), lower=0)[0])


def _lower(moment: Moment | Triangle) -> Tensor:
    """[d, d] float64 whose lower triangle is the moment's: Cholesky reads no more."""
    return moment.lower if isinstance(moment, Triangle) else dense(moment)


def _ridge(name: str, moment: Moment | Triangle, share: float) -> Tensor:
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
