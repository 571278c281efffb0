"""What `gevp` takes by keyword."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

from sst_kernels.gevp.dense import Preconditioner

Method = Literal["auto", "direct", "jacobi_davidson"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a pencil is solved.

    Attributes:
        method: "auto" follows the structure and a measured crossover table, and takes a problem on which the iteration is too slow over
            to the direct route; "direct" and "jacobi_davidson" insist.
        damping: added to the diagonal of B.
        tol: an iterative solve stops when sqrt(r' B^-1 r) <= tol * |lambda_1|; a direct one is as exact as float64 allows.
        max_cycles: restart cycles of an iterative solve.
        seed: of the random start block, the same on every device.
        preconditioner: how a stored B is inverted: "cholesky", "cholesky_single" (float32 factor, float64 refinement),
            "diagonal" or "none" (projected block CG).
        memory_budget: bytes that the solve may take beside the caller's matrices and the result: copies, temporaries and workspace.
            A batch or list of matrices is solved in as few pieces as that allows, with the same bits; where it does not hold one direct
            solve, no problem goes over to that.

    Raises:
        ValueError: a method or preconditioner that there is not, a number that no solve can use.
        TypeError: a count that is no integer.

    Example:
        >>> from sst_kernels.gevp import Settings
        >>> Settings(damping=0.1).method
        'auto'
    """

    method: Method = "auto"
    damping: float = 0.0
    tol: float = 1e-10
    max_cycles: int = 100
    seed: int = 0
    preconditioner: Preconditioner = "cholesky"
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("method", self.method, get_args(Method)),
            ("preconditioner", self.preconditioner, get_args(Preconditioner)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        check_count("max_cycles", self.max_cycles, 1)
        check_count("seed", self.seed, 0)
        if self.memory_budget is not None:
            check_count("memory_budget", self.memory_budget, 1)
        if not 0 < self.tol < 1:
            raise ValueError(f"tol must lie between 0 and 1 (it is relative to the largest eigenvalue), got {self.tol}")
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping must be finite and not negative, got {self.damping}")


def check_count(name: str, value: Any, least: int) -> None:
    """TypeError for what is no integer, ValueError for one below `least` or beyond int64."""
    if type(value) is not int and (not isinstance(value, Integral) or isinstance(value, bool)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not least <= int(value) < 2**63:
        raise ValueError(f"{name} must be an integer from {least} on, got {value}")
