// What the caller decides about an iterative solve, and the shapes that follow from it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sst {

/// How B (or an approximation K of it) is inverted.
enum class Preconditioner : int32_t {
    cholesky = 0,         ///< fp64 factor of B: the basis is the block Krylov space of B^-1 A, Rayleigh-Ritz once per cycle
    cholesky_single = 1,  ///< fp32 factor of B plus a shift, fp64 residuals: Jacobi-Davidson steps
    diagonal = 2,         ///< diag(B): correction equation by projected block CG
    none = 3,             ///< identity: the same
    exact = 4,            ///< the pencil applies B^-1 itself (Woodbury, eigenbasis): Jacobi-Davidson steps
};

struct Options {
    int64_t k = 8;
    int64_t block = 8;   ///< columns per expansion
    int64_t basis = 64;  ///< columns of the full basis, a multiple of block
    int64_t keep = 16;   ///< Ritz vectors that survive a restart, at least k and a multiple of block
    int64_t previous = 8;  ///< +k: Ritz vectors of the step before the restart that survive as well (Jacobi-Davidson steps)
    int64_t max_cycles = 100;
    int64_t inner_steps = 0;  ///< CG steps per correction equation
    double tolerance = 1e-10;  ///< converged when sqrt(r' B^-1 r) <= tolerance * largest |theta|
    uint64_t seed = 0;
    double afford = 0;  ///< cycles that the direct route costs: a problem that seems to need more stops early; 0: none does
    bool verify = false;  ///< always run a verification cycle; otherwise only behind a cluster as wide as the block
    Preconditioner preconditioner = Preconditioner::cholesky;

    /// Shapes that the measurements favour. A GPU's (wide): the fewest products that a projected problem in one CTA's shared memory
    /// allows, 64 columns up to k = 8 and 96 up to k = 32; from n = 256 on, below which a block of 16 leaves few restarts. A CPU reads A and its factor once per block whatever its width up to 8, and pays for every column of the
    /// basis: fewer columns, and one more block kept over a restart. Where n is too small for that, the least that restarts.
    static Options for_problem(int64_t n, int64_t k, bool wide = true) {
        Options options;
        options.k = k;
        const bool tight = wide && n < 256;
        options.block = wide && !tight && k <= 32 ? (k <= 8 ? 8 : 16) : wide ? std::min<int64_t>(32, std::max<int64_t>(8, (k + 15) / 16 * 8)) : (k <= 8 ? 4 : (k <= 32 ? 8 : 16));
        const int64_t b = options.block, least = (k + b - 1) / b * b + b;
        options.keep = tight || k > 32 ? least + (wide ? 0 : b) : least + std::max<int64_t>(b, wide ? 16 : 0);
        options.previous = std::min(b, k);
        options.basis = wide && !tight && k <= 32 ? (k <= 8 ? 64 : 96) : wide ? std::max<int64_t>(64, options.keep + 5 * b) : options.keep + std::max<int64_t>(32, 6 * b);
        options.basis = options.basis / b * b;
        if (options.basis + b > n) {
            options.keep = least;
            options.basis = std::max(least + 2 * b, std::min(options.basis, (n - b) / b * b));
        }
        return options;
    }
};

}  // namespace sst
