from sst_kernels.ops.core_outer.op import core_outer

__all__ = ["core_outer"]
