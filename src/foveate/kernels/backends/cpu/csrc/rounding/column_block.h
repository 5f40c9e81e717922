// The arguments of the kernels that round a weight (choose_codes-inl.h): plain structs that know nothing of torch.
// kernels/rounding/reference.py defines what the kernels compute.
//
// Legend: S = 5 streams, one a level; R rows that are rounded together; b columns of a block.
#pragma once

#include <cstdint>

namespace foveate {

constexpr int kStreams = 5;        // levels 2, 3, 4, 6, 8
constexpr int kAnchors = 3;        // of them read the anchor alone
constexpr int64_t kBlockColumns = 64;

// One block of columns, all of its rows: they, or the errors of their other columns, must not change meanwhile.
struct ColumnBlock {
  int64_t rows, columns;    // R, b
  int64_t padded;           // R, to a multiple of 16
  int64_t stride;           // elements from a row to the next of w, codes and errors
  int64_t plane;            // elements from a stream of errors to the next
  int64_t grid_stride;      // elements from a row to the next of scales and offsets
  const float* w;           // [R, b] of it
  uint8_t* anchor;          // [R, b]
  uint8_t* residual;        // [R, b]
  float* errors;            // [S, R, b], values of the codes minus w; coordinate descent only
  float* pull;              // [S, R, 64], overwritten. Coordinate descent: errors of all columns times the covariance.
                            // Error feedback: the wanted value of each weight; becomes wanted minus value
  const float* between;     // [b, b]. Coordinate descent: of the covariance. Error feedback: of its inverse's factor
  int64_t between_stride;
  const float* gradients;   // [R, padded], or null: rows are on their own. For feeding: the factor
  const float* scales;      // [R, G]
  const float* offsets;
  const int64_t* group_of;  // [b]
  const float* gains;       // [2, R]
  float* column;            // memory of [S, padded], zeros behind the rows
  float* weighed;           // memory of [S, padded]: what the column means for each row
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
