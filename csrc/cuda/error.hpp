// Every CUDA and cuSOLVER call goes through SST_TRY: a failure quotes the call, its status and its place.
#pragma once

#include <cuda_runtime.h>
#include <cusolverDn.h>

#include <stdexcept>
#include <string>

namespace sst::cuda {

inline std::string describe(cudaError_t status) {
    return std::string(cudaGetErrorName(status)) + ", " + cudaGetErrorString(status);
}

inline std::string describe(cusolverStatus_t status) {
    switch (status) {
        case CUSOLVER_STATUS_NOT_INITIALIZED:
            return "CUSOLVER_STATUS_NOT_INITIALIZED";
        case CUSOLVER_STATUS_ALLOC_FAILED:
            return "CUSOLVER_STATUS_ALLOC_FAILED";
        case CUSOLVER_STATUS_INVALID_VALUE:
            return "CUSOLVER_STATUS_INVALID_VALUE";
        case CUSOLVER_STATUS_ARCH_MISMATCH:
            return "CUSOLVER_STATUS_ARCH_MISMATCH";
        case CUSOLVER_STATUS_EXECUTION_FAILED:
            return "CUSOLVER_STATUS_EXECUTION_FAILED";
        case CUSOLVER_STATUS_INTERNAL_ERROR:
            return "CUSOLVER_STATUS_INTERNAL_ERROR";
        case CUSOLVER_STATUS_NOT_SUPPORTED:
            return "CUSOLVER_STATUS_NOT_SUPPORTED";
        default:
            return "cuSOLVER status " + std::to_string(static_cast<int>(status));
    }
}

template <class Status>
void require(Status status, const char* call, const char* file, int line) {
    if (status == Status{}) return;  // both libraries count success as zero
    throw std::runtime_error(std::string(call) + " failed: " + describe(status) + " (" + file + ":" + std::to_string(line) + ")");
}

}  // namespace sst::cuda

#define SST_TRY(call) ::sst::cuda::require((call), #call, __FILE__, __LINE__)
#define SST_TRY_LAUNCH(name) ::sst::cuda::require(cudaGetLastError(), "launch of " name, __FILE__, __LINE__)
