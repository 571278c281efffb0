// Counter-based random numbers: a pure function of (seed, column, row), so a start block is the same on the CPU and on the
// GPU, alone and in company. Uniform in (-1, 1) from 53 bits: exact arithmetic, no transcendental that devices round apart.
#pragma once

#include <cstdint>

#include "sst/views.h"

namespace sst {

/// SplitMix64 finaliser (Steele, Lea, Flood 2014).
SST_HD inline uint64_t mix(uint64_t z) {
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

SST_HD inline double random_entry(uint64_t seed, int64_t column, int64_t row) {
    const uint64_t bits = mix(mix(mix(seed) ^ static_cast<uint64_t>(column)) ^ static_cast<uint64_t>(row));
    return static_cast<double>(static_cast<int64_t>(bits >> 11) - (int64_t{1} << 52)) * 0x1p-52;
}

}  // namespace sst
