// Host-side entry points of the own kernels. All matrices are column-major, `stride` counts elements between problems,
// a null `active` means that every problem is live, and nothing here synchronises the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sst::cuda {

/// A batch of column-major matrices.
template <class T>
struct Batch {
  T* data;
  std::int64_t ld, stride;
};

/// Raises the dynamic shared memory limit of the kernels below on the current device (idempotent, cheap).
void prepare_kernels();

/// Full eigendecomposition of `batch` symmetric matrices of order m <= 64; the lower triangle is read, Z may be A.
/// info: 0 converged, 1 sweep limit, -1 a non-finite entry (values and vectors are then NaN).
void jacobi_eigh(cudaStream_t stream, int m, int batch, Batch<const double> a, double* values, std::int64_t value_stride,
                 Batch<double> z, int* info, const std::uint8_t* active, bool descending);

}  // namespace sst::cuda
