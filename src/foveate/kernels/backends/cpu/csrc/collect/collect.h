// The arguments of the kernels that collect statistics (collect-inl.h): plain structs that know nothing of torch.
// kernels/collect/reference.py defines what the kernels compute.
#pragma once

#include <cstdint>

namespace foveate {

// Rows that are summed in float32 before their sum is added to a sum in float64.
constexpr int64_t kSummedRows = 64;

// The sum and the extremes of some rows.
struct RowTotals {
  double sum;
  float least, most;
};

// Samples b of T rows each, and one block of columns of the total.
struct SampleGradients {
  int64_t samples, rows;   // B, T
  int64_t columns, outputs;  // K, N
  const float* x;          // [B, T, K]
  const float* g;          // [N, B, T]
  float* total;            // [N, K]
};

// One instruction set's kernels.
struct CollectKernels {
  // At most kSummedRows rows: the squares of each column are added to `squares` [K], the rest to `totals`.
  void (*row_sums)(const float* x, int64_t stride, int64_t rows, int64_t columns, float* squares, RowTotals& totals);
  // One row at levels 4 and 8; `ranges` is memory for two numbers a block of 32 columns.
  void (*input_changes)(const float* x, const float* toward, int64_t columns, float* ranges, double& four, double& eight);
  // Columns [column, column_end) of all outputs.
  void (*squared_gradients)(const SampleGradients&, int64_t column, int64_t column_end);
};

}  // namespace foveate
