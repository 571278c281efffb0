// The outcome of one problem. Values are shared with sst_kernels/gevp/result.py, where each carries its advice.
#pragma once

#include <cstdint>

namespace sst {

enum class Status : int32_t {
    converged = 0,
    max_iterations = 1,
    not_positive_definite = 2,
    non_finite = 3,
    rank_deficient = 4,
    not_symmetric = 5,
};

constexpr int32_t code(Status status) { return static_cast<int32_t>(status); }

}  // namespace sst
