// cuSOLVER's batched eigensolver, by a plain implementation on the host.
#pragma once

#include "cuda_runtime.h"

enum cusolverStatus_t {
    CUSOLVER_STATUS_SUCCESS,
    CUSOLVER_STATUS_NOT_INITIALIZED,
    CUSOLVER_STATUS_ALLOC_FAILED,
    CUSOLVER_STATUS_INVALID_VALUE,
    CUSOLVER_STATUS_ARCH_MISMATCH,
    CUSOLVER_STATUS_EXECUTION_FAILED,
    CUSOLVER_STATUS_INTERNAL_ERROR,
    CUSOLVER_STATUS_NOT_SUPPORTED,
};
enum cusolverEigMode_t { CUSOLVER_EIG_MODE_VECTOR };
enum cublasFillMode_t { CUBLAS_FILL_MODE_LOWER };
enum cudaDataType { CUDA_R_64F };
struct Solver {
    cudaStream_t stream = nullptr;
};
using cusolverDnHandle_t = Solver*;
using cusolverDnParams_t = int*;

inline cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle) { return *handle = new Solver, CUSOLVER_STATUS_SUCCESS; }
inline cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t handle) { return delete handle, CUSOLVER_STATUS_SUCCESS; }
inline cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t stream) {
    return handle->stream = stream, CUSOLVER_STATUS_SUCCESS;
}
inline cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t* made) { return *made = new int, CUSOLVER_STATUS_SUCCESS; }
inline cusolverStatus_t cusolverDnDestroyParams(cusolverDnParams_t made) { return delete made, CUSOLVER_STATUS_SUCCESS; }
cusolverStatus_t cusolverDnXsyevBatched_bufferSize(cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, cublasFillMode_t,
                                                   std::int64_t n, cudaDataType, const void* a, std::int64_t ld, cudaDataType,
                                                   const void* values, cudaDataType, std::size_t* device, std::size_t* host,
                                                   std::int64_t batch);
cusolverStatus_t cusolverDnXsyevBatched(cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, cublasFillMode_t, std::int64_t n,
                                        cudaDataType, void* a, std::int64_t ld, cudaDataType, void* values, cudaDataType,
                                        void* scratch, std::size_t scratch_bytes, void* host, std::size_t host_bytes,
                                        std::int32_t* info, std::int64_t batch);
