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
__global__ void __launch_bounds__(Threads)
    jacobi_kernel(int m, Batch<const double> input, double* values, std::int64_t value_stride, Batch<double> output,
                  int* info, const std::uint8_t* active, bool descending) {
  const std::int64_t problem = blockIdx.x;
  if (active && !active[problem]) return;
  const int order = m + (m & 1), half = order / 2, thread = threadIdx.x;
  extern __shared__ double shared[];
  double *a = shared, *v = a + order * order;
  auto* rotations = reinterpret_cast<Rotation*>(v + order * order);
  double* scratch = reinterpret_cast<double*>(rotations + half);

  const double* source = input.data + problem * input.stride;
  double largest = 0.0;
  bool finite = true;
  for (int t = thread; t < order * order; t += Threads) {
    const int row = t % order, column = t / order;
    const bool inside = row < m && column < m;
    const double x = inside ? source[max(row, column) + input.ld * min(row, column)] : 0.0;
    finite = finite && isfinite(x);
    largest = fmax(largest, fabs(x));
    a[t] = x;
    v[t] = row == column ? 1.0 : 0.0;
  }
  double* my_values = values + problem * value_stride;
  double* vectors = output.data + problem * output.stride;
  if (__syncthreads_or(!finite)) {
    const double nan = nan_value();
    for (int t = thread; t < m; t += Threads) my_values[t] = nan;
    for (int t = thread; t < m * m; t += Threads) vectors[t % m + output.ld * (t / m)] = nan;
    if (thread == 0) info[problem] = -1;
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

  int status = 1;
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    bool coupled = false;
    for (int t = thread; t < order * order; t += Threads)
      coupled = coupled || (t % order > t / order && fabs(a[t]) > threshold);
    if (!__syncthreads_or(coupled)) {
      status = 0;
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
    rank[i] = rank_of(a, order, m, i, descending);
    my_values[rank[i]] = ldexp(a[i + order * i], exponent);
  }
  __syncthreads();
  for (int t = thread; t < m * m; t += Threads) {
    const int row = t % m, column = t / m;
    vectors[row + output.ld * rank[column]] = v[row + order * column];
  }
  if (thread == 0) info[problem] = status;
}

template <int Threads, class... Arguments>
void launch(cudaStream_t stream, int m, int batch, Arguments... arguments) {
  jacobi_kernel<Threads><<<batch, Threads, shared_bytes(m + (m & 1)), stream>>>(m, arguments...);
  SST_TRY_LAUNCH("jacobi_kernel");
}

}  // namespace

void prepare_jacobi() {
  SST_TRY(cudaFuncSetAttribute(jacobi_kernel<256>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes(kMaxOrder))));
}

void jacobi_eigh(cudaStream_t stream, int m, int batch, Batch<const double> a, double* values,
                 std::int64_t value_stride, Batch<double> z, int* info, const std::uint8_t* active, bool descending) {
  if (m < 1 || m > kMaxOrder)
    throw std::invalid_argument("jacobi_eigh: expected an order from 1 to 64, got " + std::to_string(m));
  if (batch == 0) return;
  if (m <= 16)
    launch<64>(stream, m, batch, a, values, value_stride, z, info, active, descending);
  else if (m <= 32)
    launch<128>(stream, m, batch, a, values, value_stride, z, info, active, descending);
  else
    launch<256>(stream, m, batch, a, values, value_stride, z, info, active, descending);
}

}  // namespace sst::cuda
