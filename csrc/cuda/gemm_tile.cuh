// Products whose result is wide: a CTA of four warps computes a 64x64 tile of Z, staged 16 deep through two buffers.
#pragma once

#include "kernels.hpp"
#include "mma.cuh"

namespace sst::cuda {

constexpr int kDepth = 16;
constexpr int kStagedLd = kTile + 4;  // 4 modulo 16: the fragments of a half warp fall into sixteen different banks
constexpr int kTileThreads = 128;

constexpr int kFetches = kTile * kDepth / kTileThreads;

/// A thread's walk over a strip of kTile outer indices (rows of op(X), columns of op(Y)), kDepth summands at a time.
/// Neighbouring threads lie along whichever index is contiguous in memory: `Deep` when that is the summation index.
template <class T, class Acc, bool Deep>
class Strip {
public:
    __device__ Strip(const Batch<const T>& matrix, std::int64_t problem, std::int64_t outer, std::int64_t depth,
                     std::int64_t depth_end)
        : step_((Deep ? kTileThreads / kDepth : kTileThreads / kTile) * matrix.ld),
          advance_(Deep ? kDepth : kDepth * matrix.ld),
          outer_left_(static_cast<int>(min(std::int64_t(kTile), (Deep ? matrix.cols : matrix.rows) - outer))),
          depth_left_(static_cast<int>(depth_end - depth)) {
        const int t = threadIdx.x;
        next_ = matrix.at(problem) + (Deep ? (outer + t / kDepth) * matrix.ld + depth + t % kDepth
                                           : (depth + t / kTile) * matrix.ld + outer + t % kTile);
    }

    __device__ void fetch() {
#pragma unroll
        for (int i = 0; i < kFetches; ++i) {
            const int o = outer(i), d = depth(i);
            held_[i] = o < outer_left_ && d < depth_left_ ? static_cast<Acc>(next_[i * step_]) : Acc(0);
        }
        next_ += advance_;
        depth_left_ -= kDepth;
    }

    __device__ void stage(Acc* staged) const {
#pragma unroll
        for (int i = 0; i < kFetches; ++i) staged[depth(i) * kStagedLd + outer(i)] = held_[i];
    }

private:
    static __device__ int outer(int i) { return Deep ? threadIdx.x / kDepth + i * (kTileThreads / kDepth) : threadIdx.x % kTile; }
    static __device__ int depth(int i) { return Deep ? threadIdx.x % kDepth : threadIdx.x / kTile + i * (kTileThreads / kTile); }

    const T* next_;
    std::int64_t step_, advance_;
    int outer_left_, depth_left_;
    Acc held_[kFetches];
};

template <class TX, class TY, class TZ, bool TransposeX, bool TransposeY>
__global__ void __launch_bounds__(kTileThreads, 3)
    gemm_tile_kernel(Active active, int row_tiles, int tiles, double alpha, Batch<const TX> x, Batch<const TY> y, double beta,
                     Batch<TZ> z, Span span) {
    using Acc = TZ;
    __shared__ __align__(16) Acc staged_x[2][kDepth * kStagedLd];
    __shared__ __align__(16) Acc staged_y[2][kDepth * kStagedLd];
    const std::int64_t problem = active[blockIdx.x / tiles];
    const int tile = blockIdx.x % tiles;
    const std::int64_t row = std::int64_t(tile % row_tiles) * kTile, column = std::int64_t(tile / row_tiles) * kTile;
    const std::int64_t extent = TransposeX ? x.rows : x.cols;
    const std::int64_t begin = span == Span::from_row ? row : span == Span::from_column ? column : 0;
    const std::int64_t last = span == Span::until_row ? row : span == Span::until_column ? column : extent;
    const std::int64_t end = min(extent, last + kTile);

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp % 2 * 32, warp_column = warp / 2 * 32;
    Acc acc[4][4][2] = {};
    Strip<TX, Acc, TransposeX> strip_x(x, problem, row, begin, end);
    Strip<TY, Acc, !TransposeY> strip_y(y, problem, column, begin, end);
    strip_x.fetch();
    strip_y.fetch();
    int buffer = 0;
    for (std::int64_t depth = begin; depth < end; depth += kDepth, buffer ^= 1) {
        strip_x.stage(staged_x[buffer]);
        strip_y.stage(staged_y[buffer]);
        __syncthreads();  // the buffer staged next was last read before this barrier: one barrier a step is enough
        if (depth + kDepth < end) {
            strip_x.fetch();
            strip_y.fetch();
        }
        warp_product<kDepth, kStagedLd>(acc, staged_x[buffer] + warp_row, staged_y[buffer] + warp_column);
    }

    TZ* out = z.at(problem);
    // Z may be X: every warp must have fetched its last piece before any of them writes. The loop's last barrier sees to it.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const std::int64_t r = row + warp_row + lane / 4 + 8 * i, c = column + warp_column + 2 * (lane % 4);
        TZ before[4][2] = {};  // loaded together: eight loads in flight instead of one before each store
        if (beta != 0.0 && r < z.rows)
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    if (c + 8 * j + h < z.cols) before[j][h] = out[(c + 8 * j + h) * z.ld + r];
        if (r < z.rows)
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const TZ product = static_cast<TZ>(alpha) * acc[i][j][h];
                    if (c + 8 * j + h < z.cols)
                        out[(c + 8 * j + h) * z.ld + r] = beta == 0.0 ? product : product + static_cast<TZ>(beta) * before[j][h];
                }
    }
}

}  // namespace sst::cuda
