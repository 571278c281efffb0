// The arithmetic of the CUDA kernels, run phase by phase on the host: tournament, rotations, block elimination.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <random>
#include <set>
#include <vector>

#include "cuda/cholesky_core.hpp"
#include "cuda/jacobi_core.hpp"

using namespace sst::cuda;

namespace {

int failures = 0;

void expect(bool holds, const char* what, int order, double value = 0.0) {
    if (holds) return;
    ++failures;
    std::printf("FAILED: %s, order %d, value %.3e\n", what, order, value);
}

void tournament(int order) {
    const int half = order / 2;
    std::set<std::pair<int, int>> met, blocks;
    for (int round = 0; round < order - 1; ++round) {
        std::set<int> playing;
        for (int seat = 0; seat < half; ++seat) {
            const auto [p, q] = jacobi::pair_at(order, round, seat);
            playing.insert({p, q});
            met.insert({std::min(p, q), std::max(p, q)});
        }
        expect(int(playing.size()) == order && *playing.begin() == 0 && *playing.rbegin() == order - 1, "a round seats all", order);
    }
    expect(int(met.size()) == order * (order - 1) / 2, "a sweep meets every pair", order);
    for (int t = 0; t < half * (half - 1) / 2; ++t) {
        const auto [p, q] = jacobi::seats_at(half, t);
        expect(p != q && p >= 0 && q >= 0 && p < half && q < half, "a block joins two seats", order);
        blocks.insert({std::min(p, q), std::max(p, q)});
    }
    expect(int(blocks.size()) == half * (half - 1) / 2, "every block is visited", order);
}

void eigenpairs(int m, const std::vector<double>& matrix) {
    const int order = m + m % 2, half = order / 2;
    std::vector<double> a(matrix), v(order * order, 0.0);
    for (int i = 0; i < order; ++i) v[i + order * i] = 1.0;
    double square = 0.0;
    for (double x : a) square += x * x;
    const double norm = std::sqrt(square), threshold = DBL_EPSILON * norm / order;
    std::vector<jacobi::Rotation> rotations(half);
    int sweep = 0;
    for (; sweep < jacobi::kMaxSweeps; ++sweep) {
        bool coupled = false;
        for (int t = 0; t < order * order; ++t) coupled |= t % order > t / order && std::fabs(a[t]) > threshold;
        if (!coupled) break;
        for (int round = 0; round < order - 1; ++round) {
            for (int seat = 0; seat < half; ++seat)
                jacobi::rotate_pair(a.data(), order, jacobi::pair_at(order, round, seat), threshold, rotations[seat]);
            for (int t = 0; t < half * (half - 1) / 2; ++t) {
                const auto [p, q] = jacobi::seats_at(half, t);
                jacobi::rotate_block(a.data(), order, jacobi::pair_at(order, round, p), rotations[p],
                                     jacobi::pair_at(order, round, q), rotations[q]);
            }
            for (int t = 0; t < order * half; ++t)
                jacobi::rotate_row(v.data(), order, t % order, jacobi::pair_at(order, round, t / order), rotations[t / order]);
        }
    }
    expect(sweep <= 12, "sweeps", m, sweep);
    double backward = 0.0, skew = 0.0;
    std::set<int> ranks;
    for (int i = 0; i < m; ++i) {
        ranks.insert(jacobi::rank_of(a.data(), order, m, i));
        for (int j = 0; j < m; ++j) {
            double sum = 0.0, dot = 0.0;
            for (int l = 0; l < order; ++l) {
                sum += v[i + order * l] * a[l + order * l] * v[j + order * l];
                dot += v[l + order * i] * v[l + order * j];
            }
            backward = std::max(backward, std::fabs(sum - matrix[i + order * j]));
            skew = std::max(skew, std::fabs(dot - (i == j)));
        }
    }
    expect(int(ranks.size()) == m, "ranks are a permutation", m);
    expect(backward <= 4 * order * DBL_EPSILON * norm, "V D V' = A", m, backward / (norm > 0 ? norm : 1));
    expect(skew <= 4 * order * DBL_EPSILON, "V' V = I", m, skew);
}

void inverse_factor(int n, std::mt19937_64& random) {
    constexpr int ld = 65;
    std::normal_distribution<double> normal;
    std::vector<double> g(n * n), a(n * n), w(64 * ld, 0.0), r(64);
    for (double& x : g) x = normal(random);
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) {
            a[i * n + j] = i == j;
            for (int l = 0; l < n; ++l) a[i * n + j] += g[i * n + l] * g[j * n + l];
            w[i * ld + j] = a[i * n + j];
        }
    for (int j = 0; j < n; ++j) {
        const double root = std::sqrt(w[j * ld + j]);
        for (int i = 0; i < n; ++i) r[i] = cholesky::pivot_row(w.data(), ld, j, i, root);
        for (int i = 0; i < n; ++i)
            for (int c = 0; c < n; ++c) cholesky::eliminate(w.data(), ld, r.data(), j, i, c);
    }
    double worst = 0.0;
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) {
            double sum = 0.0;
            for (int p = 0; p <= i; ++p)
                for (int q = 0; q <= j; ++q) sum += w[i * ld + p] * a[p * n + q] * w[j * ld + q];
            worst = std::max(worst, std::fabs(sum - (i == j)));
        }
    expect(worst <= 1e-11, "W A W' = I", n, worst);
}

}  // namespace

int main() {
    std::mt19937_64 random(7);
    std::normal_distribution<double> normal;
    for (int m : {1, 2, 3, 4, 7, 16, 17, 32, 33, 63, 64}) {
        const int order = m + m % 2;
        tournament(order);
        for (int kind = 0; kind < 4; ++kind) {
            std::vector<double> a(order * order, 0.0);
            for (int i = 0; i < m; ++i)
                for (int j = 0; j <= i; ++j) {
                    const double noise = normal(random);
                    const double entries[] = {noise, i == j ? 1.0 / (1 + i) : 1e-3 * noise, 1.0, i == j ? 5.0 : 1e-9 * noise};
                    a[i + order * j] = a[j + order * i] = entries[kind];
                }
            eigenpairs(m, a);
        }
        inverse_factor(m, random);
    }
    if (failures == 0) std::printf("cuda cores: all hold\n");
    return failures != 0;
}
