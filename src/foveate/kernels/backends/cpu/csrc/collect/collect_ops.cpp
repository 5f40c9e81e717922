// The torch side of the statistics of a calibration: checks, memory, threads. Schemas are in kernels/collect/ops.py, the
// meaning in kernels/collect/reference.py.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "checks.h"
#include "collect/collect.h"
#include "simd/kernels.h"
#include "work_queue.h"

namespace foveate {
namespace {

using at::Tensor;

constexpr int64_t kColumns = 64;  // of a piece of squared gradients

void check_float(const Tensor& t, int64_t dimensions, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kFloat, name, " has dtype (=", t.scalar_type(), "), not ", at::kFloat);
  TORCH_CHECK(t.device().is_cpu(), name, " is on device (=", t.device(), "), not the CPU");
  TORCH_CHECK(t.dim() == dimensions, name, " of shape (=", t.sizes(), ") does not have ", dimensions, " dimensions");
  check_memory(t, name);
}

// Rows whose columns lie next to each other.
Tensor in_rows(const Tensor& x) { return x.size(1) < 2 || x.stride(1) == 1 ? x : x.contiguous(); }

std::tuple<Tensor, Tensor> row_sums(const Tensor& given) {
  check_float(given, 2, "x");
  const Tensor x = in_rows(given);
  const int64_t rows = x.size(0), columns = x.size(1), stride = x.stride(0), chunks = x.numel() ? over(rows, kSummedRows) : 0;
  const float infinity = std::numeric_limits<float>::infinity();
  const Tensor parts = at::zeros({chunks, columns}, x.options());  // refuses more than there is memory for
  std::vector<RowTotals> totals(static_cast<size_t>(chunks), RowTotals{0.0, infinity, -infinity});
  const float* const from = x.const_data_ptr<float>();
  float* const squares = parts.data_ptr<float>();
  const auto run = kernels().collect.row_sums;
  share(chunks, 1, worth_threads(rows, columns), [&](int64_t chunk, int64_t chunk_end) {
    for (; chunk < chunk_end; ++chunk) {
      const int64_t row = chunk * kSummedRows;
      run(from + row * stride, stride, std::min(kSummedRows, rows - row), columns, squares + chunk * columns, totals[static_cast<size_t>(chunk)]);
    }
  });
  Tensor squares_K = at::zeros({columns}, x.options().dtype(at::kDouble)), found = at::empty({3}, squares_K.options());
  double* const sum_K = squares_K.data_ptr<double>();
  RowTotals all{0.0, infinity, -infinity};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t k = 0; k < columns; ++k) sum_K[k] += static_cast<double>(squares[chunk * columns + k]);
    const RowTotals& part = totals[static_cast<size_t>(chunk)];
    all = {all.sum + part.sum, std::min(all.least, part.least), std::max(all.most, part.most)};
  }
  double* const to = found.data_ptr<double>();
  to[0] = all.sum, to[1] = static_cast<double>(all.least), to[2] = static_cast<double>(all.most);
  return {squares_K, found};
}

Tensor input_changes(const Tensor& given, const Tensor& toward) {
  check_float(given, 2, "x");
  check_float(toward, 2, "toward");
  TORCH_CHECK(given.sizes() == toward.sizes(), "toward of shape (=", toward.sizes(), ") is not of the shape of x, ", given.sizes());
  const Tensor x = in_rows(given), to = in_rows(toward);
  const int64_t rows = x.size(0), columns = x.size(1), blocks = over(columns, 32);
  TORCH_CHECK(columns < int64_t{1} << 40, "x of shape (=", x.sizes(), ") has more columns than there is memory for");
  Tensor changes = at::zeros({2, rows}, x.options().dtype(at::kDouble));
  double* const found = changes.data_ptr<double>();
  const float *const from = x.const_data_ptr<float>(), *const along = to.const_data_ptr<float>();
  const auto run = kernels().collect.input_changes;
  share(rows, 1, worth_threads(rows, columns), [&](int64_t row, int64_t row_end) {
    std::vector<float> ranges(static_cast<size_t>(2 * blocks));
    for (; row < row_end; ++row)
      run(from + row * x.stride(0), along + row * to.stride(0), columns, ranges.data(), found[row], found[rows + row]);
  });
  return changes;
}

void add_squared_gradients(Tensor& total, const Tensor& x, const Tensor& g) {
  check_float(total, 2, "total");
  check_float(x, 3, "x");
  check_float(g, 3, "g");
  const int64_t outputs = total.size(0), columns = total.size(1), samples = x.size(0), rows = x.size(1);
  TORCH_CHECK(total.is_contiguous(), "total is not contiguous");
  TORCH_CHECK(x.size(2) == columns && g.sizes() == at::IntArrayRef({samples, rows, outputs}), "x of shape (=", x.sizes(), ") and g of shape (=",
              g.sizes(), ") are not [B, T, K] and [B, T, N] of a total ", total.sizes());
  const Tensor x_BTK = x.contiguous(), g_NBT = g.permute({2, 0, 1}).contiguous();
  const SampleGradients d{samples, rows, columns, outputs, x_BTK.const_data_ptr<float>(), g_NBT.const_data_ptr<float>(), total.data_ptr<float>()};
  const auto run = kernels().collect.squared_gradients;
  share(over(columns, kColumns), 1, worth_threads(samples, rows, columns, outputs), [&](int64_t piece, int64_t piece_end) {
    for (; piece < piece_end; ++piece) run(d, piece * kColumns, std::min(columns, (piece + 1) * kColumns));
  });
}

}  // namespace
}  // namespace foveate

TORCH_LIBRARY_IMPL(foveate, CPU, m) {
  m.impl("row_sums", foveate::row_sums);
  m.impl("input_changes", foveate::input_changes);
  m.impl("add_squared_gradients", foveate::add_squared_gradients);
}
