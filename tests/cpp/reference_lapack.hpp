// The few BLAS and LAPACK routines of the CPU backend, written plainly: the sanitizers see every access, nothing is linked.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/lapack.hpp"

namespace reference {

inline void dgemm(char* ta, char* tb, int* m, int* n, int* k, double* alpha, double* a, int* lda, double* b, int* ldb, double* beta,
                  double* c, int* ldc) {
    for (int j = 0; j < *n; ++j) {
        for (int i = 0; i < *m; ++i) {
            double sum = 0.0;
            for (int l = 0; l < *k; ++l) {
                sum += (*ta == 'N' ? a[l * *lda + i] : a[i * *lda + l]) * (*tb == 'N' ? b[j * *ldb + l] : b[l * *ldb + j]);
            }
            c[j * *ldc + i] = *alpha * sum + (*beta == 0.0 ? 0.0 : *beta * c[j * *ldc + i]);
        }
    }
}

template <class T>
void trsm(char*, char*, char* trans, char*, int* m, int* n, T*, T* l, int* ldl, T* x, int* ldx) {
    for (int j = 0; j < *n; ++j) {
        T* column = x + j * *ldx;
        for (int step = 0; step < *m; ++step) {
            const int i = *trans == 'N' ? step : *m - 1 - step;
            T sum = column[i];
            for (int o = 0; o < step; ++o) {
                const int other = *trans == 'N' ? o : *m - 1 - o;
                sum -= (*trans == 'N' ? l[other * *ldl + i] : l[i * *ldl + other]) * column[other];
            }
            column[i] = sum / l[i * *ldl + i];
        }
    }
}

template <class T>
void potrf(char*, int* n, T* a, int* lda, int* info) {
    *info = 0;
    for (int j = 0; j < *n; ++j) {
        T pivot = a[j * *lda + j];
        for (int l = 0; l < j; ++l) pivot -= a[l * *lda + j] * a[l * *lda + j];
        if (!(pivot > 0)) {
            *info = j + 1;
            return;
        }
        a[j * *lda + j] = std::sqrt(pivot);
        for (int i = j + 1; i < *n; ++i) {
            T sum = a[j * *lda + i];
            for (int l = 0; l < j; ++l) sum -= a[l * *lda + i] * a[l * *lda + j];
            a[j * *lda + i] = sum / a[j * *lda + j];
        }
    }
}

/// Cyclic Jacobi; ascending, as LAPACK returns them.
inline void dsyevd(char*, char*, int* order, double* h, int* ld, double* w, double*, int*, int*, int*, int* info) {
    const int n = *order;
    std::vector<double> a(n * n), v(n * n, 0.0);
    for (int j = 0; j < n; ++j) {
        v[j * n + j] = 1.0;
        for (int i = 0; i < n; ++i) a[j * n + i] = i >= j ? h[j * *ld + i] : h[i * *ld + j];
    }
    for (int sweep = 0; sweep < 30; ++sweep) {
        for (int p = 0; p < n; ++p) {
            for (int q = p + 1; q < n; ++q) {
                if (a[q * n + p] == 0.0) continue;
                const double tau = (a[q * n + q] - a[p * n + p]) / (2 * a[q * n + p]);
                const double t = std::abs(tau) > 1e150 ? 0.5 / tau : (tau >= 0 ? 1 : -1) / (std::abs(tau) + std::sqrt(1 + tau * tau));
                const double c = 1 / std::sqrt(1 + t * t), s = t * c;
                auto turn = [c, s](double& x, double& y) {
                    const double old = x;
                    x = c * old - s * y;
                    y = s * old + c * y;
                };
                for (int i = 0; i < n; ++i) turn(a[p * n + i], a[q * n + i]);
                for (int i = 0; i < n; ++i) turn(a[i * n + p], a[i * n + q]);
                for (int i = 0; i < n; ++i) turn(v[p * n + i], v[q * n + i]);
            }
        }
    }
    std::vector<int> rank(n);
    for (int i = 0; i < n; ++i) rank[i] = i;
    std::sort(rank.begin(), rank.end(), [&](int x, int y) { return a[x * n + x] < a[y * n + y]; });
    for (int j = 0; j < n; ++j) {
        w[j] = a[rank[j] * n + rank[j]];
        std::copy_n(&v[rank[j] * n], n, h + j * *ld);
    }
    *info = 0;
}

/// A becomes L^-1 A L^-T; its lower triangle is read, all of it written.
inline void dsygst(int*, char*, int* order, double* a, int* lda, double* l, int* ldl, int* info) {
    int n = *order;
    char none = 'N';
    double one = 1.0;
    auto mirror = [&](bool lower) {
        for (int j = 0; j < n; ++j) {
            for (int i = j + 1; i < n; ++i) (lower ? a[i * *lda + j] : a[j * *lda + i]) = lower ? a[j * *lda + i] : a[i * *lda + j];
        }
    };
    auto transpose = [&] {
        for (int j = 0; j < n; ++j) {
            for (int i = j + 1; i < n; ++i) std::swap(a[j * *lda + i], a[i * *lda + j]);
        }
    };
    mirror(true);
    for (int side = 0; side < 2; ++side) {
        trsm<double>(&none, &none, &none, &none, &n, &n, &one, l, ldl, a, lda);
        transpose();
    }
    *info = 0;
}

/// Householder reduction of the lower triangle; reflector i is 1 at row i + 1 and lies below it in column i, as in LAPACK.
inline void dsytrd(char*, int* order, double* a, int* ld, double* d, double* e, double* tau, double*, int*, int* info) {
    const int n = *order;
    std::vector<double> w(n);
    auto at = [&](int i, int j) -> double& { return i >= j ? a[j * *ld + i] : a[i * *ld + j]; };
    for (int i = 0; i < n; ++i) {
        d[i] = at(i, i);
        if (i + 1 == n) break;
        double* const v = &a[i * *ld];
        double rest = 0.0;
        for (int r = i + 2; r < n; ++r) rest += v[r] * v[r];
        const double alpha = v[i + 1], beta = rest == 0.0 ? alpha : -std::copysign(std::sqrt(alpha * alpha + rest), alpha);
        tau[i] = rest == 0.0 ? 0.0 : (beta - alpha) / beta;
        for (int r = i + 2; r < n; ++r) v[r] = rest == 0.0 ? 0.0 : v[r] / (alpha - beta);
        e[i] = beta;
        v[i + 1] = 1.0;
        double overlap = 0.0;
        for (int r = i + 1; r < n; ++r) {
            w[r] = 0.0;
            for (int c = i + 1; c < n; ++c) w[r] += tau[i] * at(r, c) * v[c];
            overlap += w[r] * v[r];
        }
        for (int r = i + 1; r < n; ++r) w[r] -= 0.5 * tau[i] * overlap * v[r];
        for (int c = i + 1; c < n; ++c) {
            for (int r = c; r < n; ++r) a[c * *ld + r] -= v[r] * w[c] + w[r] * v[c];
        }
    }
    *info = 0;
}

/// C = Q C with the reflectors of dsytrd.
inline void dormtr(char*, char*, char*, int* rows, int* cols, double* a, int* lda, double* tau, double* c, int* ldc, double*, int*,
                   int* info) {
    for (int i = *rows - 2; i >= 0; --i) {
        for (int j = 0; j < *cols; ++j) {
            double dot = c[j * *ldc + i + 1];
            for (int r = i + 2; r < *rows; ++r) dot += a[i * *lda + r] * c[j * *ldc + r];
            c[j * *ldc + i + 1] -= tau[i] * dot;
            for (int r = i + 2; r < *rows; ++r) c[j * *ldc + r] -= tau[i] * dot * a[i * *lda + r];
        }
    }
    *info = 0;
}

/// All eigenpairs of (d, e): values into d, ascending.
inline void dstedc(char*, int* order, double* d, double* e, double* z, int* ldz, double*, int*, int*, int*, int* info) {
    const int n = *order;
    for (int j = 0; j < n; ++j) {
        for (int i = 0; i < n; ++i) z[j * *ldz + i] = i == j ? d[i] : (i == j + 1 ? e[j] : 0.0);
    }
    char unused = 'V';
    dsyevd(&unused, &unused, order, z, ldz, d, nullptr, nullptr, nullptr, nullptr, info);
}

inline void dstemr(char*, char*, int* order, double* d, double* e, double*, double*, int* first, int* last, int* found, double* w,
                   double* z, int* ldz, int*, int*, int*, double*, int*, int*, int*, int* info) {
    int n = *order;
    std::vector<double> all(n * n);
    dstedc(nullptr, &n, d, e, all.data(), &n, nullptr, nullptr, nullptr, nullptr, info);
    *found = *last - *first + 1;
    for (int j = 0; j < *found; ++j) {
        w[j] = d[*first - 1 + j];
        std::copy_n(&all[(*first - 1 + j) * n], n, z + j * *ldz);
    }
}

inline void install() {
    sst::cpu::Lapack& table = sst::cpu::lapack();
    table.dgemm = dgemm;
    table.dtrsm = trsm<double>;
    table.strsm = trsm<float>;
    table.dpotrf = potrf<double>;
    table.spotrf = potrf<float>;
    table.dsyevd = dsyevd;
    table.dsygst = dsygst;
    table.dsytrd = dsytrd;
    table.dstemr = dstemr;
    table.dstedc = dstedc;
    table.dormtr = dormtr;
}

}  // namespace reference
