// First and last stage of every solve: refuse what has no answer, scale what is left, put results into the caller's units.
#pragma once

#include <cmath>
#include <limits>

#include "gevp/backend.hpp"

namespace sst::gevp {

/// What extrema() saw, judged. Scales are powers of two, so that scaling rounds nothing.
struct Screen {
    Status status;
    double scale_a;
    double scale_b;
};

SST_HD inline double power_of_two_scale(double largest) {
    if (!(largest > 0.0)) return 1.0;
    int exponent = ilogb(largest);
    exponent = exponent > 1000 ? 1000 : (exponent < -1000 ? -1000 : exponent);
    return ldexp(1.0, -exponent);
}

/// `max_*`, `skew_*`: largest entry (NaN when one is not finite) and largest |a_ij - a_ji|. Asymmetry beyond 16 ulp (float64, also
/// for float32 storage) would stop the residuals short of the tolerance: the caller mirrors the matrix and comes back.
SST_HD inline Screen screen(double max_a, double skew_a, double max_b, double skew_b) {
    Screen result{Status::converged, power_of_two_scale(max_a), power_of_two_scale(max_b)};
    const double slack = 16 * std::numeric_limits<double>::epsilon();
    if (!(max_a < INFINITY) || !(max_b < INFINITY)) {
        result.status = Status::non_finite;
    } else if (skew_a > slack * max_a || skew_b > slack * max_b) {
        result.status = Status::not_symmetric;
    } else if (max_b == 0.0) {
        result.status = Status::not_positive_definite;
    }
    return result;
}

/// A problem without an answer: NaN everywhere, and the reason.
template <class Backend>
void poison(Backend& backend, Active active, const Result& result, int64_t k, Status status) {
    const Batch<double> values = result.values, vectors = result.vectors, bounds = result.bounds;
    int32_t* const codes = result.status;
    const int32_t reason = code(status);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    backend.each(active, SST_LAMBDA(int64_t p) { codes[p] = reason; });
    backend.each_column(active, k, SST_LAMBDA(int64_t p, int64_t j) { values(p, j, 0) = bounds(p, j, 0) = nan; });
    backend.each_entry(active, vectors.rows, k, SST_LAMBDA(int64_t p, int64_t i, int64_t j) { vectors(p, i, j) = nan; });
}

/// One column into the caller's units: value and bound times `value`, vector times `vector` with its largest entry positive. A
/// value that its own bound, or n ulp of the larger of `first` and `last` (the extreme wanted values), cannot tell from zero is
/// zero.
SST_HD inline void finish_column(const Result& result, int64_t p, int64_t j, int64_t n, double first, double last, double value,
                                 double vector) {
    double &theta = result.values(p, j, 0), &bound = result.bounds(p, j, 0);
    const double floor = n * std::numeric_limits<double>::epsilon() * (fabs(first) > fabs(last) ? fabs(first) : fabs(last));
    const bool zero = fabs(theta) <= floor || fabs(theta) <= bound;
    int64_t peak = 0;
    for (int64_t i = 1; i < n; ++i) {
        if (fabs(result.vectors(p, i, j)) > fabs(result.vectors(p, peak, j))) peak = i;
    }
    const double factor = result.vectors(p, peak, j) < 0.0 ? -vector : vector;
    for (int64_t i = 0; i < n; ++i) result.vectors(p, i, j) *= factor;
    theta = zero ? 0.0 : theta * value;
    bound = bound == 0.0 ? 0.0 : bound * value;
}

/// The finished values of problem p: those next to zero on the same side follow it, so that they stay sorted, and the status says
/// whether one is zero, or it or its bound beyond float64.
SST_HD inline void settle(const Result& result, int64_t p, int64_t k) {
    bool seen = false;
    for (int64_t j = 0; j < k; ++j) {
        double& value = result.values(p, j, 0);
        seen = seen || value == 0.0;
        if (seen && value > 0.0) value = 0.0;
    }
    seen = false;
    for (int64_t j = k - 1; j >= 0; --j) {
        double& value = result.values(p, j, 0);
        seen = seen || value == 0.0;
        if (seen && value < 0.0) value = 0.0;
    }
    int32_t& status = result.status[p];
    const bool usable = status == code(Status::converged) || status == code(Status::max_iterations);
    for (int64_t j = 0; j < k; ++j) {
        const double value = result.values(p, j, 0);
        if (usable && (fabs(value) == INFINITY || result.bounds(p, j, 0) == INFINITY)) status = code(Status::non_finite);
        if (status == code(Status::converged) && value == 0.0) status = code(Status::rank_deficient);
    }
}

}  // namespace sst::gevp
