// What the binding calls: plain C++ declarations, so that it needs no CUDA compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>

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

/// Bytes of device memory that solve_iterative() needs.
template <class S>
std::size_t iterative_bytes(std::int64_t batch, std::int64_t n, const Options& options, cudaStream_t stream);

/// Every pencil of the batch by Jacobi-Davidson (gevp/jacobi_davidson.hpp). Waits for the stream at the end of each cycle.
template <class S>
void solve_iterative(Batch<const S> a, Batch<const S> b, std::int64_t batch, const Options& options, const Result& result,
                     void* workspace, std::size_t bytes, cudaStream_t stream);

/// Y = A X (which = 0), B X (1) or K^-1 X (2) on packed n x columns blocks inside the workspace, issued on the solve's stream.
using Products = std::function<void(int which, const double* x, double* y, std::int64_t columns)>;

std::size_t operator_bytes(std::int64_t n, const Options& options, cudaStream_t stream);

/// One pencil known by its products.
void solve_operator(const Products& products, std::int64_t n, const Options& options, const Result& result, void* workspace,
                    std::size_t bytes, cudaStream_t stream);

}  // namespace sst::cuda
