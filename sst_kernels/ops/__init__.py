"""The curvature kernels: per-sample gradients and their moments, straight from token activations.

Letters, everywhere: N samples, S tokens laid out flat, T tokens of one sample, r rank, p × q the block, d a wide
feature dimension, l sketch columns. A folder per operator: `reference.py` is the definition in fp64, `op.py` what a
user calls (and its CPU form), `kernel.py` the Triton kernel with its launcher.
"""

from sst_kernels.ops.core_outer import core_outer
from sst_kernels.ops.eigen_moments import eigen_moments
from sst_kernels.ops.factor_moments import factor_moments
from sst_kernels.ops.factor_rows import factor_rows
from sst_kernels.ops.gram import gram, symmetrize_
from sst_kernels.ops.sketch import sketch
from sst_kernels.ops.spans import spans_from_cu_seqlens, spans_from_lengths

__all__ = [
    "core_outer",
    "eigen_moments",
    "factor_moments",
    "factor_rows",
    "gram",
    "sketch",
    "spans_from_cu_seqlens",
    "spans_from_lengths",
    "symmetrize_",
]
