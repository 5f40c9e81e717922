// The fastest read of memory that we know how to write, as the yardstick of kernels that read weights.
//
// A thread reads runs of memory as 1, 2 or 4 streams at once, with or without prefetching into the first or the second
// cache; which is fastest depends on the machine, so the caller tries all and keeps the best. Threads are those of torch
// and take runs from one counter, as the kernels' do: one that the machine holds up holds up nobody.

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define EVERY_ISA __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_ISA
#endif

typedef uint64_t Line __attribute__((vector_size(64), aligned(64)));

constexpr int64_t kLeastRun = 1024;  // lines; a multiple of four of every stream

// LOCALITY as __builtin_prefetch has it: 3 is the first cache, 2 the second.
template <int LOCALITY>
static inline __attribute__((always_inline)) Line sums_of(const Line* lines, int64_t count, int64_t streams, int64_t ahead) {
  Line sums[4] = {};
  const int64_t each = count / streams;
  for (int64_t i = 0; i + 4 <= each; i += 4) {
    for (int64_t s = 0; s < streams; ++s) {
      const Line* at = lines + s * each + i;
      if (ahead) {
        for (int64_t j = 0; j < 4; ++j) __builtin_prefetch(at + j + ahead, 0, LOCALITY);
      }
      sums[0] += at[0];
      sums[1] += at[1];
      sums[2] += at[2];
      sums[3] += at[3];
    }
  }
  return sums[0] + sums[1] + sums[2] + sums[3];
}

EVERY_ISA static uint64_t read_run(const Line* lines, int64_t count, int64_t streams, int64_t ahead, int64_t cache) {
  const Line sum = cache == 2 ? sums_of<2>(lines, count, streams, ahead) : sums_of<3>(lines, count, streams, ahead);
  uint64_t total = 0;
  for (int i = 0; i < 8; ++i) total += sum[i];
  return total;
}

// The sum of the 64-bit words of some blocks: `bytes[i]` bytes from `starts[i]`, which lies on a cache line. `ahead` is in
// cache lines, `cache` is 1 or 2. Runs are long first and short at the end, and no thread waits before it goes on to the
// next block.
extern "C" uint64_t foveate_read(const char* const* starts, const int64_t* bytes, int64_t blocks, int64_t streams, int64_t ahead, int64_t cache) {
  std::atomic<uint64_t> total{0};
  std::vector<std::atomic<int64_t>> next(blocks);
  const int64_t threads = std::max(1, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    uint64_t sum = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const Line* const lines = reinterpret_cast<const Line*>(starts[b]);
      const int64_t count = bytes[b] / 64;
      int64_t begin = next[b].load(std::memory_order_relaxed);
      while (begin < count) {
        const int64_t fair = (count - begin) / (2 * threads) / kLeastRun * kLeastRun;
        const int64_t end = std::min(count, begin + std::max(kLeastRun, fair));
        if (!next[b].compare_exchange_weak(begin, end)) continue;
        sum += read_run(lines + begin, end - begin, streams, ahead, cache);
        begin = next[b].load(std::memory_order_relaxed);
      }
    }
    total += sum;
  });
  return total;
}
