// _native_cpu: the CPU routes. BLAS and LAPACK come from SciPy's Cython capsules, so the module links nothing.
#include <pybind11/functional.h>

#include <functional>

#include "bindings/arguments.hpp"
#include "cpu/direct.hpp"
#include "cpu/parallel.hpp"
#include "gevp/jacobi_davidson.hpp"

namespace py = pybind11;
using namespace sst;
using namespace sst::bindings;

namespace {

template <class F>
void load(F*& slot, const char* module, const char* name) {
    const py::dict exports = py::module_::import(module).attr("__pyx_capi__");
    if (!exports.contains(name)) throw py::import_error(std::string(module) + " does not export " + name + "; sst_kernels needs SciPy >= 1.11");
    PyObject* capsule = PyDict_GetItemString(exports.ptr(), name);
    slot = reinterpret_cast<F*>(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
    if (!slot) throw py::error_already_set();
}

void load_lapack() {
    constexpr const char *blas = "scipy.linalg.cython_blas", *linalg = "scipy.linalg.cython_lapack";
    cpu::Lapack& table = cpu::lapack();
    load(table.dgemm, blas, "dgemm");
    load(table.dtrsm, blas, "dtrsm");
    load(table.strsm, blas, "strsm");
    load(table.dpotrf, linalg, "dpotrf");
    load(table.spotrf, linalg, "spotrf");
    load(table.dsyevd, linalg, "dsyevd");
    load(table.dsygst, linalg, "dsygst");
    load(table.dsytrd, linalg, "dsytrd");
    load(table.dstemr, linalg, "dstemr");
    load(table.dstedc, linalg, "dstedc");
    load(table.dormtr, linalg, "dormtr");
}

template <class S>
void direct(uint64_t a, int64_t a_stride, uint64_t b, int64_t b_stride, int64_t batch, int64_t n, int64_t k, const Result& result,
            int64_t threads) {
    std::vector<cpu::DirectWorkspace> workspaces(std::max<int64_t>(1, std::min(batch, threads)));
    cpu::parallel_for(batch, threads, [&](int64_t p, int64_t worker) {
        cpu::solve_direct<S>(matrices<S>(a, n, a_stride), matrices<S>(b, n, b_stride), k, p, result, workspaces[worker]);
    });
}

/// Bytes of one worker, which solves `chunk` problems at a time.
template <class S>
size_t worker_bytes(int64_t chunk, int64_t n, const Options& options) {
    cpu::CpuBackend backend(chunk);
    Arena arena;
    gevp::solve_dense<cpu::CpuBackend, S>(backend, arena, matrices<S>(0, n, n * n), matrices<S>(0, n, n * n), options, {});
    return arena.used();
}

int64_t workers(int64_t batch, int64_t chunk, int64_t threads) {
    SST_CHECK(batch >= 0 && chunk >= 1 && threads >= 1, "chunks of at least one problem and at least one thread are expected");
    return std::max<int64_t>(1, std::min((batch + chunk - 1) / chunk, threads));
}

/// Threads take chunks of problems in turn; a chunk of one is fastest, larger ones run the batched control flow as a GPU does. With
/// options.afford and a factor a problem that did not converge goes on by the direct route, and its cycles c become -1 - c.
template <class S>
void iterate(uint64_t a, int64_t a_stride, uint64_t b, int64_t b_stride, int64_t batch, int64_t n, const Options& options,
             const Result& result, uint64_t workspace, uint64_t bytes, int64_t threads, int64_t chunk) {
    const size_t share = bytes / workers(batch, chunk, threads) / Arena::alignment * Arena::alignment;
    const bool leave = options.afford > 0.0 && options.preconditioner == Preconditioner::cholesky;
    std::vector<cpu::DirectWorkspace> workspaces(workers(batch, chunk, threads));
    cpu::parallel_for((batch + chunk - 1) / chunk, threads, [&](int64_t task, int64_t worker) {
        const int64_t first = task * chunk;
        cpu::CpuBackend backend(std::min(chunk, batch - first));
        Arena arena(pointer<char>(workspace) + worker * share, share);
        auto skip = [first](auto view) { return view.data += first * view.stride, view; };
        const Result own{skip(result.values), skip(result.vectors), skip(result.bounds), result.status + first, result.cycles + first};
        const auto pencil = gevp::solve_dense(backend, arena, skip(matrices<S>(a, n, a_stride)), skip(matrices<S>(b, n, b_stride)), options, own);
        for (int64_t p = 0; leave && p < backend.batch(); ++p) {
            if (own.status[p] != code(Status::max_iterations)) continue;
            cpu::solve_factored<S>(pencil.a, pencil.b, pencil.factor.at(p), pencil.scale_a[p], pencil.scale_b[p], options.k, p, own,
                                   workspaces[worker]);
            own.cycles[p] = -1 - own.cycles[p];
        }
    });
}

using Callback = std::function<void(int, uint64_t, uint64_t, int64_t)>;

size_t operator_problem(int64_t n, const Callback* callback, const Options& options, const Result& result, Arena arena) {
    const auto apply = [&](int which, const double* x, double* y, int64_t columns) {
        (*callback)(which, reinterpret_cast<uintptr_t>(x), reinterpret_cast<uintptr_t>(y), columns);
    };
    cpu::CpuBackend backend(1);
    gevp::solve_operator(backend, arena, n, apply, options, result);
    return arena.used();
}

}  // namespace

PYBIND11_MODULE(_native_cpu, module) {
    module.doc() = "Symmetric-definite generalized eigenproblems on the CPU; called through sst_kernels.gevp.";
    load_lapack();
    bind_options(module);
    module.def(
        "solve_direct",
        [](uint64_t a, int64_t a_stride, uint64_t b, int64_t b_stride, bool single, int64_t batch, int64_t n, int64_t k,
           uint64_t values, uint64_t vectors, uint64_t bounds, uint64_t status, uint64_t cycles, int64_t threads) {
            const Result result = outputs(n, k, values, vectors, bounds, status, cycles);
            check_pencils(a, a_stride, b, b_stride, batch, n, threads);
            const py::gil_scoped_release unlocked;
            (single ? direct<float> : direct<double>)(a, a_stride, b, b_stride, batch, n, k, result, threads);
        },
        py::arg("a"), py::arg("a_stride"), py::arg("b"), py::arg("b_stride"), py::arg("single"), py::arg("batch"), py::arg("n"),
        py::arg("k"), py::arg("values"), py::arg("vectors"), py::arg("bounds"), py::arg("status"), py::arg("cycles"),
        py::arg("threads"));
    module.def(
        "workspace_bytes",
        [](int64_t batch, int64_t n, const Options& options, bool single, int64_t threads, int64_t chunk) {
            const int64_t count = workers(batch, chunk, threads);
            return count * (single ? worker_bytes<float> : worker_bytes<double>)(std::min(chunk, std::max<int64_t>(batch, 1)), n, options);
        },
        py::arg("batch"), py::arg("n"), py::arg("options"), py::arg("single"), py::arg("threads"), py::arg("chunk") = 1);
    module.def(
        "solve_dense",
        [](uint64_t a, int64_t a_stride, uint64_t b, int64_t b_stride, bool single, int64_t batch, int64_t n, const Options& options,
           uint64_t values, uint64_t vectors, uint64_t bounds, uint64_t status, uint64_t cycles, uint64_t workspace, uint64_t bytes,
           int64_t threads, int64_t chunk) {
            const Result result = outputs(n, options.k, values, vectors, bounds, status, cycles);
            check_pencils(a, a_stride, b, b_stride, batch, n, threads);
            SST_CHECK(workspace != 0, "the workspace must have an address");
            const py::gil_scoped_release unlocked;
            (single ? iterate<float> : iterate<double>)(a, a_stride, b, b_stride, batch, n, options, result, workspace, bytes, threads,
                                                        chunk);
        },
        py::arg("a"), py::arg("a_stride"), py::arg("b"), py::arg("b_stride"), py::arg("single"), py::arg("batch"), py::arg("n"),
        py::arg("options"), py::arg("values"), py::arg("vectors"), py::arg("bounds"), py::arg("status"), py::arg("cycles"),
        py::arg("workspace"), py::arg("workspace_bytes"), py::arg("threads"), py::arg("chunk") = 1);
    module.def(
        "operator_workspace_bytes",
        [](int64_t n, const Options& options, int64_t) { return operator_problem(n, nullptr, options, {}, Arena()); },
        py::arg("n"), py::arg("options"), py::arg("threads"));
    module.def(
        "solve_operator",
        [](const Callback& apply, int64_t n, const Options& options, uint64_t values, uint64_t vectors, uint64_t bounds,
           uint64_t status, uint64_t cycles, uint64_t workspace, uint64_t bytes, int64_t) {
            SST_CHECK(workspace != 0, "the workspace must have an address");
            operator_problem(n, &apply, options, outputs(n, options.k, values, vectors, bounds, status, cycles),
                             Arena(pointer<char>(workspace), bytes));
        },
        py::arg("apply"), py::arg("n"), py::arg("options"), py::arg("values"), py::arg("vectors"), py::arg("bounds"),
        py::arg("status"), py::arg("cycles"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("threads"));
}
