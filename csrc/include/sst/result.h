// Where a solve writes. All pointers are the caller's, on the backend's device; problem p owns the p-th slice.
#pragma once

#include <cstdint>

#include "sst/views.h"

namespace sst {

struct Result {
    Batch<double> values;   ///< k x 1 per problem, descending
    Batch<double> vectors;  ///< n x k per problem, v' B v = 1, largest component positive
    Batch<double> bounds;   ///< k x 1 per problem, sqrt(r' B^-1 r) >= distance to the nearest eigenvalue
    int32_t* status = nullptr;   ///< [batch], see status.h
    int32_t* cycles = nullptr;   ///< [batch] restart cycles taken
};

}  // namespace sst
