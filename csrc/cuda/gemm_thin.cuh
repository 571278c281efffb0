// Products whose result is at most NB columns wide: bound by reading X once, so plain fp64 FMA is enough. Y is staged
// through shared memory kPanel summands at a time; sums run in an order fixed by the shape of one problem.
#pragma once

#include "kernels.hpp"

namespace sst::cuda {

constexpr int kThinThreads = 256;
constexpr int kWarps = kThinThreads / 32;
constexpr int kPanel = 128;

/// Y(depth .. depth + kPanel, 0 .. NB) into shared memory; a caller passes the index of an entry there.
template <int NB, class Index>
__device__ void stage_panel(double* staged, const double* y, std::int64_t depth_step, std::int64_t column_step, int columns,
                            std::int64_t depth, std::int64_t end, Index index) {
    for (int t = threadIdx.x; t < kPanel * NB; t += kThinThreads) {
        const int d = t % kPanel, c = t / kPanel;
        staged[index(d, c)] = depth + d < end && c < columns ? y[(depth + d) * depth_step + c * column_step] : 0.0;
    }
}

__device__ inline void put(double& entry, double alpha, double sum, double beta) {
    entry = beta == 0.0 ? alpha * sum : alpha * sum + beta * entry;
}

/// Z = alpha X op(Y) + beta Z. A CTA owns kTile rows; its warps share out the summands of each panel and are added in order.
template <class TX, int NB>
__global__ void __launch_bounds__(kThinThreads, NB == 8 ? 2 : 1)
    thin_rows_kernel(Active active, int row_tiles, bool transpose_y, double alpha, Batch<const TX> x, Batch<const double> y,
                     double beta, Batch<double> z, int first_column, Span span) {
    __shared__ __align__(16) double staged[kPanel * NB];
    __shared__ double sums[NB][kTile];
    const std::int64_t problem = active[blockIdx.x / row_tiles];
    const std::int64_t row = std::int64_t(blockIdx.x % row_tiles) * kTile;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int columns = static_cast<int>(min(std::int64_t(NB), z.cols - first_column));
    const std::int64_t depth_step = transpose_y ? y.ld : 1, column_step = transpose_y ? 1 : y.ld;
    const double* y_data = y.at(problem) + first_column * column_step;
    const std::int64_t end = span == Span::until_row ? min(x.cols, row + kTile) : x.cols;

    const std::int64_t row0 = row + lane, row1 = row + lane + 32;
    const bool has0 = row0 < x.rows, has1 = row1 < x.rows;
    const TX *x0 = x.at(problem) + (has0 ? row0 : 0), *x1 = x.at(problem) + (has1 ? row1 : 0);
    double acc0[NB] = {}, acc1[NB] = {};
    for (std::int64_t depth = 0; depth < end; depth += kPanel) {
        __syncthreads();
        stage_panel<NB>(staged, y_data, depth_step, column_step, columns, depth, end, [](int d, int c) { return d * NB + c; });
        __syncthreads();
        const int mine = static_cast<int>(min(std::int64_t(kPanel), end - depth));
#pragma unroll 4
        for (int d = warp; d < mine; d += kWarps) {
            const double u = static_cast<double>(x0[(depth + d) * x.ld]), v = static_cast<double>(x1[(depth + d) * x.ld]);
#pragma unroll
            for (int c = 0; c < NB; ++c) {
                acc0[c] = fma(u, staged[d * NB + c], acc0[c]);
                acc1[c] = fma(v, staged[d * NB + c], acc1[c]);
            }
        }
    }
    for (int turn = 0; turn < kWarps; ++turn) {
        if (warp == turn)
#pragma unroll
            for (int c = 0; c < NB; ++c) {
                sums[c][lane] = turn == 0 ? acc0[c] : sums[c][lane] + acc0[c];
                sums[c][lane + 32] = turn == 0 ? acc1[c] : sums[c][lane + 32] + acc1[c];
            }
        __syncthreads();
    }
    for (int t = threadIdx.x; t < kTile * columns; t += kThinThreads) {
        const std::int64_t r = row + t % kTile;
        if (r < z.rows) put(z(problem, r, first_column + t / kTile), alpha, sums[t / kTile][t % kTile], beta);
    }
}

/// Z = alpha X' op(Y) + beta Z. A warp owns `Each` columns of X and runs down them, lane by lane along the summands.
template <class TX, int NB, int Each>
__global__ void __launch_bounds__(kThinThreads, 2)
    thin_columns_kernel(Active active, int row_tiles, bool transpose_y, double alpha, Batch<const TX> x, Batch<const double> y,
                        double beta, Batch<double> z, int first_column, Span span) {
    __shared__ double staged[NB * kPanel];
    const std::int64_t problem = active[blockIdx.x / row_tiles];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const std::int64_t first_row = std::int64_t(blockIdx.x % row_tiles) * kWarps * Each, row = first_row + warp * Each;
    const int columns = static_cast<int>(min(std::int64_t(NB), z.cols - first_column));
    const std::int64_t depth_step = transpose_y ? y.ld : 1, column_step = transpose_y ? 1 : y.ld;
    const double* y_data = y.at(problem) + first_column * column_step;
    const std::int64_t begin = span == Span::from_row ? first_row / kTile * kTile : 0, end = x.rows;

    const TX* source[Each];
#pragma unroll
    for (int e = 0; e < Each; ++e) source[e] = x.at(problem) + (row + e < x.cols ? row + e : 0) * x.ld;
    double acc[Each][NB] = {};
    for (std::int64_t depth = begin; depth < end; depth += kPanel) {
        __syncthreads();
        stage_panel<NB>(staged, y_data, depth_step, column_step, columns, depth, end,
                        [](int d, int c) { return c * kPanel + d; });
        __syncthreads();
        const int mine = static_cast<int>(min(std::int64_t(kPanel), end - depth));
#pragma unroll
        for (int d0 = 0; d0 < kPanel; d0 += 32) {
            const int d = d0 + lane;
            double u[Each];
#pragma unroll
            for (int e = 0; e < Each; ++e) u[e] = d < mine ? static_cast<double>(source[e][depth + d]) : 0.0;
#pragma unroll
            for (int c = 0; c < NB; ++c) {
                const double s = staged[c * kPanel + d];
#pragma unroll
                for (int e = 0; e < Each; ++e) acc[e][c] = fma(u[e], s, acc[e][c]);
            }
        }
    }
#pragma unroll
    for (int e = 0; e < Each; ++e)
#pragma unroll
        for (int c = 0; c < NB; ++c) {
            double sum = acc[e][c];
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            if (lane == (e * NB + c) % 32 && c < columns && row + e < z.rows)
                put(z(problem, row + e, first_column + c), alpha, sum, beta);
        }
}

}  // namespace sst::cuda
