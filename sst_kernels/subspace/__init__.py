"""From a pair of Fishers to a filtered patch."""

from sst_kernels.subspace.patch import Patch, Prediction
from sst_kernels.subspace.subspace import Subspace, subspace

__all__ = ["Patch", "Prediction", "Subspace", "subspace"]
