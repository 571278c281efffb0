from sst_kernels.ops.gram.op import gram, symmetrize_

__all__ = ["gram", "symmetrize_"]
