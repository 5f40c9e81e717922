// The arguments of the kernels that round a weight (choose_codes-inl.h): plain structs that know nothing of torch.
// kernels/rounding/reference.py defines what the kernels compute.
//
// Legend: S = 5 streams, one a level; R rows that are rounded together; b columns of a block; G groups of a row.
#pragma once

#include <cstdint>

namespace foveate {

constexpr int kStreams = 5;        // levels 2, 3, 4, 6, 8
constexpr int kAnchors = 3;        // of them read the anchor alone
constexpr int64_t kBlockColumns = 64;

// One block of columns, all of its rows. A column lies in one piece, so that going through it reads memory in order; what
// lies behind its rows is zero.
struct ColumnBlock {
  int64_t rows, columns;    // R, b
  int64_t padded;           // P: R, to a multiple of 16
  const float* w;           // [b, P]
  uint8_t* anchor;          // [b, P]
  uint8_t* residual;        // [b, P]
  float* errors;            // [b, S, P], values of the codes minus w; coordinate descent only
  float* pull;              // [b, S, P], overwritten. Coordinate descent: errors of all columns times the covariance.
                            // Error feedback: the wanted value of each weight; becomes wanted minus value
  float* changes;           // memory of [b, S, P]: by how much this sweep changed each error; coordinate descent only
  const float* between;     // [b, b]. Coordinate descent: of the covariance. Error feedback: of its inverse's factor
  int64_t between_stride;
  const float* gradients;   // [R, P], or null: rows are on their own. For feeding: the factor
  const float* scales;      // [G, P]
  const float* offsets;     // [G, P]
  const float* per_step;    // [G, P], 1 / scale
  const int64_t* group_of;  // [b]
  const float* gains;       // [2, P]
  float* weighed;           // memory of [S + 1, P]: what the column means for each row; one over the row's own metric
  double* form;             // added to, not for feeding: share-weighted tr(G dW H dW^T), and what the sweep took off it
  float level_weights[kStreams];
  float widening;           // how much wider the steps of residuals are than without reach
};

// The values of a pair of codes in each stream, in steps from the offset.
inline void code_values(int anchor, int residual, float widening, float gain2, float gain3, float (&value)[kStreams]) {
  const float middle = static_cast<float>(anchor) - 7.5f;
  value[0] = (static_cast<float>(anchor / 4 * 4) - 6.0f) * gain2;
  value[1] = (static_cast<float>(anchor / 2 * 2) - 7.0f) * gain3;
  value[2] = middle;
  value[3] = middle + (static_cast<float>(residual / 4) - 1.5f) * (0.25f * widening);
  value[4] = middle + (static_cast<float>(residual) - 7.5f) * (0.0625f * widening);
}

}  // namespace foveate
