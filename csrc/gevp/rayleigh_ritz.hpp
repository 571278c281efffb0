// Rayleigh-Ritz on the basis, rotation of the basis onto Ritz vectors, and residuals.
#pragma once

#include "gevp/state.hpp"
#include "sst/nvtx.h"

namespace sst::gevp {

/// Eigenpairs of the leading m x m part of H, of which the upper triangle is filled.
template <class Backend>
void rayleigh_ritz(Backend& backend, Active active, State& state, int64_t m) {
    const Range range("rayleigh_ritz");
    const Batch<double> h = state.h;
    const Batch<double> s{state.s.data, m, m, state.s.ld, state.s.stride};
    backend.each_entry(active, m, m, SST_LAMBDA(int64_t p, int64_t i, int64_t j) { s(p, i, j) = i < j ? h(p, i, j) : h(p, j, i); });
    backend.syev(active, s, Batch<double>{state.theta.data, m, 1, state.theta.ld, state.theta.stride});
}

/// basis[:, :columns] = basis[:, :m] times coefficients (m x columns)
template <class Backend>
void rotate(Backend& backend, Active active, const State& state, Batch<double> basis, Batch<const double> coefficients) {
    const Batch<double> rotated = state.ritz.columns(0, coefficients.cols);
    backend.gemm(active, Op::none, Op::none, 1.0, basis.columns(0, coefficients.rows), coefficients, 0.0, rotated);
    backend.copy(active, rotated, basis.columns(0, coefficients.cols));
}

/// H of a basis of Ritz vectors is diagonal.
template <class Backend>
void diagonal_h(Backend& backend, Active active, State& state, int64_t columns) {
    const Batch<double> h = state.h, theta = state.theta;
    backend.each_entry(active, columns, columns, SST_LAMBDA(int64_t p, int64_t i, int64_t j) {
        h(p, i, j) = i == j ? theta(p, i, 0) : 0.0;
    });
}

}  // namespace sst::gevp
