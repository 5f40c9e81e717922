// The arguments of the kernels on saved tensors: plain structs that know nothing of torch.
//
// A tensor is n elements in the order of its memory, cut into groups of g; a block is 32 elements, the smallest group. What
// each op means is in kernels/saved/reference.py, and every instruction set gives its bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "planes/planes.h"

namespace foveate {

constexpr int kBlock = 32;
constexpr int kLargestGroup = 1024;
constexpr float kSmallestStep = 0x1p-108f;  // 256 / step stays finite

// A byte for each element of a block.
typedef uint32_t Hashes __attribute__((vector_size(32)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

struct Packing {
  const void* x;
  Type type;
  int64_t n;
  int bits, group;
  float limit;  // the greatest value of the type
  bool random;
  uint64_t seed;
  uint8_t* codes;    // [G, g * bits / 8]
  uint16_t* ranges;  // bfloat16 [G, 2], low and step
};

struct Unpacking {
  const uint8_t* codes;
  const uint16_t* ranges;
  int64_t n;
  int bits, group;
  Type type;
  void* out;
  bool stream;  // past the caches; `out` is then aligned to 64 bytes
};

struct Variance {
  const void* x;
  Type type;
  int64_t n;
  int group;
  float limit;
  const int64_t* bits;
  int64_t levels;
  float* out;  // [levels, G]
};

// Of elements of 1, 2, 4 or 8 bytes; blocks are words of `bits`.
struct TwoValues {
  const void* x;
  int bytes;
  int64_t n;
  uint64_t first, second;
  uint8_t* bits;
};

struct Choosing {
  const uint8_t* bits;
  uint64_t values[2];
  int bytes;
  int64_t n;
  void* out;
};

enum class Integer : uint8_t { kUInt8, kInt8, kInt16, kInt32, kInt64 };

struct Narrowing {
  void* x;  // only read when packing
  Integer type;
  int64_t n;
  int bits;
  int64_t low;
  uint8_t* codes;
};

struct Moments {
  int64_t finite, zeros, not_finite;
  double sum, minimum, maximum;
};

// One instruction set's kernels. Ranges of groups, blocks or elements are half open and may run on different threads.
struct SavedKernels {
  void (*pack)(const Packing&, int64_t group, int64_t group_end);
  void (*unpack)(const Unpacking&, int64_t group, int64_t group_end);
  void (*variance)(const Variance&, int64_t group, int64_t group_end);
  void (*mask)(const void* x, Type, int64_t n, float threshold, uint8_t* bits, int64_t block, int64_t block_end);
  bool (*two_values)(const TwoValues&, int64_t block, int64_t block_end);  // false: there is a third
  void (*choose)(const Choosing&, int64_t block, int64_t block_end);
  bool (*narrow)(const Narrowing&, int64_t block, int64_t block_end);  // false: a value does not fit
  void (*widen)(const Narrowing&, int64_t block, int64_t block_end);
  Moments (*moments)(const void* x, Type, int64_t begin, int64_t end);
  // Squared deviations from the mean; the histogram is added to.
  double (*spread)(const void* x, Type, int64_t begin, int64_t end, double mean, double minimum, double per_unit, int64_t bins, int64_t* histogram);
};

// Of machines that have the instructions only.
const SavedKernels* saved_avx512();
const SavedKernels* saved_avx2();
const SavedKernels* saved_portable();

}  // namespace foveate
