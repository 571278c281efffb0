// The Backend concept (gevp/backend.hpp) on one CPU thread: loops over the problems, BLAS inside. Problems are spread over
// threads one level up (parallel.hpp), so this file stays serial and its order of operations fixed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/lapack.hpp"
#include "gevp/backend.hpp"
#include "sst/check.h"

namespace sst::cpu {

class CpuBackend {
public:
    explicit CpuBackend(int64_t batch) : batch_(batch) {}

    int64_t batch() const { return batch_; }

    void reserve(Arena& arena, const gevp::Shape& shape) {
        order_ = shape.basis;
        syev_work_ = arena.take<double>(1 + 6 * order_ + 2 * order_ * order_);
        syev_integers_ = arena.take<int>(3 + 5 * order_);
        values_ = arena.take<double>(order_);
        panel_ = arena.take<double>(shape.n * panel_columns);
        if (shape.single_factor) single_ = arena.take<float>(shape.n * shape.block);
        lists_[0] = arena.take<int64_t>(batch_);
        lists_[1] = arena.take<int64_t>(batch_);
    }

    /// Scratch for symm on fp32 storage where nothing else of reserve() is needed: rows x 64 doubles.
    void widen(double* panel) { panel_ = panel; }

    void zero(Active active, Batch<double> x) {
        each_entry(active, x.rows, x.cols, [=](int64_t p, int64_t i, int64_t j) { x(p, i, j) = 0.0; });
    }

    template <class S, class T>
    void copy(Active active, Batch<S> x, Batch<T> y) {
        each_entry(active, x.rows, x.cols, [=](int64_t p, int64_t i, int64_t j) { y(p, i, j) = static_cast<T>(x(p, i, j)); });
    }

    void gemm(Active active, Op op_x, Op op_y, double alpha, Batch<const double> x, Batch<const double> y, double beta,
              Batch<double> z) {
        char tx = letter(op_x), ty = letter(op_y);
        int m = int(z.rows), n = int(z.cols), k = int(op_x == Op::none ? x.cols : x.rows);
        int ldx = int(x.ld), ldy = int(y.ld), ldz = int(z.ld);
        if (m == 0 || n == 0) return;
        for (int64_t slot = 0; slot < active.count; ++slot) {
            const int64_t p = active[slot];
            lapack().dgemm(&tx, &ty, &m, &n, &k, &alpha, const_cast<double*>(x.at(p)), &ldx, const_cast<double*>(y.at(p)), &ldy,
                           &beta, z.at(p), &ldz);
        }
    }

    template <class S>
    void symm(Active active, Batch<const S> a, Batch<const double> x, Batch<double> y) {
        if constexpr (std::is_same_v<S, double>) {
            gemm(active, Op::none, Op::none, 1.0, a, x, 0.0, y);
        } else {
            widened_symm(active, a, x, y);
        }
    }

    void dots(Active active, Batch<const double> x, Batch<const double> y, Batch<double> out) {
        const int64_t rows = x.rows;
        each_column(active, x.cols, [=](int64_t p, int64_t j) {
            const double *u = &x(p, 0, j), *v = &y(p, 0, j);
            double partial[8] = {};
            int64_t i = 0;
            for (; i + 8 <= rows; i += 8) {
                for (int lane = 0; lane < 8; ++lane) partial[lane] += u[i + lane] * v[i + lane];
            }
            for (; i < rows; ++i) partial[0] += u[i] * v[i];
            out(p, j, 0) = ((partial[0] + partial[1]) + (partial[2] + partial[3])) +
                           ((partial[4] + partial[5]) + (partial[6] + partial[7]));
        });
    }

    template <class T>
    void potrf(Active active, Batch<T> f, int32_t* info) {
        char lower = 'L';
        int n = int(f.rows), ld = int(f.ld);
        for (int64_t slot = 0; slot < active.count; ++slot) {
            const int64_t p = active[slot];
            int failed = 0;
            if constexpr (std::is_same_v<T, double>) {
                lapack().dpotrf(&lower, &n, f.at(p), &ld, &failed);
            } else {
                lapack().spotrf(&lower, &n, f.at(p), &ld, &failed);
            }
            info[p] = failed;
        }
    }

    template <class T>
    void trsm(Active active, Op op, Batch<const T> f, Batch<double> x) {
        char left = 'L', lower = 'L', trans = letter(op), general = 'N';
        int m = int(x.rows), n = int(x.cols), ldf = int(f.ld), ldx = int(x.ld);
        for (int64_t slot = 0; slot < active.count; ++slot) {
            const int64_t p = active[slot];
            T one = 1;
            if constexpr (std::is_same_v<T, double>) {
                lapack().dtrsm(&left, &lower, &trans, &general, &m, &n, &one, const_cast<double*>(f.at(p)), &ldf, x.at(p), &ldx);
            } else {
                for (int64_t j = 0; j < n; ++j) {
                    for (int64_t i = 0; i < m; ++i) single_[j * m + i] = float(x(p, i, j));
                }
                lapack().strsm(&left, &lower, &trans, &general, &m, &n, &one, const_cast<float*>(f.at(p)), &ldf, single_, &m);
                for (int64_t j = 0; j < n; ++j) {
                    for (int64_t i = 0; i < m; ++i) x(p, i, j) = double(single_[j * m + i]);
                }
            }
        }
    }

    void syev(Active active, Batch<double> h, Batch<double> w) {
        char vectors = 'V', lower = 'L';
        int n = int(h.rows), ld = int(h.ld), info = 0;
        int work = int(1 + 6 * order_ + 2 * order_ * order_), integers = int(3 + 5 * order_);
        for (int64_t slot = 0; slot < active.count; ++slot) {
            const int64_t p = active[slot];
            lapack().dsyevd(&vectors, &lower, &n, h.at(p), &ld, values_, syev_work_, &work, syev_integers_, &integers, &info);
            for (int64_t j = 0; j < n / 2; ++j) std::swap_ranges(&h(p, 0, j), &h(p, 0, j) + n, &h(p, 0, n - 1 - j));
            for (int64_t j = 0; j < n; ++j) {
                w(p, j, 0) = info == 0 ? values_[n - 1 - j] : std::numeric_limits<double>::quiet_NaN();
            }
        }
    }

    template <class S>
    void extrema(Active active, Batch<const S> a, Batch<double> out) {
        constexpr int64_t tile = 32;
        const int64_t n = a.rows;
        for (int64_t slot = 0; slot < active.count; ++slot) {
            const int64_t p = active[slot];
            double largest = 0.0, skew = 0.0, poison = 0.0;
            for (int64_t jt = 0; jt < n; jt += tile) {
                for (int64_t it = jt; it < n; it += tile) {
                    for (int64_t j = jt; j < std::min(jt + tile, n); ++j) {
                        const S *column = &a(p, 0, j), *row = &a(p, j, 0);
                        for (int64_t i = std::max(it, j); i < std::min(it + tile, n); ++i) {
                            const double x = column[i], y = row[i * a.ld];
                            largest = std::max(largest, std::max(std::abs(x), std::abs(y)));
                            skew = std::max(skew, std::abs(x - y));
                            poison += x * 0.0 + y * 0.0;
                        }
                    }
                }
            }
            out(p, 0, 0) = largest + poison;
            out(p, 1, 0) = skew;
        }
    }

    template <class F>
    void each(Active active, F f) {
        for (int64_t slot = 0; slot < active.count; ++slot) f(active[slot]);
    }

    template <class F>
    void each_column(Active active, int64_t cols, F f) {
        for (int64_t slot = 0; slot < active.count; ++slot) {
            for (int64_t j = 0; j < cols; ++j) f(active[slot], j);
        }
    }

    template <class F>
    void each_entry(Active active, int64_t rows, int64_t cols, F f) {
        for (int64_t slot = 0; slot < active.count; ++slot) {
            const int64_t p = active[slot];
            for (int64_t j = 0; j < cols; ++j) {
                for (int64_t i = 0; i < rows; ++i) f(p, i, j);
            }
        }
    }

    Active compact(Active active, const int32_t* done) {
        int64_t* list = active.index == lists_[0] ? lists_[1] : lists_[0];
        int64_t count = 0;
        for (int64_t slot = 0; slot < active.count; ++slot) {
            if (done[active[slot]] == 0) list[count++] = active[slot];
        }
        return {list, count};
    }

    void wait() {}

private:
    static constexpr int64_t panel_columns = 64;

    static char letter(Op op) { return op == Op::none ? 'N' : 'T'; }

    /// fp32 storage: columns of A are widened a panel at a time, so that every product is a double product.
    void widened_symm(Active active, Batch<const float> a, Batch<const double> x, Batch<double> y) {
        char none = 'N';
        int n = int(a.rows), b = int(x.cols), ldx = int(x.ld), ldy = int(y.ld);
        double one = 1.0;
        for (int64_t slot = 0; slot < active.count; ++slot) {
            const int64_t p = active[slot];
            for (int64_t first = 0; first < n; first += panel_columns) {
                int width = int(std::min<int64_t>(panel_columns, n - first));
                for (int64_t j = 0; j < width; ++j) std::copy_n(&a(p, 0, first + j), n, panel_ + j * n);
                double beta = first == 0 ? 0.0 : 1.0;
                lapack().dgemm(&none, &none, &n, &b, &width, &one, panel_, &n, const_cast<double*>(&x(p, first, 0)), &ldx, &beta,
                               y.at(p), &ldy);
            }
        }
    }

    int64_t batch_;
    int64_t order_ = 0;
    double* syev_work_ = nullptr;
    int* syev_integers_ = nullptr;
    double* values_ = nullptr;
    double* panel_ = nullptr;
    float* single_ = nullptr;
    int64_t* lists_[2] = {};
};

}  // namespace sst::cpu
