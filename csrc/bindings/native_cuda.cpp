// _native_cuda: the GPU routes. Every call works on the caller's stream and workspace of the current device, and none of the
// addresses is read on the host.
#include "bindings/arguments.hpp"
#include "cuda/solve.hpp"

namespace py = pybind11;
using namespace sst;
using namespace sst::bindings;

namespace {

cudaStream_t stream_of(uint64_t address) { return reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(address)); }

}  // namespace

PYBIND11_MODULE(_native_cuda, module) {
    module.doc() = "Symmetric-definite generalized eigenproblems on a GPU; called through sst_kernels.gevp.";
    bind_options(module);
    module.def(
        "direct_workspace_bytes",
        [](int64_t batch, int64_t n, int64_t k, bool single, uint64_t stream) {
            return (single ? cuda::direct_bytes<float> : cuda::direct_bytes<double>)(batch, n, k, stream_of(stream));
        },
        py::arg("batch"), py::arg("n"), py::arg("k"), py::arg("single"), py::arg("stream"));
    module.def(
        "solve_direct",
        [](uint64_t a, int64_t a_stride, uint64_t b, int64_t b_stride, bool single, int64_t batch, int64_t n, int64_t k,
           uint64_t values, uint64_t vectors, uint64_t bounds, uint64_t status, uint64_t cycles, uint64_t workspace, size_t bytes,
           uint64_t stream) {
            const Result result = outputs(n, k, values, vectors, bounds, status, cycles);
            const py::gil_scoped_release unlocked;
            void* const memory = pointer<void>(workspace);
            if (single)
                cuda::solve_direct<float>(matrices<float>(a, n, a_stride), matrices<float>(b, n, b_stride), batch, k, result, memory,
                                          bytes, stream_of(stream));
            else
                cuda::solve_direct<double>(matrices<double>(a, n, a_stride), matrices<double>(b, n, b_stride), batch, k, result,
                                           memory, bytes, stream_of(stream));
        },
        py::arg("a"), py::arg("a_stride"), py::arg("b"), py::arg("b_stride"), py::arg("single"), py::arg("batch"), py::arg("n"),
        py::arg("k"), py::arg("values"), py::arg("vectors"), py::arg("bounds"), py::arg("status"), py::arg("cycles"),
        py::arg("workspace"), py::arg("bytes"), py::arg("stream"));
    module.def(
        "workspace_bytes",
        [](int64_t batch, int64_t n, const Options& options, bool single, uint64_t stream) {
            return (single ? cuda::iterative_bytes<float> : cuda::iterative_bytes<double>)(batch, n, options, stream_of(stream));
        },
        py::arg("batch"), py::arg("n"), py::arg("options"), py::arg("single"), py::arg("stream"));
    module.def(
        "solve_dense",
        [](uint64_t a, int64_t a_stride, uint64_t b, int64_t b_stride, bool single, int64_t batch, int64_t n, const Options& options,
           uint64_t values, uint64_t vectors, uint64_t bounds, uint64_t status, uint64_t cycles, uint64_t workspace, size_t bytes,
           uint64_t stream) {
            const Result result = outputs(n, options.k, values, vectors, bounds, status, cycles);
            const py::gil_scoped_release unlocked;
            void* const memory = pointer<void>(workspace);
            if (single)
                cuda::solve_iterative<float>(matrices<float>(a, n, a_stride), matrices<float>(b, n, b_stride), batch, options, result,
                                             memory, bytes, stream_of(stream));
            else
                cuda::solve_iterative<double>(matrices<double>(a, n, a_stride), matrices<double>(b, n, b_stride), batch, options,
                                              result, memory, bytes, stream_of(stream));
        },
        py::arg("a"), py::arg("a_stride"), py::arg("b"), py::arg("b_stride"), py::arg("single"), py::arg("batch"), py::arg("n"),
        py::arg("options"), py::arg("values"), py::arg("vectors"), py::arg("bounds"), py::arg("status"), py::arg("cycles"),
        py::arg("workspace"), py::arg("bytes"), py::arg("stream"));
    module.def(
        "operator_workspace_bytes",
        [](int64_t n, const Options& options, uint64_t stream) { return cuda::operator_bytes(n, options, stream_of(stream)); },
        py::arg("n"), py::arg("options"), py::arg("stream"));
    module.def(
        "solve_operator",
        [](const py::function& apply, int64_t n, const Options& options, uint64_t values, uint64_t vectors, uint64_t bounds,
           uint64_t status, uint64_t cycles, uint64_t workspace, size_t bytes, uint64_t stream) {
            const cuda::Products products = [&](int which, const double* x, double* y, int64_t columns) {
                apply(which, reinterpret_cast<uintptr_t>(x), reinterpret_cast<uintptr_t>(y), columns);
            };
            cuda::solve_operator(products, n, options, outputs(n, options.k, values, vectors, bounds, status, cycles),
                                 pointer<void>(workspace), bytes, stream_of(stream));
        },
        py::arg("apply"), py::arg("n"), py::arg("options"), py::arg("values"), py::arg("vectors"), py::arg("bounds"),
        py::arg("status"), py::arg("cycles"), py::arg("workspace"), py::arg("bytes"), py::arg("stream"));
}
