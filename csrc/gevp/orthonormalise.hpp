// Orthonormalisation of a block by SVQB (Stathopoulos & Wu 2002): the eigenbasis of its scaled Gram matrix, dependent
// directions dropped and refilled with random ones, so that every problem of a batch keeps the same number of columns.
#pragma once

#include <limits>

#include "gevp/backend.hpp"
#include "sst/random.h"

namespace sst::gevp {

/// Inner product of the standard problem: the metric is the identity and an image is its own source.
struct Euclidean {
    static constexpr bool trivial = true;
    template <class Backend>
    void operator()(Backend&, Active, Batch<double>, Batch<double>) const {}
};

struct OrthoScratch {
    Batch<double> gram;       ///< b x b
    Batch<double> transform;  ///< b x b
    Batch<double> values;     ///< b x 1
    Batch<double> floor;      ///< b x 1, squared norms below which a column is rounding noise
    Batch<double> overlap;    ///< basis x b
    Batch<double> moved;      ///< n x b
    int32_t* indefinite;      ///< [batch] set where x' B x < 0 was met

    static OrthoScratch carve(Arena& arena, int64_t batch, int64_t n, int64_t basis, int64_t b) {
        return {arena.matrices<double>(batch, b, b), arena.matrices<double>(batch, b, b), arena.matrices<double>(batch, b, 1),
                arena.matrices<double>(batch, b, 1), arena.matrices<double>(batch, basis, b), arena.matrices<double>(batch, n, b),
                arena.take<int32_t>(batch)};
    }
};

/// Squared norms before the first projection, as the measure of what that projection leaves: below 100 ulp it is noise.
template <class Backend>
void note_size(Backend& backend, Active active, Batch<const double> x, const OrthoScratch& scratch) {
    const Batch<double> floor = scratch.floor;
    backend.dots(active, x, x, floor);
    const double ulp = 100 * std::numeric_limits<double>::epsilon();
    backend.each_column(active, x.cols, SST_LAMBDA(int64_t p, int64_t j) { floor(p, j, 0) *= ulp * ulp; });
}

/// x -= V (BV' x)
template <class Backend>
void project(Backend& backend, Active active, Batch<const double> v, Batch<const double> bv, Batch<double> x,
             const OrthoScratch& scratch) {
    if (v.cols == 0) return;
    const Batch<double> overlap = scratch.overlap.block(0, 0, v.cols, x.cols);
    backend.gemm(active, Op::transpose, Op::none, 1.0, bv, x, 0.0, overlap);
    backend.gemm(active, Op::none, Op::none, -1.0, v, overlap, 1.0, x);
}

/// One SVQB pass: x and bx times Z s^-1/2. With `refill`, columns that carry nothing new become random ones whose key is
/// (seed, first_random + column); bx is stale for those until the next metric product.
template <class Backend>
void svqb(Backend& backend, Active active, Batch<double> x, Batch<double> bx, bool trivial, bool refill, uint64_t seed,
          int64_t first_random, const OrthoScratch& scratch) {
    const int64_t b = x.cols;
    const Batch<double> gram = scratch.gram.block(0, 0, b, b), z = scratch.transform.block(0, 0, b, b), s = scratch.values,
                        floor = scratch.floor, moved = scratch.moved.block(0, 0, x.rows, b);
    int32_t* const indefinite = scratch.indefinite;
    backend.gemm(active, Op::transpose, Op::none, 1.0, x, bx, 0.0, gram);
    backend.each_entry(active, b, b, SST_LAMBDA(int64_t p, int64_t i, int64_t j) {
        const double gi = gram(p, i, i), gj = gram(p, j, j);
        if (i == j && gi < 0.0) indefinite[p] = 1;
        const bool live = !refill || (gi > floor(p, i, 0) && gj > floor(p, j, 0));
        z(p, i, j) = live && gi > 0 && gj > 0 ? 0.5 * (gram(p, i, j) + gram(p, j, i)) / (sqrt(gi) * sqrt(gj)) : 0.0;
    });
    backend.syev(active, z, s);
    const double ulp = b * std::numeric_limits<double>::epsilon();
    backend.each_entry(active, b, b, SST_LAMBDA(int64_t p, int64_t i, int64_t j) {
        const double g = gram(p, i, i), cut = ulp * s(p, 0, 0), own = s(p, j, 0);
        const bool live = g > 0 && (!refill || (g > floor(p, i, 0) && own > cut));
        z(p, i, j) = live && own > 0 ? z(p, i, j) / (sqrt(g) * sqrt(own > cut ? own : cut)) : 0.0;
    });
    backend.gemm(active, Op::none, Op::none, 1.0, x, z, 0.0, moved);
    backend.copy(active, moved, x);
    if (!trivial) {
        backend.gemm(active, Op::none, Op::none, 1.0, bx, z, 0.0, moved);
        backend.copy(active, moved, bx);
    }
    if (!refill) return;
    backend.each_entry(active, x.rows, b, SST_LAMBDA(int64_t p, int64_t i, int64_t j) {
        if (!(s(p, j, 0) > ulp * s(p, 0, 0))) x(p, i, j) = random_entry(seed, first_random + j, i);
    });
}

/// Makes x (already projected once; note_size() taken before) orthonormal in the metric and against V. Leaves bx = metric x.
template <class Backend, class Metric>
void orthonormalise(Backend& backend, Active active, const Metric& metric, Batch<const double> v, Batch<const double> bv,
                    Batch<double> x, Batch<double> bx, uint64_t seed, int64_t first_random, const OrthoScratch& scratch) {
    for (const bool first : {true, false}) {
        if (!first) project(backend, active, v, bv, x, scratch);
        metric(backend, active, x, bx);
        svqb(backend, active, x, bx, Metric::trivial, first, seed, first_random, scratch);
    }
}

/// x(p, :, :) random where `chosen` is null or chosen[p] is 1.
template <class Backend>
void randomise(Backend& backend, Active active, Batch<double> x, const int32_t* chosen, uint64_t seed, int64_t first_random) {
    backend.each_entry(active, x.rows, x.cols, SST_LAMBDA(int64_t p, int64_t i, int64_t j) {
        if (chosen == nullptr || chosen[p] == 1) x(p, i, j) = random_entry(seed, first_random + j, i);
    });
}

}  // namespace sst::gevp
