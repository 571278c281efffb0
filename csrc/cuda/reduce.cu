#include "error.hpp"
#include "kernels.hpp"
#include "reduce.cuh"

namespace sst::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSquare = 32;  // side of the square pieces in which a matrix meets its transpose
constexpr int kPiecesEach = 16;

/// Non-negative doubles order like their bits, and NaN lies above infinity: an integer maximum is exact in any order.
__device__ void raise_to(double* target, double value) {
    atomicMax(reinterpret_cast<unsigned long long*>(target), static_cast<unsigned long long>(__double_as_longlong(value)));
}

__device__ double larger(double x, double y) {
    return __longlong_as_double(max(__double_as_longlong(x), __double_as_longlong(y)));
}

/// Pieces (i, j), i >= j, counted along the rows of the lower triangle.
template <class S>
__global__ void __launch_bounds__(kThreads)
    extrema_kernel(Active active, int groups, std::int64_t pieces, Batch<const S> a, Batch<double> out) {
    __shared__ S mirrored[kSquare][kSquare + 1];
    __shared__ double scratch[32];
    const std::int64_t problem = active[blockIdx.x / groups], n = a.rows;
    const int group = blockIdx.x % groups, x = threadIdx.x % kSquare;
    double largest = 0.0, skew = 0.0;
    for (int turn = 0; turn < kPiecesEach; ++turn) {
        const std::int64_t piece = std::int64_t(group) * kPiecesEach + turn;
        if (piece >= pieces) break;
        std::int64_t i = static_cast<std::int64_t>((sqrt(8.0 * piece + 1.0) - 1.0) / 2.0);
        while (i * (i + 1) / 2 > piece) --i;
        while ((i + 1) * (i + 2) / 2 <= piece) ++i;
        const std::int64_t j = piece - i * (i + 1) / 2, row = i * kSquare, column = j * kSquare;
        __syncthreads();
        for (int y = threadIdx.x / kSquare; y < kSquare; y += kThreads / kSquare)
            if (column + x < n && row + y < n) mirrored[y][x] = a(problem, column + x, row + y);
        __syncthreads();
        for (int y = threadIdx.x / kSquare; y < kSquare; y += kThreads / kSquare)
            if (row + x < n && column + y < n) {
                const double here = static_cast<double>(a(problem, row + x, column + y)),
                             there = static_cast<double>(mirrored[x][y]);
                largest = larger(largest, isfinite(here) && isfinite(there) ? fmax(fabs(here), fabs(there)) : nan_value());
                skew = larger(skew, fabs(here - there));
            }
    }
    const auto combine = [](double u, double v) { return larger(u, v); };
    largest = block_reduce<kThreads>(largest, scratch, 0.0, combine);
    skew = block_reduce<kThreads>(skew, scratch, 0.0, combine);
    if (threadIdx.x == 0) {
        raise_to(&out(problem, 0, 0), largest);
        raise_to(&out(problem, 1, 0), skew);
    }
}

__global__ void clear_kernel(Active active, Batch<double> out) {
    const std::int64_t slot = blockIdx.x * std::int64_t(kThreads) + threadIdx.x;
    if (slot < active.count) out(active[slot], 0, 0) = out(active[slot], 1, 0) = 0.0;
}

__global__ void __launch_bounds__(kThreads)
    dots_kernel(Active active, int columns, Batch<const double> x, Batch<const double> y, Batch<double> d) {
    __shared__ double scratch[32];
    const std::int64_t problem = active[blockIdx.x / columns], column = blockIdx.x % columns;
    double sum = 0.0;
    for (std::int64_t i = threadIdx.x; i < x.rows; i += kThreads) sum = fma(x(problem, i, column), y(problem, i, column), sum);
    sum = block_sum<kThreads>(sum, scratch);
    if (threadIdx.x == 0) d(problem, column, 0) = sum;
}

/// One CTA: a chunk's survivors are counted before a thread by ballots, chunk after chunk in order.
__global__ void __launch_bounds__(kThreads)
    compact_kernel(Active active, const std::int32_t* done, std::int64_t* list, std::int64_t* count) {
    __shared__ int per_warp[kThreads / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    std::int64_t kept = 0;
    for (std::int64_t chunk = 0; chunk < active.count; chunk += kThreads) {
        const std::int64_t slot = chunk + threadIdx.x;
        const std::int64_t problem = slot < active.count ? active[slot] : -1;
        const bool keep = problem >= 0 && done[problem] == 0;
        const unsigned ballot = __ballot_sync(0xffffffffu, keep);
        if (lane == 0) per_warp[warp] = __popc(ballot);
        __syncthreads();
        std::int64_t place = kept + __popc(ballot & ((1u << lane) - 1u));
        for (int w = 0; w < kThreads / 32; ++w) {
            if (w < warp) place += per_warp[w];
            kept += per_warp[w];
        }
        if (keep) list[place] = problem;
        __syncthreads();
    }
    if (threadIdx.x == 0) *count = kept;
}

}  // namespace

template <class S>
void extrema(cudaStream_t stream, Active active, Batch<const S> a, Batch<double> out) {
    if (active.count == 0) return;
    const std::int64_t side = (a.rows + kSquare - 1) / kSquare, pieces = side * (side + 1) / 2;
    const std::int64_t groups = (pieces + kPiecesEach - 1) / kPiecesEach;
    clear_kernel<<<static_cast<unsigned>((active.count + kThreads - 1) / kThreads), kThreads, 0, stream>>>(active, out);
    SST_TRY_LAUNCH("clear_kernel");
    if (groups == 0) return;
    extrema_kernel<S>
        <<<static_cast<unsigned>(groups * active.count), kThreads, 0, stream>>>(active, static_cast<int>(groups), pieces, a, out);
    SST_TRY_LAUNCH("extrema_kernel");
}

template void extrema<double>(cudaStream_t, Active, Batch<const double>, Batch<double>);
template void extrema<float>(cudaStream_t, Active, Batch<const float>, Batch<double>);

void dots(cudaStream_t stream, Active active, Batch<const double> x, Batch<const double> y, Batch<double> d) {
    if (active.count == 0 || x.cols == 0) return;
    dots_kernel<<<static_cast<unsigned>(active.count * x.cols), kThreads, 0, stream>>>(active, static_cast<int>(x.cols), x, y, d);
    SST_TRY_LAUNCH("dots_kernel");
}

void compact(cudaStream_t stream, Active active, const std::int32_t* done, std::int64_t* list, std::int64_t* count) {
    compact_kernel<<<1, kThreads, 0, stream>>>(active, done, list, count);
    SST_TRY_LAUNCH("compact_kernel");
}

}  // namespace sst::cuda
