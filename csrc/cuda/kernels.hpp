// Host-side entry points of the own kernels (matrices: sst/views.h). Nothing here synchronises the host or allocates, and
// how a result is summed depends on the shape of one problem only, never on the batch: alone or in company, same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "sst/views.h"

namespace sst::cuda {

/// Width of the blocks of a factor, and rows of a tile of every product: both grids fall on the same lines.
constexpr int kTile = 64;

/// Raises the dynamic shared memory limits on the current device (idempotent).
void prepare_kernels();

/// Largest order of jacobi_eigh() on the current device: 96, or 64 where a CTA has no 145 KiB of shared memory (sm_86, sm_89, sm_120).
int jacobi_limit();

/// Which part of the summation range can hold non-zeros, in steps of kTile, given where an output tile lies.
enum class Span { all, until_row, from_row, until_column, from_column };

/// Z = alpha op(X) op(Y) + beta Z. Z may be X when X is not transposed and Z has at most kTile columns.
template <class TX, class TY, class TZ>
void gemm(cudaStream_t stream, Active active, Op op_x, Op op_y, double alpha, Batch<const TX> x, Batch<const TY> y, double beta,
          Batch<TZ> z, Span span = Span::all);

/// F = L L' (lower triangle read) becomes L^-1 in place: with the inverse at hand a triangular solve is one product instead of
/// a chain of n / 64 small ones. Left-looking by blocks of kTile, then inverted block row by block row; `strip` is kTile x n.
/// The diagonal blocks end with zeros above the diagonal. info[p] = 1-based order of the first failing minor; set it to zero.
template <class T>
void invert_cholesky(cudaStream_t stream, Active active, Batch<T> f, Batch<T> strip, std::int32_t* info);

/// Full eigendecomposition of symmetric matrices of order <= jacobi_limit() in place, values descending; the lower triangle is read.
/// A matrix that is not finite, or does not converge in 30 sweeps, gets NaN values.
void jacobi_eigh(cudaStream_t stream, Active active, Batch<double> a, Batch<double> values);

/// out(p, 0, 0) = max |a_ij|, NaN if an entry is not finite; out(p, 1, 0) = max |a_ij - a_ji|.
template <class S>
void extrema(cudaStream_t stream, Active active, Batch<const S> a, Batch<double> out);

/// d(p, j, 0) = x_j' y_j.
void dots(cudaStream_t stream, Active active, Batch<const double> x, Batch<const double> y, Batch<double> d);

/// The problems of `active` with done[p] == 0, in order, into `list`, and how many into `count`.
void compact(cudaStream_t stream, Active active, const std::int32_t* done, std::int64_t* list, std::int64_t* count);

}  // namespace sst::cuda
