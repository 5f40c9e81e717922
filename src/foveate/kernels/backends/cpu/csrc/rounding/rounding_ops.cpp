// The torch side of rounding by error feedback and by coordinate descent: checks, memory, threads. Schemas are in
// kernels/rounding/ops.py, the meaning in kernels/rounding/reference.py.

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
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

  // Calls run(block, first row, what all columns of its rows have in common) for each block of rows.
  template <class Run>
  void each_block(const Run& run) const {
    const int64_t blocks = over(rows, size);
    if (blocks == 0) return;
    const int64_t padded = (size + 15) / 16 * 16;
    share(blocks, 1, blocks > 1 && worth_threads(rows, columns), [&](int64_t block, int64_t block_end) {
      Tensor column = at::zeros({2, kStreams, padded}, w.options());
      for (; block < block_end; ++block) {
        const int64_t row = block * size, count = std::min(size, rows - row), groups = scale.size(1);
        const Tensor own_gain = gain.narrow(1, row, count).contiguous();
        Tensor metric;
        if (gradients) {
          metric = at::zeros({count, padded}, w.options());
          // a metric is symmetric, and a factor was transposed
          metric.narrow(1, 0, count).copy_(gradients->select(0, block).narrow(0, 0, count).narrow(1, 0, count).t());
        }
        column.zero_();
        ColumnBlock d{};
        d.rows = count;
        d.padded = padded;
        d.stride = columns;
        d.plane = count * columns;
        d.grid_stride = groups;
        d.w = w.const_data_ptr<float>() + row * columns;
        d.anchor = codes.data_ptr<uint8_t>() + row * columns;
        d.residual = d.anchor + rows * columns;
        d.between = between.const_data_ptr<float>();
        d.between_stride = columns;
        d.gradients = gradients ? metric.const_data_ptr<float>() : nullptr;
        d.scales = scale.const_data_ptr<float>() + row * groups;
        d.offsets = offset.const_data_ptr<float>() + row * groups;
        d.group_of = group_of.const_data_ptr<int64_t>();
        d.gains = own_gain.const_data_ptr<float>();
        d.column = column.data_ptr<float>();
        d.weighed = d.column + kStreams * padded;
        for (int s = 0; s < kStreams; ++s) d.level_weights[s] = static_cast<float>(level_weights[static_cast<size_t>(s)]);
        d.widening = static_cast<float>(kOwnAnchorStep) / static_cast<float>(kAnchorSteps[reach]);
        run(block, row, d);
      }
    });
  }

  // Calls run(first column, its block) for each block of columns.
  template <class Run>
  void each_part(const ColumnBlock& d, const Run& run) const {
    for (int64_t first = 0; first < columns; first += kBlockColumns) {
      ColumnBlock part = d;
      part.columns = std::min(kBlockColumns, columns - first);
      part.w += first, part.anchor += first, part.residual += first, part.group_of += first;
      part.between += first * columns + first;
      run(first, part);
    }
  }
};

// [S * R, b] in memory of 64 columns.
Tensor as_block(const Tensor& x) {
  const int64_t missing = kBlockColumns - x.size(1);
  return missing ? at::constant_pad_nd(x, {0, missing}) : x.contiguous();
}

// Values minus weights of some rows, [S, R, K].
void write_errors(const ColumnBlock& d, int64_t columns) {
  for (int64_t i = 0; i < d.rows; ++i)
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t at = i * d.stride + k, group = i * d.grid_stride + d.group_of[k];
      float value[kStreams];
      code_values(d.anchor[at], d.residual[at], d.widening, d.gains[i], d.gains[d.rows + i], value);
      for (int s = 0; s < kStreams; ++s) d.errors[s * d.plane + at] = (d.offsets[group] + d.scales[group] * value[s]) - d.w[at];
    }
}

Tensor coordinate_descent(Tensor& codes, const Tensor& w, const Tensor& covariance, const std::optional<Tensor>& gradients, const Tensor& scale,
                     const Tensor& offset, const Tensor& gain, const Tensor& group_of, at::ArrayRef<double> level_weights, int64_t sweeps,
                     double least_gain, int64_t reach) {
  Rounding rounding{codes, w, covariance, scale, offset, gain, group_of, gradients, level_weights, reach};
  rounding.check_all();
  Tensor made = at::zeros({over(rounding.rows, rounding.size)}, w.options().dtype(at::kLong));
  int64_t* const count = made.data_ptr<int64_t>();
  rounding.each_block([&](int64_t block, int64_t, ColumnBlock& d) {
    Tensor errors = at::empty({kStreams * d.rows, rounding.columns}, w.options());
    d.errors = errors.data_ptr<float>();
    write_errors(d, rounding.columns);
    for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
      double form[2] = {0.0, 0.0};
      d.form = form;
      rounding.each_part(d, [&](int64_t first, ColumnBlock& part) {
        // the covariance is symmetric: its rows are its columns
        Tensor pull = as_block(at::matmul(errors, covariance.narrow(0, first, part.columns).t()));
        part.errors += first;
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
  rounding.each_block([&](int64_t, int64_t row, ColumnBlock& d) {
    const int64_t columns = rounding.columns;
    Tensor wanted = at::empty({kStreams, d.rows, columns}, w.options()).copy_(w.narrow(0, row, d.rows)).view({kStreams * d.rows, columns});
    rounding.each_part(d, [&](int64_t first, ColumnBlock& part) {
      Tensor block = as_block(wanted.narrow(1, first, part.columns));
      part.pull = block.data_ptr<float>();
      kernels().error_feedback(part);
      const int64_t next = first + part.columns;
      if (next < columns)
        wanted.narrow(1, next, columns - next)
            .sub_(at::matmul(block.narrow(1, 0, part.columns), factor.narrow(0, first, part.columns).narrow(1, next, columns - next)));
    });
  });
}

}  // namespace
}  // namespace foveate

TORCH_LIBRARY_IMPL(foveate, CPU, m) {
  m.impl("coordinate_descent", foveate::coordinate_descent);
  m.impl("error_feedback", foveate::error_feedback);
}
