// The direct route on a batch: screen, scale, Cholesky, reduction to standard form, eigensolver, back substitution, bound.
// The GPU twin of cpu/direct.hpp; three n x n matrices a problem, and cuSOLVER's scratch beyond order 64.
#pragma once

#include "cuda/cuda_backend.hpp"
#include "gevp/screen.hpp"
#include "sst/nvtx.h"

namespace sst::cuda {

template <class S>
class DirectSolve {
public:
    DirectSolve(Arena& arena, CudaBackend& backend, std::int64_t n, std::int64_t k)
        : backend_(backend), all_{nullptr, backend.batch()}, n_(n), k_(k) {
        const std::int64_t batch = backend.batch();
        gevp::Shape shape;
        shape.batch = batch, shape.n = n, shape.basis = 1, shape.block = k;
        backend.reserve(arena, shape);
        reduced_ = arena.matrices<double>(batch, n, n);
        factor_ = arena.matrices<double>(batch, n, n);
        half_ = arena.matrices<double>(batch, n, n);
        theta_ = arena.matrices<double>(batch, n, 1);
        residual_ = arena.matrices<double>(batch, n, k);
        image_ = arena.matrices<double>(batch, n, k);
        seen_a_ = arena.matrices<double>(batch, 2, 1);
        seen_b_ = arena.matrices<double>(batch, 2, 1);
        scales_ = arena.matrices<double>(batch, 2, 1);
        info_ = arena.take<std::int32_t>(batch);
        if (n > kTile) eigensolver_ = BatchedEigensolver(arena, backend.handles(), n, batch);
    }

    void run(Batch<const S> a, Batch<const S> b, const Result& result) {
        screen(a, b, result);
        reduce(result);
        eigenpairs(result);
        bound(a, b, result);
        finish(result);
    }

    // The stages are public because nvcc takes no device lambda from a private function.

    void screen(Batch<const S> a, Batch<const S> b, const Result& result) {
        const Range range("screen");
        backend_.extrema(all_, a, seen_a_);
        backend_.extrema(all_, b, seen_b_);
        const Batch<double> seen_a = seen_a_, seen_b = seen_b_, scales = scales_, reduced = reduced_, factor = factor_;
        std::int32_t *const status = result.status, *const cycles = result.cycles;
        backend_.each(all_, [=] __device__(std::int64_t p) {
            const gevp::Screen seen = gevp::screen(seen_a(p, 0, 0), seen_a(p, 1, 0), seen_b(p, 0, 0), seen_b(p, 1, 0));
            status[p] = code(seen.status);
            cycles[p] = 0;
            scales(p, 0, 0) = seen.scale_a;
            scales(p, 1, 0) = seen.scale_b;
        });
        // A refused problem is solved as the pencil (I, I): its neighbours share launches with it, never numbers.
        backend_.each_entry(all_, n_, n_, [=] __device__(std::int64_t p, std::int64_t i, std::int64_t j) {
            const bool refused = status[p] != code(Status::converged);
            const double identity = i == j ? 1.0 : 0.0;
            reduced(p, i, j) = refused ? identity : static_cast<double>(a(p, i, j)) * scales(p, 0, 0);
            factor(p, i, j) = refused ? identity : static_cast<double>(b(p, i, j)) * scales(p, 1, 0);
        });
    }

    /// C = L^-1 A L^-T, both factors triangular.
    void reduce(const Result& result) {
        const Range range("reduce");
        backend_.potrf(all_, factor_, info_);
        gemm<double, double, double>(backend_.stream(), all_, Op::none, Op::none, 1.0, factor_, reduced_, 0.0, half_,
                                     Span::until_row);
        gemm<double, double, double>(backend_.stream(), all_, Op::none, Op::transpose, 1.0, half_, factor_, 0.0, reduced_,
                                     Span::until_column);
        const Batch<double> reduced = reduced_;
        std::int32_t *const status = result.status, *const info = info_;
        backend_.each_entry(all_, n_, n_, [=] __device__(std::int64_t p, std::int64_t i, std::int64_t j) {
            if (info[p] != 0) reduced(p, i, j) = i == j ? 1.0 : 0.0;
        });
        backend_.each(all_, [=] __device__(std::int64_t p) {
            if (info[p] != 0 && status[p] == code(Status::converged)) status[p] = code(Status::not_positive_definite);
        });
    }

    void eigenpairs(const Result& result) {
        const Range range("eigenpairs");
        const bool ascending = n_ > kTile;
        if (ascending)
            eigensolver_(reduced_.data, theta_.data, n_, all_.count);
        else
            backend_.syev(all_, reduced_, theta_);
        const Batch<double> reduced = reduced_, theta = theta_, values = result.values, vectors = result.vectors;
        const std::int64_t n = n_;
        const std::int32_t* const info = ascending ? eigensolver_.info() : nullptr;
        std::int32_t* const status = result.status;
        backend_.each_entry(all_, n_, k_, [=] __device__(std::int64_t p, std::int64_t i, std::int64_t j) {
            const std::int64_t source = ascending ? n - 1 - j : j;
            vectors(p, i, j) = reduced(p, i, source);
            if (i == 0) values(p, j, 0) = theta(p, source, 0);
        });
        backend_.each(all_, [=] __device__(std::int64_t p) {
            const bool failed = info ? info[p] != 0 : isnan(theta(p, 0, 0));
            if (failed && status[p] == code(Status::converged)) status[p] = code(Status::max_iterations);
        });
        backend_.trsm(all_, Op::transpose, Batch<const double>(factor_), vectors);
    }

    /// r = A v - theta B v in the B^-1 norm, from the stored A and B rather than from the reduced matrix.
    void bound(Batch<const S> a, Batch<const S> b, const Result& result) {
        const Range range("bound");
        backend_.symm(all_, a, Batch<const double>(result.vectors), residual_);
        backend_.symm(all_, b, Batch<const double>(result.vectors), image_);
        const Batch<double> residual = residual_, image = image_, scales = scales_, values = result.values,
                            bounds = result.bounds;
        backend_.each_entry(all_, n_, k_, [=] __device__(std::int64_t p, std::int64_t i, std::int64_t j) {
            residual(p, i, j) = scales(p, 0, 0) * residual(p, i, j) - values(p, j, 0) * scales(p, 1, 0) * image(p, i, j);
        });
        backend_.trsm(all_, Op::none, Batch<const double>(factor_), residual_);
        backend_.dots(all_, residual_, residual_, bounds);
    }

    /// Into the caller's units (gevp::finish_column); a problem without an answer gets NaN everywhere.
    void finish(const Result& result) {
        const Range range("finish");
        const Batch<double> values = result.values, vectors = result.vectors, bounds = result.bounds, scales = scales_,
                            theta = theta_;
        const Result out = result;
        std::int32_t* const status = result.status;
        const std::int64_t n = n_, k = k_, top = n_ > kTile ? n_ - 1 : 0, step = n_ > kTile ? -1 : 1;
        backend_.each_column(all_, k_, [=] __device__(std::int64_t p, std::int64_t j) {
            bounds(p, j, 0) = sqrt(bounds(p, j, 0));
            gevp::finish_column(out, p, j, n, theta(p, top, 0), theta(p, top + step * (k - 1), 0),
                                scales(p, 1, 0) / scales(p, 0, 0), sqrt(scales(p, 1, 0)));
        });
        backend_.each(all_, [=] __device__(std::int64_t p) { gevp::settle(out, p, k); });
        backend_.each_entry(all_, n_, k_, [=] __device__(std::int64_t p, std::int64_t i, std::int64_t j) {
            if (status[p] == code(Status::converged) || status[p] == code(Status::rank_deficient)) return;
            vectors(p, i, j) = values(p, j, 0) = bounds(p, j, 0) = std::numeric_limits<double>::quiet_NaN();
        });
    }

private:
    CudaBackend& backend_;
    Active all_;
    std::int64_t n_, k_;
    Batch<double> reduced_, factor_, half_, theta_, residual_, image_, seen_a_, seen_b_, scales_;
    std::int32_t* info_ = nullptr;
    BatchedEigensolver eigensolver_;
};

}  // namespace sst::cuda
