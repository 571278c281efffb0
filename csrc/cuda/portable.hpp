// Arithmetic of a kernel is written as plain functions of a thread's coordinates, so that tests/cpp can run it on a host.
#pragma once

#ifdef __CUDACC__
#define SST_HD __host__ __device__ __forceinline__
#else
#define SST_HD inline
#endif
