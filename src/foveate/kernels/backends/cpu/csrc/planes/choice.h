// Which of its two maps each row of x reads: the higher one where an estimate of the lower one's error is above a threshold.
//
// The error is that of the product, weighted by how much the loss depends on each output:
//
//     E = sum over sampled rows n of the weight of row_weights[n] * (y_high - y_low)_n^2
//
// Rows are sampled as whole strips, which is what kernels are fast at, and read at both maps with the kernels of the
// product itself. So the estimate needs no memory but the sample's list. Its sums are made in one order and row by row:
// what a row reads depends neither on its batch, nor on the threads, nor on the instruction set. Inputs of 32 bits are
// quantized to 16 for the estimate.
#pragma once

#include "planes/generations.h"
#include "planes/products.h"

#include <array>

namespace foveate {
namespace {

// Sampled strips of a weight, and the weight of each of their rows.
struct Sample {
  const int64_t* strips;
  const float* row_weights;  // [count, kTileRows]
  int64_t count;
};

// Some rows of x: row_of[0..count), or the first `count` where that is null.
struct RowsOfX {
  const int64_t* row_of;
  int64_t count;
};

constexpr int64_t kRowBlock = 64;  // rows of x whose products are held at once

// The estimated error of each of `rows`, where maps are (low, high).
void estimated_errors(const Tensor& x_MK, const Weight& w, const InputSource& input, std::array<int64_t, 2> maps, const Sample& sample,
                      const RowsOfX& rows, float* errors) {
  TORCH_CHECK(w.columns == x_MK.size(1), "x has ", x_MK.size(1), " columns, the weight ", w.columns);
  for (int64_t s = 0; s < sample.count; ++s)
    TORCH_CHECK(sample.strips[s] >= 0 && sample.strips[s] < w.strips, "strip (=", sample.strips[s], ") is not one of ", w.strips);
  std::vector<MapRows> parts;
  for (const int64_t map : maps) {
    TORCH_CHECK(map >= 0 && map < w.maps, "a row reads map (=", map, "), and there are ", w.maps);
    Weight read = w;
    read.active_levels += map * w.map_stride;
    read.bias = nullptr;
    parts.push_back({rows.count, rows.row_of, std::min(16, input.level(map)), input.range, {read}});
  }
  std::fill_n(errors, rows.count, 0.0f);
  if (sample.count == 0 || rows.count == 0) return;
  std::vector<Quantized> quantized;
  quantized.emplace_back(parts[0], x_MK, nullptr);
  if (parts[1].level != parts[0].level) quantized.emplace_back(parts[1], x_MK, nullptr);
  const int64_t width = sample.count * kTileRows;
  Faults faults;
  const bool parallel = rows.count > kRowBlock && worth_threads(rows.count, 2 * width, w.columns);
  share(rows.count, kRowBlock, parallel, [&](int64_t begin, int64_t end) {
    std::vector<float> products(static_cast<size_t>(2 * std::min(kRowBlock, end - begin) * width));
    for (int64_t stop; begin < end && !faults.any(); begin = stop) {
      stop = std::min(end, begin + kRowBlock);
      const int64_t apart = (stop - begin) * width;  // between the products of the two maps
      for (int64_t s = 0; s < sample.count; ++s)
        for (int64_t side = 0; side < 2; ++side) {
          // the kernel adds begin * width and 16 a strip to where it writes
          const int64_t shift = side * apart + (s - sample.strips[s]) * kTileRows - begin * width;
          void* const to = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(products.data()) + static_cast<uintptr_t>(shift) * sizeof(float));
          const Inputs& q = quantized[quantized.size() > 1 ? static_cast<size_t>(side) : 0].inputs;
          faults.note(kernels().product(parts[static_cast<size_t>(side)].weights[0], q, {to, width, nullptr, Type::kFloat32}, sample.strips[s],
                                        sample.strips[s] + 1, begin, stop));
        }
      for (int64_t r = begin; r < stop; ++r) {
        const float* const low = products.data() + (r - begin) * width;
        float error = 0.0f;
        for (int64_t s = 0; s < sample.count; ++s) {
          const int64_t rows_left = std::min<int64_t>(kTileRows, w.rows - sample.strips[s] * kTileRows);
          for (int64_t n = s * kTileRows; n < s * kTileRows + rows_left; ++n) {
            const float difference = low[apart + n] - low[n];
            error += sample.row_weights[n] * (difference * difference);
          }
        }
        errors[r] = error;
      }
    }
  });
  faults.raise();
}

// Whether any row has two maps to choose between.
bool differ(const std::vector<uint8_t>& pairs) {
  for (size_t r = 0; r < pairs.size(); r += 2)
    if (pairs[r] != pairs[r + 1]) return true;
  return false;
}

// The higher map of each pair (low, high).
std::vector<uint8_t> better_maps(const std::vector<uint8_t>& pairs) {
  std::vector<uint8_t> maps(pairs.size() / 2);
  for (size_t r = 0; r < maps.size(); ++r) maps[r] = pairs[2 * r + 1];
  return maps;
}

// The map that each row reads of weight number `place` of a generation, of pairs (low, high). An error that is no number
// takes the higher map.
std::vector<uint8_t> decided_maps(const Generation& generation, int64_t place, const Weight& w, const InputSource& input, const Tensor& x_MK,
                                  const std::vector<uint8_t>& pairs) {
  TORCH_CHECK(generation.choices && place >= 0 && place < generation.choices->weights, "a row reads one of two maps, and no choice says which");
  const Choices& choices = *generation.choices;
  std::vector<uint8_t> maps = better_maps(pairs);
  std::vector<int64_t> rows[kMaxMaps * kMaxMaps];  // of each pair
  for (size_t r = 0; r < maps.size(); ++r) {
    const size_t pair = static_cast<size_t>(kMaxMaps * pairs[2 * r] + pairs[2 * r + 1]);
    if (pairs[2 * r] == pairs[2 * r + 1]) continue;
    TORCH_CHECK(pair < kMaxMaps * kMaxMaps && choices.of_pair[pair] >= 0, "row ", r, " reads one of maps ", static_cast<int>(pairs[2 * r]), " and ",
                static_cast<int>(pairs[2 * r + 1]), ", and no choice says which");
    rows[pair].push_back(static_cast<int64_t>(r));
  }
  for (int64_t pair = 0; pair < kMaxMaps * kMaxMaps; ++pair) {
    const std::vector<int64_t>& mine = rows[pair];
    if (mine.empty()) continue;
    const int64_t choice = choices.of_pair[pair], low = pair / kMaxMaps;
    const int64_t* const begin = choices.begins.data() + choice * (choices.weights + 1) + place;
    const Sample sample{choices.strips.data() + begin[0], choices.row_weights.data() + kTileRows * begin[0], begin[1] - begin[0]};
    const float threshold = choices.thresholds[static_cast<size_t>(choice * choices.weights + place)];
    std::vector<float> errors(mine.size());
    const bool all = mine.size() == maps.size();
    estimated_errors(x_MK, w, input, {low, pair % kMaxMaps}, sample, {all ? nullptr : mine.data(), static_cast<int64_t>(mine.size())}, errors.data());
    int64_t higher = 0;
    for (size_t i = 0; i < mine.size(); ++i) {
      if (errors[i] <= threshold) maps[static_cast<size_t>(mine[i])] = static_cast<uint8_t>(low);
      else ++higher;
    }
    int64_t* const count = static_cast<int64_t*>(choices.counts.data_ptr()) + 2 * (choice * choices.weights + place);
    __atomic_fetch_add(count, static_cast<int64_t>(mine.size()), __ATOMIC_RELAXED);
    __atomic_fetch_add(count + 1, higher, __ATOMIC_RELAXED);
  }
  return maps;
}

}  // namespace
}  // namespace foveate
