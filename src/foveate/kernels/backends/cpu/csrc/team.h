// One team of threads for a whole op: its threads run the same program and meet at the end of each of its parts.
//
// A fork and a join for each product cost a small model more than the product. Here threads are woken once an op. Between
// two parts they spin, and give their processor away only when a part takes long, as it does where another process has it.
//
//     run_team(parallel, [&](Team& team, int64_t thread) {
//       team.part(thread, rows, 1, [&](int64_t begin, int64_t end) { ... });
//       team.part(thread, strips, 1, [&](int64_t begin, int64_t end) { ... });
//     });
//
// Every thread must come to the same parts in the same order, with the same counts. An exception in a part is kept, the
// parts that follow are skipped, and it is raised when all threads have left.
#pragma once

#include <ATen/Parallel.h>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <thread>
#endif

#include <sched.h>

#include <atomic>
#include <exception>
#include <mutex>

#include "work_queue.h"

namespace foveate {
namespace {

inline void rest_a_moment() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

class Team {
 public:
  explicit Team(int64_t threads) : queue_(0, 1, threads), threads_(threads) {}

  // Calls run(begin, end) for pieces of [0, count), which begin at multiples of `least`, and returns when all are done.
  template <class Each>
  void part(int64_t thread, int64_t count, int64_t least, const Each& run) {
    if (!failed_.load(std::memory_order_relaxed)) {
      try {
        queue_.begin(thread, threads_, count, least);
        int64_t begin, end;
        while (queue_.take(thread, least, begin, end)) run(begin, end);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
        failed_.store(true, std::memory_order_relaxed);
      }
    }
    meet();
  }

  void raise() {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static constexpr int kSpins = 2000;  // about 0.1 ms

  void meet() {
    if (threads_ == 1) return;
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins) rest_a_moment();
      else sched_yield();
    }
  }

  WorkQueue queue_;
  const int64_t threads_;
  alignas(64) std::atomic<int64_t> waiting_{0};
  alignas(64) std::atomic<int64_t> round_{0};
  alignas(64) std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::exception_ptr error_;
};

// Runs `program(team, thread)` on all of torch's threads; on this one alone if not `parallel`.
template <class Program>
void run_team(bool parallel, const Program& program) {
#if defined(_OPENMP)
  if (parallel && at::get_num_threads() > 1 && !at::in_parallel_region()) {
    std::optional<Team> team;  // of as many threads as there are, which may be fewer than asked for
#pragma omp parallel num_threads(static_cast<int>(at::get_num_threads()))
    {
#pragma omp single
      team.emplace(omp_get_num_threads());
      program(*team, static_cast<int64_t>(omp_get_thread_num()));
    }
    team->raise();
    return;
  }
#endif
  Team team(1);
  program(team, 0);
  team.raise();
}

}  // namespace
}  // namespace foveate
