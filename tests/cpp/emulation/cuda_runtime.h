// The part of CUDA that csrc/cuda uses, on the host: enough to run its kernels, launches and memory calls unchanged but for
// what tests/emulation.py rewrites (launches, dynamic shared memory, the tensor-core instruction). See runtime.cpp for how.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define EMULATED __attribute__((visibility("default")))

// ---- the host's side -----------------------------------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
using cudaStream_t = struct CUstream_st*;

extern "C" {
EMULATED cudaError_t cudaMalloc(void** memory, std::size_t bytes);
EMULATED cudaError_t cudaFree(void* memory);
EMULATED cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
EMULATED cudaError_t cudaStreamSynchronize(cudaStream_t stream);
EMULATED cudaError_t cudaGetLastError();
EMULATED const char* cudaGetErrorString(cudaError_t error);
EMULATED void emulation_seed(std::uint64_t seed);
EMULATED std::uint64_t emulation_waits();
}
cudaError_t cudaMallocHost(std::int64_t** memory, std::size_t bytes);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* target, int value, std::size_t bytes, cudaStream_t stream);
const char* cudaGetErrorName(cudaError_t error);
inline cudaError_t cudaDeviceSynchronize() { return cudaStreamSynchronize(nullptr); }
template <class T>
cudaError_t cudaMallocManaged(T** memory, std::size_t bytes) {
    *memory = static_cast<T*>(std::malloc(bytes));
    return cudaSuccess;
}
#define cudaFuncSetAttribute(kernel, attribute, bytes) ::emulation::allow(#kernel, bytes)

// ---- the device's side ---------------------------------------------------------------------------------------------------------
struct Index {
    unsigned x;
};
inline thread_local Index threadIdx, blockIdx;

struct alignas(8) float2 {
    float x, y;
};

namespace emulation {

struct Grid {
    unsigned ctas, threads;
    std::size_t shared = 0;
    cudaStream_t stream = nullptr;
};

/// Queues a launch of the kernel of that name: nothing runs before the host waits for the stream.
void launch(const char* kernel, Grid grid, std::function<void()> thread);
/// Queues a call of a library, which sees the device's memory as a kernel does.
void enqueue(cudaStream_t stream, std::function<void()> work);
/// Lets launches of a kernel (template arguments do not count) ask for that much shared memory.
cudaError_t allow(const char* kernel, int bytes);
/// Waits for all threads of the CTA at this place of the source; whether `predicate` held for any.
bool barrier(const char* file, int line, bool predicate = false);
/// Hands `value` (up to kSlot bytes) to the warp; what lane l handed in lies at l * kSlot until the thread's next such call.
constexpr int kSlot = 16;
const char* exchange(const char* file, int line, const void* value, std::size_t bytes);
/// What the launch asked for, and an array of the kernel: full of NaN when a CTA begins, and not to be left.
char* dynamic_shared();
char* static_shared(const char* name, std::size_t bytes);

template <class T>
T handed_in(const char* warp, unsigned lane) {
    T value;
    std::memcpy(&value, warp + lane * kSlot, sizeof value);
    return value;
}

template <class T>
T shuffled(const char* file, int line, T value, int offset) {
    return handed_in<T>(exchange(file, line, &value, sizeof value), threadIdx.x % 32 ^ unsigned(offset));
}

inline unsigned ballot(const char* file, int line, bool vote) {
    const char* const warp = exchange(file, line, &vote, sizeof vote);
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane) bits |= unsigned(handed_in<bool>(warp, lane)) << lane;
    return bits;
}

/// mma.m8n8k4 in double (PTX ISA): lane l holds A(l/4, l%4), B(l%4, l/4) and C(l/4, 2 (l%4) + {0, 1}).
inline void mma_8x8x4(const char* file, int line, double (&c)[2], double a, double b) {
    const double mine[2] = {a, b};
    const char* const warp = exchange(file, line, mine, sizeof mine);
    const unsigned row = threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);
    for (unsigned h = 0; h < 2; ++h)
        for (unsigned k = 0; k < 4; ++k) {
            const double right = handed_in<double>(warp + sizeof a, 4 * (column + h) + k);
            c[h] = std::fma(handed_in<double>(warp, 4 * row + k), right, c[h]);
        }
}

/// mma.m16n8k4: A(l/4 + {0, 8}, l%4), B(l%4, l/4), C(l/4 + {0, 8}, 2 (l%4) + {0, 1}).
inline void mma_16x8x4(const char* file, int line, double (&upper)[2], double (&lower)[2], double a_upper, double a_lower, double b) {
    mma_8x8x4(file, line, upper, a_upper, b);
    mma_8x8x4(file, line, lower, a_lower, b);
}

}  // namespace emulation

#define __syncthreads() ::emulation::barrier(__FILE__, __LINE__)
#define __syncthreads_or(predicate) ::emulation::barrier(__FILE__, __LINE__, (predicate))
#define __shfl_xor_sync(mask, value, offset) ::emulation::shuffled(__FILE__, __LINE__, value, offset)
#define __ballot_sync(mask, vote) ::emulation::ballot(__FILE__, __LINE__, vote)

using std::isfinite, std::isnan, std::max, std::min;
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline long long __double_as_longlong(double x) {
    long long bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline double __longlong_as_double(long long bits) {
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline unsigned long long atomicMax(unsigned long long* target, unsigned long long value) {
    const unsigned long long before = *target;
    *target = std::max(before, value);
    return before;
}
