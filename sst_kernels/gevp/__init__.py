"""Batched symmetric-definite generalized eigenproblems A v = lambda B v: `gevp`, its operators and its result."""

from sst_kernels.gevp.certified import Certified, certified, quadratic_bounds
from sst_kernels.gevp.operators import Dense, Diagonal, EigenKronecker, Kronecker, KroneckerSum, LowRank, Operator
from sst_kernels.gevp.result import GEVPError, GEVPResult, GEVPStatus
from sst_kernels.gevp.settings import Settings
from sst_kernels.gevp.solve import gevp

__all__ = [
    "Certified",
    "Dense",
    "Diagonal",
    "EigenKronecker",
    "GEVPError",
    "GEVPResult",
    "GEVPStatus",
    "Kronecker",
    "KroneckerSum",
    "LowRank",
    "Operator",
    "Settings",
    "certified",
    "gevp",
    "quadratic_bounds",
]
