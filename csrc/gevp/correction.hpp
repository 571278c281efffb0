// Block conjugate gradients, one scalar recurrence per column, frozen columns instead of branches. Two uses: the
// Jacobi-Davidson correction equation
//
//   P' (theta_j B - A) P t_j = r_j,   P = I - X (BX)',   t_j = P t_j,   preconditioner P K^-1 P'
//
// which is positive definite on the complement of the Ritz vectors once theta_j lies above what is left of the spectrum; and
// B e_j = r_j, whose solution gives the residual's B^-1 norm where K is only near B.
#pragma once

#include "gevp/orthonormalise.hpp"
#include "sst/nvtx.h"

namespace sst::gevp {

struct CorrectionScratch {
    Batch<double> x, bx;           ///< n x wanted, Ritz vectors and B times them
    Batch<double> z, t, r, d, q;   ///< n x wanted: preconditioned residual, solution, residual, direction, image
    Batch<double> rz, dq, target;  ///< wanted x 1
    Batch<double> shift;           ///< wanted x 1, theta of the column
    Batch<double> safety;          ///< 1 x 1, certified residual norm over the preconditioner's
    int32_t* unlikely = nullptr;   ///< [batch] not converged even in the preconditioner's norm

    static CorrectionScratch carve(Arena& arena, int64_t batch, int64_t n, int64_t wanted) {
        auto tall = [&] { return arena.matrices<double>(batch, n, wanted); };
        auto flat = [&] { return arena.matrices<double>(batch, wanted, 1); };
        return {tall(), tall(), tall(), tall(), tall(), tall(), tall(), flat(), flat(), flat(), flat(),
                arena.matrices<double>(batch, 1, 1), arena.take<int32_t>(batch)};
    }
};

/// Solves operate(t) = r column by column from t = 0; r becomes the residual. A column freezes when r' K^-1 r has fallen by
/// `reduction` squared, or at a direction of non-positive curvature (where a first step is still the preconditioned residual).
template <class Backend, class Operate, class Precondition>
void conjugate_gradients(Backend& backend, Active active, const CorrectionScratch& scratch, int64_t columns, int64_t steps,
                         double reduction, const Operate& operate, const Precondition& precondition) {
    const int64_t n = scratch.x.rows;
    const Batch<double> r = scratch.r.columns(0, columns), t = scratch.t.columns(0, columns), z = scratch.z.columns(0, columns),
                        d = scratch.d.columns(0, columns), q = scratch.q.columns(0, columns);
    const Batch<double> rz = scratch.rz, dq = scratch.dq, target = scratch.target;
    backend.zero(active, t);
    precondition(r, z);
    backend.copy(active, z, d);
    backend.dots(active, r, z, rz);
    backend.each_column(active, columns, SST_LAMBDA(int64_t p, int64_t j) { target(p, j, 0) = reduction * reduction * rz(p, j, 0); });
    for (int64_t step = 0; step < steps; ++step) {
        operate(d, q);
        backend.dots(active, d, q, dq);
        const bool first = step == 0;
        backend.each_entry(active, n, columns, SST_LAMBDA(int64_t p, int64_t i, int64_t j) {
            const bool live = rz(p, j, 0) > target(p, j, 0);
            if (live && dq(p, j, 0) > 0.0) {
                const double alpha = rz(p, j, 0) / dq(p, j, 0);
                t(p, i, j) += alpha * d(p, i, j);
                r(p, i, j) -= alpha * q(p, i, j);
            } else if (live && first) {
                t(p, i, j) = d(p, i, j);
            }
        });
        precondition(r, z);
        backend.each_column(active, columns, SST_LAMBDA(int64_t p, int64_t j) {
            if (!(dq(p, j, 0) > 0.0)) rz(p, j, 0) = 0.0;
        });
        backend.dots(active, r, z, dq);
        backend.each_entry(active, n, columns, SST_LAMBDA(int64_t p, int64_t i, int64_t j) {
            const double beta = rz(p, j, 0) > target(p, j, 0) ? dq(p, j, 0) / rz(p, j, 0) : 0.0;
            d(p, i, j) = z(p, i, j) + beta * d(p, i, j);
        });
        backend.each_column(active, columns, SST_LAMBDA(int64_t p, int64_t j) {
            rz(p, j, 0) = rz(p, j, 0) > target(p, j, 0) ? dq(p, j, 0) : 0.0;
        });
    }
}

/// P' (theta B - A) P on directions that P maps to themselves.
template <class Backend, class Pencil>
struct ShiftedOperator {
    Backend& backend;
    Active active;
    const Pencil& pencil;
    Batch<double> x, bx, shift, image;
    const OrthoScratch& ortho;

    void operator()(Batch<double> d, Batch<double> q) const {
        pencil.multiply_a(backend, active, d, image);
        pencil.multiply_b(backend, active, d, q);
        subtract(backend, active, q, shift, image);
        project(backend, active, bx, x, q, ortho);
    }

    static void subtract(Backend& backend, Active active, Batch<double> q, Batch<double> shift, Batch<double> image) {
        backend.each_entry(active, q.rows, q.cols, SST_LAMBDA(int64_t p, int64_t i, int64_t j) {
            q(p, i, j) = shift(p, j, 0) * q(p, i, j) - image(p, i, j);
        });
    }
};

/// P K^-1 P' on residuals that P' maps to themselves.
template <class Backend, class Pencil>
struct ProjectedPreconditioner {
    Backend& backend;
    Active active;
    const Pencil& pencil;
    Batch<double> x, bx;
    const OrthoScratch& ortho;

    void operator()(Batch<double> r, Batch<double> z) const {
        pencil.precondition(backend, active, r, z);
        project(backend, active, x, bx, z, ortho);
    }
};

template <class Backend, class Pencil>
struct MassOperator {
    Backend& backend;
    Active active;
    const Pencil& pencil;

    void operator()(Batch<double> d, Batch<double> q) const { pencil.multiply_b(backend, active, d, q); }
};

template <class Backend, class Pencil>
struct PlainPreconditioner {
    Backend& backend;
    Active active;
    const Pencil& pencil;

    void operator()(Batch<double> r, Batch<double> z) const { pencil.precondition(backend, active, r, z); }
};

/// t = correction of the columns whose residuals lie in scratch.r and whose Ritz values in scratch.shift.
template <class Backend, class Pencil>
void correct(Backend& backend, Active active, const Pencil& pencil, const CorrectionScratch& scratch, int64_t ritz, int64_t columns,
             int64_t steps, const OrthoScratch& ortho) {
    const Range range("correction");
    const Batch<double> x = scratch.x.columns(0, ritz), bx = scratch.bx.columns(0, ritz), image = ortho.moved.columns(0, columns);
    conjugate_gradients(backend, active, scratch, columns, steps, 0.1,
                        ShiftedOperator<Backend, Pencil>{backend, active, pencil, x, bx, scratch.shift, image, ortho},
                        ProjectedPreconditioner<Backend, Pencil>{backend, active, pencil, x, bx, ortho});
}

/// rho(j) = sqrt(r_j' B^-1 r_j) for the first `columns` residuals, to about one per cent.
template <class Backend, class Pencil>
void certify(Backend& backend, Active active, const Pencil& pencil, const CorrectionScratch& scratch, Batch<double> residual,
             int64_t columns, int64_t steps, Batch<double> rho) {
    const Range range("certify");
    backend.copy(active, residual.columns(0, columns), scratch.r.columns(0, columns));
    conjugate_gradients(backend, active, scratch, columns, steps, 1e-2, MassOperator<Backend, Pencil>{backend, active, pencil},
                        PlainPreconditioner<Backend, Pencil>{backend, active, pencil});
    backend.dots(active, residual.columns(0, columns), scratch.t.columns(0, columns), rho);
    backend.each_column(active, columns, SST_LAMBDA(int64_t p, int64_t j) {
        rho(p, j, 0) = sqrt(rho(p, j, 0) > 0.0 ? rho(p, j, 0) : 0.0);
    });
}

}  // namespace sst::gevp
