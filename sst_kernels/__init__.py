"""Fast second-order merging of LoRA adapters.

`fisher_accumulate` gathers Fisher matrices in LoRA space from any training loop, `gevp` solves batches of symmetric-definite
generalized eigenproblems, `subspace` finds and keeps the directions of a patch that buy most gain per cost.
"""

from sst_kernels import _native
from sst_kernels.evidence import Evidence, Filtered
from sst_kernels.fisher import Fisher, declared_loss, fisher_accumulate, label_logits, opening_weights, sequence_nll
from sst_kernels.gevp import GEVPResult, GEVPStatus, gevp
from sst_kernels.inputs import InputMoments, filter_inputs, input_moments
from sst_kernels.subspace import Patch, Subspace, subspace

_native.warn_if_shadowed()

__version__ = "0.1.0"

__all__ = [
    "Evidence",
    "Filtered",
    "Fisher",
    "GEVPResult",
    "GEVPStatus",
    "InputMoments",
    "Patch",
    "Subspace",
    "declared_loss",
    "filter_inputs",
    "fisher_accumulate",
    "gevp",
    "input_moments",
    "label_logits",
    "opening_weights",
    "sequence_nll",
    "subspace",
]
