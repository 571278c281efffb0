// cuSOLVER's batched eigensolver behind one typed call. It takes packed matrices and counts their bytes in 32 bits.
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
        : handles_(&handles),
          chunk_(std::clamp<std::int64_t>(0x7fffffff / (n * n * std::int64_t(sizeof(double))), 1, std::max<std::int64_t>(batch, 1))) {
        using S = CuSolver;
        SST_TRY(handles.library().buffer_size(handles.solver(), handles.parameters(), S::vectors, S::lower, n, S::real64, nullptr, n,
                                              S::real64, nullptr, S::real64, &bytes_, &host_bytes_, chunk_));
        handles.host.resize(std::max(handles.host.size(), host_bytes_));
        scratch_ = arena.take<char>(static_cast<std::int64_t>(bytes_));
        info_ = arena.take<std::int32_t>(std::max<std::int64_t>(batch, 1));
    }

    /// `a` (count packed n x n, lower triangle) becomes the eigenvectors of `values` [count, n], ascending. info()[i] != 0:
    /// failed. The scratch is zeroed first: 11.7.1 gives wrong results on what lies in it.
    void operator()(double* a, double* values, std::int64_t n, std::int64_t count) {
        using S = CuSolver;
        for (std::int64_t first = 0; first < count; first += chunk_) {
            const std::int64_t now = std::min(chunk_, count - first);
            SST_TRY(cudaMemsetAsync(scratch_, 0, bytes_, handles_->stream));
            SST_TRY(handles_->library().syev(handles_->solver(), handles_->parameters(), S::vectors, S::lower, n, S::real64,
                                             a + first * n * n, n, S::real64, values + first * n, S::real64, scratch_, bytes_,
                                             handles_->host.data(), host_bytes_, info_ + first, now));
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
