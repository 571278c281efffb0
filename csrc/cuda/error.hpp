// Every CUDA and cuSOLVER call goes through SST_TRY: a failure quotes the call, its status and its place.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cusolver.hpp"

namespace sst::cuda {

inline std::string describe(cudaError_t status) {
    return std::string(cudaGetErrorName(status)) + ", " + cudaGetErrorString(status);
}

inline std::string describe(SolverStatus status) {
    static const char* const names[] = {"SUCCESS",          "NOT_INITIALIZED",  "ALLOC_FAILED",   "INVALID_VALUE",
                                        "ARCH_MISMATCH",    "MAPPING_ERROR",    "EXECUTION_FAILED", "INTERNAL_ERROR",
                                        "MATRIX_TYPE_NOT_SUPPORTED", "NOT_SUPPORTED"};
    const int code = static_cast<int>(status);
    return code < 10 ? std::string("CUSOLVER_STATUS_") + names[code] : "cuSOLVER status " + std::to_string(code);
}

template <class Status>
void require(Status status, const char* call, const char* file, int line) {
    if (status == Status{}) return;  // both libraries count success as zero
    throw std::runtime_error(std::string(call) + " failed: " + describe(status) + " (" + file + ":" + std::to_string(line) + ")");
}

}  // namespace sst::cuda

#define SST_TRY(call) ::sst::cuda::require((call), #call, __FILE__, __LINE__)
#define SST_TRY_LAUNCH(name) ::sst::cuda::require(cudaGetLastError(), "launch of " name, __FILE__, __LINE__)
