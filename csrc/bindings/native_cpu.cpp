// _native_cpu: the CPU routes. BLAS and LAPACK come from SciPy's Cython capsules, so the module links nothing.
#include "bindings/arguments.hpp"
#include "cpu/direct.hpp"
#include "cpu/parallel.hpp"

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
    load(table.dsyevr, linalg, "dsyevr");
    load(table.dsygst, linalg, "dsygst");
}

template <class S>
void direct(uint64_t a, int64_t a_stride, uint64_t b, int64_t b_stride, int64_t batch, int64_t n, int64_t k, const Result& result,
            int64_t threads) {
    std::vector<cpu::DirectWorkspace> workspaces(std::max<int64_t>(1, std::min(batch, threads)));
    cpu::parallel_for(batch, threads, [&](int64_t p, int64_t worker) {
        cpu::solve_direct<S>(matrices<S>(a, n, a_stride), matrices<S>(b, n, b_stride), k, p, result, workspaces[worker]);
    });
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
            const py::gil_scoped_release unlocked;
            (single ? direct<float> : direct<double>)(a, a_stride, b, b_stride, batch, n, k, result, threads);
        },
        py::arg("a"), py::arg("a_stride"), py::arg("b"), py::arg("b_stride"), py::arg("single"), py::arg("batch"), py::arg("n"),
        py::arg("k"), py::arg("values"), py::arg("vectors"), py::arg("bounds"), py::arg("status"), py::arg("cycles"),
        py::arg("threads"));
}
