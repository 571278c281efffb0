from sst_kernels.ops.eigen_moments.op import eigen_moments

__all__ = ["eigen_moments"]
