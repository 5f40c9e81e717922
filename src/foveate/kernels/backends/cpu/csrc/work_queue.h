// The work of one call, shared among torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace foveate {
namespace {

constexpr double kParallelFrom = 1 << 17;  // products of a weight and an input below which one thread is faster

// A work queue with stealing: each thread has a range of [0, count). A thread takes small pieces from the front of its own
// range, so that it reads memory in order. When its range is empty, it steals the back half of the longest range that is
// left, so that no thread waits for one that the machine has interrupted. A range is one atomic word that holds its begin
// and its end, so that both change at once.
class WorkQueue {
 public:
  WorkQueue(int64_t count, int64_t least, int64_t threads) : least_(least), ranges_(static_cast<size_t>(threads)) {
    int64_t begin = 0;
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t end = i + 1 == threads ? count : count / least * (i + 1) / threads * least;
      ranges_[static_cast<size_t>(i)].word = word(begin, end);
      begin = end;
    }
  }

  // The next piece for a thread; false when nothing is left.
  bool take(int64_t thread, int64_t& begin, int64_t& end) {
    std::atomic<uint64_t>& own = ranges_[static_cast<size_t>(thread)].word;
    for (;;) {
      uint64_t now = own.load(std::memory_order_relaxed);
      while (left(now) > 0) {
        begin = first(now);
        end = std::min(last(now), begin + std::max(least_, left(now) / 8 / least_ * least_));
        if (own.compare_exchange_weak(now, word(end, last(now)))) return true;
      }
      if (!steal(own)) return false;
    }
  }

 private:
  struct alignas(64) Range {  // a cache line each
    std::atomic<uint64_t> word{0};
  };

  static uint64_t word(int64_t begin, int64_t end) { return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end); }
  static int64_t first(uint64_t word) { return static_cast<int64_t>(word >> 32); }
  static int64_t last(uint64_t word) { return static_cast<int64_t>(word & 0xFFFFFFFFu); }
  static int64_t left(uint64_t word) { return last(word) - first(word); }

  // A piece that was taken is never put back, so a word that has not changed still describes its range.
  bool steal(std::atomic<uint64_t>& own) {
    for (;;) {
      Range* longest = nullptr;
      uint64_t most = 0;
      for (Range& range : ranges_) {
        const uint64_t seen = range.word.load(std::memory_order_relaxed);
        if (left(seen) > left(most)) longest = &range, most = seen;
      }
      if (!longest) return false;
      const int64_t middle = first(most) + left(most) / 2 / least_ * least_;
      if (!longest->word.compare_exchange_strong(most, word(first(most), middle))) continue;
      own.store(word(middle, last(most)), std::memory_order_relaxed);
      return true;
    }
  }

  const int64_t least_;
  std::vector<Range> ranges_;
};

// Calls run(begin, end) for pieces of [0, count), which begin at multiples of `least`, until all are done.
template <class Each>
void share(int64_t count, int64_t least, bool parallel, const Each& run) {
  if (!parallel) {
    run(0, count);
    return;
  }
  const int64_t threads = at::get_num_threads();
  TORCH_CHECK(count < int64_t{1} << 32, "a weight's strips times chunks of rows (=", count, ") are more than 2^32");
  WorkQueue queue(count, least, threads);
  at::parallel_for(0, threads, 1, [&](int64_t thread, int64_t thread_end) {
    int64_t begin, end;
    for (; thread < thread_end; ++thread)
      while (queue.take(thread, begin, end)) run(begin, end);
  });
}

// Whether so many products (the factors' product, which may be beyond int64) are worth more than one thread.
template <class... Factors>
bool worth_threads(Factors... factors) {
  const double work = (1.0 * ... * static_cast<double>(factors));
  return work >= kParallelFrom && at::get_num_threads() > 1 && !at::in_parallel_region();
}

}  // namespace
}  // namespace foveate
