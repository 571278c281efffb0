// The innermost product of a warp: a 32x32 tile of the result, rows lane/4 + 8 i, columns 2 (lane%4) + 8 j + {0, 1}.
// Doubles go through the tensor cores (exact fp64 arithmetic; mma m16n8k4 from sm_90 on, where the m8n8k4 of sm_80 reaches about half of
// the rate), floats through FMA in the same ownership.
#pragma once

#include <cuda_runtime.h>

namespace sst::cuda {

__device__ inline void mma_8x8x4(double (&c)[2], double a, double b) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(c[0]), "+d"(c[1])
        : "d"(a), "d"(b));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
/// Two of the former with the same b, eight rows apart.
__device__ inline void mma_16x8x4(double (&upper)[2], double (&lower)[2], double a_upper, double a_lower, double b) {
    asm("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+d"(upper[0]), "+d"(upper[1]), "+d"(lower[0]), "+d"(lower[1])
        : "d"(a_upper), "d"(a_lower), "d"(b));
}
#endif

/// acc += x' y over `depth` (a multiple of 4) staged slices; x and y point at the warp's first row and column.
template <int depth, int ld>
__device__ void warp_product(double (&acc)[4][4][2], const double* x, const double* y) {
    const int lane = threadIdx.x % 32, outer = lane / 4, inner = lane % 4;
#pragma unroll
    for (int k = 0; k < depth; k += 4) {
        double a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = x[(k + inner) * ld + outer + 8 * i];
#pragma unroll
        for (int j = 0; j < 4; ++j) b[j] = y[(k + inner) * ld + outer + 8 * j];
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#pragma unroll
        for (int i = 0; i < 4; i += 2)
#pragma unroll
            for (int j = 0; j < 4; ++j) mma_16x8x4(acc[i][j], acc[i + 1][j], a[i], a[i + 1], b[j]);
#else
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) mma_8x8x4(acc[i][j], a[i], b[j]);
#endif
    }
}

template <int depth, int ld>
__device__ void warp_product(float (&acc)[4][4][2], const float* x, const float* y) {
    const int lane = threadIdx.x % 32, outer = lane / 4, inner = lane % 4;
#pragma unroll
    for (int k = 0; k < depth; ++k) {
        float a[4];
        float2 b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = x[k * ld + outer + 8 * i];
#pragma unroll
        for (int j = 0; j < 4; ++j) b[j] = *reinterpret_cast<const float2*>(&y[k * ld + 2 * inner + 8 * j]);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                acc[i][j][0] = fmaf(a[i], b[j].x, acc[i][j][0]);
                acc[i][j][1] = fmaf(a[i], b[j].y, acc[i][j][1]);
            }
    }
}

}  // namespace sst::cuda
