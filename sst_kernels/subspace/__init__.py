"""From a pair of Fishers to a filtered patch."""

from sst_kernels.subspace.filters import Filter
from sst_kernels.subspace.patch import Patch, Prediction
from sst_kernels.subspace.subspace import Metric, Scope, Subspace, subspace

__all__ = ["Filter", "Metric", "Patch", "Prediction", "Scope", "Subspace", "subspace"]
