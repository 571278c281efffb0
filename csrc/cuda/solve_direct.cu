#include "cuda/direct.cuh"
#include "cuda/solve.hpp"

namespace sst::cuda {

template <class S>
std::size_t direct_bytes(std::int64_t batch, std::int64_t n, std::int64_t k, cudaStream_t stream) {
    Arena arena;
    CudaBackend backend(batch, stream);
    const DirectSolve<S> solve(arena, backend, n, k);
    return arena.used();
}

template <class S>
void solve_direct(Batch<const S> a, Batch<const S> b, std::int64_t batch, std::int64_t k, const Result& result, void* workspace,
                  std::size_t bytes, cudaStream_t stream) {
    const Range range("gevp direct");
    Arena arena(workspace, bytes);
    CudaBackend backend(batch, stream);
    DirectSolve<S>(arena, backend, a.rows, k).run(a, b, result);
}

template std::size_t direct_bytes<float>(std::int64_t, std::int64_t, std::int64_t, cudaStream_t);
template std::size_t direct_bytes<double>(std::int64_t, std::int64_t, std::int64_t, cudaStream_t);
template void solve_direct<float>(Batch<const float>, Batch<const float>, std::int64_t, std::int64_t, const Result&, void*,
                                  std::size_t, cudaStream_t);
template void solve_direct<double>(Batch<const double>, Batch<const double>, std::int64_t, std::int64_t, const Result&, void*,
                                   std::size_t, cudaStream_t);

}  // namespace sst::cuda
