// Everything a solve keeps between its stages, carved from the caller's workspace.
#pragma once

#include "gevp/orthonormalise.hpp"

namespace sst::gevp {

struct State {
    Options options;
    int64_t n = 0;
    int64_t wanted = 0;  ///< Ritz pairs whose residuals are formed: k, or one block if that is more

    Batch<double> v;        ///< n x (basis + block), B-orthonormal (Euclidean in the standard coordinates)
    Batch<double> av;       ///< A V, n x basis
    Batch<double> bv;       ///< B V, n x (basis + block); v itself in the standard coordinates
    Batch<double> h;        ///< V' A V, basis x basis, upper triangle
    Batch<double> s;        ///< eigenvectors of h, basis x basis
    Batch<double> theta;    ///< Ritz values, basis x 1, descending
    Batch<double> ritz;     ///< n x keep: rotated blocks, Ritz vectors
    Batch<double> residual; ///< n x wanted
    Batch<double> rho;      ///< wanted x 1, residual norms
    Batch<double> trace;    ///< 1 x 1, sum of the wanted Ritz values when last found converged
    Batch<double> best;     ///< 2 x 1, fewest halvings that the residuals lacked so far, and the cycle of the last clear progress
    Batch<double> pace;     ///< 2 x 1, halvings that the residuals lacked when last looked at, and the cycles until then
    Batch<int64_t> pick;    ///< block x 1, the Ritz pairs whose residuals make the next block
    OrthoScratch ortho;
    int32_t* bad = nullptr;        ///< [batch] without an answer: screened out, or B does not factor
    int32_t* done = nullptr;       ///< [batch] out of the loop
    int32_t* verifying = nullptr;  ///< [batch] converged before: 1 a fresh block looks for missed copies, 2 it is refined

    static State carve(Arena& arena, const Options& options, int64_t batch, int64_t n, bool standard) {
        State state;
        const int64_t m = options.basis, b = options.block;
        state.options = options;
        state.n = n;
        state.wanted = options.k > b ? options.k : b;
        const int64_t rotated = options.keep + options.previous;
        state.v = arena.matrices<double>(batch, n, m + b);
        state.av = arena.matrices<double>(batch, n, m + b);
        state.bv = standard ? state.v : arena.matrices<double>(batch, n, m + b);
        state.h = arena.matrices<double>(batch, m, m + b);
        state.s = arena.matrices<double>(batch, m, m);
        state.theta = arena.matrices<double>(batch, m, 1);
        state.ritz = arena.matrices<double>(batch, n, rotated);
        state.residual = arena.matrices<double>(batch, n, state.wanted);
        state.rho = arena.matrices<double>(batch, state.wanted, 1);
        state.trace = arena.matrices<double>(batch, 1, 1);
        state.best = arena.matrices<double>(batch, 2, 1);
        state.pace = arena.matrices<double>(batch, 2, 1);
        state.pick = arena.matrices<int64_t>(batch, b, 1);
        const int64_t columns = rotated > b ? rotated : b;
        state.ortho = OrthoScratch::carve(arena, batch, n, m, columns);
        state.bad = arena.take<int32_t>(batch);
        state.done = arena.take<int32_t>(batch);
        state.verifying = arena.take<int32_t>(batch);
        return state;
    }
};

}  // namespace sst::gevp
