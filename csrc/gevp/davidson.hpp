// Jacobi-Davidson steps in the original coordinates, for a B that is not factored in fp64: every step corrects the worst
// wanted Ritz pairs, by K^-1 r where K is near B (fp32 factor, structural inverse), else by the projected equation.
#pragma once

#include "gevp/convergence.hpp"
#include "gevp/correction.hpp"
#include "gevp/pencil.hpp"
#include "gevp/rayleigh_ritz.hpp"

namespace sst::gevp {

template <class Pencil>
struct MassMetric {
    const Pencil& pencil;
    static constexpr bool trivial = false;
    template <class Backend>
    void operator()(Backend& backend, Active active, Batch<double> x, Batch<double> bx) const {
        pencil.multiply_b(backend, active, x, bx);
    }
};

/// The block at columns [filled, filled + b) of v becomes part of the basis: B-orthonormal, with its images and its part of H.
template <class Backend, class Pencil>
void append_block(Backend& backend, Active active, const Pencil& pencil, State& state, int64_t filled, int64_t& randoms) {
    const Range range("append_block");
    const int64_t b = state.options.block;
    const Batch<double> v = state.v.columns(0, filled), bv = state.bv.columns(0, filled);
    const Batch<double> block = state.v.columns(filled, b), image = state.av.columns(filled, b);
    note_size(backend, active, block, state.ortho);
    project(backend, active, v, bv, block, state.ortho);
    orthonormalise(backend, active, MassMetric<Pencil>{pencil}, v, bv, block, state.bv.columns(filled, b), state.options.seed, randoms,
                   state.ortho);
    randoms += b;
    pencil.multiply_a(backend, active, block, image);
    backend.gemm(active, Op::transpose, Op::none, 1.0, state.v.columns(0, filled + b), image, 0.0,
                 state.h.block(0, filled, filled + b, b));
}

/// Ritz vectors, residuals and their norms in the preconditioner's norm for the first `count` pairs of an m-column basis.
template <class Backend, class Pencil>
void residuals(Backend& backend, Active active, const Pencil& pencil, State& state, const CorrectionScratch& scratch, int64_t m,
               int64_t count) {
    rayleigh_ritz(backend, active, state, m);
    const Batch<double> s = state.s.block(0, 0, m, count), r = state.residual.columns(0, count), theta = state.theta, rho = state.rho;
    const Batch<double> x = scratch.x.columns(0, count), bx = scratch.bx.columns(0, count), safety = scratch.safety;
    backend.gemm(active, Op::none, Op::none, 1.0, state.v.columns(0, m), s, 0.0, x);
    backend.gemm(active, Op::none, Op::none, 1.0, state.bv.columns(0, m), s, 0.0, bx);
    backend.gemm(active, Op::none, Op::none, 1.0, state.av.columns(0, m), s, 0.0, r);
    backend.each_entry(active, state.n, count, SST_LAMBDA(int64_t p, int64_t i, int64_t j) { r(p, i, j) -= theta(p, j, 0) * bx(p, i, j); });
    pencil.precondition(backend, active, r, scratch.z.columns(0, count));
    backend.dots(active, r, scratch.z.columns(0, count), rho);
    backend.each_column(active, count, SST_LAMBDA(int64_t p, int64_t j) {
        rho(p, j, 0) = safety(p, 0, 0) * sqrt(rho(p, j, 0) > 0.0 ? rho(p, j, 0) : 0.0);
    });
}

/// pick: the unconverged among the k wanted first (soft locking: converged pairs stay in the basis and expand it last).
template <class Backend>
void select(Backend& backend, Active active, State& state, const CorrectionScratch& scratch, int64_t m, int64_t count) {
    const Options options = state.options;
    const Batch<double> theta = state.theta, rho = state.rho, shift = scratch.shift;
    const Batch<int64_t> pick = state.pick;
    backend.each(active, SST_LAMBDA(int64_t p) {
        const double limit = options.tolerance * spectral_size(theta, p, m);
        int64_t taken = 0;
        for (int pass = 0; pass < 3; ++pass) {
            for (int64_t j = 0; j < count && taken < options.block; ++j) {
                const int own = j >= options.k ? 1 : (rho(p, j, 0) > limit ? 0 : 2);
                if (own == pass) pick(p, taken++, 0) = j;
            }
        }
        for (int64_t j = 0; j < options.block; ++j) shift(p, j, 0) = theta(p, pick(p, j, 0), 0);
    });
}

/// The next block: corrections of the selected pairs, or random columns where missed copies are sought.
template <class Backend, class Pencil>
void propose(Backend& backend, Active active, const Pencil& pencil, State& state, const CorrectionScratch& scratch, int64_t filled,
             int64_t count, bool verify_now, int64_t& randoms) {
    const int64_t b = state.options.block;
    const Batch<double> block = state.v.columns(filled, b), z = scratch.z, r = state.residual, picked = scratch.r;
    const Batch<int64_t> pick = state.pick;
    if (state.options.inner_steps == 0) {
        backend.each_entry(active, state.n, b, SST_LAMBDA(int64_t p, int64_t i, int64_t j) { block(p, i, j) = z(p, i, pick(p, j, 0)); });
    } else {
        backend.each_entry(active, state.n, b, SST_LAMBDA(int64_t p, int64_t i, int64_t j) { picked(p, i, j) = r(p, i, pick(p, j, 0)); });
        correct(backend, active, pencil, scratch, count, b, state.options.inner_steps, state.ortho);
        backend.copy(active, scratch.t.columns(0, b), block);
    }
    if (verify_now) {
        randomise(backend, active, block, state.verifying, state.options.seed, randoms);
        randoms += b;
    }
}

/// Thick restart with +k: the kept Ritz vectors and what the Ritz vectors of the step before add to them.
template <class Backend>
int64_t restart(Backend& backend, Active active, State& state, Batch<double> previous, int64_t full, int64_t& randoms) {
    const Range range("restart");
    const int64_t keep = state.options.keep, total = keep + state.options.previous;
    const Batch<double> coefficients = state.s.block(0, 0, full, total), extra = state.s.block(0, keep, full, state.options.previous);
    backend.copy(active, Batch<const double>(previous.block(0, 0, full, state.options.previous)), extra);
    note_size(backend, active, extra, state.ortho);
    const Batch<double> kept = state.s.block(0, 0, full, keep);
    project(backend, active, kept, kept, extra, state.ortho);
    orthonormalise(backend, active, Euclidean{}, kept, kept, extra, extra, state.options.seed, randoms, state.ortho);
    randoms += state.options.previous;
    rotate(backend, active, state, state.v, coefficients);
    rotate(backend, active, state, state.av, coefficients);
    rotate(backend, active, state, state.bv, coefficients);
    backend.gemm(active, Op::transpose, Op::none, 1.0, state.v.columns(0, total), state.av.columns(0, total), 0.0,
                 state.h.block(0, 0, total, total));
    return total;
}

template <class Backend, class Pencil>
void davidson_cycles(Backend& backend, Active active, const Pencil& pencil, State& state, const CorrectionScratch& scratch,
                     Batch<double> previous, bool exact, const Result& result) {
    const Options& options = state.options;
    const int64_t b = options.block, m = options.basis, certifying_steps = 60;
    const Batch<double> safety = scratch.safety, theta = state.theta, rho = state.rho;
    int64_t randoms = b, filled = b, full = b;
    backend.each(active, SST_LAMBDA(int64_t p) { safety(p, 0, 0) = 1.0; });
    randomise(backend, active, state.v.columns(0, b), nullptr, options.seed, 0);
    append_block(backend, active, pencil, state, 0, randoms);
    for (int64_t cycle = 0; cycle < options.max_cycles && active.count > 0; ++cycle) {
        for (bool first = true; filled + b <= m; filled += b, first = false) {
            const int64_t count = std::min(state.wanted, filled);
            residuals(backend, active, pencil, state, scratch, filled, count);
            select(backend, active, state, scratch, filled, count);
            const int64_t carried = std::min(options.previous, filled);
            backend.zero(active, previous);
            backend.copy(active, state.s.block(0, 0, filled, carried), previous.block(0, 0, filled, carried));
            propose(backend, active, pencil, state, scratch, filled, count, first, randoms);
            append_block(backend, active, pencil, state, filled, randoms);
            full = filled + b;
        }
        residuals(backend, active, pencil, state, scratch, full, state.wanted);
        if (!exact) {
            int32_t* const unlikely = scratch.unlikely;
            const Options opts = options;
            const int64_t columns = full;
            backend.each(active, SST_LAMBDA(int64_t p) {
                unlikely[p] = 0;
                for (int64_t j = 0; j < opts.k; ++j) unlikely[p] |= !(rho(p, j, 0) <= opts.tolerance * spectral_size(theta, p, columns));
            });
            const Active candidates = backend.compact(active, unlikely);
            if (candidates.count > 0) {
                const Batch<double> proxy = scratch.shift;
                backend.each_column(candidates, opts.k, SST_LAMBDA(int64_t p, int64_t j) { proxy(p, j, 0) = rho(p, j, 0); });
                certify(backend, candidates, pencil, scratch, state.residual, opts.k, certifying_steps, rho);
                backend.each(candidates, SST_LAMBDA(int64_t p) {
                    double factor = 1.0;
                    for (int64_t j = 0; j < opts.k; ++j) {
                        if (rho(p, j, 0) > factor * proxy(p, j, 0) && proxy(p, j, 0) > 0.0) factor = rho(p, j, 0) / proxy(p, j, 0);
                    }
                    safety(p, 0, 0) *= factor;
                });
            }
        }
        const double later = double(m - options.keep - options.previous);
        judge(backend, active, state, full, cycle, double(m) / later + double(cycle), result);
        active = backend.compact(active, state.done);
        filled = restart(backend, active, state, previous, full, randoms);
    }
    if (exact) return;
    int32_t* const settled = scratch.unlikely;
    const int32_t* const codes = result.status;
    const int32_t* const bad = state.bad;
    const Active everything{nullptr, backend.batch()};
    backend.each(everything, SST_LAMBDA(int64_t p) { settled[p] = bad[p] || codes[p] == code(Status::converged); });
    const Active rest = backend.compact(everything, settled);
    if (rest.count == 0) return;
    certify(backend, rest, pencil, scratch, state.residual, options.k, certifying_steps, rho);
    int32_t* const statuses = result.status;
    const Options last = options;
    const int64_t columns = full;
    backend.each(rest, SST_LAMBDA(int64_t p) {
        bool all = statuses[p] == code(Status::max_iterations);
        for (int64_t j = 0; j < last.k; ++j) all = all && rho(p, j, 0) <= last.tolerance * spectral_size(theta, p, columns);
        if (all) statuses[p] = code(Status::converged);
    });
}

}  // namespace sst::gevp
