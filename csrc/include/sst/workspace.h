// The workspace is the caller's. The code that carves it also measures it: an arena without memory only counts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "sst/check.h"
#include "sst/views.h"

namespace sst {

class Arena {
public:
    static constexpr size_t alignment = 256;

    Arena() = default;  ///< counting mode: take() returns null and used() grows
    Arena(void* memory, size_t bytes) : memory_(static_cast<char*>(memory)), bytes_(bytes) {}

    bool counting() const { return memory_ == nullptr; }
    size_t used() const { return used_; }

    template <class T>
    T* take(int64_t count) {
        const size_t offset = used_;
        used_ += (static_cast<size_t>(count) * sizeof(T) + alignment - 1) / alignment * alignment;
        if (counting()) return nullptr;
        SST_CHECK(used_ <= bytes_, "workspace too small: needs at least " + std::to_string(used_) + " bytes, has " +
                                       std::to_string(bytes_) + "; ask workspace_bytes() with the same options");
        return reinterpret_cast<T*>(memory_ + offset);
    }

    /// rows x cols for each of `batch` problems, densely packed.
    template <class T>
    Batch<T> matrices(int64_t batch, int64_t rows, int64_t cols) {
        return {take<T>(batch * rows * cols), rows, cols, rows, rows * cols};
    }

private:
    char* memory_ = nullptr;
    size_t bytes_ = 0;
    size_t used_ = 0;
};

}  // namespace sst
