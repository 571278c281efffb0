#include <cfloat>

#include "error.hpp"
#include "jacobi_core.hpp"
#include "kernels.hpp"
#include "reduce.cuh"

namespace sst::cuda {
namespace {

using namespace jacobi;

constexpr std::size_t shared_bytes(int order) { return (2 * order * order + order + 32) * sizeof(double); }

/// One problem a CTA. Shared memory: A, V, the rotations of a round, one double a warp for the reductions.
template <int Threads>
__global__ void __launch_bounds__(Threads) jacobi_kernel(Active active, int m, Batch<double> matrix, Batch<double> values) {
    const std::int64_t problem = active[blockIdx.x];
    const int order = m + (m & 1), half = order / 2, thread = threadIdx.x;
    extern __shared__ double shared[];
    double *a = shared, *v = a + order * order;
    auto* rotations = reinterpret_cast<Rotation*>(v + order * order);
    double* scratch = reinterpret_cast<double*>(rotations + half);

    double* const matrix_data = matrix.at(problem);
    double largest = 0.0;
    bool finite = true;
    for (int t = thread; t < order * order; t += Threads) {
        const int row = t % order, column = t / order;
        const bool inside = row < m && column < m;
        const double x = inside ? matrix_data[max(row, column) + matrix.ld * min(row, column)] : 0.0;
        finite = finite && isfinite(x);
        largest = fmax(largest, fabs(x));
        a[t] = x;
        v[t] = row == column ? 1.0 : 0.0;
    }
    if (__syncthreads_or(!finite)) {
        const double nan = nan_value();
        for (int t = thread; t < m; t += Threads) values(problem, t, 0) = nan;
        for (int t = thread; t < m * m; t += Threads) matrix_data[t % m + matrix.ld * (t / m)] = nan;
        return;
    }

    // A power of two brings the largest entry to [1/2, 1): squares neither overflow nor vanish, and no bit is lost.
    int exponent;
    frexp(block_max<Threads>(largest, scratch), &exponent);
    double square = 0.0;
    for (int t = thread; t < order * order; t += Threads) {
        const double x = ldexp(a[t], -exponent);
        a[t] = x;
        square += x * x;
    }
    const double threshold = DBL_EPSILON * sqrt(block_sum<Threads>(square, scratch)) / order;

    bool converged = false;
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
        bool coupled = false;
        for (int t = thread; t < order * order; t += Threads)
            coupled = coupled || (t % order > t / order && fabs(a[t]) > threshold);
        if (!__syncthreads_or(coupled)) {
            converged = true;
            break;
        }
        for (int round = 0; round < order - 1; ++round) {
            bool rotated = false;
            if (thread < half) rotated = rotate_pair(a, order, pair_at(order, round, thread), threshold, rotations[thread]);
            if (!__syncthreads_or(rotated)) continue;
            for (int t = thread; t < half * (half - 1) / 2; t += Threads) {
                const Pair seats = seats_at(half, t);
                const Rotation left = rotations[seats.p], right = rotations[seats.q];
                if (left.s != 0.0 || right.s != 0.0)
                    rotate_block(a, order, pair_at(order, round, seats.p), left, pair_at(order, round, seats.q), right);
            }
            for (int t = thread; t < order * half; t += Threads) {
                const int seat = t / order;
                const Rotation rotation = rotations[seat];
                if (rotation.s != 0.0) rotate_row(v, order, t % order, pair_at(order, round, seat), rotation);
            }
            __syncthreads();
        }
    }

    int* rank = reinterpret_cast<int*>(rotations);
    for (int i = thread; i < m; i += Threads) {
        rank[i] = rank_of(a, order, m, i);
        values(problem, rank[i], 0) = converged ? ldexp(a[i + order * i], exponent) : nan_value();
    }
    __syncthreads();
    for (int t = thread; t < m * m; t += Threads) {
        const int row = t % m, column = t / m;
        matrix_data[row + matrix.ld * rank[column]] = v[row + order * column];
    }
}

template <int Threads>
void launch(cudaStream_t stream, Active active, Batch<double> a, Batch<double> values) {
    const int m = static_cast<int>(a.rows);
    jacobi_kernel<Threads>
        <<<static_cast<unsigned>(active.count), Threads, shared_bytes(m + m % 2), stream>>>(active, m, a, values);
    SST_TRY_LAUNCH("jacobi_kernel");
}

}  // namespace

int jacobi_limit() {
    int device = 0, shared = 0;
    SST_TRY(cudaGetDevice(&device));
    SST_TRY(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return static_cast<std::size_t>(shared) >= shared_bytes(kMaxOrder) ? kMaxOrder : kTile;
}

void prepare_kernels() {
    SST_TRY(cudaFuncSetAttribute(jacobi_kernel<256>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes(kTile))));
    if (jacobi_limit() > kTile)
        SST_TRY(cudaFuncSetAttribute(jacobi_kernel<512>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes(kMaxOrder))));
}

void jacobi_eigh(cudaStream_t stream, Active active, Batch<double> a, Batch<double> values) {
    if (a.rows < 1 || a.rows > kMaxOrder)
        throw std::invalid_argument("jacobi_eigh: expected an order from 1 to 96, got " + std::to_string(a.rows));
    if (active.count == 0) return;
    const auto run = a.rows <= 16 ? launch<64> : a.rows <= 32 ? launch<128> : a.rows <= kTile ? launch<256> : launch<512>;
    run(stream, active, a, values);
}

}  // namespace sst::cuda
