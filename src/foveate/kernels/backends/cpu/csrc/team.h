// One team of threads for a whole op: its threads run the same program, part after part.
//
// A fork and a join for each product cost a small model more than the product. Here threads are woken once an op. They wait
// for each other's work, never for each other: a part is over when its units are done, and a thread that the machine has
// interrupted, or that wakes late, finds parts over and goes on. Waiting threads spin, and give their processor away only
// where a part takes long.
//
//     run_team(parallel, [&](Member& member) {
//       member.part([&] { return Units{rows}; }, [&](int64_t begin, int64_t end) { ... });
//       member.part([&] { return Units{strips}; }, [&](int64_t begin, int64_t end) { ... });
//     });
//
// The first thread that comes to a part prepares it: it may change what the program shares, for nobody else is at work. Of
// what changes during the program a thread may look at nothing outside of `prepare` and of units. An exception is kept, the
// work that follows is skipped, and it is raised when all threads have left.
#pragma once

#include <ATen/Parallel.h>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <vector>

namespace foveate {
namespace {

// The units of a part: pieces of [0, count) that begin at multiples of `least`.
struct Units {
  int64_t count, least = 1;
};

class Team {
 public:
  explicit Team(int64_t threads) : ranges_(static_cast<size_t>(threads)) {}

  void raise() {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  friend class Member;

  // A thread's own range of units, and the part that it belongs to, in one word: so a unit of a part that is over is never
  // taken. A thread takes small pieces from the front of its range, so that it reads memory in order, and when it is empty
  // the back half of the longest that is left.
  struct alignas(64) Range {
    std::atomic<uint64_t> word{0};
  };
  static constexpr int kBits = 24;
  static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
  static uint64_t word(int64_t part, int64_t begin, int64_t end) {
    return static_cast<uint64_t>(part) << (2 * kBits) | static_cast<uint64_t>(begin) << kBits | static_cast<uint64_t>(end);
  }
  static uint64_t tag(int64_t part) { return static_cast<uint64_t>(part) & 0xFFFF; }
  static uint64_t tag_of(uint64_t word) { return word >> (2 * kBits); }
  static int64_t first(uint64_t word) { return static_cast<int64_t>(word >> kBits & kMask); }
  static int64_t last(uint64_t word) { return static_cast<int64_t>(word & kMask); }
  static int64_t left(uint64_t word) { return last(word) - first(word); }

  // A part that is one piece of work is done by the thread that opens it: the others need not see it before it is over.
  template <class Prepare, class Each>
  void open(int64_t part, const Prepare& prepare, const Each& run) {
    Units units{0};
    guarded([&] {
      units = prepare();
      TORCH_CHECK(units.count <= static_cast<int64_t>(kMask), "a part of an op has ", units.count, " units, more than ", kMask);
    });
    if (units.count <= units.least) {
      if (units.count) guarded([&] { run(0, units.count); });
      ready_.store(part, std::memory_order_release);
      finished_.store(part, std::memory_order_release);  // at last: from here on others may open the next part
      return;
    }
    count_ = units.count;
    least_ = units.least;
    done_.store(0, std::memory_order_relaxed);
    const int64_t threads = static_cast<int64_t>(ranges_.size());
    const auto edge = [&](int64_t i) { return i == threads ? count_ : count_ / least_ * i / threads * least_; };
    for (int64_t i = 0; i < threads; ++i) ranges_[static_cast<size_t>(i)].word.store(word(part, edge(i), edge(i + 1)), std::memory_order_release);
    ready_.store(part, std::memory_order_release);
  }

  bool take(int64_t thread, int64_t part, int64_t& begin, int64_t& end) {
    std::atomic<uint64_t>& own = ranges_[static_cast<size_t>(thread)].word;
    for (;;) {
      uint64_t now = own.load(std::memory_order_acquire);
      while (tag_of(now) == tag(part) && left(now) > 0) {
        begin = first(now);
        end = std::min(last(now), begin + std::max(least_, left(now) / 8 / least_ * least_));
        if (own.compare_exchange_weak(now, word(part, end, last(now)), std::memory_order_acq_rel)) return true;
      }
      Range* longest = nullptr;
      uint64_t most = 0;
      for (Range& range : ranges_) {
        const uint64_t seen = range.word.load(std::memory_order_acquire);
        if (tag_of(seen) == tag(part) && left(seen) > left(most)) longest = &range, most = seen;
      }
      if (!longest) return false;
      const int64_t middle = first(most) + left(most) / 2 / least_ * least_;
      if (!longest->word.compare_exchange_strong(most, word(part, first(most), middle), std::memory_order_acq_rel)) continue;
      own.store(word(part, middle, last(most)), std::memory_order_release);  // the part is not over while these are left
    }
  }

  template <class Work>
  void guarded(const Work& work) {
    if (failed_.load(std::memory_order_relaxed)) return;
    try {
      work();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      failed_.store(true, std::memory_order_relaxed);
    }
  }

  std::vector<Range> ranges_;
  alignas(64) std::atomic<int64_t> opened_{0};    // the last part that a thread has begun to prepare
  alignas(64) std::atomic<int64_t> ready_{0};     // the last part that is prepared
  alignas(64) std::atomic<int64_t> finished_{0};  // the last part that is over
  alignas(64) std::atomic<int64_t> done_{0};      // units of the present part
  int64_t count_ = 0, least_ = 1;
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::exception_ptr error_;
};

// One thread of a team.
class Member {
 public:
  Member(Team& team, int64_t thread) : team_(team), thread_(thread) {}

  int64_t thread() const { return thread_; }

  // Calls run(begin, end) for pieces of the units that `prepare` returns, and comes back when all are done.
  template <class Prepare, class Each>
  void part(const Prepare& prepare, const Each& run) {
    const int64_t part = ++part_;
    int64_t before = part - 1;
    if (over(part)) return;
    if (team_.opened_.compare_exchange_strong(before, part, std::memory_order_acq_rel)) team_.open(part, prepare, run);
    else wait([&] { return team_.ready_.load(std::memory_order_acquire) >= part; });
    int64_t begin, end;
    while (team_.take(thread_, part, begin, end)) {
      team_.guarded([&] { run(begin, end); });
      const int64_t count = team_.count_;  // of this part, as long as what was taken is not counted as done
      if (team_.done_.fetch_add(end - begin, std::memory_order_acq_rel) + (end - begin) == count) team_.finished_.store(part, std::memory_order_release);
    }
    wait([&] { return over(part); });
  }

  // Something that one thread does, while no other is at work.
  template <class Work>
  void alone(const Work& work) {
    part(
        [&] {
          work();
          return Units{0};
        },
        [](int64_t, int64_t) {});
  }

 private:
  static constexpr int kSpins = 2000;  // about 0.1 ms

  bool over(int64_t part) const { return team_.finished_.load(std::memory_order_acquire) >= part; }

  template <class Condition>
  static void wait(const Condition& condition) {
    for (int spins = 0; !condition(); ++spins) {
      if (spins >= kSpins) sched_yield();
#if defined(__x86_64__)
      else _mm_pause();
#endif
    }
  }

  Team& team_;
  const int64_t thread_;
  int64_t part_ = 0;
};

// Runs `program(member)` on all of torch's threads; on this one alone if not `parallel`.
template <class Program>
void run_team(bool parallel, const Program& program) {
  const bool alone = !parallel || at::get_num_threads() == 1 || at::in_parallel_region();
  Team team(alone ? 1 : at::get_num_threads());
#if defined(_OPENMP)
  if (!alone) {
#pragma omp parallel num_threads(static_cast<int>(at::get_num_threads()))
    {
      Member member(team, static_cast<int64_t>(omp_get_thread_num()));
      program(member);
    }
    team.raise();
    return;
  }
#endif
  Member member(team, 0);
  program(member);
  team.raise();
}

}  // namespace
}  // namespace foveate
