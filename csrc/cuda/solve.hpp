// What the binding calls: plain C++ declarations, so that it needs no CUDA compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "sst/options.h"
#include "sst/result.h"
#include "sst/views.h"

namespace sst::cuda {

/// Bytes of device memory that solve_direct() needs.
template <class S>
std::size_t direct_bytes(std::int64_t batch, std::int64_t n, std::int64_t k, cudaStream_t stream);

/// Every pencil of the batch by Cholesky and a full eigendecomposition. Asynchronous on `stream`.
template <class S>
void solve_direct(Batch<const S> a, Batch<const S> b, std::int64_t batch, std::int64_t k, const Result& result, void* workspace,
                  std::size_t bytes, cudaStream_t stream);

}  // namespace sst::cuda
