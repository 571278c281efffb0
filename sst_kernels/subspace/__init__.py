"""From a pair of Fishers to a filtered patch."""

from sst_kernels.subspace.subspace import Patch, Prediction, Subspace, subspace

__all__ = ["Patch", "Prediction", "Subspace", "subspace"]
