// Every own kernel against plain host loops, on problems of odd sizes, through an active list, alone and in company. Runs under
// compute-sanitizer as it is. Prints one line a failure and a verdict.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/each.cuh"
#include "cuda/error.hpp"
#include "cuda/kernels.hpp"

using namespace sst;

namespace {

int failures = 0, checks = 0;
std::mt19937_64 random_bits(11);

template <class... Arguments>
void expect(bool holds, const char* format, Arguments... arguments) {
    ++checks;
    if (holds) return;
    if (++failures <= 40) std::printf("FAILED: "), std::printf(format, arguments...), std::printf("\n");
}

/// Managed memory, poisoned with NaN bytes, with a leading dimension above the row count.
template <class T>
struct Matrices {
    Batch<T> view;
    int64_t batch;

    Matrices(int64_t batch, int64_t rows, int64_t cols) : batch(batch) {
        view = {nullptr, rows, cols, rows + 3, (rows + 3) * cols + 5};
        const std::size_t bytes = sizeof(T) * std::max<int64_t>(1, view.stride * batch);
        SST_TRY(cudaMallocManaged(&view.data, bytes));
        std::memset(view.data, 0xff, bytes);
    }
    Matrices(const Matrices&) = delete;
    ~Matrices() { cudaFree(view.data); }

    Matrices& fill() {
        std::normal_distribution<double> normal;
        for (int64_t p = 0; p < batch; ++p)
            for (int64_t j = 0; j < view.cols; ++j)
                for (int64_t i = 0; i < view.rows; ++i) view(p, i, j) = static_cast<T>(normal(random_bits));
        return *this;
    }
    T& operator()(int64_t p, int64_t i, int64_t j) { return view(p, i, j); }
    Batch<const T> constant() const { return view; }
};

struct List {
    int64_t* index;
    int64_t count;
    explicit List(const std::vector<int64_t>& problems) : count(int64_t(problems.size())) {
        SST_TRY(cudaMallocManaged(&index, sizeof(int64_t) * std::max<std::size_t>(1, problems.size())));
        std::copy(problems.begin(), problems.end(), index);
    }
    ~List() { cudaFree(index); }
    operator Active() const { return {index, count}; }
};

void settle() { SST_TRY(cudaDeviceSynchronize()); }

template <class T>
double entry(Batch<T> x, bool transposed, int64_t p, int64_t i, int64_t j) {
    return transposed ? double(x(p, j, i)) : double(x(p, i, j));
}

bool inside(cuda::Span span, int64_t i, int64_t j, int64_t l) {
    switch (span) {
        case cuda::Span::until_row: return l <= i;
        case cuda::Span::from_row: return l >= i;
        case cuda::Span::until_column: return l <= j;
        case cuda::Span::from_column: return l >= j;
        default: return true;
    }
}

template <class TX, class TY, class TZ>
void products(int64_t m, int64_t n, int64_t k, bool tx, bool ty, double beta, cuda::Span span) {
    constexpr int64_t batch = 5;
    Matrices<TX> x(batch, tx ? k : m, tx ? m : k);
    Matrices<TY> y(batch, ty ? n : k, ty ? k : n);
    Matrices<TZ> z(batch, m, n), solo(batch, m, n);
    x.fill(), y.fill();
    // What a span excludes is zero inside the 64-wide diagonal blocks and must never be read outside them.
    for (int64_t p = 0; p < batch; ++p)
        for (int64_t l = 0; l < k; ++l) {
            for (int64_t i = 0; i < m; ++i)
                if ((span == cuda::Span::until_row || span == cuda::Span::from_row) && !inside(span, i, 0, l))
                    (tx ? x(p, l, i) : x(p, i, l)) = l / 64 == i / 64 ? TX(0) : TX(NAN);
            for (int64_t j = 0; j < n; ++j)
                if ((span == cuda::Span::until_column || span == cuda::Span::from_column) && !inside(span, 0, j, l))
                    (ty ? y(p, j, l) : y(p, l, j)) = l / 64 == j / 64 ? TY(0) : TY(NAN);
        }
    Matrices<TZ> before(batch, m, n);
    before.fill();
    if (beta != 0.0)
        for (int64_t p = 0; p < batch; ++p)
            for (int64_t j = 0; j < n; ++j)
                for (int64_t i = 0; i < m; ++i) z(p, i, j) = solo(p, i, j) = before(p, i, j);
    const List some({3, 0, 4}), one({4});
    const Op ox = tx ? Op::transpose : Op::none, oy = ty ? Op::transpose : Op::none;
    cuda::gemm<TX, TY, TZ>(nullptr, some, ox, oy, 0.75, x.constant(), y.constant(), beta, z.view, span);
    cuda::gemm<TX, TY, TZ>(nullptr, one, ox, oy, 0.75, x.constant(), y.constant(), beta, solo.view, span);
    settle();
    double worst = 0.0;
    bool same = true, apart = true;
    for (int64_t p : {3, 0, 4})
        for (int64_t j = 0; j < n; ++j)
            for (int64_t i = 0; i < m; ++i) {
                double sum = 0.0, size = 0.0;
                for (int64_t l = 0; l < k; ++l)
                    if (inside(span, i, j, l)) {
                        const double term = entry(x.view, tx, p, i, l) * entry(y.view, ty, p, l, j);
                        sum += term, size += std::fabs(term);
                    }
                const double old = beta == 0.0 ? 0.0 : double(before(p, i, j)), expected = 0.75 * sum + beta * old;
                const double ulp = sizeof(TZ) == 4 ? FLT_EPSILON : DBL_EPSILON;
                const double error = std::fabs(double(z(p, i, j)) - expected) / (ulp * (double(k) + 4) * (size + std::fabs(old) + 1e-300));
                worst = error <= worst ? worst : error;  // NaN sticks
                if (!(error <= 1e300)) worst = 1e300;
                if (p == 4) same = same && std::memcmp(&z(p, i, j), &solo(p, i, j), sizeof(TZ)) == 0;
            }
    for (int64_t p : {1, 2})
        for (int64_t j = 0; j < n; ++j)
            for (int64_t i = 0; i < m; ++i)
                apart = apart && (beta != 0.0 ? z(p, i, j) == before(p, i, j) : std::isnan(double(z(p, i, j))));
    const int bits = int(sizeof(TX) * 100 + sizeof(TY) * 10 + sizeof(TZ));
    expect(worst <= 1.0, "gemm<%d> m %d n %d k %d tx %d ty %d beta %g span %d: %.3g ulp-lengths", bits, int(m), int(n), int(k), tx, ty, beta,
           int(span), worst);
    expect(same, "gemm<%d> m %d n %d k %d tx %d ty %d span %d: other bits alone", bits, int(m), int(n), int(k), tx, ty, int(span));
    expect(apart, "gemm<%d> m %d n %d k %d: touched an inactive problem", bits, int(m), int(n), int(k));
}

void all_products(bool quick) {
    using cuda::Span;
    const std::vector<int64_t> widths = quick ? std::vector<int64_t>{9, 71} : std::vector<int64_t>{1, 7, 8, 9, 16, 17, 64, 71};
    const std::vector<int64_t> depths = quick ? std::vector<int64_t>{67} : std::vector<int64_t>{1, 16, 67, 150};
    for (bool tx : {false, true})
        for (bool ty : {false, true})
            for (double beta : {0.0, -1.5})
                for (int64_t n : widths)
                    for (int64_t k : depths) {
                        products<double, double, double>(131, n, k, tx, ty, beta, Span::all);
                        products<float, double, double>(33, n, k, tx, ty, beta, Span::all);
                        products<float, float, float>(65, n, k, tx, ty, beta, Span::all);
                    }
    products<double, double, double>(40, 8, 0, false, false, -1.5, Span::all);
    for (int64_t n : {3, 16, 70, 200}) {
        products<double, double, double>(200, n, 200, false, false, 0.0, Span::until_row);
        products<double, double, double>(200, n, 200, true, false, 0.0, Span::from_row);
        products<float, double, double>(200, n, 200, false, false, 0.0, Span::until_row);
        products<float, double, double>(200, n, 200, true, false, 0.0, Span::from_row);
    }
    products<double, double, double>(200, 200, 200, false, true, 0.0, Span::until_column);
    products<double, double, double>(64, 200, 200, false, false, 0.0, Span::from_column);
    products<float, float, float>(64, 130, 130, false, false, 0.0, Span::from_column);
}

void eigensolver(int m, int kind) {
    constexpr int64_t batch = 4;
    Matrices<double> a(batch, m, m), original(batch, m, m), values(batch, m, 1);
    original.fill();
    for (int64_t p = 0; p < batch; ++p)
        for (int64_t j = 0; j < m; ++j)
            for (int64_t i = j; i < m; ++i) {
                double& x = original(p, i, j);
                if (kind == 1) x = i == j ? std::ldexp(1.0, -int(i)) : 1e-6 * x;
                if (kind == 2) x = p == 0 ? 0.0 : 1.0;
                if (kind == 3) x *= p == 0 ? 1e200 : 1e-200;
                original(p, j, i) = x;
                a(p, i, j) = x;  // the strict upper triangle stays NaN
            }
    if (kind == 4) a(2, m - 1, 0) = NAN;
    const List some({3, 0, 2});
    cuda::jacobi_eigh(nullptr, some, a.view, values.view);
    settle();
    for (int64_t p : {3, 0, 2}) {
        if (kind == 4 && p == 2) {
            expect(std::isnan(values(p, 0, 0)), "jacobi order %d: NaN was not reported", m);
            continue;
        }
        double norm = 0.0, backward = 0.0, skew = 0.0;
        bool sorted = true;
        for (int64_t j = 0; j < m; ++j)
            for (int64_t i = 0; i < m; ++i) norm = std::max(norm, std::fabs(original(p, i, j)));
        for (int64_t j = 0; j < m; ++j) {
            sorted = sorted && (j == 0 || values(p, j - 1, 0) >= values(p, j, 0));
            for (int64_t i = 0; i < m; ++i) {
                double image = 0.0, dot = 0.0;
                for (int64_t l = 0; l < m; ++l) image += (original(p, i, l) / (norm > 0 ? norm : 1)) * a(p, l, j), dot += a(p, l, i) * a(p, l, j);
                backward = std::max(backward, std::fabs(image - values(p, j, 0) / (norm > 0 ? norm : 1) * a(p, i, j)));
                skew = std::max(skew, std::fabs(dot - (i == j)));
            }
        }
        expect(sorted && backward <= 8 * m * DBL_EPSILON && skew <= 8 * m * DBL_EPSILON,
               "jacobi order %d kind %d problem %d: residual %.2e, V'V - I %.2e, sorted %d", m, kind, int(p), backward, skew, sorted);
    }
    expect(std::isnan(a(1, 0, m - 1)) || m == 1, "jacobi order %d: touched an inactive problem", m);
}

template <class T>
void factor(int64_t n, int64_t bad) {
    constexpr int64_t batch = 3;
    Matrices<T> f(batch, n, n), strip(batch, cuda::kTile, n);
    Matrices<double> b(batch, n, n), g(batch, n, n);
    g.fill();
    int32_t* info;
    SST_TRY(cudaMallocManaged(&info, batch * sizeof(int32_t)));
    std::fill(info, info + batch, 0);
    for (int64_t p = 0; p < batch; ++p)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j <= i; ++j) {
                double sum = i == j ? 1.0 : 0.0;
                for (int64_t l = 0; l < n; ++l) sum += g(p, i, l) * g(p, j, l) / double(n);
                if (p == 0 && i == j && i + 1 == bad) sum = -1.0;
                b(p, i, j) = b(p, j, i) = sum;
                f(p, i, j) = static_cast<T>(sum);
                f(p, j, i) = i == j ? static_cast<T>(sum) : static_cast<T>(NAN);
            }
    const List some({2, 0});
    cuda::invert_cholesky<T>(nullptr, some, f.view, strip.view, info);
    settle();
    expect(info[2] == 0 && info[1] == 0 && info[0] == (bad > 0 ? bad : 0), "factor<%d> n %d: info %d %d %d, expected minor %d",
           int(sizeof(T)), int(n), info[0], info[1], info[2], int(bad));
    for (int64_t p : {2, 0}) {
        if (p == 0 && bad > 0) continue;
        std::vector<double> half(n * n, 0.0);
        double worst = 0.0;
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < n; ++j)
                for (int64_t l = 0; l <= i; ++l) half[i * n + j] += double(f(p, i, l)) * b(p, l, j);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < n; ++j) {
                double sum = 0.0;
                for (int64_t l = 0; l <= j; ++l) sum += half[i * n + l] * double(f(p, j, l));
                const double error = std::fabs(sum - (i == j));
                worst = error <= worst ? worst : error;
                if (!(error < 1e300)) worst = 1e300;
            }
        const double ulp = sizeof(T) == 4 ? FLT_EPSILON : DBL_EPSILON;
        expect(worst <= 64 * double(n) * ulp, "factor<%d> n %d problem %d: L^-1 B L^-T - I is %.2e", int(sizeof(T)), int(n), int(p), worst);
    }
    cudaFree(info);
}

template <class S>
void screening(int64_t n) {
    constexpr int64_t batch = 4;
    Matrices<S> a(batch, n, n);
    Matrices<double> out(batch, 2, 1);
    a.fill();
    for (int64_t p = 0; p < batch; ++p)
        for (int64_t j = 0; j < n; ++j)
            for (int64_t i = 0; i < j; ++i) a(p, i, j) = a(p, j, i);
    a(1, n - 1, 0) = S(INFINITY);
    a(2, 0, n - 1) = S(NAN);
    a(3, n - 1, 0) += S(0.5);
    a(3, n / 2, n / 2) = S(-100);
    const List all({0, 1, 2, 3});
    cuda::extrema<S>(nullptr, all, a.constant(), out.view);
    settle();
    double largest = 0.0;
    for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(double(a(0, i, j))));
    expect(out(0, 0, 0) == largest && out(0, 1, 0) == 0.0, "extrema<%d> n %d: %g %g, expected %g 0", int(sizeof(S)), int(n), out(0, 0, 0),
           out(0, 1, 0), largest);
    expect(std::isnan(out(1, 0, 0)) && std::isnan(out(2, 0, 0)), "extrema<%d> n %d: not finite was not seen", int(sizeof(S)), int(n));
    const double skew = n > 1 ? 0.5 : 0.0;
    expect(out(3, 0, 0) == 100.0 && std::fabs(out(3, 1, 0) - skew) < 1e-6, "extrema<%d> n %d: %g %g, expected 100 %g", int(sizeof(S)), int(n),
           out(3, 0, 0), out(3, 1, 0), skew);
}

void small_kernels() {
    constexpr int64_t batch = 700;
    std::vector<int64_t> odd, expected;
    int32_t* done;
    int64_t *list, *count;
    SST_TRY(cudaMallocManaged(&done, batch * sizeof(int32_t)));
    SST_TRY(cudaMallocManaged(&list, batch * sizeof(int64_t)));
    SST_TRY(cudaMallocManaged(&count, sizeof(int64_t)));
    for (int64_t p = 0; p < batch; ++p) {
        done[p] = p % 3 == 0;
        if (p % 2) odd.push_back(p);
        if (p % 2 && p % 3) expected.push_back(p);
    }
    const List active(odd);
    cuda::compact(nullptr, active, done, list, count);
    settle();
    expect(*count == int64_t(expected.size()) && std::equal(expected.begin(), expected.end(), list), "compact: %d of %d kept", int(*count),
           int(expected.size()));
    Matrices<double> x(3, 1000, 4), y(3, 1000, 4), d(3, 4, 1);
    x.fill(), y.fill();
    const List two({2, 1});
    cuda::dots(nullptr, two, x.constant(), y.constant(), d.view);
    const Batch<double> target = x.view;
    cuda::each_entry(nullptr, two, 1000, 3, [=] __device__(int64_t p, int64_t i, int64_t j) { target(p, i, j) = double(i * 4 + j); });
    settle();
    expect(std::isnan(d(0, 0, 0)), "dots: touched an inactive problem %g", d(0, 0, 0));
    for (int64_t p : {1, 2}) {
        double sum = 0.0;
        for (int64_t i = 0; i < 1000; ++i) sum += x(p, i, 3) * y(p, i, 3);
        expect(std::fabs(sum - d(p, 3, 0)) <= 1e-10, "dots: %g, expected %g", d(p, 3, 0), sum);
        expect(x(p, 999, 2) == 999 * 4 + 2 && x(p, 0, 1) == 1, "each_entry: wrong entry %g", x(p, 999, 2));
    }
    cudaFree(done), cudaFree(list), cudaFree(count);
}

}  // namespace

/// `quick` as an argument: fewer shapes of products.
int main(int count, char** arguments) {
    const bool quick = count > 1 && std::string(arguments[1]) == "quick";
    try {
        cuda::prepare_kernels();
        small_kernels();
        for (int m : {1, 2, 3, 8, 15, 16, 17, 32, 33, 48, 63, 64, 65, 96}) {
            if (m > cuda::jacobi_limit()) continue;
            for (int kind = 0; kind < 5; ++kind) eigensolver(m, kind);
        }
        for (int64_t n : {1, 5, 63, 64, 65, 128, 200}) {
            factor<double>(n, 0), factor<float>(n, 0);
            factor<double>(n, n), factor<double>(n, (n + 1) / 2);
        }
        for (int64_t n : {1, 5, 32, 33, 150, 257}) screening<double>(n), screening<float>(n);
        all_products(quick);
    } catch (const std::exception& error) {
        std::printf("FAILED: %s\n", error.what());
        return 2;
    }
    std::printf("cuda kernels: %d checks, %d failures\n", checks, failures);
    return failures != 0;
}
