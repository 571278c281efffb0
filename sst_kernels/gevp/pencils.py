"""Which pair of structures takes which route, and why: the one table of decisions."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sst_kernels.gevp.operators import Dense, Diagonal, EigenKronecker, Kronecker, LowRank, Operator

DENSE_LIMIT = 1024
"""Structured pencils without a closed form are stored and solved as dense ones up to this order."""

STORED_LIMIT = 4096
"""Up to this order they are where the iteration on their products was too slow: some 1 GiB of matrices and workspace."""


@dataclass(frozen=True)
class Route:
    """`name` is the algorithm, `reason` what about the pencil chose it."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def choose(gain: Operator, cost: Operator, k: int, method: str) -> Route:
    """The route of A = gain, B = cost.

    Args:
        gain: A.
        cost: B, damping included.
        k: pairs wanted.
        method: "auto", or "direct" / "jacobi_davidson" to force the family.
    """
    if isinstance(gain, Dense) and isinstance(cost, Dense):
        kind = "batched" if gain.batch.numel() >= 8 else "single"
        return dense_route(gain.n, k, method, gain.device.type, kind)
    iterate = method == "jacobi_davidson"
    if not iterate:
        if isinstance(gain, Diagonal) and isinstance(cost, Diagonal):
            return Route("diagonal", "both operators are diagonal")
        if isinstance(gain, EigenKronecker) and isinstance(cost, EigenKronecker) and gain.same_basis(cost):
            return Route("eigenbasis", "both operators are diagonal in the same Kronecker eigenbasis")
        if _same_factors(gain, cost):
            return Route("kronecker", "a pair of Kronecker products is two small pencils and their top-k products")
    if isinstance(gain, LowRank) and (not iterate or iterable(len(gain.rows), k)):
        reduced = _reduction(gain, cost)
        if reduced is not None:
            return reduced
    if not iterable(gain.n, k) or (not iterate and (method == "direct" or gain.n <= DENSE_LIMIT)):
        return Route("stored", f"n = {gain.n}: the operators are stored and solved as dense matrices")
    if any(isinstance(side, Dense) and side.batch for side in (gain, cost)):
        raise ValueError(
            "a batch of dense matrices pairs with another batch of dense matrices only; solve one pencil at a time"
        )
    inverse = "B is inverted by its structure" if has_inverse(cost) else "projected block CG with diag(B)"
    return Route(
        "operator_jacobi_davidson", f"{type(gain).__name__} and {type(cost).__name__} at n = {gain.n}; {inverse}"
    )


def _reduction(gain: LowRank, cost: Operator) -> Route | None:
    """The exact way to a problem of the order of A's rows, where there is one."""
    p = len(gain.rows)
    if bool(gain.damping.any()):
        return None
    if isinstance(cost, LowRank) and bool((cost.damping > 0).all()):
        return Route("split_projection", f"A has {p} rows, B {len(cost.rows)} rows plus damping: exact reduction")
    if isinstance(cost, Diagonal):
        return Route("split_projection", f"A has {p} rows and B is diagonal: exact reduction")
    if isinstance(cost, Dense) and not cost.batch and 4 * p <= gain.n:
        return Route("cholesky_projection", f"A has {p} <= n/4 rows and B factors: exact reduction")
    return None


def has_inverse(cost: Operator) -> bool:
    """Whether the structure of B gives B^-1 x."""
    return type(cost).solve is not Operator.solve


def _same_factors(gain: Operator, cost: Operator) -> bool:
    return isinstance(gain, Kronecker) and isinstance(cost, Kronecker) and gain.left.shape == cost.left.shape


@cache
def dense_route(n: int, k: int, method: str, device: str, kind: str) -> Route:
    """The route of stored matrices of order n; `kind` names the rows of the crossover table: "single", "batched" or "projected"."""
    if method != "auto":
        if method == "jacobi_davidson" and not iterable(n, k):
            return Route("direct", f"n = {n} leaves no room for a restarted basis with k = {k}")
        return Route(method, "asked for")
    from_n = crossover(device, k, kind)
    basis = "measured" if device == "cpu" else "estimated"
    if iterable(n, k) and n >= from_n:
        return Route("jacobi_davidson", f"n = {n} >= {from_n}, the {basis} crossover on {device} for k = {k}")
    return Route("direct", f"n = {n} < {from_n}, the {basis} crossover on {device} for k = {k}")


def iterable(n: int, k: int) -> bool:
    """Whether a basis with restarts fits into n dimensions."""
    block = min(32, max(8, (k + 15) // 16 * 8))
    keep = (k + block - 1) // block * block + block
    return n >= keep + 3 * block


@cache
def _table() -> dict[str, dict[str, list[list[float]]]]:
    return json.loads(Path(__file__).with_name("crossover.json").read_text())


def crossover(device: str, k: int, kind: str) -> int:
    """Order from which iterating beat the direct route in bench/gevp_cpu.py (CPU), or is expected to (CUDA)."""
    kinds = _table().get(device, _table()["cpu"])
    rows = kinds.get(kind, kinds["single"])
    position = bisect_right([limit for limit, _ in rows], k - 1)
    if position == len(rows):
        limit, order = rows[-1]
        return int(order * k / limit)
    return int(rows[position][1])
