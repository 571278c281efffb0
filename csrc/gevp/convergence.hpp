// Which problems are done. Decided on the device from residual norms in the B^-1 norm; the host only counts the survivors.
#pragma once

#include <cmath>

#include "gevp/state.hpp"

namespace sst::gevp {

/// A block Krylov space holds at most `block` copies of one eigenvalue, so a converged run of `block` near-equal values may
/// hide more, which matters where wanted values lie below the run. Such a problem (or every one, with options.verify) goes on for a cycle from a fresh random block and is done only
/// when that changes nothing.
SST_HD inline bool hides_copies(const Options& options, const Batch<double>& theta, int64_t p, double size) {
    const double near = sqrt(options.tolerance) * size;
    for (int64_t j = 0; j + options.block < options.k; ++j) {
        const bool run = theta(p, j, 0) - theta(p, j + options.block - 1, 0) <= near;
        if (run && theta(p, j, 0) - theta(p, options.k - 1, 0) > near) return true;
    }
    return false;
}

SST_HD inline double spectral_size(const Batch<double>& theta, int64_t p, int64_t m) {
    const double first = fabs(theta(p, 0, 0)), last = fabs(theta(p, m - 1, 0));
    return first > last ? first : last;
}

/// Halvings that the residuals of the wanted pairs lack together.
SST_HD inline double missing_halvings(const Options& options, const Batch<double>& rho, int64_t p, double size) {
    const double limit = options.tolerance * size;
    double missing = 0.0;
    for (int64_t j = 0; j < options.k; ++j) missing += rho(p, j, 0) > limit ? log2(rho(p, j, 0) / limit) : 0.0;
    return missing;
}

/// Whether the problem, at the pace since it was last looked at, needs more than `afford` further cycles. `now` counts cycles.
SST_HD inline bool too_slow(const Batch<double>& pace, int64_t p, double missing, double now, double afford) {
    const double gained = pace(p, 0, 0) - missing, taken = now - pace(p, 1, 0);
    pace(p, 0, 0) = missing;
    pace(p, 1, 0) = now;
    return afford > 0.0 && missing * taken > gained * afford;
}

/// Judges every active problem from theta (m Ritz values) and rho: sets done, verifying, status, cycles. `patience` cycles in which
/// all residuals together have not come one halving nearer to the tolerance are a stagnation: the problem stops, its bound says
/// where. So does one whose pace does not pay (options.afford). The worst residual alone would not do: it stands still while the pairs above it are corrected.
template <class Backend>
void judge(Backend& backend, Active active, State& state, int64_t m, int64_t cycle, double now, const Result& result) {
    const Options options = state.options;
    const int64_t patience = options.inner_steps > 0 ? 30 : 6;
    const Batch<double> theta = state.theta, rho = state.rho, trace = state.trace, best = state.best, pace = state.pace;
    int32_t *const done = state.done, *const verifying = state.verifying, *const codes = result.status, *const cycles = result.cycles;
    const int32_t* const indefinite = state.ortho.indefinite;
    backend.each(active, SST_LAMBDA(int64_t p) {
        const double size = spectral_size(theta, p, m);
        const double limit = options.tolerance * size;
        double worst = 0.0, sum = 0.0;
        bool finite = !indefinite[p];
        for (int64_t j = 0; j < options.k; ++j) {
            finite = finite && 0.0 * rho(p, j, 0) == 0.0 && 0.0 * theta(p, j, 0) == 0.0;
            worst = rho(p, j, 0) > worst ? rho(p, j, 0) : worst;
            sum += theta(p, j, 0);
        }
        cycles[p] = static_cast<int32_t>(cycle + 1);
        codes[p] = code(finite ? Status::max_iterations : Status::not_positive_definite);
        if (finite && worst <= limit) {
            const bool settled = verifying[p] && sum - trace(p, 0, 0) <= 10 * options.tolerance * size;
            if (settled || (!verifying[p] && !options.verify && !hides_copies(options, theta, p, size))) {
                done[p] = 1;
                codes[p] = code(Status::converged);
            }
            verifying[p] = 1;
            trace(p, 0, 0) = sum;
            best(p, 1, 0) = static_cast<double>(cycle);
            return;
        }
        const double missing = missing_halvings(options, rho, p, size);
        const bool slow = too_slow(pace, p, missing, now, options.afford) && !verifying[p];
        const bool searching = verifying[p] == 1;  // what the fresh block has found is now refined like anything else
        if (searching) verifying[p] = 2;
        if (cycle == 0 || searching || missing <= best(p, 0, 0) - 1.0) {
            best(p, 0, 0) = missing;
            best(p, 1, 0) = static_cast<double>(cycle);
        }
        if (!finite || slow || cycle - static_cast<int64_t>(best(p, 1, 0)) >= patience) done[p] = 1;
    });
}

}  // namespace sst::gevp
