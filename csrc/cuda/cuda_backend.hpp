// The Backend concept (gevp/backend.hpp) on one CUDA stream. Products, factorisation and the projected eigenproblem up to
// order 96 are own kernels whose summation order depends on one problem's shape alone: library kernels are chosen by the
// batch count, and a problem would not get the same bits alone and in company.
#pragma once

#include <limits>

#include "cuda/each.cuh"
#include "cuda/handles.hpp"
#include "cuda/kernels.hpp"
#include "cuda/solver.hpp"
#include "gevp/backend.hpp"

namespace sst::cuda {

class CudaBackend {
public:
    CudaBackend(std::int64_t batch, cudaStream_t stream) : batch_(batch), stream_(stream), lease_(stream), jacobi_(jacobi_limit()) { prepare_kernels(); }

    std::int64_t batch() const { return batch_; }
    cudaStream_t stream() const { return stream_; }
    Handles& handles() const { return *lease_; }

    void reserve(Arena& arena, const gevp::Shape& shape) {
        if (shape.factor) {
            if (shape.single_factor)
                strip_single_ = arena.matrices<float>(batch_, kTile, shape.n);
            else
                strip_ = arena.matrices<double>(batch_, kTile, shape.n);
            solved_ = arena.matrices<double>(batch_, shape.n, shape.block);
        }
        if (shape.basis > jacobi_) {
            packed_ = arena.matrices<double>(batch_, shape.basis, shape.basis);
            values_ = arena.matrices<double>(batch_, shape.basis, 1);
            eigensolver_ = BatchedEigensolver(arena, *lease_, shape.basis, batch_);
        }
        for (auto& list : lists_) list = arena.take<std::int64_t>(batch_);
        count_ = arena.take<std::int64_t>(1);
    }

    void zero(Active active, Batch<double> x) {
        each_entry(active, x.rows, x.cols, [=] __device__(std::int64_t p, std::int64_t i, std::int64_t j) { x(p, i, j) = 0.0; });
    }

    template <class S, class T>
    void copy(Active active, Batch<S> x, Batch<T> y) {
        each_entry(active, x.rows, x.cols,
                   [=] __device__(std::int64_t p, std::int64_t i, std::int64_t j) { y(p, i, j) = static_cast<T>(x(p, i, j)); });
    }

    void gemm(Active active, Op op_x, Op op_y, double alpha, Batch<const double> x, Batch<const double> y, double beta,
              Batch<double> z) {
        cuda::gemm<double, double, double>(stream_, active, op_x, op_y, alpha, x, y, beta, z);
    }

    template <class S>
    void symm(Active active, Batch<const S> a, Batch<const double> x, Batch<double> y) {
        cuda::gemm<S, double, double>(stream_, active, Op::none, Op::none, 1.0, a, x, 0.0, y);
    }

    void dots(Active active, Batch<const double> x, Batch<const double> y, Batch<double> d) {
        cuda::dots(stream_, active, x, y, d);
    }

    /// Leaves L^-1 instead of L below the diagonal (see invert_cholesky): only trsm() reads a factor.
    template <class T>
    void potrf(Active active, Batch<T> f, std::int32_t* info) {
        each(active, [=] __device__(std::int64_t p) { info[p] = 0; });
        if constexpr (std::is_same_v<T, double>)
            invert_cholesky<double>(stream_, active, f, strip_, info);
        else
            invert_cholesky<float>(stream_, active, f, strip_single_, info);
    }

    /// X = op(L)^-1 X by the inverse that potrf() left. Sums are in double for a float factor too.
    template <class T>
    void trsm(Active active, Op op, Batch<const T> f, Batch<double> x) {
        const Batch<double> source = solved_.columns(0, x.cols);
        copy(active, x, source);
        cuda::gemm<T, double, double>(stream_, active, op, Op::none, 1.0, f, source, 0.0, x,
                                      op == Op::none ? Span::until_row : Span::from_row);
    }

    void syev(Active active, Batch<double> h, Batch<double> w) {
        if (h.rows <= jacobi_)
            jacobi_eigh(stream_, active, h, w);
        else
            syev_by_library(active, h, w);
    }

    template <class S>
    void extrema(Active active, Batch<const S> a, Batch<double> out) {
        cuda::extrema<S>(stream_, active, a, out);
    }

    template <class F>
    void each(Active active, F f) {
        cuda::each(stream_, active, f);
    }

    template <class F>
    void each_column(Active active, std::int64_t cols, F f) {
        cuda::each_entry(stream_, active, cols, 1, [=] __device__(std::int64_t p, std::int64_t col, std::int64_t) { f(p, col); });
    }

    template <class F>
    void each_entry(Active active, std::int64_t rows, std::int64_t cols, F f) {
        cuda::each_entry(stream_, active, rows, cols, f);
    }

    Active compact(Active active, const std::int32_t* done) {
        std::int64_t* const list = active.index == lists_[0] ? lists_[1] : lists_[0];
        cuda::compact(stream_, active, done, list, count_);
        SST_TRY(cudaMemcpyAsync(lease_->pinned, count_, sizeof(std::int64_t), cudaMemcpyDeviceToHost, stream_));
        wait();
        return {list, *lease_->pinned};
    }

    void wait() { SST_TRY(cudaStreamSynchronize(stream_)); }

    /// cuSOLVER wants packed matrices in slot order and answers ascending; a failed one gets NaN values. Public for nvcc, which
    /// takes no device lambda from a private function.
    void syev_by_library(Active active, Batch<double> h, Batch<double> w) {
        const std::int64_t n = h.rows;
        const Batch<double> packed{packed_.data, n, n, n, n * n};
        double* const values = values_.data;
        const std::int64_t* const index = active.index;
        const Active slots{nullptr, active.count};
        each_entry(slots, n, n, [=] __device__(std::int64_t s, std::int64_t i, std::int64_t j) {
            packed(s, i, j) = h(index ? index[s] : s, i, j);
        });
        eigensolver_(packed.data, values, n, active.count);
        const std::int32_t* const info = eigensolver_.info();
        each_entry(slots, n, n, [=] __device__(std::int64_t s, std::int64_t i, std::int64_t j) {
            const std::int64_t p = index ? index[s] : s;
            h(p, i, j) = packed(s, i, n - 1 - j);
            if (i == 0) w(p, j, 0) = info[s] == 0 ? values[s * n + n - 1 - j] : std::numeric_limits<double>::quiet_NaN();
        });
    }

private:
    std::int64_t batch_;
    cudaStream_t stream_;
    Lease lease_;
    int jacobi_;
    Batch<float> strip_single_;
    Batch<double> strip_, solved_, packed_, values_;
    BatchedEigensolver eigensolver_;
    std::int64_t* lists_[2] = {};
    std::int64_t* count_ = nullptr;
};

}  // namespace sst::cuda
