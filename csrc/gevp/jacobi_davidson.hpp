// Blocked, batched Jacobi-Davidson for the largest eigenpairs of A v = lambda B v, A symmetric, B positive definite.
//
//   1. screen     refuse non-finite and asymmetric input, scale by powers of two                        screen.hpp
//   2. factor     K = Cholesky of B (fp64, or fp32 plus a shift), diagonal, none, or the pencil's own    jacobi_davidson.hpp
//   3. start      random block keyed by (seed, column, row), B-orthonormalised                          orthonormalise.hpp
//   4. expand     K = B: the block Krylov space of B^-1 A up to the full basis                           krylov.hpp
//                 else:  per step, corrections of the worst wanted Ritz pairs                            davidson.hpp, correction.hpp
//   5. extract    Rayleigh-Ritz: once per cycle for K = B, else once per step                            rayleigh_ritz.hpp
//   6. judge      sqrt(r' B^-1 r) <= tol |theta_1|; where copies may hide, one more cycle; too slow: out  convergence.hpp
//   7. restart    thick: `keep` Ritz vectors (+k previous ones), next block; finished problems drop out  krylov.hpp, davidson.hpp
//   8. finish     back to the caller's scale and coordinates, sign, zero values flagged                  jacobi_davidson.hpp
//
// One cycle is 4 to 7. Inside a cycle nothing waits for the host. Shapes are the same for all problems; a direction that a
// problem lacks (exhausted space, A = 0) is filled with a random one, so that no problem's arithmetic depends on another's.
#pragma once

#include <array>

#include "gevp/davidson.hpp"
#include "gevp/krylov.hpp"
#include "gevp/screen.hpp"

namespace sst::gevp {

inline Shape shape_of(const Options& options, int64_t batch, int64_t n) {
    const bool factored = options.preconditioner == Preconditioner::cholesky;
    const bool single = options.preconditioner == Preconditioner::cholesky_single;
    return {batch, n, options.basis, std::max({options.k, options.block}), single, factored || single};
}

struct Screening {
    Batch<double> seen_a, seen_b;  ///< 2 x 1, see Backend::extrema
    double *scale_a, *scale_b;     ///< [batch]
    int32_t* info;                 ///< [batch]
};

/// 1. Bad problems get their status and leave the active list.
template <class Backend, class S>
Active screen_pencil(Backend& backend, Active active, const DensePencil<S>& pencil, const Screening& screening, int32_t* bad,
                     const Result& result, int64_t k) {
    const Range range("screen");
    backend.extrema(active, pencil.a, screening.seen_a);
    backend.extrema(active, pencil.b, screening.seen_b);
    const Screening seen = screening;
    int32_t *const codes = result.status, *const cycles = result.cycles;
    poison(backend, active, result, k, Status::max_iterations);
    backend.each(active, SST_LAMBDA(int64_t p) {
        const Screen verdict = screen(seen.seen_a(p, 0, 0), seen.seen_a(p, 1, 0), seen.seen_b(p, 0, 0), seen.seen_b(p, 1, 0));
        seen.scale_a[p] = verdict.scale_a;
        seen.scale_b[p] = verdict.scale_b;
        cycles[p] = 0;
        bad[p] = verdict.status != Status::converged;
        if (bad[p]) codes[p] = code(verdict.status);
    });
    return backend.compact(active, bad);
}

/// 2. L overwrites a copy of scale_b B. The fp32 factor takes a shift that keeps it positive definite: K need only be near B.
template <class Backend, class S, class T>
Active factorise(Backend& backend, Active active, const DensePencil<S>& pencil, Batch<T> factor, const Screening& screening,
                 int32_t* bad, const Result& result) {
    const Range range("factor");
    const Batch<const S> b = pencil.b;
    const double* const scale = screening.scale_b;
    const double shift = sizeof(T) == sizeof(float) ? 8 * sqrt(double(b.rows)) * std::numeric_limits<float>::epsilon() : 0.0;
    backend.each_entry(active, b.rows, b.cols, SST_LAMBDA(int64_t p, int64_t i, int64_t j) {
        factor(p, i, j) = T(scale[p] * double(b(p, i, j)) + (i == j ? shift : 0.0));
    });
    backend.potrf(active, factor, screening.info);
    int32_t *const codes = result.status, *const info = screening.info;
    backend.each(active, SST_LAMBDA(int64_t p) {
        bad[p] = info[p] != 0;
        if (bad[p]) codes[p] = code(Status::not_positive_definite);
    });
    return backend.compact(active, bad);
}

/// Flags and sums that the stages find set to zero.
template <class Backend>
void prepare(Backend& backend, Active active, const State& state) {
    const State own = state;
    backend.each(active, SST_LAMBDA(int64_t p) {
        own.bad[p] = own.done[p] = own.verifying[p] = own.ortho.indefinite[p] = 0;
        own.trace(p, 0, 0) = 0.0;
        own.pace(p, 0, 0) = -own.options.k * log2(own.options.tolerance);
        own.pace(p, 1, 0) = 0.0;
    });
}

/// 8. Ritz vectors `x` (standard coordinates already left behind), theta and rho of every problem that has them.
template <class Backend>
void finish(Backend& backend, const State& state, Batch<const double> x, const double* scale_a, const double* scale_b,
            const Result& result) {
    const Range range("finish");
    const Active everything{nullptr, backend.batch()};
    const int64_t k = state.options.k, n = state.n;
    const Batch<double> theta = state.theta, rho = state.rho;
    const int32_t* const bad = state.bad;
    backend.each_entry(everything, n, k, SST_LAMBDA(int64_t p, int64_t i, int64_t j) {
        if (!bad[p]) result.vectors(p, i, j) = x(p, i, j);
    });
    backend.each_column(everything, k, SST_LAMBDA(int64_t p, int64_t j) {
        if (bad[p]) return;
        const double sa = scale_a ? scale_a[p] : 1.0, sb = scale_b ? scale_b[p] : 1.0;
        result.values(p, j, 0) = theta(p, j, 0);
        result.bounds(p, j, 0) = rho(p, j, 0);
        finish_column(result, p, j, n, theta(p, 0, 0), theta(p, k - 1, 0), sb / sa, sqrt(sb));
    });
    backend.each(everything, SST_LAMBDA(int64_t p) { settle(result, p, k); });
    backend.each_entry(everything, n, k, SST_LAMBDA(int64_t p, int64_t i, int64_t j) {
        const int32_t status = result.status[p];
        if (status == code(Status::not_positive_definite) || status == code(Status::non_finite)) {
            result.vectors(p, i, j) = result.values(p, j, 0) = result.bounds(p, j, 0) = std::numeric_limits<double>::quiet_NaN();
        }
    });
}

/// Steps 3 to 8 in the original coordinates, for a pencil that is ready.
template <class Backend, class Pencil>
void solve_davidson(Backend& backend, Active active, const Pencil& pencil, State& state, const CorrectionScratch& scratch,
                    Batch<double> previous, const Result& result) {
    const bool exact = state.options.preconditioner == Preconditioner::exact;
    davidson_cycles(backend, active, pencil, state, scratch, previous, exact, result);
    finish(backend, state, scratch.x.columns(0, state.options.k), pencil.scale_a, pencil.scale_b, result);
}

/// What the shapes rest on, term by term so that no sum of what a caller wrote can overflow.
inline void check_options(const Options& options, int64_t n) {
    const auto [k, block, basis, keep, previous] = std::array{options.k, options.block, options.basis, options.keep, options.previous};
    SST_CHECK(1 <= n && n < 32768, "an order of 1 to 32767 is expected");
    SST_CHECK(1 <= block && block <= n && basis <= n - block, "the order leaves no room for this basis; use the direct route");
    SST_CHECK(1 <= k && k <= keep && keep <= n, "at least one pair is wanted, and keep holds all of them");
    SST_CHECK(0 <= previous && previous <= n && keep + previous + block <= basis, "the basis must hold keep + previous + block columns");
    SST_CHECK(keep % block == 0 && basis % block == 0, "keep and basis must be multiples of block");
    SST_CHECK(options.max_cycles >= 1 && options.inner_steps >= 0, "at least one cycle and no negative number of steps are expected");
    SST_CHECK(options.preconditioner >= Preconditioner::cholesky && options.preconditioner <= Preconditioner::exact,
              "no such preconditioner");
}

/// The whole solve of stored matrices. With a counting arena nothing is computed: arena.used() is the answer. Returns the pencil with its
/// factor and scales, for those that leave.
template <class Backend, class S>
DensePencil<S> solve_dense(Backend& backend, Arena& arena, Batch<const S> a, Batch<const S> b, const Options& options, const Result& result) {
    const int64_t batch = backend.batch(), n = a.rows;
    const bool standard = options.preconditioner == Preconditioner::cholesky;
    check_options(options, n);
    SST_CHECK(options.preconditioner != Preconditioner::exact, "stored matrices have no inverse of their own");
    backend.reserve(arena, shape_of(options, batch, n));
    State state = State::carve(arena, options, batch, n, standard);
    DensePencil<S> pencil{a, b, {}, {}, arena.take<double>(batch), arena.take<double>(batch), options.preconditioner};
    const Screening screening{arena.matrices<double>(batch, 2, 1), arena.matrices<double>(batch, 2, 1), pencil.scale_a, pencil.scale_b,
                              arena.take<int32_t>(batch)};
    if (standard) pencil.factor = arena.matrices<double>(batch, n, n);
    if (options.preconditioner == Preconditioner::cholesky_single) pencil.single = arena.matrices<float>(batch, n, n);
    CorrectionScratch scratch;
    Batch<double> previous;
    if (!standard) {
        scratch = CorrectionScratch::carve(arena, batch, n, state.wanted);
        previous = arena.matrices<double>(batch, options.basis, options.previous);
    }
    if (arena.counting()) return pencil;

    const Active everything{nullptr, batch};
    prepare(backend, everything, state);
    Active active = screen_pencil(backend, everything, pencil, screening, state.bad, result, options.k);
    if (!standard) {
        if (pencil.single.data) active = factorise(backend, active, pencil, pencil.single, screening, state.bad, result);
        solve_davidson(backend, active, pencil, state, scratch, previous, result);
        return pencil;
    }
    active = factorise(backend, active, pencil, pencil.factor, screening, state.bad, result);
    krylov_cycles(backend, active, pencil, state, result);
    const Batch<double> x = state.v.columns(0, options.k);
    backend.trsm(everything, Op::transpose, Batch<const double>(pencil.factor), x);
    finish(backend, state, x, pencil.scale_a, pencil.scale_b, result);
    return pencil;
}

/// One problem known by its products only (see OperatorPencil).
template <class Backend, class Apply>
void solve_operator(Backend& backend, Arena& arena, int64_t n, const Apply& apply, const Options& options, const Result& result) {
    check_options(options, n);
    SST_CHECK(options.preconditioner >= Preconditioner::diagonal, "operators are not factored");
    backend.reserve(arena, shape_of(options, 1, n));
    State state = State::carve(arena, options, 1, n, false);
    const CorrectionScratch scratch = CorrectionScratch::carve(arena, 1, n, state.wanted);
    const Batch<double> previous = arena.matrices<double>(1, options.basis, options.previous);
    if (arena.counting()) return;
    const Active active{nullptr, 1};
    poison(backend, active, result, options.k, Status::max_iterations);
    prepare(backend, active, state);
    solve_davidson(backend, active, OperatorPencil<Apply>{n, apply, options.preconditioner}, state, scratch, previous, result);
}

}  // namespace sst::gevp
