"""Symmetric operators that a pencil can be made of. Each knows its product, its dense form, its diagonal, and, where the
structure gives one, its inverse; pencils.py decides from that which route a pair takes.

Kronecker products act on row-major vec: (L kron R) vec(S) = vec(L S R^T) for S [p, q].
All arithmetic is float64 on the device of the tensors; storage may be float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import frexp

import torch
from torch import Tensor


class Operator(ABC):
    """A symmetric n x n matrix that need not be stored as one.

    Example:
        >>> from sst_kernels.gevp import LowRank, Operator
        >>> operator = LowRank(torch.ones(1, 3))
        >>> isinstance(operator, Operator), operator.damped(1.0).diagonal()
        (True, tensor([2., 2., 2.], dtype=torch.float64))
    """

    n: int
    device: torch.device

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """Product with x [n, b] float64, as [n, b] float64."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal, [n] float64."""

    def solve(self, x: Tensor) -> Tensor | None:
        """Inverse times x [n, b] where the structure gives it without factoring an n x n matrix, else None."""
        return None

    def damped(self, damping: float) -> Operator:
        """This operator plus damping times the identity."""
        return self if damping == 0.0 else Shifted(self, damping)

    def dense(self) -> Tensor:
        """The matrix, [n, n] float64."""
        return self.matmul(torch.eye(self.n, dtype=torch.float64, device=self.device))


def power_of_two(x: Tensor, even: bool = False) -> float:
    """2^e near the largest |entry| of x, with an even e if asked for; 1 where there is none or only zeros."""
    exponent = frexp(float(x.abs().amax()))[1] if x.numel() else 0
    return 2.0 ** max(-1000, min(1000, exponent - (exponent % 2 if even else 0)))


def _square(name: str, matrix: Tensor) -> Tensor:
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{name} must be square matrices [..., n, n], got {tuple(matrix.shape)}")
    if not matrix.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {matrix.dtype}; convert it with .double()")
    return matrix


class Dense(Operator):
    """Stored matrices [..., n, n]; the only operator that carries a batch.

    Example:
        >>> from sst_kernels.gevp import Dense
        >>> Dense(torch.eye(3, dtype=torch.float64)).matmul(torch.ones(3, 1, dtype=torch.float64)).shape
        torch.Size([3, 1])
    """

    def __init__(self, matrix: Tensor):
        self._matrix = _square("matrix", matrix)
        self.n, self.device, self.dtype = matrix.shape[-1], matrix.device, matrix.dtype
        self.batch, self.packed = matrix.shape[:-2], matrix.is_contiguous()

    @property
    def matrix(self) -> Tensor:
        """All of them, [..., n, n]."""
        return self._matrix

    def problems(self, first: int, last: int) -> Tensor:
        """Matrices first .. last - 1 of the flattened batch, [last - first, n, n]: a view where `packed`, else possibly a copy."""
        if self.packed or len(self.batch) < 2:
            return self.matrix.reshape(self.batch.numel(), self.n, self.n)[first:last]
        return self.matrix[torch.unravel_index(torch.arange(first, last, device=self.device), self.batch)]

    def matmul(self, x: Tensor) -> Tensor:
        return self.matrix.double() @ x

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal(dim1=-2, dim2=-1).double()

    def damped(self, damping: float) -> Dense:
        if damping == 0.0:
            return self
        matrix = self.matrix.clone()
        matrix.diagonal(dim1=-2, dim2=-1).add_(damping)
        return Dense(matrix)

    def dense(self) -> Tensor:
        return self.matrix


class Stack(Dense):
    """A batch [N, n, n] whose matrices lie apart; they are put side by side only as far as `problems` asks."""

    def __init__(self, members: Sequence[Tensor]):
        super().__init__(members[0])
        self.members, self.batch, self.packed = members, torch.Size([len(members)]), False

    @property
    def matrix(self) -> Tensor:
        """All of them, [N, n, n]."""
        return torch.stack([*self.members])

    def problems(self, first: int, last: int) -> Tensor:
        return torch.stack([*self.members[first:last]])


class Shifted(Operator):
    """An operator plus a multiple of the identity, for structures that cannot absorb it."""

    def __init__(self, base: Operator, shift: float):
        self.base, self.shift, self.n, self.device = base, shift, base.n, base.device

    def matmul(self, x: Tensor) -> Tensor:
        return self.base.matmul(x) + self.shift * x

    def diagonal(self) -> Tensor:
        return self.base.diagonal() + self.shift


class Diagonal(Operator):
    """diag(d), d [n].

    Example:
        >>> from sst_kernels.gevp import Diagonal, gevp
        >>> gevp(Diagonal(torch.tensor([1.0, 4.0])), Diagonal(torch.tensor([1.0, 2.0])), k=1).values
        tensor([2.], dtype=torch.float64)
    """

    def __init__(self, diag: Tensor):
        if diag.ndim != 1:
            raise ValueError(f"diag must be [n], got {tuple(diag.shape)}")
        self.diag, self.n, self.device = diag.double(), len(diag), diag.device

    def matmul(self, x: Tensor) -> Tensor:
        return self.diag[:, None] * x

    def diagonal(self) -> Tensor:
        return self.diag

    def solve(self, x: Tensor) -> Tensor | None:
        return x / self.diag[:, None] if bool((self.diag > 0).all()) else None

    def damped(self, damping: float) -> Diagonal:
        return Diagonal(self.diag + damping)


class LowRank(Operator):
    """rows^T rows + diag(damping): rows [p, n] (any floating type, read in place), damping a number or [n].

    Example:
        >>> from sst_kernels.gevp import LowRank
        >>> LowRank(torch.ones(1, 3), damping=0.5).dense()[0]
        tensor([1.5000, 1.0000, 1.0000], dtype=torch.float64)
    """

    def __init__(self, rows: Tensor, damping: float | Tensor = 0.0):
        if rows.ndim != 2:
            raise ValueError(f"rows must be [p, n], got {tuple(rows.shape)}")
        self.rows, self.n, self.device = rows, rows.shape[1], rows.device
        if isinstance(damping, Tensor) and damping.ndim == 1 and len(damping) != self.n:
            raise ValueError(f"damping must be a number or [n={self.n}], got {tuple(damping.shape)}")
        self.damping = torch.as_tensor(damping, dtype=torch.float64, device=rows.device)

    def matmul(self, x: Tensor) -> Tensor:
        rows = self.rows.double()
        return rows.mT @ (rows @ x) + self.diagonal_part()[:, None] * x

    def diagonal(self) -> Tensor:
        return self.rows.double().square().sum(0) + self.diagonal_part()

    def diagonal_part(self) -> Tensor:
        return self.damping.expand(self.n)

    def damped(self, damping: float) -> LowRank:
        return self if damping == 0.0 else LowRank(self.rows, self.damping + damping)


class Kronecker(Operator):
    """(left + left_damping I) kron (right + right_damping I), both factors positive semi-definite: left [p, p], right [q, q].

    Example:
        >>> from sst_kernels.gevp import Kronecker
        >>> Kronecker(2 * torch.eye(2), torch.eye(3)).diagonal()
        tensor([2., 2., 2., 2., 2., 2.], dtype=torch.float64)
    """

    def __init__(self, left: Tensor, right: Tensor, left_damping: float = 0.0, right_damping: float = 0.0):
        self.left, self.right = (
            _damp(_square("left", left), left_damping),
            _damp(_square("right", right), right_damping),
        )
        self.n, self.device = left.shape[0] * right.shape[0], left.device

    def matmul(self, x: Tensor) -> Tensor:
        return _kron_matmul(self.left, self.right, x)

    def diagonal(self) -> Tensor:
        return torch.outer(self.left.diagonal(), self.right.diagonal()).reshape(-1)


class KroneckerSum(Operator):
    """Sum of Kronecker products: terms [(left [p, p], right [q, q]), ...], each symmetric.

    Example:
        >>> from sst_kernels.gevp import KroneckerSum
        >>> KroneckerSum([(torch.eye(2), torch.eye(3)), (torch.eye(2), torch.eye(3))]).diagonal()
        tensor([2., 2., 2., 2., 2., 2.], dtype=torch.float64)
    """

    def __init__(self, terms: Sequence[tuple[Tensor, Tensor]]):
        if not terms:
            raise ValueError("KroneckerSum needs at least one (left, right) term")
        self.terms = [(_square("left", left).double(), _square("right", right).double()) for left, right in terms]
        shapes = {(len(left), len(right)) for left, right in self.terms}
        if len(shapes) != 1:
            raise ValueError(f"all terms must have the same (p, q), got {sorted(shapes)}")
        left, right = self.terms[0]
        self.n, self.device = len(left) * len(right), left.device

    def matmul(self, x: Tensor) -> Tensor:
        return torch.stack([_kron_matmul(left, right, x) for left, right in self.terms]).sum(0)

    def diagonal(self) -> Tensor:
        return torch.stack(
            [torch.outer(left.diagonal(), right.diagonal()).reshape(-1) for left, right in self.terms]
        ).sum(0)

    def damped(self, damping: float) -> KroneckerSum:
        if damping == 0.0:
            return self
        left, right = self.terms[0]
        eye = [torch.eye(len(side), dtype=torch.float64, device=self.device) for side in (left, right)]
        return KroneckerSum([*self.terms, (damping * eye[0], eye[1])])


class EigenKronecker(Operator):
    """(U_L kron U_R) diag(s + damping) (U_L kron U_R)^T with orthogonal u_left [p, p], u_right [q, q] and s [p, q] >= 0 (EK-FAC).

    Example:
        >>> from sst_kernels.gevp import EigenKronecker
        >>> f = EigenKronecker(torch.eye(2), torch.eye(3), torch.ones(2, 3), damping=1.0)
        >>> f.diagonal()
        tensor([2., 2., 2., 2., 2., 2.], dtype=torch.float64)
    """

    def __init__(self, u_left: Tensor, u_right: Tensor, s: Tensor, damping: float = 0.0):
        if s.shape != (len(_square("u_left", u_left)), len(_square("u_right", u_right))):
            raise ValueError(f"s must be [{len(u_left)}, {len(u_right)}], got {tuple(s.shape)}")
        self.u_left, self.u_right, self.s = u_left.double(), u_right.double(), s.double() + damping
        self.n, self.device = s.numel(), s.device

    def _apply(self, spectrum: Tensor, x: Tensor) -> Tensor:
        inner = spectrum.reshape(-1, 1) * _kron_matmul(self.u_left.mT, self.u_right.mT, x)
        return _kron_matmul(self.u_left, self.u_right, inner)

    def matmul(self, x: Tensor) -> Tensor:
        return self._apply(self.s, x)

    def diagonal(self) -> Tensor:
        return (self.u_left.square() @ self.s @ self.u_right.square().mT).reshape(-1)

    def solve(self, x: Tensor) -> Tensor | None:
        return self._apply(1 / self.s, x) if bool((self.s > 0).all()) else None

    def damped(self, damping: float) -> EigenKronecker:
        return EigenKronecker(self.u_left, self.u_right, self.s, damping)

    def same_basis(self, other: EigenKronecker) -> bool:
        """Whether both are diagonal in the very same vectors."""
        return torch.equal(self.u_left, other.u_left) and torch.equal(self.u_right, other.u_right)


def _damp(matrix: Tensor, damping: float) -> Tensor:
    return matrix.double() + damping * torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)


def _kron_matmul(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    stacked = x.mT.reshape(-1, left.shape[1], right.shape[1])
    return (left @ stacked @ right.mT).reshape(x.shape[1], -1).mT
