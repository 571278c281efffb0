"""Fisher matrices in the coordinates of a LoRA adapter: accumulation, structures, storage."""

from sst_kernels.fisher.accumulate import fisher_accumulate
from sst_kernels.fisher.accumulator import Accumulator
from sst_kernels.fisher.base import Block, Counts, Structure, TokenBatch
from sst_kernels.fisher.checkpoint import Checkpoints, Interrupted, item_seed, rank_path
from sst_kernels.fisher.fisher import Fisher
from sst_kernels.fisher.loss import declared_loss, label_logits, opening_weights, sequence_nll
from sst_kernels.fisher.storage import StorageError
from sst_kernels.fisher.structures import STRUCTURES, make_structure

__all__ = [
    "STRUCTURES",
    "Accumulator",
    "Block",
    "Checkpoints",
    "Counts",
    "Fisher",
    "Interrupted",
    "StorageError",
    "Structure",
    "TokenBatch",
    "declared_loss",
    "fisher_accumulate",
    "item_seed",
    "label_logits",
    "make_structure",
    "opening_weights",
    "rank_path",
    "sequence_nll",
]
