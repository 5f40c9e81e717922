// The arguments of the kernel that searches grids (search_grids-inl.h): plain numbers that know nothing of torch.
// kernels/rounding/grid_search.py defines what the kernel computes.
#pragma once

#include <cstdint>

namespace foveate {

constexpr int64_t kGroupInputs = 128;  // of the largest groups
constexpr int64_t kGridRows = 16;      // whose grids are searched at once
constexpr int64_t kGridsTried = 32;    // of each group

// The groups of a weight. Rows are taken by strips of kGridRows, the last one as far as there are rows.
struct GridSearch {
  int64_t rows, columns, groups, group;  // N, K, G, inputs a group
  const float* w;                        // [N, K]
  const float* importance;               // [K]
  float* scales;                         // [N, G], written
  float* offsets;                        // [N, G], written
  float clip;                            // what clipping costs at 6 and 8 bits together
  float noise;                           // the rest of the error of these levels, in squared steps
  int exponent;                          // of the weight's scales
};

}  // namespace foveate
