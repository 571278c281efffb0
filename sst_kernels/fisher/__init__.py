"""Fisher matrices in the coordinates of a LoRA adapter: accumulation, structures, storage."""

from sst_kernels.fisher.accumulate import fisher_accumulate
from sst_kernels.fisher.accumulator import Accumulator
from sst_kernels.fisher.base import Block, Counts, Structure, TokenBatch
from sst_kernels.fisher.fisher import Fisher
from sst_kernels.fisher.loss import declared_loss, sequence_nll
from sst_kernels.fisher.structures import STRUCTURES, make_structure

__all__ = [
    "STRUCTURES",
    "Accumulator",
    "Block",
    "Counts",
    "Fisher",
    "Structure",
    "TokenBatch",
    "declared_loss",
    "fisher_accumulate",
    "make_structure",
    "sequence_nll",
]
