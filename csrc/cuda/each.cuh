// The solver's small kernels: a lambda of (problem), (problem, column) or (problem, row, column), one thread each.
#pragma once

#include <cstdint>
#include <string>

#include "error.hpp"
#include "sst/views.h"

namespace sst::cuda {

constexpr int kEachThreads = 256;

template <class F>
__global__ void __launch_bounds__(kEachThreads) each_kernel(Active active, F f) {
    const std::int64_t slot = std::int64_t(blockIdx.x) * kEachThreads + threadIdx.x;
    if (slot < active.count) f(active[slot]);
}

/// Rows run fastest. 32-bit division: a 64-bit one costs more than what most of these kernels do.
template <class F>
__global__ void __launch_bounds__(kEachThreads)
    each_entry_kernel(Active active, unsigned rows, unsigned entries, unsigned ctas, F f) {
    const unsigned entry = blockIdx.x % ctas * kEachThreads + threadIdx.x;
    if (entry < entries) f(active[blockIdx.x / ctas], std::int64_t(entry % rows), std::int64_t(entry / rows));
}

template <class F>
void each(cudaStream_t stream, Active active, F f) {
    if (active.count == 0) return;
    each_kernel<<<static_cast<unsigned>((active.count + kEachThreads - 1) / kEachThreads), kEachThreads, 0, stream>>>(active, f);
    SST_TRY_LAUNCH("each_kernel");
}

template <class F>
void each_entry(cudaStream_t stream, Active active, std::int64_t rows, std::int64_t columns, F f) {
    if (active.count == 0 || rows == 0 || columns == 0) return;
    const std::int64_t entries = rows * columns, ctas = (entries + kEachThreads - 1) / kEachThreads;
    if (entries > 0x7fffffff || ctas * active.count > 0x7fffffff)
        throw std::invalid_argument("each_entry: " + std::to_string(active.count) + " matrices of " + std::to_string(entries) +
                                    " entries exceed the grid; split the batch");
    each_entry_kernel<<<static_cast<unsigned>(ctas * active.count), kEachThreads, 0, stream>>>(
        active, static_cast<unsigned>(rows), static_cast<unsigned>(entries), static_cast<unsigned>(ctas), f);
    SST_TRY_LAUNCH("each_entry_kernel");
}

}  // namespace sst::cuda
