// How the emulation runs. Every launch, copy and library call waits in one queue until the host waits for a stream, and device
// memory cannot be touched outside that: a host that reads a result too early, or device memory at all, faults.
//
// CTAs run one after another, and a CTA's threads are fibers of one thread of the host, all in random orders. A fiber runs until
// a barrier or a warp operation, and goes on when all threads of its CTA or warp have come to the same place in the source; a
// warp runs as far as it gets before the next one does. What depends on the order of threads between barriers therefore depends
// on the seed, and threads that part ways at a barrier are an error of the launch. A kernel whose first thread meets no barrier
// runs as a plain loop.
#include "cuda_runtime.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

#include "../reference_lapack.hpp"

namespace emulation {
namespace {

constexpr std::size_t kStack = 256 * 1024, kMaxShared = 227 * 1024, kFreeShared = 48 * 1024;  // bytes; sm_90
constexpr std::size_t kGuard = 512;  // bytes behind every piece of shared memory that must stay as they are

struct Place {
    const char* file = nullptr;
    int line = 0;
    bool operator==(const Place& other) const { return line == other.line && !std::strcmp(file, other.file); }
};

struct Fiber {
    enum State { ready, at_barrier, at_warp, done } state = ready;
    bool started = false;
    Place place;
    std::jmp_buf resume;
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStack);
    unsigned turn = 0;  // of its warp operations; two slots, so that a fast lane does not write what a slow one still reads
};

/// The threads of the CTA that runs.
struct Cta {
    std::vector<Fiber> fibers;
    std::vector<char> slots;  // [warps, 2, 32, kSlot]
    std::jmp_buf home;
    std::function<void()>* body = nullptr;
    Fiber* running = nullptr;
    bool any = false, outcome = false;
    std::vector<std::pair<std::string, char*>> arrays;  // those of the kernel that a thread has come to
    std::vector<char*> guards;
    std::size_t used = 0;  // bytes of `shared`: what the launch asked for, then the arrays, each with its guard
};

Cta cta;
alignas(256) char shared[kMaxShared + 16 * (kGuard + 16)];
std::mt19937_64 random_bits(1);
std::recursive_mutex guard;
std::vector<std::pair<cudaStream_t, std::function<void()>>> queue;
std::map<std::string, std::size_t> allowed;  // shared memory that launches of a kernel may ask for
std::map<char*, std::size_t> device;  // first page and bytes of what cudaMalloc gave
cudaError_t sticky = cudaSuccess;
std::string message;
std::uint64_t waits = 0;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

std::string text(const Place& place) { return std::string(place.file) + ":" + std::to_string(place.line); }

/// Back to the scheduler; returns when the fiber goes on.
void yield(Fiber::State state, Place place) {
    Fiber& fiber = *cta.running;
    fiber.state = state, fiber.place = place;
    if (_setjmp(fiber.resume) == 0) _longjmp(cta.home, 1);
}

void enter() {
    (*cta.body)();
    cta.running->state = Fiber::done;
    _longjmp(cta.home, 1);
}

void run(unsigned thread) {
    Fiber& fiber = cta.fibers[thread];
    cta.running = &fiber;
    threadIdx.x = thread;
    if (_setjmp(cta.home) != 0) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    setcontext(&fiber.context);
}

/// Lets a warp go on that all of its threads brought to one place. Whether they did.
bool release_warp(unsigned first) {
    Fiber* const warp = &cta.fibers[first];
    const auto waits = [](const Fiber& fiber) { return fiber.state == Fiber::at_warp; };
    const Fiber* const one = std::find_if(warp, warp + 32, waits);
    if (one == warp + 32) return false;
    for (int lane = 0; lane < 32; ++lane) {
        if (!waits(warp[lane])) fail("a warp operation at " + text(one->place) + " is not met by all lanes");
        if (!(warp[lane].place == one->place))
            fail("lanes of a warp part ways at " + text(one->place) + " and " + text(warp[lane].place));
    }
    for (int lane = 0; lane < 32; ++lane) warp[lane].state = Fiber::ready;
    return true;
}

/// Lets all threads go on from one barrier. False when all are done instead.
bool release_barrier(unsigned threads) {
    const Fiber& one = cta.fibers[0];
    for (unsigned t = 0; t < threads; ++t) {
        const Fiber& fiber = cta.fibers[t];
        if (fiber.state != one.state || (one.state == Fiber::at_barrier && !(fiber.place == one.place))) {
            const Fiber& waiting = one.state == Fiber::at_barrier ? one : fiber;
            fail("the barrier at " + text(waiting.place) + " is not met by all threads of a CTA");
        }
    }
    if (one.state == Fiber::done) return false;
    for (unsigned t = 0; t < threads; ++t) cta.fibers[t].state = Fiber::ready;
    cta.outcome = cta.any, cta.any = false;
    return true;
}

/// 0 .. count - 1 in a random order.
std::vector<unsigned> shuffled(unsigned count) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random_bits);
    return order;
}

/// So many bytes of NaN, and a guard behind them.
char* reserve(std::size_t bytes) {
    char* const piece = shared + cta.used;
    bytes = (bytes + 15) / 16 * 16;
    cta.used += bytes + kGuard;
    if (cta.used > kMaxShared) fail("more shared memory than a CTA can have");
    std::memset(piece, 0xff, bytes + kGuard);
    cta.guards.push_back(piece + bytes);
    return piece;
}

void run_cta(unsigned threads, std::size_t dynamic, std::function<void()>& body) {
    cta.arrays.clear(), cta.guards.clear(), cta.used = 0;
    reserve(dynamic);
    std::vector<unsigned> order = shuffled(threads);
    while (cta.fibers.size() < threads) cta.fibers.emplace_back();
    cta.slots.resize(cta.fibers.size() * 2 * kSlot);
    for (unsigned t = 0; t < threads; ++t) cta.fibers[t].state = Fiber::ready, cta.fibers[t].started = false, cta.fibers[t].turn = 0;
    cta.body = &body, cta.any = false;
    run(order[0]);
    if (cta.fibers[order[0]].state == Fiber::done) {
        cta.running = nullptr;
        for (unsigned t = 1; t < threads; ++t) threadIdx.x = order[t], body();
    } else {
        do {
            for (unsigned warp : shuffled(threads / 32)) {
                const std::vector<unsigned> lanes = shuffled(32);
                do {
                    for (unsigned lane : lanes)
                        if (cta.fibers[32 * warp + lane].state == Fiber::ready) run(32 * warp + lane);
                } while (release_warp(32 * warp));
            }
        } while (release_barrier(threads));
    }
    for (const char* guard : cta.guards)
        if (std::any_of(guard, guard + kGuard, [](char byte) { return byte != char(0xff); })) fail("a write behind shared memory");
}

void protect(int rights) {
    for (const auto& [first, bytes] : device) mprotect(first, bytes, rights);
}

}  // namespace

void launch(const char* kernel, Grid grid, std::function<void()> thread) {
    const std::lock_guard<std::recursive_mutex> locked(guard);
    const std::size_t most = std::max(kFreeShared, allowed[kernel]);
    const bool fits = grid.ctas >= 1 && grid.ctas <= 0x7fffffff && grid.threads >= 1 && grid.threads <= 1024 && grid.shared <= most;
    if (!fits || grid.threads % 32 != 0) {
        sticky = cudaErrorInvalidConfiguration;
        return;
    }
    enqueue(grid.stream, [=]() mutable {
        for (unsigned block : shuffled(grid.ctas)) {
            blockIdx.x = block;
            try {
                run_cta(grid.threads, grid.shared, thread);
            } catch (const std::runtime_error& error) {
                fail(std::string(kernel) + ": " + error.what());
            }
        }
    });
}

void enqueue(cudaStream_t stream, std::function<void()> work) {
    const std::lock_guard<std::recursive_mutex> locked(guard);
    queue.emplace_back(stream, std::move(work));
}

cudaError_t allow(const char* kernel, int bytes) {
    const std::lock_guard<std::recursive_mutex> locked(guard);
    if (bytes < 0 || std::size_t(bytes) > kMaxShared) return cudaErrorInvalidValue;
    allowed[std::string(kernel, std::strcspn(kernel, "<"))] = std::size_t(bytes);
    return cudaSuccess;
}

bool barrier(const char* file, int line, bool predicate) {
    if (!cta.running) fail(text({file, line}) + ": only some threads of a CTA come to this barrier");
    cta.any = cta.any || predicate;
    yield(Fiber::at_barrier, {file, line});
    return cta.outcome;
}

const char* exchange(const char* file, int line, const void* value, std::size_t bytes) {
    if (!cta.running) fail(text({file, line}) + ": only some threads of a CTA come to this warp operation");
    const unsigned thread = threadIdx.x, side = cta.running->turn++ % 2;
    char* const warp = &cta.slots[(thread / 32 * 2 + side) * 32 * kSlot];
    std::memcpy(warp + thread % 32 * kSlot, value, bytes);
    yield(Fiber::at_warp, {file, line});
    return warp;
}

char* dynamic_shared() { return shared; }

char* static_shared(const char* name, std::size_t bytes) {
    for (const auto& [known, array] : cta.arrays)
        if (known == name) return array;
    return cta.arrays.emplace_back(name, reserve(bytes)).second;
}

}  // namespace emulation

using namespace emulation;

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
    const std::lock_guard<std::recursive_mutex> locked(guard);
    const std::size_t page = sysconf(_SC_PAGESIZE), used = (bytes + 255) / 256 * 256, pages = (used + page - 1) / page * page;
    // The end of the allocation meets a page that nobody may touch.
    void* const first = mmap(nullptr, pages + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (first == MAP_FAILED) return cudaErrorMemoryAllocation;
    mprotect(first, pages, PROT_READ | PROT_WRITE);
    std::memset(first, 0xff, pages);
    mprotect(first, pages, PROT_NONE);
    device[static_cast<char*>(first)] = pages;
    *memory = static_cast<char*>(first) + pages - used;
    return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
    const std::lock_guard<std::recursive_mutex> locked(guard);
    cudaStreamSynchronize(nullptr);
    const auto after = device.upper_bound(static_cast<char*>(memory));
    const auto found = after == device.begin() ? device.end() : std::prev(after);
    if (found == device.end() || static_cast<char*>(memory) >= found->first + found->second) {
        std::free(memory);  // managed
        return cudaSuccess;
    }
    munmap(found->first, found->second + sysconf(_SC_PAGESIZE));
    device.erase(found);
    return cudaSuccess;
}

cudaError_t cudaMallocHost(std::int64_t** memory, std::size_t bytes) {
    *memory = static_cast<std::int64_t*>(std::malloc(bytes));
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) { return std::free(memory), cudaSuccess; }

cudaError_t cudaGetDevice(int* current) { return *current = 0, cudaSuccess; }

cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    enqueue(stream, [=] { std::memcpy(target, source, bytes); });
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    const std::lock_guard<std::recursive_mutex> locked(guard);
    ++waits;
    decltype(queue) later;
    protect(PROT_READ | PROT_WRITE);
    try {
        for (auto& [own, work] : queue) {
            if (stream == nullptr || own == stream)
                work();
            else
                later.emplace_back(own, std::move(work));
        }
    } catch (const std::runtime_error& error) {
        sticky = cudaErrorLaunchFailure, message = error.what();
    }
    protect(PROT_NONE);
    queue = std::move(later);
    return sticky;
}

cudaError_t cudaGetLastError() {
    const std::lock_guard<std::recursive_mutex> locked(guard);
    const cudaError_t error = sticky;
    if (error != cudaErrorLaunchFailure) sticky = cudaSuccess;
    return error;
}

const char* cudaGetErrorName(cudaError_t error) { return error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaError"; }

const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorLaunchFailure ? message.c_str() : "see the call"; }

void emulation_seed(std::uint64_t seed) { random_bits.seed(seed); }

std::uint64_t emulation_waits() { return waits; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = int(kMaxShared), cudaSuccess; }

cudaError_t cudaMemsetAsync(void* target, int value, std::size_t bytes, cudaStream_t stream) {
    enqueue(stream, [=] { std::memset(target, value, bytes); });
    return cudaSuccess;
}

// cuSOLVER's batched eigensolver, by a plain implementation: found by name, as in the library (csrc/cuda/cusolver.hpp).
namespace {
constexpr int kInvalid = 3;
constexpr std::size_t kDeviceScratch = 512, kHostScratch = 64;
}  // namespace

extern "C" {
EMULATED int cusolverGetVersion(int* version) { return *version = 11702, 0; }
EMULATED int cusolverDnCreate(void** handle) { return *handle = new cudaStream_t(nullptr), 0; }
EMULATED int cusolverDnDestroy(void* handle) { return delete static_cast<cudaStream_t*>(handle), 0; }
EMULATED int cusolverDnSetStream(void* handle, cudaStream_t stream) { return *static_cast<cudaStream_t*>(handle) = stream, 0; }
EMULATED int cusolverDnCreateParams(void** made) { return *made = new int, 0; }
EMULATED int cusolverDnDestroyParams(void* made) { return delete static_cast<int*>(made), 0; }

EMULATED int cusolverDnXsyevBatched_bufferSize(void*, void*, int, int, std::int64_t, int, const void*, std::int64_t, int, const void*, int,
                                               std::size_t* device_bytes, std::size_t* host_bytes, std::int64_t) {
    return *device_bytes = kDeviceScratch, *host_bytes = kHostScratch, 0;
}

EMULATED int cusolverDnXsyevBatched(void* handle, void*, int vectors, int lower, std::int64_t n, int type, void* a, std::int64_t ld, int,
                                    void* values, int, void* scratch, std::size_t scratch_bytes, void* host, std::size_t host_bytes,
                                    std::int32_t* info, std::int64_t batch) {
    if (vectors != 1 || lower != 0 || type != 1 || ld != n || scratch_bytes < kDeviceScratch || host_bytes < kHostScratch || !host ||
        (batch > 1 && 8 * n * n * batch > 0x7fffffff))
        return kInvalid;
    enqueue(*static_cast<cudaStream_t*>(handle), [=] {
        const char* const bytes = static_cast<const char*>(scratch);
        const bool clean = std::all_of(bytes, bytes + kDeviceScratch, [](char byte) { return byte == 0; });
        std::memset(scratch, 0xff, scratch_bytes);
        for (std::int64_t p = 0; p < batch; ++p) {
            double* const matrix = static_cast<double*>(a) + p * n * n;
            bool finite = clean;  // on what lies in its scratch the real one gives wrong results
            for (std::int64_t i = 0; i < n; ++i)
                for (std::int64_t j = 0; j <= i; ++j) finite = finite && std::isfinite(matrix[j * n + i]);
            int order = int(n), width = int(n), failed = 1;
            if (finite)
                reference::dsyevd(nullptr, nullptr, &order, matrix, &width, static_cast<double*>(values) + p * n, nullptr, nullptr,
                                  nullptr, nullptr, &failed);
            info[p] = failed;
        }
    });
    return 0;
}
}
