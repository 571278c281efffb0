// The solver on the CPU backend, built once under AddressSanitizer and UBSan and once under ThreadSanitizer: known spectra, bad
// neighbours, an exactly sized workspace, problems spread over threads.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/cpu_backend.hpp"
#include "cpu/direct.hpp"
#include "cpu/parallel.hpp"
#include "gevp/jacobi_davidson.hpp"
#include "reference_lapack.hpp"

using namespace sst;

#define REQUIRE(condition)                                                    \
    do {                                                                      \
        if (!(condition)) {                                                   \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);       \
            std::exit(1);                                                     \
        }                                                                     \
    } while (false)

namespace {

constexpr int64_t n = 48, k = 3;

struct Solution {
    std::vector<double> values, vectors, bounds;
    std::vector<int32_t> status, cycles;
};

Solution outputs(int64_t batch) {
    return {std::vector<double>(batch * k), std::vector<double>(batch * k * n), std::vector<double>(batch * k),
            std::vector<int32_t>(batch), std::vector<int32_t>(batch)};
}

Result view(Solution& out) {
    return {{out.values.data(), k, 1, k, k}, {out.vectors.data(), n, k, n, n * k}, {out.bounds.data(), k, 1, k, k},
            out.status.data(), out.cycles.data()};
}

/// A and B [batch, n, n]; the workspace is exactly what the counting arena asked for, so that an overrun is a heap overflow.
template <class S>
Solution solve(const std::vector<S>& a, const std::vector<S>& b, Preconditioner preconditioner) {
    const int64_t batch = int64_t(a.size()) / (n * n);
    Options options = Options::for_problem(n, k, false);
    options.preconditioner = preconditioner;
    options.inner_steps = preconditioner == Preconditioner::diagonal || preconditioner == Preconditioner::none ? 15 : 0;
    Solution out = outputs(batch);
    const Result result = view(out);
    const Batch<const S> va{a.data(), n, n, n, n * n}, vb{b.data(), n, n, n, n * n};
    cpu::CpuBackend measuring(batch), solving(batch);
    Arena counting;
    gevp::solve_dense(measuring, counting, va, vb, options, result);
    std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(Arena::alignment, counting.used()), std::free);
    Arena arena(memory.get(), counting.used());
    gevp::solve_dense(solving, arena, va, vb, options, result);
    REQUIRE(arena.used() == counting.used());
    return out;
}

/// Diagonal A with the given leading values (the rest fall off below one) against B = 2 I + a coupling of neighbours.
template <class S>
void append(std::vector<S>& a, std::vector<S>& b, std::vector<double> leading, double coupling, double scale) {
    const size_t base = a.size();
    a.resize(base + n * n), b.resize(base + n * n);
    for (int64_t i = 0; i < n; ++i) {
        a[base + i * n + i] = S(scale * (i < int64_t(leading.size()) ? leading[i] : 1.0 / double(i + 1)));
        b[base + i * n + i] = S(2);
        if (i > 0) b[base + i * n + i - 1] = b[base + (i - 1) * n + i] = S(coupling);
    }
}

/// The direct route, three threads taking problems in turn.
template <class S>
Solution solve_direct(const std::vector<S>& a, const std::vector<S>& b) {
    const int64_t batch = int64_t(a.size()) / (n * n);
    Solution out = outputs(batch);
    const Result result = view(out);
    const Batch<const S> va{a.data(), n, n, n, n * n}, vb{b.data(), n, n, n, n * n};
    std::vector<cpu::DirectWorkspace> workspaces(3);
    cpu::parallel_for(batch, 3, [&](int64_t p, int64_t worker) { cpu::solve_direct<S>(va, vb, k, p, result, workspaces[worker]); });
    return out;
}

template <class S, class Solve>
void known_spectra_and_bad_neighbours(Solve solve) {
    std::vector<S> a, b;
    append(a, b, {10, 8, 6}, 0.0, 1.0);
    append(a, b, {10, 10, 10, 10, 10, 10}, 0.0, 1.0);
    append(a, b, {10, 8, 6}, 3.0, 1.0);  // indefinite B
    append(a, b, {10, 8, 6}, 0.4, 1.0);
    append(a, b, {10, 8, 6}, 0.0, 0.0);  // A = 0
    append(a, b, {std::nan("")}, 0.0, 1.0);
    const Solution got = solve(a, b);
    for (int64_t j = 0; j < k; ++j) {
        REQUIRE(std::abs(got.values[j] - (5.0 - double(j))) < 1e-9);
        REQUIRE(std::abs(got.values[k + j] - 5.0) < 1e-9);
        REQUIRE(std::isnan(got.values[2 * k + j]) && std::isnan(got.values[5 * k + j]));
        REQUIRE(got.bounds[3 * k + j] <= 1e-9 * got.values[3 * k]);
        REQUIRE(got.values[4 * k + j] == 0.0);
    }
    using code_list = std::vector<int32_t>;
    REQUIRE((got.status == code_list{code(Status::converged), code(Status::converged), code(Status::not_positive_definite),
                                     code(Status::converged), code(Status::rank_deficient), code(Status::non_finite)}));
    // Problem 3 alone gives the same bits.
    const std::vector<S> one_a(a.begin() + 3 * n * n, a.begin() + 4 * n * n), one_b(b.begin() + 3 * n * n, b.begin() + 4 * n * n);
    const Solution alone = solve(one_a, one_b);
    for (int64_t j = 0; j < k; ++j) REQUIRE(alone.values[j] == got.values[3 * k + j]);
    for (int64_t i = 0; i < n * k; ++i) REQUIRE(alone.vectors[i] == got.vectors[3 * k * n + i]);
}

/// MRRR that returns the right count of wrong pairs: the check sees it, divide and conquer answers.
void wrong_pairs_are_not_believed() {
    const auto good = cpu::lapack().dstemr;
    cpu::lapack().dstemr = [](char*, char*, int* order, double* d, double*, double*, double*, int* first, int* last, int* found,
                              double* w, double* z, int* ldz, int*, int*, int*, double*, int*, int*, int*, int* info) {
        *found = *last - *first + 1;
        std::fill_n(z, *ldz * *found, 1.0 / std::sqrt(double(*order)));
        std::fill_n(w, *found, d[0]);
        *info = 0;
    };
    known_spectra_and_bad_neighbours<double>(solve_direct<double>);
    cpu::lapack().dstemr = good;
}

/// One problem and one arena a thread, as the binding spreads a batch.
template <class Solve>
void threads_share_nothing(const Solve& solve) {
    std::vector<double> a, b;
    for (int problem = 0; problem < 6; ++problem) append(a, b, {10.0 + problem, 8, 6}, 0.4, 1.0);
    const Solution together = solve(a, b);
    std::vector<Solution> alone(6);
    cpu::parallel_for(6, 3, [&](int64_t p, int64_t) {
        const std::vector<double> own_a(a.begin() + p * n * n, a.begin() + (p + 1) * n * n);
        const std::vector<double> own_b(b.begin() + p * n * n, b.begin() + (p + 1) * n * n);
        alone[p] = solve(own_a, own_b);
    });
    for (int64_t p = 0; p < 6; ++p) {
        for (int64_t j = 0; j < k; ++j) REQUIRE(alone[p].values[j] == together.values[p * k + j]);
    }
}

void arena_reports_need_and_have() {
    char memory[512];
    Arena arena(memory, sizeof memory);
    arena.take<double>(8);
    bool thrown = false;
    try {
        arena.take<double>(64);
    } catch (const std::runtime_error& error) {
        thrown = std::string(error.what()).find("needs at least 768 bytes, has 512") != std::string::npos;
    }
    REQUIRE(thrown);
}

void parallel_for_visits_all_and_rethrows() {
    std::vector<int> seen(100);
    cpu::parallel_for(100, 3, [&](int64_t task, int64_t) { ++seen[task]; });
    for (const int count : seen) REQUIRE(count == 1);
    bool thrown = false;
    try {
        cpu::parallel_for(10, 2, [](int64_t task, int64_t) { SST_CHECK(task < 5, "stop"); });
    } catch (const std::runtime_error&) {
        thrown = true;
    }
    REQUIRE(thrown);
}

void random_entries_are_a_function_of_their_key() {
    double sum = 0.0, square = 0.0;
    for (int64_t i = 0; i < 10000; ++i) {
        const double x = random_entry(7, i % 10, i / 10);
        REQUIRE(x >= -1.0 && x < 1.0 && x == random_entry(7, i % 10, i / 10));
        sum += x, square += x * x;
    }
    REQUIRE(std::abs(sum / 10000) < 0.03 && std::abs(square / 10000 - 1.0 / 3) < 0.02);
    REQUIRE(random_entry(7, 1, 2) != random_entry(7, 2, 1) && random_entry(7, 1, 2) != random_entry(8, 1, 2));
}

}  // namespace

int main() {
    reference::install();
    arena_reports_need_and_have();
    parallel_for_visits_all_and_rethrows();
    random_entries_are_a_function_of_their_key();
    for (const auto kind : {Preconditioner::cholesky, Preconditioner::cholesky_single, Preconditioner::diagonal, Preconditioner::none}) {
        known_spectra_and_bad_neighbours<double>([kind](const auto& a, const auto& b) { return solve(a, b, kind); });
        known_spectra_and_bad_neighbours<float>([kind](const auto& a, const auto& b) { return solve(a, b, kind); });
    }
    known_spectra_and_bad_neighbours<double>(solve_direct<double>);
    known_spectra_and_bad_neighbours<float>(solve_direct<float>);
    wrong_pairs_are_not_believed();
    threads_share_nothing([](const auto& a, const auto& b) { return solve(a, b, Preconditioner::cholesky); });
    threads_share_nothing(solve_direct<double>);
    std::printf("all C++ tests passed\n");
}
