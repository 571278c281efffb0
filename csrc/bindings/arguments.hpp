// What both native modules take from Python: addresses as integers (tensor.data_ptr()), shapes, options. No torch here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "sst/check.h"
#include "sst/options.h"
#include "sst/result.h"
#include "sst/views.h"

namespace sst::bindings {

namespace py = pybind11;

template <class T>
T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

/// [batch, n, n] symmetric matrices, `stride` entries apart.
template <class S>
Batch<const S> matrices(uint64_t address, int64_t n, int64_t stride) {
    return {pointer<const S>(address), n, n, n, stride};
}

/// What an address cannot tell: shapes and strides that would read or write outside of any tensor of that shape.
inline void check_pencils(uint64_t a, int64_t a_stride, uint64_t b, int64_t b_stride, int64_t batch, int64_t n, int64_t threads) {
    SST_CHECK(a != 0 && b != 0, "A and B must have addresses");
    SST_CHECK(batch >= 1 && n >= 1 && n < 32768, "a batch of at least one problem of order 1 to 32767 is expected");
    SST_CHECK(a_stride >= n * n && b_stride >= n * n, "strides must be at least n * n");
    SST_CHECK(threads >= 1, "at least one thread is expected");
}

/// Contiguous outputs: values [batch, k], vectors [batch, k, n] (rows are the vectors), bounds [batch, k], status and cycles [batch].
inline Result outputs(int64_t n, int64_t k, uint64_t values, uint64_t vectors, uint64_t bounds, uint64_t status, uint64_t cycles) {
    SST_CHECK(1 <= k && k <= n, "k must be between 1 and n");
    SST_CHECK(values && vectors && bounds && status && cycles, "every output must have an address");
    return {{pointer<double>(values), k, 1, k, k},
            {pointer<double>(vectors), n, k, n, n * k},
            {pointer<double>(bounds), k, 1, k, k},
            pointer<int32_t>(status),
            pointer<int32_t>(cycles)};
}

/// Both modules show Options under the same names.
inline void bind_options(py::module_& module) {
    py::class_<Options>(module, "Options", py::module_local())  // both modules may be loaded at once
        .def_static("for_problem", &Options::for_problem, py::arg("n"), py::arg("k"), py::arg("wide") = true)
        .def_readwrite("k", &Options::k)
        .def_readwrite("block", &Options::block)
        .def_readwrite("basis", &Options::basis)
        .def_readwrite("keep", &Options::keep)
        .def_readwrite("previous", &Options::previous)
        .def_readwrite("max_cycles", &Options::max_cycles)
        .def_readwrite("inner_steps", &Options::inner_steps)
        .def_readwrite("tolerance", &Options::tolerance)
        .def_readwrite("seed", &Options::seed)
        .def_readwrite("afford", &Options::afford)
        .def_readwrite("verify", &Options::verify)
        .def_property(
            "preconditioner", [](const Options& options) { return static_cast<int>(options.preconditioner); },
            [](Options& options, int value) { options.preconditioner = static_cast<Preconditioner>(value); });
}

}  // namespace sst::bindings
