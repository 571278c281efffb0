"""What one reading of the data tells about a patch, kept: every decision follows from it without the model."""

from sst_kernels.evidence.evidence import Evidence, Filtered, Weights
from sst_kernels.evidence.reading import Reading
from sst_kernels.evidence.side import Side

__all__ = ["Evidence", "Filtered", "Reading", "Side", "Weights"]
