// cuSOLVER's batched eigensolver behind one typed call. It takes packed matrices and at most 2^31 - 1 entries at a time.
#pragma once

#include <algorithm>

#include "handles.hpp"
#include "sst/views.h"
#include "sst/workspace.h"

namespace sst::cuda {

class BatchedEigensolver {
public:
    BatchedEigensolver() = default;

    /// Scratch for `batch` problems of order n, values included. The size is cuSOLVER's own answer, asked in both modes.
    BatchedEigensolver(Arena& arena, Handles& handles, std::int64_t n, std::int64_t batch)
        : handles_(&handles), chunk_(std::clamp<std::int64_t>(0x7fffffff / (n * n), 1, std::max<std::int64_t>(batch, 1))) {
        std::size_t device = 0, host = 0;
        SST_TRY(cusolverDnXsyevBatched_bufferSize(handles.solver, handles.parameters, CUSOLVER_EIG_MODE_VECTOR,
                                                  CUBLAS_FILL_MODE_LOWER, n, CUDA_R_64F, nullptr, n, CUDA_R_64F, nullptr,
                                                  CUDA_R_64F, &device, &host, chunk_));
        bytes_ = device;
        host_bytes_ = host;
        handles.host.resize(std::max(handles.host.size(), host));
        scratch_ = arena.take<char>(static_cast<std::int64_t>(device));
        info_ = arena.take<std::int32_t>(std::max<std::int64_t>(batch, 1));
    }

    /// `a` (count packed n x n, lower triangle) becomes the eigenvectors of `values` [count, n], ascending. info()[i] != 0:
    /// failed.
    void operator()(double* a, double* values, std::int64_t n, std::int64_t count) {
        for (std::int64_t first = 0; first < count; first += chunk_) {
            const std::int64_t now = std::min(chunk_, count - first);
            SST_TRY(cusolverDnXsyevBatched(handles_->solver, handles_->parameters, CUSOLVER_EIG_MODE_VECTOR,
                                           CUBLAS_FILL_MODE_LOWER, n, CUDA_R_64F, a + first * n * n, n, CUDA_R_64F,
                                           values + first * n, CUDA_R_64F, scratch_, bytes_, handles_->host.data(), host_bytes_,
                                           info_ + first, now));
        }
    }

    const std::int32_t* info() const { return info_; }

private:
    Handles* handles_ = nullptr;
    std::int64_t chunk_ = 1;
    std::size_t bytes_ = 0;
    char* scratch_ = nullptr;
    std::int32_t* info_ = nullptr;
    std::size_t host_bytes_ = 0;
};

}  // namespace sst::cuda
