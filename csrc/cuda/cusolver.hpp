// cuSOLVER's batched eigensolver, loaded when a problem first needs it: orders up to jacobi_limit() never do, so neither building nor
// importing the module takes cuSOLVER. torch's wheels bring it into the process; SST_CUSOLVER names another file.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace sst::cuda {

/// cusolverStatus_t, of which only success is told apart.
enum class SolverStatus : int { success = 0 };

/// The part of cuSOLVER 11.7.1 (CUDA 12.6.2) and later that is used. Constants: cusolver_common.h, cublas_api.h, library_types.h.
struct CuSolver {
    using Handle = void*;
    static constexpr int vectors = 1, lower = 0, real64 = 1;

    SolverStatus (*create)(Handle*);
    SolverStatus (*destroy)(Handle);
    SolverStatus (*set_stream)(Handle, cudaStream_t);
    SolverStatus (*create_parameters)(Handle*);
    SolverStatus (*destroy_parameters)(Handle);
    SolverStatus (*buffer_size)(Handle, Handle, int job, int uplo, std::int64_t n, int type_a, const void* a, std::int64_t ld, int type_w,
                                const void* w, int compute, std::size_t* device, std::size_t* host, std::int64_t batch);
    SolverStatus (*syev)(Handle, Handle, int job, int uplo, std::int64_t n, int type_a, void* a, std::int64_t ld, int type_w, void* w,
                         int compute, void* device, std::size_t device_bytes, void* host, std::size_t host_bytes, int* info,
                         std::int64_t batch);
    int version = 0;  ///< 1000 major + 100 minor + patch

    /// The one table of the process. Throws where there is no library, or an older one.
    static const CuSolver& get() {
        static const CuSolver table = load();
        return table;
    }

private:
    static CuSolver load() {
        const char* const named = std::getenv("SST_CUSOLVER");
        std::string tried;
        void* library = nullptr;
        for (const char* name : {named ? named : "libcusolver.so.12", named ? named : "libcusolver.so.11"}) {
            library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
            if (library) break;
            tried += std::string("; ") + dlerror();
        }
        if (!library)
            throw std::runtime_error(
                "problems beyond the own eigensolver's order need cuSOLVER 11.7.1 (CUDA 12.6.2) or newer, and none can be loaded: "
                "pip install nvidia-cusolver, or set SST_CUSOLVER to libcusolver.so" + tried);
        CuSolver table;
        const auto find = [library](const char* name) { return dlsym(library, name); };
        if (const auto version = reinterpret_cast<SolverStatus (*)(int*)>(find("cusolverGetVersion"))) version(&table.version);
        const auto fill = [&](auto& slot, const char* name) {
            slot = reinterpret_cast<std::decay_t<decltype(slot)>>(find(name));
            if (!slot)
                throw std::runtime_error("cuSOLVER " + std::to_string(table.version / 1000) + "." + std::to_string(table.version / 100 % 10) +
                                         "." + std::to_string(table.version % 100) + " has no " + name +
                                         "; 11.7.1 (CUDA 12.6.2) or newer is needed: pip install --upgrade nvidia-cusolver, or set SST_CUSOLVER");
        };
        fill(table.create, "cusolverDnCreate");
        fill(table.destroy, "cusolverDnDestroy");
        fill(table.set_stream, "cusolverDnSetStream");
        fill(table.create_parameters, "cusolverDnCreateParams");
        fill(table.destroy_parameters, "cusolverDnDestroyParams");
        fill(table.buffer_size, "cusolverDnXsyevBatched_bufferSize");
        fill(table.syev, "cusolverDnXsyevBatched");
        return table;
    }
};

}  // namespace sst::cuda
