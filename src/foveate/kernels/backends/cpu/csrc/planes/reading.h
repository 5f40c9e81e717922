// How weights are read: at which levels, by which rows of x, and with which bias.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "planes/handles.h"
#include "planes/products.h"

namespace foveate {
namespace {

void set_bias(Weight& w, const Tensor& bias) {
  if (bias.numel() == 0) return;
  check_vector(bias, at::kFloat, "a bias");
  TORCH_CHECK(bias.numel() == w.rows, "a bias has ", bias.numel(), " values, not ", w.rows);
  w.bias = bias.const_data_ptr<float>();
}

// The map that each row reads, one byte a row, of pairs (low, high) whose two are the same.
std::vector<uint8_t> chosen_maps(const std::vector<uint8_t>& pairs) {
  std::vector<uint8_t> maps(pairs.size() / 2);
  for (size_t r = 0; r < maps.size(); ++r) {
    TORCH_CHECK(pairs[2 * r] == pairs[2 * r + 1], "row ", r, " reads one of maps ", static_cast<int>(pairs[2 * r]), " and ",
                static_cast<int>(pairs[2 * r + 1]), ", and nothing says which");
    maps[r] = pairs[2 * r];
  }
  return maps;
}

// The rows of each map that is read, in ascending order of maps; `row_of` holds their numbers where there are several maps.
std::vector<MapRows> rows_by_map(const std::vector<uint8_t>& maps, int64_t m, const std::vector<Weight>& weights, const InputSource& input,
                                 std::vector<int64_t>& row_of) {
  int64_t counts[kMaxMaps] = {m};
  if (!maps.empty()) {
    counts[0] = 0;
    for (const uint8_t map : maps) {
      TORCH_CHECK(map < kMaxMaps, "a row reads map (=", static_cast<int>(map), "), which is not one of ", kMaxMaps);
      ++counts[map];
    }
  }
  const bool several = std::count_if(counts, counts + kMaxMaps, [](int64_t count) { return count > 0; }) > 1;
  int64_t first[kMaxMaps] = {};
  for (int64_t map = 1; map < kMaxMaps; ++map) first[map] = first[map - 1] + counts[map - 1];
  if (several) {
    row_of.resize(static_cast<size_t>(m));
    int64_t at[kMaxMaps];
    std::copy_n(first, kMaxMaps, at);
    for (int64_t r = 0; r < m; ++r) row_of[static_cast<size_t>(at[maps[static_cast<size_t>(r)]]++)] = r;
  }
  std::vector<MapRows> parts;
  for (int64_t map = 0; map < kMaxMaps; ++map) {
    if (counts[map] == 0) continue;
    MapRows part{counts[map], several ? row_of.data() + first[map] : nullptr, input.level(map), input.range, weights};
    for (Weight& w : part.weights) {
      TORCH_CHECK(map < w.maps, "a row reads map (=", map, "), and there are ", w.maps);
      w.active_levels += map * w.map_stride;
    }
    parts.push_back(std::move(part));
  }
  return parts;
}

// Input number `input` of a model, as a generation has it.
InputSource input_of(const Generation& generation, int64_t input) {
  TORCH_CHECK(input >= 0 && input < generation.inputs, "input (=", input, ") is not one of the ", generation.inputs, " of the pass's model");
  return {generation.input_levels.data() + input, generation.inputs, generation.maps, generation.ranges.data() + 2 * input};
}

// Weight number `i` of a handle and its input, as a pass reads them; without a pass at the levels of their own tensors.
std::pair<Weight, InputSource> read_by(const Held& held, size_t i, const Generation* generation) {
  if (!generation) {
    const Weight w = weight_of(held.tensors, held.geometries, i);
    check_input_level(held.input_levels[i]);
    if (!held.input_ranges.empty()) check_input_range(held.input_ranges[i]);
    const float* const range = held.input_ranges.empty() ? nullptr : held.input_ranges[i].const_data_ptr<float>();
    return {w, {held.input_levels[i].const_data_ptr<uint8_t>(), 1, held.input_levels[i].numel(), range}};
  }
  Weight w = held.weight(i);
  TORCH_CHECK(!held.places.empty(), "the handle does not say where its weights are in a pass");
  w.active_levels = generation->levels_of(held.places[i], w.strips * w.groups);
  w.maps = generation->maps;
  w.map_stride = w.strips * w.groups;
  return {w, input_of(*generation, held.inputs[i])};
}

}  // namespace
}  // namespace foveate
