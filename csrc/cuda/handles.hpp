// What is costly to make or must outlive an asynchronous call, pooled per device and stream: cuSOLVER's handle and its host
// buffer, and the pinned word that a compaction is read through.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "error.hpp"

namespace sst::cuda {

struct Handles {
    cudaStream_t stream;
    std::int64_t* pinned = nullptr;
    std::vector<char> host;

    explicit Handles(cudaStream_t stream) : stream(stream) { SST_TRY(cudaMallocHost(&pinned, sizeof(std::int64_t))); }
    Handles(const Handles&) = delete;
    Handles& operator=(const Handles&) = delete;
    ~Handles() {
        cudaFreeHost(pinned);
        if (parameters_) CuSolver::get().destroy_parameters(parameters_);
        if (solver_) CuSolver::get().destroy(solver_);
    }

    const CuSolver& library() const { return CuSolver::get(); }
    CuSolver::Handle solver() {
        if (!solver_) {
            SST_TRY(library().create(&solver_));
            SST_TRY(library().set_stream(solver_, stream));
        }
        return solver_;
    }
    CuSolver::Handle parameters() {
        if (!parameters_) SST_TRY(library().create_parameters(&parameters_));
        return parameters_;
    }

private:
    CuSolver::Handle solver_ = nullptr, parameters_ = nullptr;
};

/// Borrows handles for one solve; two solves at once on the same stream get two.
class Lease {
public:
    explicit Lease(cudaStream_t stream) {
        int device = 0;
        SST_TRY(cudaGetDevice(&device));
        key_ = {device, stream};
        const std::lock_guard<std::mutex> locked(mutex());
        auto& idle = pool()[key_];
        if (idle.empty()) {
            handles_ = std::make_unique<Handles>(stream);
        } else {
            handles_ = std::move(idle.back());
            idle.pop_back();
        }
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() {
        const std::lock_guard<std::mutex> locked(mutex());
        pool()[key_].push_back(std::move(handles_));
    }
    Handles& operator*() const { return *handles_; }
    Handles* operator->() const { return handles_.get(); }

private:
    using Key = std::pair<int, cudaStream_t>;
    static std::mutex& mutex() {
        static std::mutex one;
        return one;
    }
    /// Never destroyed: at process exit the driver may be gone before this is.
    static std::map<Key, std::vector<std::unique_ptr<Handles>>>& pool() {
        static auto* const all = new std::map<Key, std::vector<std::unique_ptr<Handles>>>;
        return *all;
    }

    Key key_;
    std::unique_ptr<Handles> handles_;
};

}  // namespace sst::cuda
