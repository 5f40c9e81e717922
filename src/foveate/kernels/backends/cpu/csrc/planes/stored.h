// A weight as torch hands it over: ten tensors and five numbers, checked, to the plain `Weight` of the kernels.
//
// Shapes, types and layout are checked here; what the tile index says (starts, resident, tags) the kernels check.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>

#include "checks.h"
#include "planes/planes.h"

namespace foveate {
namespace {

using at::Tensor;
using at::TensorList;

void check_input_level(const Tensor& input_level) {
  check_vector(input_level, at::kByte, "input_level");
  TORCH_CHECK(input_level.numel() == 2, "input_level has ", input_level.numel(), " values, not 2");
}

void check_input_range(const Tensor& input_range) {
  check_vector(input_range, at::kFloat, "input_range");
  TORCH_CHECK(input_range.numel() == 2, "input_range has ", input_range.numel(), " values, not 2");
}

constexpr size_t kTensors = kPlanes + 5;  // planes, scales, gain, starts, resident, tags
constexpr size_t kForm = 5;               // rows, columns, inputs a group, reach, exponent of the scales

// Weight number `i` of a list, checked; its tags are those of `map`.
Weight weight_of(TensorList weights, at::IntArrayRef forms, size_t i, int64_t map) {
  TORCH_CHECK(weights.size() % kTensors == 0 && forms.size() == weights.size() / kTensors * kForm,
              "a weight is ", kTensors, " tensors and ", kForm, " numbers, not ", weights.size(), " and ", forms.size());
  TORCH_CHECK(map == 0 || map == 1, "map (=", map, ") is not 0 or 1");
  const int64_t rows = forms[i * kForm], columns = forms[i * kForm + 1], group = forms[i * kForm + 2], reach = forms[i * kForm + 3],
                exponent = forms[i * kForm + 4];
  TORCH_CHECK(group == 32 || group == 64 || group == 128, "group (=", group, ") is not one of 32, 64, 128");
  TORCH_CHECK(reach >= 0 && reach <= 2, "reach (=", reach, ") is not one of 0, 1, 2");
  TORCH_CHECK(exponent >= -64 && exponent <= 32, "exponent (=", exponent, ") is not in -64..32");
  TORCH_CHECK(rows >= 0 && columns >= 0, "rows (=", rows, ") and columns (=", columns, ") must not be negative");
  const Tensor* const planes = &weights[i * kTensors];
  const Tensor &scales = planes[kPlanes], &gain = planes[kPlanes + 1], &starts = planes[kPlanes + 2],
               &resident = planes[kPlanes + 3], &tags = planes[kPlanes + 4];
  Weight w{};
  w.rows = rows;
  w.columns = columns;
  w.strips = over(rows, kTileRows);
  w.groups = over(columns, group);
  w.group = static_cast<int>(group);
  w.reach = static_cast<int>(reach);
  for (int p = 0; p < kPlanes; ++p) {
    check_vector(planes[p], at::kByte, "a plane");
    const int64_t bytes = tile_bytes(p, w.group);
    TORCH_CHECK(planes[p].numel() % bytes == 0, "plane ", p, " has ", planes[p].numel(), " bytes, not a multiple of ", bytes);
    w.planes[p] = planes[p].const_data_ptr<uint8_t>();
    w.tiles[p + 1] = static_cast<uint64_t>(planes[p].numel() / bytes);
  }
  check_vector(scales, at::kByte, "scales");
  TORCH_CHECK(scales.numel() % (2 * kTileRows) == 0, "scales have ", scales.numel(), " bytes, not a multiple of 32");
  w.scales = scales.const_data_ptr<uint8_t>();
  w.tiles[0] = static_cast<uint64_t>(scales.numel() / (2 * kTileRows));
  check_vector(gain, at::kHalf, "gain");
  const bool gain_a_row = gain.dim() == 2 && gain.size(1) / kTileRows == w.strips && gain.size(1) % kTileRows == 0;
  TORCH_CHECK(gain.dim() == 2 && gain.size(0) == 2 && (gain.size(1) == 1 || gain_a_row), "gain has shape (=", gain.sizes(),
              "), not [2, 1] or [2, ", kTileRows, " * ", w.strips, "]");
  const float half_steps[kPlanes] = {2.0f, 1.0f, 0.5f, 0.125f * static_cast<float>(1 << reach), 0.03125f * static_cast<float>(1 << reach)};
  for (int p = 0; p < kPlanes; ++p) w.units[p] = std::ldexp(half_steps[p], static_cast<int>(exponent));
  w.offset_unit = std::ldexp(0.125f, static_cast<int>(exponent));
  if (gain.size(1) == 1) {
    for (int i = 0; i < 2; ++i) w.units[i] *= static_cast<float>(gain.const_data_ptr<at::Half>()[i]);
  } else {
    w.gains = static_cast<const uint16_t*>(gain.const_data_ptr());
  }
  check_vector(starts, at::kLong, "starts");
  TORCH_CHECK(starts.dim() == 2 && starts.size(0) == w.strips && starts.size(1) == 6,
              "starts have shape (=", starts.sizes(), "), not [", w.strips, ", 6]");
  w.starts = starts.const_data_ptr<int64_t>();
  check_vector(resident, at::kByte, "resident");
  TORCH_CHECK(resident.dim() == 2 && resident.size(0) == w.strips && resident.size(1) == w.groups,
              "resident has shape (=", resident.sizes(), "), not [", w.strips, ", ", w.groups, "]");
  w.resident = resident.const_data_ptr<uint8_t>();
  check_vector(tags, at::kByte, "tags");
  TORCH_CHECK(tags.dim() == 3 && tags.size(0) == 2 && tags.size(1) == w.strips && tags.size(2) == w.groups,
              "tags have shape (=", tags.sizes(), "), not [2, ", w.strips, ", ", w.groups, "]");
  w.tags = tags.const_data_ptr<uint8_t>() + (map ? tags.numel() / 2 : 0);
  return w;
}

}  // namespace
}  // namespace foveate
