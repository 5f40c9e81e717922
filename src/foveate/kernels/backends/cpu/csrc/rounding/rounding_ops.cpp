// The torch side of rounding: of the search for grids, of error feedback and of coordinate descent. Checks, memory,
// threads. Schemas are in kernels/rounding/ops.py, the meaning in kernels/rounding/{grid_search,reference}.py.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "rounding/column_block.h"
#include "simd/kernels.h"
#include "work_queue.h"

namespace foveate {
namespace {

using at::Tensor;

constexpr int64_t kLoneRows = 64;  // rounded together where there are no gradients

void check(const Tensor& t, at::IntArrayRef shape, at::ScalarType type, const char* name) {
  TORCH_CHECK(t.sizes() == shape && t.scalar_type() == type && t.is_contiguous(), name, " is ", t.scalar_type(), " ", t.sizes(),
              ", not contiguous ", type, " ", shape);
  check_memory(t, name);
}

// The arguments that both ops have: a weight, its codes and its grid.
struct Rounding {
  Tensor &codes;
  const Tensor &w, &between, &scale, &offset, &gain, &group_of;
  const std::optional<Tensor>& gradients;
  at::ArrayRef<double> level_weights;
  int64_t reach;
  int64_t rows = 0, columns = 0, size = 0;  // N, K, R

  void check_all() {
    TORCH_CHECK(w.dim() == 2 && scale.dim() == 2, "w (", w.sizes(), ") or scale (", scale.sizes(), ") is not a matrix");
    rows = w.size(0), columns = w.size(1);
    check(w, {rows, columns}, at::kFloat, "w");
    check(codes, {2, rows, columns}, at::kByte, "codes");
    check(between, {columns, columns}, at::kFloat, "the matrix of columns");
    check(scale, {rows, scale.size(1)}, at::kFloat, "scale");
    check(offset, {rows, scale.size(1)}, at::kFloat, "offset");
    check(gain, {2, rows}, at::kFloat, "gain");
    check(group_of, {columns}, at::kLong, "group_of");
    const int64_t* const of = group_of.const_data_ptr<int64_t>();
    for (int64_t k = 0; k < columns; ++k)
      TORCH_CHECK(of[k] >= 0 && of[k] < scale.size(1), "group_of (", of[k], " at ", k, ") is outside the ", scale.size(1), " groups");
    TORCH_CHECK(level_weights.size() == kStreams, "level_weights (", level_weights.size(), " of them) are not one per level");
    TORCH_CHECK(reach >= 0 && reach <= 3, "reach (=", reach, ") is not one of 0, 1, 2, 3");
    size = std::max<int64_t>(std::min(rows, kLoneRows), 1);
    if (gradients) {
      TORCH_CHECK(gradients->dim() == 3 && gradients->size(1) >= 1, "the matrices of rows are not [B, R, R]");
      size = gradients->size(1);
      check(*gradients, {over(rows, size), size, size}, at::kFloat, "the matrix of rows");
    }
  }

  // Calls run(block, what all columns of its rows have in common, the weight as it lies there [K, P]) for each block of
  // rows, whose codes are written back afterwards.
  template <class Run>
  void each_block(const Run& run) const {
    const int64_t blocks = over(rows, size);
    if (blocks == 0) return;
    const int64_t padded = (size + 15) / 16 * 16;
    share(blocks, 1, blocks > 1 && worth_threads(rows, columns), [&](int64_t block, int64_t block_end) {
      Tensor weighed = at::empty({kStreams + 1, padded}, w.options());
      for (; block < block_end; ++block) {
        const int64_t row = block * size, count = std::min(size, rows - row);
        // a block of rows, its columns in one piece each
        const auto turned = [&](const Tensor& t) {
          at::DimVector shape(t.sizes());
          shape[shape.size() - 2] = t.size(-1), shape.back() = padded;
          Tensor held = at::zeros(shape, t.options());
          held.narrow(-1, 0, count).copy_(t.narrow(-2, row, count).transpose(-2, -1));
          return held;
        };
        const Tensor own_codes = turned(codes), own_w = turned(w), scales = turned(scale), offsets = turned(offset);
        const Tensor per_step = at::where(scales.gt(0), scales.reciprocal(), 0.0), gains = turned(gain.t());
        Tensor metric;
        if (gradients) {
          metric = at::zeros({count, padded}, w.options());
          // a metric is symmetric, and a factor was transposed
          metric.narrow(1, 0, count).copy_(gradients->select(0, block).narrow(0, 0, count).narrow(1, 0, count).t());
        }
        ColumnBlock d{};
        d.rows = count;
        d.padded = padded;
        d.w = own_w.const_data_ptr<float>();
        d.anchor = own_codes.data_ptr<uint8_t>();
        d.residual = d.anchor + columns * padded;
        d.between = between.const_data_ptr<float>();
        d.between_stride = columns;
        d.gradients = gradients ? metric.const_data_ptr<float>() : nullptr;
        d.scales = scales.const_data_ptr<float>();
        d.offsets = offsets.const_data_ptr<float>();
        d.per_step = per_step.const_data_ptr<float>();
        d.group_of = group_of.const_data_ptr<int64_t>();
        d.gains = gains.const_data_ptr<float>();
        d.weighed = weighed.data_ptr<float>();
        for (int s = 0; s < kStreams; ++s) d.level_weights[s] = static_cast<float>(level_weights[static_cast<size_t>(s)]);
        d.widening = static_cast<float>(kOwnAnchorStep) / static_cast<float>(kAnchorSteps[reach]);
        run(block, d, own_w);
        codes.narrow(1, row, count).copy_(own_codes.narrow(2, 0, count).transpose(1, 2));
      }
    });
  }

  // Calls run(first column, its block) for each block of columns.
  template <class Run>
  void each_part(const ColumnBlock& d, const Run& run) const {
    for (int64_t first = 0; first < columns; first += kBlockColumns) {
      ColumnBlock part = d;
      part.columns = std::min(kBlockColumns, columns - first);
      part.w += first * d.padded, part.anchor += first * d.padded, part.residual += first * d.padded, part.group_of += first;
      part.between += first * columns + first;
      run(first, part);
    }
  }
};

// Values minus weights of some rows, [K, S, P].
void write_errors(const ColumnBlock& d, int64_t columns, float* errors) {
  for (int64_t k = 0; k < columns; ++k)
    for (int64_t i = 0; i < d.rows; ++i) {
      const int64_t at = k * d.padded + i, grid = d.group_of[k] * d.padded + i;
      float value[kStreams];
      code_values(d.anchor[at], d.residual[at], d.widening, d.gains[i], d.gains[d.padded + i], value);
      for (int s = 0; s < kStreams; ++s) errors[(k * kStreams + s) * d.padded + i] = (d.offsets[grid] + d.scales[grid] * value[s]) - d.w[at];
    }
}

Tensor coordinate_descent(Tensor& codes, const Tensor& w, const Tensor& covariance, const std::optional<Tensor>& gradients, const Tensor& scale,
                     const Tensor& offset, const Tensor& gain, const Tensor& group_of, at::ArrayRef<double> level_weights, int64_t sweeps,
                     double least_gain, int64_t reach) {
  Rounding rounding{codes, w, covariance, scale, offset, gain, group_of, gradients, level_weights, reach};
  rounding.check_all();
  Tensor made = at::zeros({over(rounding.rows, rounding.size)}, w.options().dtype(at::kLong));
  int64_t* const count = made.data_ptr<int64_t>();
  rounding.each_block([&](int64_t block, ColumnBlock& d, const Tensor&) {
    const int64_t columns = rounding.columns, size = kStreams * d.padded;
    Tensor errors = at::zeros({columns, size}, w.options()), changes = at::empty({std::min(columns, kBlockColumns), size}, w.options());
    d.changes = changes.data_ptr<float>();
    write_errors(d, columns, errors.data_ptr<float>());
    for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
      double form[2] = {0.0, 0.0};
      d.form = form;
      rounding.each_part(d, [&](int64_t first, ColumnBlock& part) {
        Tensor pull = at::matmul(covariance.narrow(0, first, part.columns), errors);
        part.errors = errors.data_ptr<float>() + first * size;
        part.pull = pull.data_ptr<float>();
        kernels().coordinate_descent(part);
      });
      ++count[block];
      if (form[1] < least_gain * form[0]) break;
    }
  });
  return made;
}

void error_feedback(Tensor& codes, const Tensor& w, const Tensor& factor, const std::optional<Tensor>& row_factor,
                    const Tensor& scale, const Tensor& offset, const Tensor& gain, const Tensor& group_of,
                    at::ArrayRef<double> level_weights, int64_t reach) {
  Rounding rounding{codes, w, factor, scale, offset, gain, group_of, row_factor, level_weights, reach};
  rounding.check_all();
  rounding.each_block([&](int64_t, ColumnBlock& d, const Tensor& own_w) {
    const int64_t columns = rounding.columns, size = kStreams * d.padded;
    Tensor wanted = own_w.unsqueeze(1).repeat({1, kStreams, 1}).view({columns, size});
    rounding.each_part(d, [&](int64_t first, ColumnBlock& part) {
      part.pull = wanted.data_ptr<float>() + first * size;
      kernels().error_feedback(part);
      const int64_t next = first + part.columns;
      if (next < columns)
        wanted.narrow(0, next, columns - next)
            .sub_(at::matmul(factor.narrow(0, first, part.columns).narrow(1, next, columns - next).t(), wanted.narrow(0, first, part.columns)));
    });
  });
}

Tensor search_grids(const Tensor& w, const Tensor& importance, int64_t group, int64_t exponent, double penalty6, double penalty8) {
  TORCH_CHECK(w.dim() == 2, "w (", w.sizes(), ") is not a matrix");
  TORCH_CHECK(group == 32 || group == 64 || group == 128, "group (=", group, ") is not one of 32, 64, 128");
  TORCH_CHECK(exponent >= -64 && exponent <= 32, "exponent (=", exponent, ") is not in -64..32");
  const int64_t rows = w.size(0), columns = w.size(1), groups = over(columns, group);
  check(w, {rows, columns}, at::kFloat, "w");
  check(importance, {columns}, at::kFloat, "importance");
  Tensor grids = at::empty({2, rows, groups}, w.options());
  if (grids.numel() == 0) return grids;
  GridSearch d{};
  d.rows = rows, d.columns = columns, d.groups = groups, d.group = group;
  d.w = w.const_data_ptr<float>(), d.importance = importance.const_data_ptr<float>();
  d.scales = grids.data_ptr<float>(), d.offsets = d.scales + rows * groups;
  d.clip = static_cast<float>(penalty6 + penalty8);
  d.noise = static_cast<float>((penalty6 / 16 + penalty8 / 256) / 12);
  d.exponent = static_cast<int>(exponent);
  const int64_t strips = over(rows, kGridRows);
  share(strips, 1, strips > 1 && worth_threads(rows, columns, kGridsTried), [&](int64_t strip, int64_t end) { kernels().search_grids(d, strip, end); });
  return grids;
}

}  // namespace
}  // namespace foveate

TORCH_LIBRARY_IMPL(foveate, CPU, m) {
  m.impl("coordinate_descent", foveate::coordinate_descent);
  m.impl("error_feedback", foveate::error_feedback);
  m.impl("search_grids", foveate::search_grids);
}
