// Problems over threads: a worker takes the next problem when it is done with its last, so mixed difficulty balances itself.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace sst::cpu {

/// Calls work(task, worker) for every task in [0, tasks) on up to `threads` threads; rethrows the first exception.
template <class Work>
void parallel_for(int64_t tasks, int64_t threads, Work work) {
    const int64_t workers = std::max<int64_t>(1, std::min(tasks, threads));
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex guard;
    auto run = [&](int64_t worker) {
        try {
            for (int64_t task = next++; task < tasks; task = next++) work(task, worker);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(guard);
            if (!failure) failure = std::current_exception();
            next = tasks;
        }
    };
    std::vector<std::thread> others;
    for (int64_t worker = 1; worker < workers; ++worker) others.emplace_back(run, worker);
    run(0);
    for (auto& thread : others) thread.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace sst::cpu
