// Two-sided parallel cyclic Jacobi on a symmetric matrix of even order M, stored in full with leading dimension M.
//
// One round of the tournament rotates M/2 disjoint index pairs at once, in two phases with a barrier after each:
//   phase 1, one thread a pair:   find the rotation, apply it to the pair's own 2x2 diagonal block;
//   phase 2, one thread a block:  A(I, J) <- R_I' A(I, J) R_J for I > J and its mirror image; V(:, J) <- V(:, J) R_J.
// M - 1 rounds meet every pair once: a sweep. Both triangles are written from one product, so A stays symmetric to the
// last bit. An even leading dimension makes every access of phase 2 stride an odd number of doubles: no bank conflicts.
// (Golub & Van Loan, Matrix Computations, 8.5; Brent & Luk 1985 for the tournament.)
#pragma once

#include <cmath>

#include "sst/views.h"

namespace sst::cuda::jacobi {

constexpr int kMaxOrder = 96;  // 145 KiB of shared memory; see jacobi_limit()
constexpr int kMaxSweeps = 30;

struct Pair {
    int p, q;
};

struct Rotation {
    double c, s;
};

/// The pair at `seat` (0 <= seat < order / 2) in `round` (0 <= round < order - 1).
SST_HD inline Pair pair_at(int order, int round, int seat) {
    const int ring = order - 1;
    if (seat == 0) return {ring, round};
    const int p = round + seat, q = round - seat;
    return {p < ring ? p : p - ring, q < 0 ? q + ring : q};
}

/// The t-th of the H(H-1)/2 unordered pairs of seats; neighbours in t are neighbours in both seats.
SST_HD inline Pair seats_at(int half, int t) {
    const int first = t % half, second = first + t / half + 1;
    return {first, second < half ? second : second - half};
}

/// Phase 1. Returns whether the pair was rotated.
SST_HD inline bool rotate_pair(double* a, int order, Pair pair, double threshold, Rotation& rotation) {
    const auto [p, q] = pair;
    const double app = a[p + order * p], aqq = a[q + order * q], apq = a[p + order * q];
    rotation = {1.0, 0.0};
    if (!(fabs(apq) > threshold)) return false;
    const double tau = (aqq - app) / (2.0 * apq);
    const double t = (tau < 0.0 ? -1.0 : 1.0) / (fabs(tau) + sqrt(1.0 + tau * tau));
    const double c = 1.0 / sqrt(1.0 + t * t);
    rotation = {c, t * c};
    a[p + order * p] = app - t * apq;
    a[q + order * q] = aqq + t * apq;
    a[p + order * q] = a[q + order * p] = 0.0;
    return true;
}

/// Phase 2, matrix: the 2x2 block at the crossing of the row pair `left` and the column pair `right`.
SST_HD inline void rotate_block(double* a, int order, Pair left, Rotation rl, Pair right, Rotation rr) {
    const double pp = a[left.p + order * right.p], pq = a[left.p + order * right.q];
    const double qp = a[left.q + order * right.p], qq = a[left.q + order * right.q];
    const double pp1 = rr.c * pp - rr.s * pq, pq1 = rr.s * pp + rr.c * pq;
    const double qp1 = rr.c * qp - rr.s * qq, qq1 = rr.s * qp + rr.c * qq;
    const double pp2 = rl.c * pp1 - rl.s * qp1, qp2 = rl.s * pp1 + rl.c * qp1;
    const double pq2 = rl.c * pq1 - rl.s * qq1, qq2 = rl.s * pq1 + rl.c * qq1;
    a[left.p + order * right.p] = a[right.p + order * left.p] = pp2;
    a[left.p + order * right.q] = a[right.q + order * left.p] = pq2;
    a[left.q + order * right.p] = a[right.p + order * left.q] = qp2;
    a[left.q + order * right.q] = a[right.q + order * left.q] = qq2;
}

/// Phase 2, vectors: one row of V.
SST_HD inline void rotate_row(double* v, int order, int row, Pair pair, Rotation rotation) {
    double& vp = v[row + order * pair.p];
    double& vq = v[row + order * pair.q];
    const double p = vp, q = vq;
    vp = rotation.c * p - rotation.s * q;
    vq = rotation.s * p + rotation.c * q;
}

/// Place of eigenvalue i among the `m` diagonal entries, largest first; ties go by index, so that the order is a function of the
/// data.
SST_HD inline int rank_of(const double* a, int order, int m, int i) {
    const double mine = a[i + order * i];
    int rank = 0;
    for (int j = 0; j < m; ++j) {
        const double other = a[j + order * j];
        rank += other > mine || (other == mine && j < i);
    }
    return rank;
}

}  // namespace sst::cuda::jacobi
