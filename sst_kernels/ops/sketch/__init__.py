from sst_kernels.ops.sketch.op import sketch

__all__ = ["sketch"]
