#include "cuda/cuda_backend.hpp"
#include "cuda/solve.hpp"
#include "gevp/jacobi_davidson.hpp"

namespace sst::cuda {

template <class S>
std::size_t iterative_bytes(std::int64_t batch, std::int64_t n, const Options& options, cudaStream_t stream) {
    Arena arena;
    CudaBackend backend(batch, stream);
    const Batch<const S> unread{nullptr, n, n, n, n * n};
    gevp::solve_dense(backend, arena, unread, unread, options, Result{});
    return arena.used();
}

template <class S>
void solve_iterative(Batch<const S> a, Batch<const S> b, std::int64_t batch, const Options& options, const Result& result,
                     void* workspace, std::size_t bytes, cudaStream_t stream) {
    const Range range("gevp jacobi_davidson");
    Arena arena(workspace, bytes);
    CudaBackend backend(batch, stream);
    gevp::solve_dense(backend, arena, a, b, options, result);
}

std::size_t operator_bytes(std::int64_t n, const Options& options, cudaStream_t stream) {
    Arena arena;
    CudaBackend backend(1, stream);
    gevp::solve_operator(backend, arena, n, Products{}, options, Result{});
    return arena.used();
}

void solve_operator(const Products& products, std::int64_t n, const Options& options, const Result& result, void* workspace,
                    std::size_t bytes, cudaStream_t stream) {
    const Range range("gevp operator");
    Arena arena(workspace, bytes);
    CudaBackend backend(1, stream);
    gevp::solve_operator(backend, arena, n, products, options, result);
}

template std::size_t iterative_bytes<float>(std::int64_t, std::int64_t, const Options&, cudaStream_t);
template std::size_t iterative_bytes<double>(std::int64_t, std::int64_t, const Options&, cudaStream_t);
template void solve_iterative<float>(Batch<const float>, Batch<const float>, std::int64_t, const Options&, const Result&, void*,
                                     std::size_t, cudaStream_t);
template void solve_iterative<double>(Batch<const double>, Batch<const double>, std::int64_t, const Options&, const Result&,
                                      void*, std::size_t, cudaStream_t);

}  // namespace sst::cuda
