// The fastest read of memory that we know how to write, as the yardstick of kernels that read weights.
//
// A thread reads its share as 1, 2 or 4 streams at once, with or without prefetching; which is fastest depends on the
// machine, so the caller tries all and keeps the best. Threads are those of torch, as they are for the kernels.

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define EVERY_ISA __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_ISA
#endif

typedef uint64_t Line __attribute__((vector_size(64), aligned(64)));

EVERY_ISA static uint64_t read_streams(const Line* lines, int64_t count, int64_t streams, int64_t ahead) {
  Line sums[4] = {};
  const int64_t each = count / streams;
  for (int64_t i = 0; i + 4 <= each; i += 4) {
    for (int64_t s = 0; s < streams; ++s) {
      const Line* at = lines + s * each + i;
      if (ahead) {
        for (int64_t j = 0; j < 4; ++j) __builtin_prefetch(at + j + ahead);
      }
      sums[0] += at[0];
      sums[1] += at[1];
      sums[2] += at[2];
      sums[3] += at[3];
    }
  }
  const Line sum = sums[0] + sums[1] + sums[2] + sums[3];
  uint64_t total = 0;
  for (int i = 0; i < 8; ++i) total += sum[i];
  return total;
}

// The sum of the 64-bit words of `bytes` bytes from `start`, which lies on a cache line. `ahead` is in cache lines.
extern "C" uint64_t foveate_read(const char* start, int64_t bytes, int64_t streams, int64_t ahead) {
  std::atomic<uint64_t> total{0};
  const int64_t lines = bytes / 64;
  const int64_t threads = std::max(1, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t from = lines * t / threads, to = lines * (t + 1) / threads;
      total += read_streams(reinterpret_cast<const Line*>(start) + from, to - from, streams, ahead);
    }
  });
  return total;
}
