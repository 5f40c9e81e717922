// The arguments of the kernels on bit planes: plain structs that know nothing of torch.
//
// A weight is stored as five bit planes of tiles. A tile is 16 rows by one group of inputs (docs/format.md). The torch
// side (planes/plane_ops.cpp) checks the shape of every argument before it calls a kernel. The kernels check the tile
// index (tile_offsets, stored_levels, active_levels) tile by tile as they read it, and report an error as a Fault.
//
// Legend: M rows of x, N rows and K inputs of a weight, g inputs a group, G groups, NT strips of 16 rows. A *lane* is
// one int8 row of inputs: an 8-bit row of x is one lane, a 16-bit row two (high byte, then low byte).
#pragma once

#include <cstdint>

namespace foveate {

constexpr int kPlanes = 5;
constexpr int kTileRows = 16;
constexpr int kMaxGroup = 128;
constexpr int kTopNested = 8;  // levels above it are exact
constexpr int kOwnAnchorStep = 16;                           // a step of the anchor in those of the residual, without reach
constexpr int kAnchorSteps[4] = {kOwnAnchorStep, 8, 4, 12};  // of each reach
constexpr int64_t kMaxMaps = 8;  // maps that are in use at once

// Tiles of a plane are runs of 64-byte chunks: 16 columns a chunk at 2 bits, 32 at 1 bit.
constexpr int kPlaneBits[kPlanes] = {2, 1, 1, 2, 2};

constexpr int64_t tile_bytes(int plane, int group) { return int64_t{kTileRows} * group * kPlaneBits[plane] / 8; }

enum class Type : uint8_t { kFloat32, kBFloat16, kFloat16 };

// Tiles that are stored as floating point, in the order of tiles (docs/format.md, "Exact tiles"). Each is
// [g columns, 16 rows]. Those of strip nt are offsets[nt] to offsets[nt + 1].
struct ExactTiles {
  const void* values;
  const int32_t* numbers;  // of the tile that each is
  const int64_t* offsets;  // [NT + 1], or null: there are none
  int64_t count;
  Type type;
};

// One weight, read by one map.
struct Weight {
  const uint8_t* planes[kPlanes];
  const uint8_t* scales;    // 16 scales (4 bits of exponent, 4 of mantissa), then 16 signed offsets, a stored tile
  uint64_t tiles[6];        // how many tiles are stored: of scales, then of each plane
  float units[kPlanes];     // of levels 2, 3, 4, 6, 8: half a code step, times the gain if that is one a weight, times 2^e
  float offset_unit;        // of offsets: an eighth of 2^e
  const uint16_t* gains;    // float16 [2, NT * 16] for levels 2 and 3, or null
  const int64_t* tile_offsets;   // [NT, 6], columns as in `tiles`
  const uint8_t* stored_levels;  // [NT, G]
  const uint8_t* active_levels;  // [NT, G] of the map that is read
  int64_t maps, map_stride;      // how many maps there are, and the bytes between two
  const float* bias;        // [N], or null
  int64_t rows, columns;    // N, K
  int64_t strips, groups;   // NT, G
  int group, anchor_step;
  ExactTiles exact;
};

// Rows of x as they arrive; row r of the kernels' numbering is row_of[r] here (null: r).
struct InputRows {
  const void* data;
  int64_t row_stride;    // in elements
  int64_t columns;       // K
  const int64_t* row_of;
  const int64_t* order;  // column k of the weight is column order[k] here (null: k)
  Type type;
};

// Quantized rows, group by group: what a tile needs of many rows is one run of memory.
struct Inputs {
  int8_t* codes;   // [G, lanes, g]
  float* sums;     // [G, rows], sums of a group's codes (exact: below 2^24)
  float* scales;   // [rows]
  int64_t rows, lanes, groups;
  int group;
  int level;        // 4, 8 or 16
  float low, high;  // the range of all rows; zeros or NaN: each row has its own
  bool wide;        // two lanes a row
};

struct Output {
  void* data;
  int64_t row_stride;  // in elements
  const int64_t* row_of;
  Type type;
};

enum class Fault : uint8_t { kNone, kOutside, kLevel, kOrder };

}  // namespace foveate
