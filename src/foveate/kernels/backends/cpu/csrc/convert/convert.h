// The arguments of the kernels that change the form of what moves (convert-inl.h): plain structs that know nothing of
// torch. kernels/convert/reference.py defines what the kernels compute.
#pragma once

#include <cstdint>

namespace foveate {

constexpr int kFormPlanes = 5;
// The bits of each plane, and how far they are from the lowest of an 8-bit code.
constexpr int kFormBits[kFormPlanes] = {2, 1, 1, 2, 2}, kFormShifts[kFormPlanes] = {6, 5, 4, 2, 0};

// A strip of weights of 16 bits on its way to planes.
struct HalfStrip {
  const uint16_t* rows;           // [16, columns]
  int64_t columns, group;
  bool bfloat;                    // whether they are bfloat16, not float16
  const float *offset, *inverse;  // [16, columns / group], of each group: its offset, and steps of 8 bits in 1
  uint32_t* planes[kFormPlanes];  // the strip's tiles
};

// One instruction set's kernels.
struct ConvertKernels {
  // A strip of one plane: 16 rows of words, `stride` words apart, to the order of tiles, [words, 16].
  void (*strip_to_tiles)(const uint32_t* rows, int64_t stride, int64_t words, int bits, uint32_t* out);
  // The least and the greatest of each group of a row; all NaN where a number of the row is not finite.
  void (*half_extremes)(const uint16_t* row, bool bfloat, int64_t groups, int64_t group, float* least, float* greatest);
  void (*strip_to_planes)(const HalfStrip&);
  // `count` bytes of the upper halves of codes of `level` bits.
  void (*upper_halves)(const uint8_t* codes, int level, int64_t count, uint8_t* out);
};

}  // namespace foveate
