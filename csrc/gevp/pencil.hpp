// The two sides of A v = lambda B v as the solver meets them: products with blocks, and the inverse of B or of what stands in
// for it. A pencil offers
//
//   multiply_a(backend, active, X, Y)   Y = A X
//   multiply_b(backend, active, X, Y)   Y = B X
//   precondition(backend, active, R, Z) Z = K^-1 R
//   order()                             n
//
// for double blocks n x b in device memory.
#pragma once

#include "gevp/backend.hpp"

namespace sst::gevp {

/// Stored matrices, scaled by powers of two on the fly; K is a Cholesky factor, the diagonal, or nothing.
template <class S>
struct DensePencil {
    Batch<const S> a, b;
    Batch<double> factor;       ///< fp64 lower Cholesky factor of scale_b B, or empty
    Batch<float> single;        ///< fp32 lower Cholesky factor of scale_b B + shift, or empty
    double* scale_a = nullptr;  ///< [batch]
    double* scale_b = nullptr;  ///< [batch]
    Preconditioner kind = Preconditioner::cholesky;

    int64_t order() const { return a.rows; }

    template <class Backend>
    void multiply_a(Backend& backend, Active active, Batch<const double> x, Batch<double> y) const {
        multiply(backend, active, a, scale_a, x, y);
    }

    template <class Backend>
    void multiply_b(Backend& backend, Active active, Batch<const double> x, Batch<double> y) const {
        multiply(backend, active, b, scale_b, x, y);
    }

    template <class Backend>
    void precondition(Backend& backend, Active active, Batch<const double> r, Batch<double> z) const {
        backend.copy(active, r, z);
        if (kind == Preconditioner::cholesky_single) {
            backend.trsm(active, Op::none, Batch<const float>(single), z);
            backend.trsm(active, Op::transpose, Batch<const float>(single), z);
        } else if (kind == Preconditioner::diagonal) {
            const Batch<const S> stored = b;
            const double* scale = scale_b;
            backend.each_entry(active, z.rows, z.cols, SST_LAMBDA(int64_t p, int64_t i, int64_t j) {
                z(p, i, j) /= scale[p] * double(stored(p, i, i));
            });
        }
    }

    template <class Backend>
    static void multiply(Backend& backend, Active active, Batch<const S> m, const double* scale, Batch<const double> x,
                         Batch<double> y) {
        backend.symm(active, m, x, y);
        backend.each_entry(active, y.rows, y.cols, SST_LAMBDA(int64_t p, int64_t i, int64_t j) { y(p, i, j) *= scale[p]; });
    }
};

/// One problem whose products are calls: apply(which, x, y, columns) with which = 0 for A, 1 for B, 2 for K^-1, and x, y the
/// addresses of packed n x columns blocks inside the workspace.
template <class Apply>
struct OperatorPencil {
    int64_t n;
    const Apply& apply;
    Preconditioner kind;
    double* scale_a = nullptr;
    double* scale_b = nullptr;

    int64_t order() const { return n; }

    template <class Backend>
    void multiply_a(Backend&, Active, Batch<const double> x, Batch<double> y) const {
        apply(0, x.data, y.data, x.cols);
    }
    template <class Backend>
    void multiply_b(Backend&, Active, Batch<const double> x, Batch<double> y) const {
        apply(1, x.data, y.data, x.cols);
    }
    template <class Backend>
    void precondition(Backend& backend, Active active, Batch<const double> r, Batch<double> z) const {
        if (kind == Preconditioner::none) return backend.copy(active, r, z);
        apply(2, r.data, z.data, r.cols);
    }
};

}  // namespace sst::gevp
