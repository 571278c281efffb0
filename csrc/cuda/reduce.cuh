// Reductions over a CTA in a fixed order: shuffles inside a warp, then one warp over the warps. Every thread gets the
// result; `scratch` holds one element a warp and may be reused after the call returns.
#pragma once

#include <cuda_runtime.h>

namespace sst::cuda {

template <class T, class Combine>
__device__ T warp_reduce(T value, Combine combine) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
}

template <int Threads, class T, class Combine>
__device__ T block_reduce(T value, T* scratch, T identity, Combine combine) {
    static_assert(Threads % 32 == 0 && Threads <= 1024);
    value = warp_reduce(value, combine);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    value = warp_reduce(lane < Threads / 32 ? scratch[lane] : identity, combine);
    __syncthreads();
    return value;
}

template <int Threads, class T>
__device__ T block_sum(T value, T* scratch) {
    return block_reduce<Threads>(value, scratch, T(0), [](T x, T y) { return x + y; });
}

template <int Threads, class T>
__device__ T block_max(T value, T* scratch) {
    return block_reduce<Threads>(value, scratch, T(0), [](T x, T y) { return x > y ? x : y; });
}

__device__ inline double nan_value() { return __longlong_as_double(0x7ff8000000000000LL); }

}  // namespace sst::cuda
