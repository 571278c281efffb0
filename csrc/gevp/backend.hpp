// The Backend concept: everything the solver needs of a device, and nothing else.
//
// A backend is an object that owns (or borrows) handles and an ordered stream. The solver issues operations on it; on a GPU
// every operation is asynchronous on that stream, and *only* compact() and wait() may block the host. The solver calls
// compact() at cycle ends, nowhere else. Memory is carved from the caller's Arena (sst/workspace.h) before the first
// operation; a backend carves its own scratch in reserve(), by the same code in counting and in solving mode.
//
// Every operation acts on each problem of `active` separately, and the bits of one problem's result depend neither on the
// other problems nor on how many there are. All views are column-major device memory (sst/views.h). T is double, S the
// storage of A and B (double or float). Matrices do not alias unless an operation says "in place".
//
//   int64_t  batch()                                     problems in this solve
//   void     reserve(Arena&, Shape)                      carve scratch for the largest operation of the shape below
//
//   Memory and shapes
//   void     zero(active, X)                             X = 0
//   void     copy(active, X, Y)                          Y = X; same shape; element types may differ (S -> double, double -> float)
//
//   Products (op: Op::none | Op::transpose)
//   void     gemm(active, opX, opY, alpha, X, Y, beta, Z)    Z = alpha op(X) op(Y) + beta Z, all double
//   void     symm(active, A, X, Y)                       Y = A X, A n x n symmetric of storage S with both triangles there,
//                                                        X, Y double n x b; products and sums in double also for S = float
//   void     dots(active, X, Y, d)                       d(p, j, 0) = x_j' y_j for every column j; fixed summation order
//
//   Factorisations
//   void     potrf(active, F, info)                      in place: lower Cholesky factor of F (double or float), upper triangle
//                                                        untouched; info[p] = 0, or the 1-based order of the failing minor
//   void     trsm(active, op, F, X)                      in place: X = op(L)^-1 X, L = lower triangle of F; X is double, and for
//                                                        float F rounded to float for the solve and widened again
//   void     syev(active, H, w)                          in place: H symmetric (lower triangle read) becomes its orthonormal
//                                                        eigenvectors, w(p, i, 0) the eigenvalues, *descending*
//   void     extrema(active, A, out)                     out(p, 0, 0) = max |a_ij|, NaN if any entry is not finite;
//                                                        out(p, 1, 0) = max |a_ij - a_ji|
//
//   Small kernels written once, in the solver, as SST_LAMBDA (views.h)
//   void     each(active, f)                             f(p)                one thread per problem
//   void     each_column(active, cols, f)                f(p, col)
//   void     each_entry(active, rows, cols, f)           f(p, row, col)      elementwise; rows fastest
//
//   Control
//   Active   compact(active, done)                       blocks: the problems of `active` with done[p] == 0 in order, packed into
//                                                        the backend's own list (not into the list that `active` points to)
//   void     wait()                                      blocks until everything issued has finished
//
// CpuBackend (csrc/cpu) is the reading copy. csrc/cuda implements the same by own kernels, and cuSOLVER for wide bases.
#pragma once

#include "sst/options.h"
#include "sst/result.h"
#include "sst/status.h"
#include "sst/views.h"
#include "sst/workspace.h"

namespace sst::gevp {

/// Largest sizes that the operations of one solve will see, for Backend::reserve.
struct Shape {
    int64_t batch = 0;
    int64_t n = 0;
    int64_t basis = 0;  ///< order of the largest syev; the smallest is `block`
    int64_t block = 0;  ///< widest X of symm and trsm
    bool single_factor = false;
    bool factor = true;  ///< whether potrf and trsm are used at all
};

}  // namespace sst::gevp
