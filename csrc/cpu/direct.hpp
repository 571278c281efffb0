// The direct route for one problem: screen, scale, Cholesky, reduction to standard and to tridiagonal form, eigenpairs of that,
// and the way back.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/cpu_backend.hpp"
#include "cpu/tridiagonal.hpp"
#include "gevp/screen.hpp"

namespace sst::cpu {

/// Scratch of one worker, reused over its problems.
struct DirectWorkspace {
    std::vector<double> c, factor, tau, work;
    Tridiagonal tridiagonal;
};

/// Top-k pairs of `a` v = lambda `b` v (n x n, storage S) into slice `p` of `result`, from the lower Cholesky factor [n, n] of scale_b
/// `b`. Returns nothing: the status says it.
template <class S>
void solve_factored(Batch<const S> a, Batch<const S> b, const double* factor, double scale_a, double scale_b, int64_t k, int64_t p,
                    const Result& result, DirectWorkspace& ws) {
    int n = int(a.rows);
    const Active one{&p, 1};
    CpuBackend backend(1);
    auto fail = [&](Status status) { gevp::poison(backend, one, result, k, status); };
    double* const l = const_cast<double*>(factor);  // LAPACK's prototypes do not say what is only read

    Tridiagonal& t = ws.tridiagonal;
    ws.c.resize(int64_t(n) * n), ws.tau.resize(n), t.resize(n);
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < n; ++i) ws.c[j * n + i] = double(a(p, i, j)) * scale_a;
    }
    char lower = 'L', left = 'L', trans = 'T', plain = 'N';
    int info = 0, type = 1, count = int(k);
    int size = 64 * std::max(n, count + 65);  // what LAPACK's block size of 32 to 64 asks for, in dormtr with its triangular factors
    double unit = 1;
    lapack().dsygst(&type, &lower, &n, ws.c.data(), &n, l, &n, &info);
    ws.work.resize(std::max<int64_t>(size, 2 * k * n + n * 64));
    lapack().dsytrd(&lower, &n, ws.c.data(), &n, t.d.data(), t.e.data(), ws.tau.data(), ws.work.data(), &size, &info);
    double* const z = largest_pairs(n, count, t);
    if (z == nullptr) return fail(Status::max_iterations);
    lapack().dormtr(&left, &lower, &plain, &n, &count, ws.c.data(), &n, ws.tau.data(), z, &n, ws.work.data(), &size, &info);
    lapack().dtrsm(&left, &lower, &trans, &plain, &n, &count, &unit, l, &n, z, &n);
    const double unscale_value = scale_b / scale_a, unscale_vector = std::sqrt(scale_b);
    for (int64_t j = 0; j < k; ++j) {
        result.values(p, j, 0) = t.values[k - 1 - j];
        std::copy_n(z + (k - 1 - j) * n, n, &result.vectors(p, 0, j));
    }

    // The bound: r = A v - theta B v in the B^-1 norm, from the stored A and B, not from the reduced matrix.
    Batch<double> r{ws.work.data(), n, k, n, 0};
    Batch<double> bv{ws.work.data() + k * n, n, k, n, 0};
    backend.widen(ws.work.data() + 2 * k * n);
    backend.symm(one, a, Batch<const double>(result.vectors), r);
    backend.symm(one, b, Batch<const double>(result.vectors), bv);
    const Batch<double> theta = result.values, bounds = result.bounds;
    backend.each_entry(one, n, k, [=](int64_t q, int64_t i, int64_t j) {
        r(q, i, j) = scale_a * r(q, i, j) - theta(q, j, 0) * scale_b * bv(q, i, j);
    });
    backend.trsm(one, Op::none, Batch<const double>{factor, n, n, n, 0}, r);
    backend.dots(one, r, r, bounds);
    backend.each_column(one, k, [=](int64_t q, int64_t j) { bounds(q, j, 0) = std::sqrt(bounds(q, j, 0)); });
    result.status[p] = code(Status::converged);
    const double top = t.values[k - 1], bottom = t.values[0];
    for (int64_t j = 0; j < k; ++j) gevp::finish_column(result, p, j, n, top, bottom, unscale_value, unscale_vector);
    gevp::settle(result, p, k);
    if (result.status[p] == code(Status::non_finite)) fail(Status::non_finite);
}

/// The same from the matrices alone.
template <class S>
void solve_direct(Batch<const S> a, Batch<const S> b, int64_t k, int64_t p, const Result& result, DirectWorkspace& ws) {
    int n = int(a.rows), info = 0;
    const Active one{&p, 1};
    CpuBackend backend(1);
    result.cycles[p] = 0;

    double seen_a[2], seen_b[2];
    backend.extrema(one, a, {seen_a, 2, 1, 2, 0});
    backend.extrema(one, b, {seen_b, 2, 1, 2, 0});
    const gevp::Screen screen = gevp::screen(seen_a[0], seen_a[1], seen_b[0], seen_b[1]);
    if (screen.status != Status::converged) return gevp::poison(backend, one, result, k, screen.status);

    ws.factor.resize(int64_t(n) * n);
    for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < n; ++i) ws.factor[j * n + i] = double(b(p, i, j)) * screen.scale_b;
    }
    char lower = 'L';
    lapack().dpotrf(&lower, &n, ws.factor.data(), &n, &info);
    if (info != 0) return gevp::poison(backend, one, result, k, Status::not_positive_definite);
    solve_factored(a, b, ws.factor.data(), screen.scale_a, screen.scale_b, k, p, result, ws);
}

}  // namespace sst::cpu
