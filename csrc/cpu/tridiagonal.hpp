// Largest eigenpairs of a symmetric tridiagonal matrix. MRRR on the wanted part of the spectrum costs O(nk), where the bisection
// and inverse iteration behind LAPACK's own subset drivers cost ten times as much; its answer is checked, and where it does not hold
// divide and conquer computes the whole spectrum.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/lapack.hpp"

namespace sst::cpu {

/// Scratch of one worker; `d` [n] and `e` [n], of which n - 1 count, are the input.
struct Tridiagonal {
    std::vector<double> d, e, z, gram, work;
    std::vector<double> values;  ///< [n], the wanted ones ascending in front
    std::vector<int> integers, support;

    void resize(int n) { d.resize(n), e.resize(n), values.resize(n); }
};

/// Whether w [k] and z [n, k] are eigenpairs of (d, e), orthonormal, to a small multiple of n ulp.
inline bool holds(int n, int k, const double* d, const double* e, const double* w, double* z, std::vector<double>& gram) {
    const double limit = 10 * std::max(n, 8) * std::numeric_limits<double>::epsilon();
    double size = 0.0, worst = 0.0;
    for (int i = 0; i < n; ++i) size = std::max(size, std::abs(d[i]) + (i + 1 < n ? std::abs(e[i]) : 0.0));
    for (int j = 0; j < k; ++j) {
        const double* column = z + int64_t(j) * n;
        for (int i = 0; i < n; ++i) {
            const double before = i > 0 ? e[i - 1] * column[i - 1] : 0.0, after = i + 1 < n ? e[i] * column[i + 1] : 0.0;
            worst = std::max(worst, std::abs(before + (d[i] - w[j]) * column[i] + after));
        }
    }
    char transposed = 'T', none = 'N';
    double one = 1.0, zero = 0.0;
    gram.resize(int64_t(k) * k);
    lapack().dgemm(&transposed, &none, &k, &k, &n, &one, z, &n, z, &n, &zero, gram.data(), &k);
    bool orthonormal = true;
    for (int j = 0; j < k; ++j) {
        for (int i = 0; i < k; ++i) orthonormal = orthonormal && std::abs(gram[int64_t(j) * k + i] - (i == j)) <= limit;
    }
    return orthonormal && worst <= limit * size;
}

/// MRRR for the k largest pairs into t.values and t.z [n, k]; false where they are not all there or do not hold.
inline bool mrrr(int n, int k, Tridiagonal& t) {
    char vectors = 'V', range = 'I';
    int first = n - k + 1, found = 0, columns = k, relative = 1, size = 18 * n, integer_size = 10 * n, info = 0;
    double unused = 0.0;
    t.z.resize(int64_t(n) * k), t.support.resize(2 * k), t.integers.resize(integer_size), t.work.resize(size + 2 * n);
    double *const d = t.work.data() + size, *const e = d + n;  // overwritten
    std::copy_n(t.d.data(), n, d), std::copy_n(t.e.data(), n, e);
    lapack().dstemr(&vectors, &range, &n, d, e, &unused, &unused, &first, &n, &found, t.values.data(), t.z.data(), &n, &columns,
                    t.support.data(), &relative, t.work.data(), &size, t.integers.data(), &integer_size, &info);
    return info == 0 && found == k && holds(n, k, t.d.data(), t.e.data(), t.values.data(), t.z.data(), t.gram);
}

/// The k largest pairs (MRRR up to n/8 of them, where the two were measured to meet): values ascending in t.values[0 .. k), vectors in the k columns of order n that are returned; null if
/// LAPACK fails. t.d and t.e are spent.
inline double* largest_pairs(int n, int k, Tridiagonal& t) {
    if (8 * k <= n && mrrr(n, k, t)) return t.z.data();
    char identity = 'I';
    int size = 1 + 4 * n + n * n, integer_size = 3 + 5 * n, info = 0;
    t.z.resize(int64_t(n) * n), t.work.resize(size), t.integers.resize(integer_size);
    lapack().dstedc(&identity, &n, t.d.data(), t.e.data(), t.z.data(), &n, t.work.data(), &size, t.integers.data(), &integer_size,
                    &info);
    std::copy_n(t.d.data() + n - k, k, t.values.data());
    return info == 0 ? t.z.data() + int64_t(n) * (n - k) : nullptr;
}

}  // namespace sst::cpu
