from sst_kernels.ops.factor_moments.op import factor_moments

__all__ = ["factor_moments"]
