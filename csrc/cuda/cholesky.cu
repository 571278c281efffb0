#include "cholesky_core.hpp"
#include "error.hpp"
#include "kernels.hpp"

namespace sst::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLd = kTile + 1;

template <class T>
__global__ void __launch_bounds__(kThreads)
    invert_block_kernel(Active active, Batch<T> f, std::int64_t first, int width, std::int32_t* info) {
    __shared__ T w[kTile * kLd];
    __shared__ T r[kTile];
    const std::int64_t problem = active[blockIdx.x];
    T* block = &f(problem, first, first);
    for (int t = threadIdx.x; t < width * width; t += kThreads) {
        const int i = t % width, c = t / width;
        w[i * kLd + c] = block[c * f.ld + i];
    }
    __syncthreads();
    const int c = threadIdx.x % kTile;
    for (int j = 0; j < width; ++j) {
        const T pivot = w[j * kLd + j];
        const bool positive = pivot > T(0);
        if (threadIdx.x < width) r[threadIdx.x] = cholesky::pivot_row<T>(w, kLd, j, threadIdx.x, positive ? sqrt(pivot) : T(1));
        if (threadIdx.x == 0 && !positive && info[problem] == 0) info[problem] = static_cast<std::int32_t>(first) + j + 1;
        __syncthreads();
        for (int i = threadIdx.x / kTile; i < width; i += kThreads / kTile) cholesky::eliminate<T>(w, kLd, r, j, i, c);
        __syncthreads();
    }
    for (int t = threadIdx.x; t < width * width; t += kThreads) {
        const int i = t % width, k = t / width;
        block[k * f.ld + i] = k <= i ? w[i * kLd + k] : T(0);
    }
}

}  // namespace

template <class T>
void invert_diagonal_block(cudaStream_t stream, Active active, Batch<T> f, std::int64_t first, std::int32_t* info) {
    if (active.count == 0) return;
    const int width = static_cast<int>(std::min<std::int64_t>(kTile, f.rows - first));
    invert_block_kernel<T><<<static_cast<unsigned>(active.count), kThreads, 0, stream>>>(active, f, first, width, info);
    SST_TRY_LAUNCH("invert_block_kernel");
}

template <class T>
void invert_cholesky(cudaStream_t stream, Active active, Batch<T> f, Batch<T> strip, std::int32_t* info) {
    const std::int64_t n = f.rows;
    for (std::int64_t first = 0; first < n; first += kTile) {
        const std::int64_t width = std::min<std::int64_t>(kTile, n - first), below = n - first - width;
        if (first > 0)
            gemm<T, T, T>(stream, active, Op::none, Op::transpose, -1.0, f.block(first, 0, n - first, first),
                          f.block(first, 0, width, first), 1.0, f.block(first, first, n - first, width));
        invert_diagonal_block(stream, active, f, first, info);
        if (below > 0)
            gemm<T, T, T>(stream, active, Op::none, Op::transpose, 1.0, f.block(first + width, first, below, width),
                          f.block(first, first, width, width), 0.0, f.block(first + width, first, below, width));
    }
    for (std::int64_t first = kTile; first < n; first += kTile) {
        const std::int64_t width = std::min<std::int64_t>(kTile, n - first);
        const Batch<T> row = f.block(first, 0, width, first), product = strip.block(0, 0, width, first);
        gemm<T, T, T>(stream, active, Op::none, Op::none, 1.0, row, f.block(0, 0, first, first), 0.0, product, Span::from_column);
        gemm<T, T, T>(stream, active, Op::none, Op::none, -1.0, f.block(first, first, width, width), product, 0.0, row);
    }
}

template void invert_cholesky<double>(cudaStream_t, Active, Batch<double>, Batch<double>, std::int32_t*);
template void invert_cholesky<float>(cudaStream_t, Active, Batch<float>, Batch<float>, std::int32_t*);

}  // namespace sst::cuda
