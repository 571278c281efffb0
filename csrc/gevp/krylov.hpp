// With an fp64 Cholesky factor of B the correction equation's solution is B^-1 r, and the basis of every step is the block
// Krylov space of B^-1 A. That space is built here in the standard coordinates y = L' v, where B is the identity, with one
// projected eigenproblem per restart cycle instead of one per step (lazy Rayleigh-Ritz).
#pragma once

#include "gevp/convergence.hpp"
#include "gevp/pencil.hpp"
#include "gevp/rayleigh_ritz.hpp"

namespace sst::gevp {

/// y = L^-1 A L^-T x
template <class Backend, class S>
void multiply_standard(Backend& backend, Active active, const DensePencil<S>& pencil, Batch<const double> x, Batch<double> y,
                       Batch<double> scratch) {
    backend.copy(active, x, scratch);
    backend.trsm(active, Op::transpose, Batch<const double>(pencil.factor), scratch);
    pencil.multiply_a(backend, active, scratch, y);
    backend.trsm(active, Op::none, Batch<const double>(pencil.factor), y);
}

/// Columns at which the first basis is looked at: twice, two blocks apart, once it holds a block more than the wanted pairs and the random
/// start is forgotten. {0, 0} where nobody may leave.
struct Outlook {
    int64_t first = 0, second = 0;

    explicit Outlook(const Options& options) {
        const int64_t b = options.block, start = std::max((options.k + b - 1) / b + 1, (16 + b - 1) / b) * b;
        if (options.afford > 0.0 && start + 2 * b < options.basis) first = start, second = start + 2 * b;
    }
};

/// In the midst of the first basis, of m columns so far: with `leave`, what is too slow to pay leaves before the rest of that basis is
/// built. Its outputs stay as the screening left them. A V = V H + V_next H_next, so the residual of the Ritz pair s is |H_next s|.
template <class Backend>
Active look_ahead(Backend& backend, Active active, State& state, int64_t m, bool leave) {
    const Options options = state.options;
    rayleigh_ritz(backend, active, state, m);
    const Batch<double> residual = state.ortho.overlap.block(0, 0, options.block, options.k), theta = state.theta, rho = state.rho,
                        pace = state.pace;
    backend.gemm(active, Op::transpose, Op::none, 1.0, state.h.block(0, m, m, options.block), state.s.block(0, 0, m, options.k), 0.0,
                 residual);
    backend.dots(active, residual, residual, rho.block(0, 0, options.k, 1));
    backend.each_column(active, options.k, SST_LAMBDA(int64_t p, int64_t j) { rho(p, j, 0) = sqrt(rho(p, j, 0)); });
    const double now = double(m) / double(options.basis - options.keep);
    const double afford = leave ? 1.5 * options.afford : 0.0;  // the pace of a growing Krylov space rises where it is worth going on
    int32_t *const done = state.done, *const bad = state.bad;
    backend.each(active, SST_LAMBDA(int64_t p) {
        const double missing = missing_halvings(options, rho, p, spectral_size(theta, p, m));
        if (too_slow(pace, p, missing, now, afford)) done[p] = bad[p] = 1;
    });
    return leave ? backend.compact(active, done) : active;
}

/// Expands from `filled` columns to the full basis: A V, H, and behind the basis the next orthonormal block. Returns who is left.
template <class Backend, class S>
Active expand_krylov(Backend& backend, Active active, const DensePencil<S>& pencil, State& state, int64_t filled, int64_t& randoms) {
    const Range range("expand_krylov");
    const int64_t b = state.options.block;
    const Outlook outlook(state.options);
    const bool fresh = filled == 0;
    for (; filled < state.options.basis; filled += b) {
        const Batch<double> block = state.v.columns(filled, b), image = state.av.columns(filled, b);
        const Batch<double> next = state.v.columns(filled + b, b), basis = state.v.columns(0, filled + b);
        multiply_standard(backend, active, pencil, block, image, next);
        const Batch<double> h = state.h.block(0, filled, filled + b, b);
        backend.gemm(active, Op::transpose, Op::none, 1.0, basis, image, 0.0, h);
        if (fresh && filled > 0 && (filled == outlook.first || filled == outlook.second)) {
            active = look_ahead(backend, active, state, filled, filled == outlook.second);
            if (active.count == 0) break;
        }
        note_size(backend, active, image, state.ortho);
        backend.copy(active, image, next);
        backend.gemm(active, Op::none, Op::none, -1.0, basis, h, 1.0, next);
        orthonormalise(backend, active, Euclidean{}, basis, basis, next, next, state.options.seed, randoms, state.ortho);
        randoms += b;
    }
    return active;
}

/// The block behind the basis, for problems that search for missed copies: a fresh block has no part in the residuals of the Ritz
/// vectors kept from before, so from then on the worst residuals themselves go next, as in any Davidson method.
template <class Backend>
void redirect(Backend& backend, Active active, State& state, Batch<double> next, int64_t randoms) {
    const Options options = state.options;
    const int64_t wanted = state.wanted;
    const int32_t* const verifying = state.verifying;
    const Batch<double> r = state.residual, rho = state.rho;
    const Batch<int64_t> pick = state.pick;
    backend.each(active, SST_LAMBDA(int64_t p) {
        for (int64_t j = 0; j < options.block; ++j) {
            int64_t worst = -1;
            for (int64_t i = 0; i < wanted; ++i) {
                bool taken = false;
                for (int64_t l = 0; l < j; ++l) taken = taken || pick(p, l, 0) == i;
                if (!taken && (worst < 0 || rho(p, i, 0) > rho(p, worst, 0))) worst = i;
            }
            pick(p, j, 0) = worst;
        }
    });
    backend.each_entry(active, state.n, options.block, SST_LAMBDA(int64_t p, int64_t i, int64_t j) {
        if (verifying[p] == 2) next(p, i, j) = r(p, i, pick(p, j, 0));
    });
    randomise(backend, active, next, verifying, options.seed, randoms);
}

/// Cycles until every problem is done. On return v holds the Ritz vectors in the standard coordinates.
template <class Backend, class S>
void krylov_cycles(Backend& backend, Active active, const DensePencil<S>& pencil, State& state, const Result& result) {
    const Options& options = state.options;
    const int64_t b = options.block, m = options.basis, keep = options.keep;
    int64_t randoms = b;
    Batch<double> start = state.v.columns(0, b);
    randomise(backend, active, start, nullptr, options.seed, 0);
    note_size(backend, active, start, state.ortho);
    orthonormalise(backend, active, Euclidean{}, state.v.columns(0, 0), state.v.columns(0, 0), start, start, options.seed, randoms,
                   state.ortho);
    for (int64_t cycle = 0, filled = 0; cycle < options.max_cycles && active.count > 0; ++cycle, filled = keep) {
        active = expand_krylov(backend, active, pencil, state, filled, randoms);
        if (active.count == 0) break;
        rayleigh_ritz(backend, active, state, m);
        const Batch<double> kept = state.s.block(0, 0, m, keep);
        rotate(backend, active, state, state.v, kept);
        rotate(backend, active, state, state.av, kept);

        const Batch<double> r = state.residual, v = state.v, av = state.av, theta = state.theta, rho = state.rho;
        backend.each_entry(active, state.n, state.wanted, SST_LAMBDA(int64_t p, int64_t i, int64_t j) {
            r(p, i, j) = av(p, i, j) - theta(p, j, 0) * v(p, i, j);
        });
        backend.dots(active, r, r, rho);
        backend.each_column(active, state.wanted, SST_LAMBDA(int64_t p, int64_t j) { rho(p, j, 0) = sqrt(rho(p, j, 0)); });
        judge(backend, active, state, m, cycle, double(m + cycle * (m - keep)) / double(m - keep), result);
        active = backend.compact(active, state.done);

        // Restart: the kept Ritz vectors, then the next block (fresh and random where copies may have been missed).
        diagonal_h(backend, active, state, keep);
        const Batch<double> kept_v = state.v.columns(0, keep), next = state.v.columns(keep, b);
        backend.copy(active, state.v.columns(m, b), next);
        redirect(backend, active, state, next, randoms);
        note_size(backend, active, next, state.ortho);
        project(backend, active, kept_v, kept_v, next, state.ortho);
        orthonormalise(backend, active, Euclidean{}, kept_v, kept_v, next, next, options.seed, randoms + b, state.ortho);
        randoms += 2 * b;
    }
}

}  // namespace sst::gevp
