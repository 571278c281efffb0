// Views of batched column-major storage. Column-major is stated here and nowhere else: entry (row, col) of problem p lies at
// data[p * stride + col * ld + row]. A torch tensor [..., n, n] of symmetric matrices is the same memory read either way;
// vectors leave as rows ([..., k, n] row-major is n x k column-major).
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define SST_HD __host__ __device__
#else
#define SST_HD
#endif

// A lambda that the CPU backend calls in a loop and the CUDA backend in a kernel (nvcc --extended-lambda).
#define SST_LAMBDA [=] SST_HD

namespace sst {

/// The same matrix shape for every problem of a batch. `rows`, `cols`: one problem. Does not own.
template <class T>
struct Batch {
    T* data = nullptr;
    int64_t rows = 0;
    int64_t cols = 0;
    int64_t ld = 0;
    int64_t stride = 0;

    SST_HD T* at(int64_t problem) const { return data + problem * stride; }
    SST_HD T& operator()(int64_t problem, int64_t row, int64_t col) const {
        return data[problem * stride + col * ld + row];
    }
    SST_HD Batch columns(int64_t first, int64_t count) const {
        return {data + first * ld, rows, count, ld, stride};
    }
    SST_HD Batch block(int64_t row, int64_t col, int64_t height, int64_t width) const {
        return {data + col * ld + row, height, width, ld, stride};
    }
    template <class U, class = std::enable_if_t<std::is_same_v<U, const T> && !std::is_const_v<T>>>
    operator Batch<U>() const {
        return {data, rows, cols, ld, stride};
    }
};

/// The problems that an operation touches: `index[0..count)` in device memory, or all of 0..count when `index` is null.
struct Active {
    const int64_t* index = nullptr;
    int64_t count = 0;

    SST_HD int64_t operator[](int64_t slot) const { return index ? index[slot] : slot; }
};

enum class Op { none, transpose };

}  // namespace sst
