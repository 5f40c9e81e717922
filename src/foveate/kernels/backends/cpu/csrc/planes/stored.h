// A weight as torch hands it over: thirteen tensors and five numbers, checked, to the plain `Weight` of the kernels.
//
// Shapes, types and layout are checked here. The kernels check the contents of the tile index (tile_offsets,
// stored_levels, active_levels) as they read it.
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
  TORCH_CHECK(input_level.numel() >= 1 && input_level.numel() <= kMaxMaps, "input_level has ", input_level.numel(), " values, not 1..",
              kMaxMaps, ", one a map");
}

void check_input_range(const Tensor& input_range) {
  check_vector(input_range, at::kFloat, "input_range");
  TORCH_CHECK(input_range.numel() == 2, "input_range has ", input_range.numel(), " values, not 2");
}

// planes, scales, gain, tile_offsets, stored_levels, exact_values, exact_tiles, exact_offsets, active_levels
constexpr size_t kTensors = kPlanes + 8;
constexpr size_t kGeometryNumbers = 5;     // rows, columns, inputs a group, reach, exponent of the scales

// The maps lie one after another, and need not be next to each other.
void set_active_levels(Weight& w, const Tensor& levels) {
  TORCH_CHECK(levels.scalar_type() == at::kByte, "active_levels has dtype (=", levels.scalar_type(), "), not Byte");
  TORCH_CHECK(levels.device().is_cpu(), "active_levels is on device (=", levels.device(), "), not the CPU");
  TORCH_CHECK(levels.dim() == 3 && levels.size(0) >= 1 && levels.size(0) <= kMaxMaps && levels.size(1) == w.strips && levels.size(2) == w.groups,
              "active_levels have shape (=", levels.sizes(), "), not [1..", kMaxMaps, ", ", w.strips, ", ", w.groups, "]");
  check_memory(levels, "active_levels");
  TORCH_CHECK(levels.numel() == 0 || levels[0].is_contiguous(), "active_levels is not contiguous within a map");
  w.active_levels = levels.const_data_ptr<uint8_t>();
  w.maps = levels.size(0);
  w.map_stride = levels.stride(0);
}

// The kernels check the offsets and numbers as they read them.
void set_exact_tiles(Weight& w, const Tensor& values, const Tensor& numbers, const Tensor& offsets) {
  check_vector(offsets, at::kLong, "exact_offsets");
  check_vector(numbers, at::kInt, "exact_tiles");
  if (offsets.numel() == 0) {
    TORCH_CHECK(values.numel() == 0 && numbers.numel() == 0, "there are exact tiles, and no exact_offsets");
    return;
  }
  TORCH_CHECK(offsets.numel() == w.strips + 1, "exact_offsets have ", offsets.numel(), " values, not 0 or ", w.strips, " + 1");
  check_vector(values, values.scalar_type(), "exact_values");
  switch (values.scalar_type()) {
    case at::kFloat: w.exact.type = Type::kFloat32; break;
    case at::kBFloat16: w.exact.type = Type::kBFloat16; break;
    case at::kHalf: w.exact.type = Type::kFloat16; break;
    default: TORCH_CHECK(false, "exact_values have dtype (=", values.scalar_type(), "), not float32, bfloat16 or float16");
  }
  const int64_t each = int64_t{kTileRows} * w.group;
  TORCH_CHECK(values.numel() % each == 0 && values.numel() / each == numbers.numel(), "there are ", numbers.numel(), " exact tiles, and ", values.numel(),
              " exact values, not ", each, " a tile");
  w.exact.values = values.const_data_ptr();
  w.exact.numbers = numbers.const_data_ptr<int32_t>();
  w.exact.offsets = offsets.const_data_ptr<int64_t>();
  w.exact.count = numbers.numel();
}

// Weight number `i` of a list, checked; its active levels are those of map 0.
Weight weight_of(TensorList weights, at::IntArrayRef geometries, size_t i) {
  TORCH_CHECK(weights.size() % kTensors == 0 && geometries.size() == weights.size() / kTensors * kGeometryNumbers,
              "a weight is ", kTensors, " tensors and ", kGeometryNumbers, " numbers, not ", weights.size(), " and ", geometries.size());
  TORCH_CHECK(i < weights.size() / kTensors, "there is no weight ", i);
  const int64_t rows = geometries[i * kGeometryNumbers], columns = geometries[i * kGeometryNumbers + 1], group = geometries[i * kGeometryNumbers + 2], reach = geometries[i * kGeometryNumbers + 3],
                exponent = geometries[i * kGeometryNumbers + 4];
  TORCH_CHECK(group == 32 || group == 64 || group == 128, "group (=", group, ") is not one of 32, 64, 128");
  TORCH_CHECK(reach >= 0 && reach <= 3, "reach (=", reach, ") is not one of 0, 1, 2, 3");
  TORCH_CHECK(exponent >= -64 && exponent <= 32, "exponent (=", exponent, ") is not in -64..32");
  TORCH_CHECK(rows >= 0 && columns >= 0, "rows (=", rows, ") and columns (=", columns, ") must not be negative");
  const Tensor* const planes = &weights[i * kTensors];
  const Tensor &scales = planes[kPlanes], &gain = planes[kPlanes + 1], &tile_offsets = planes[kPlanes + 2],
               &stored_levels = planes[kPlanes + 3], &active_levels = planes[kPlanes + 7];
  Weight w{};
  w.rows = rows;
  w.columns = columns;
  w.strips = over(rows, kTileRows);
  w.groups = over(columns, group);
  w.group = static_cast<int>(group);
  w.anchor_step = kAnchorSteps[reach];
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
  const float half_steps[kPlanes] = {2.0f, 1.0f, 0.5f, static_cast<float>(2.0 / w.anchor_step), static_cast<float>(0.5 / w.anchor_step)};
  for (int p = 0; p < kPlanes; ++p) w.units[p] = std::ldexp(half_steps[p], static_cast<int>(exponent));
  w.offset_unit = std::ldexp(0.125f, static_cast<int>(exponent));
  if (gain.size(1) == 1) {
    for (int i = 0; i < 2; ++i) w.units[i] *= static_cast<float>(gain.const_data_ptr<at::Half>()[i]);
  } else {
    w.gains = static_cast<const uint16_t*>(gain.const_data_ptr());
  }
  check_vector(tile_offsets, at::kLong, "tile_offsets");
  TORCH_CHECK(tile_offsets.dim() == 2 && tile_offsets.size(0) == w.strips && tile_offsets.size(1) == 6,
              "tile_offsets have shape (=", tile_offsets.sizes(), "), not [", w.strips, ", 6]");
  w.tile_offsets = tile_offsets.const_data_ptr<int64_t>();
  check_vector(stored_levels, at::kByte, "stored_levels");
  TORCH_CHECK(stored_levels.dim() == 2 && stored_levels.size(0) == w.strips && stored_levels.size(1) == w.groups,
              "stored_levels has shape (=", stored_levels.sizes(), "), not [", w.strips, ", ", w.groups, "]");
  w.stored_levels = stored_levels.const_data_ptr<uint8_t>();
  set_exact_tiles(w, planes[kPlanes + 4], planes[kPlanes + 5], planes[kPlanes + 6]);
  set_active_levels(w, active_levels);
  return w;
}

}  // namespace
}  // namespace foveate
