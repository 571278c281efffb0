#include "error.hpp"
#include "gemm_thin.cuh"
#include "gemm_tile.cuh"

namespace sst::cuda {
namespace {

std::int64_t tiles_of(std::int64_t extent, std::int64_t tile) { return (extent + tile - 1) / tile; }

unsigned grid_of(std::int64_t tiles, std::int64_t count) {
    if (tiles * count > 0x7fffffff)
        throw std::invalid_argument("gemm: " + std::to_string(count) + " problems of " + std::to_string(tiles) +
                                    " tiles exceed the grid; split the batch");
    return static_cast<unsigned>(tiles * count);
}

template <class TX, int NB>
void thin(cudaStream_t stream, Active active, Op op_x, Op op_y, double alpha, Batch<const TX> x, Batch<const double> y,
          double beta, Batch<double> z, Span span) {
    constexpr int each = 32 / NB;
    const bool transposed = op_x == Op::transpose;
    const int row_tiles = static_cast<int>(tiles_of(z.rows, transposed ? kWarps * each : kTile));
    for (int column = 0; column < z.cols; column += NB) {
        if (transposed)
            thin_columns_kernel<TX, NB, each><<<grid_of(row_tiles, active.count), kThinThreads, 0, stream>>>(
                active, row_tiles, op_y == Op::transpose, alpha, x, y, beta, z, column, span);
        else
            thin_rows_kernel<TX, NB><<<grid_of(row_tiles, active.count), kThinThreads, 0, stream>>>(
                active, row_tiles, op_y == Op::transpose, alpha, x, y, beta, z, column, span);
        SST_TRY_LAUNCH("thin product");
    }
}

}  // namespace

template <class TX, class TY, class TZ>
void gemm(cudaStream_t stream, Active active, Op op_x, Op op_y, double alpha, Batch<const TX> x, Batch<const TY> y, double beta,
          Batch<TZ> z, Span span) {
    if (active.count == 0 || z.rows == 0 || z.cols == 0) return;
    if constexpr (std::is_same_v<TZ, double>) {
        const bool by_column = span == Span::from_column || span == Span::until_column;
        if (z.cols <= 8 && !by_column) return thin<TX, 8>(stream, active, op_x, op_y, alpha, x, y, beta, z, span);
        if (z.cols <= 16 && !by_column) return thin<TX, 16>(stream, active, op_x, op_y, alpha, x, y, beta, z, span);
    }
    const std::int64_t row_tiles = tiles_of(z.rows, kTile), tiles = row_tiles * tiles_of(z.cols, kTile);
    const auto launch = [&](auto kernel) {
        kernel<<<grid_of(tiles, active.count), kTileThreads, 0, stream>>>(active, static_cast<int>(row_tiles),
                                                                          static_cast<int>(tiles), alpha, x, y, beta, z, span);
    };
    if (op_x == Op::none)
        op_y == Op::none ? launch(gemm_tile_kernel<TX, TY, TZ, false, false>) : launch(gemm_tile_kernel<TX, TY, TZ, false, true>);
    else
        op_y == Op::none ? launch(gemm_tile_kernel<TX, TY, TZ, true, false>) : launch(gemm_tile_kernel<TX, TY, TZ, true, true>);
    SST_TRY_LAUNCH("gemm_tile_kernel");
}

#define SST_GEMM(TX, TY, TZ)                                                                                                  \
    template void gemm<TX, TY, TZ>(cudaStream_t, Active, Op, Op, double, Batch<const TX>, Batch<const TY>, double, Batch<TZ>, \
                                   Span)
SST_GEMM(double, double, double);
SST_GEMM(float, double, double);
SST_GEMM(float, float, float);
#undef SST_GEMM

}  // namespace sst::cuda
