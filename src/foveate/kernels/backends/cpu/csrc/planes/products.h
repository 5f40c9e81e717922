// Products of x with weights that share it: for each map the rows that read it, quantized, then strips of the weights.
//
// The unit of work is a strip of one weight. Where strips are few, it is a strip times a chunk of the rows of x. The
// threads take units from a queue (work_queue.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "planes/planes.h"
#include "planes/stored.h"
#include "simd/kernels.h"
#include "work_queue.h"

namespace foveate {
namespace {

using at::Tensor;

constexpr int64_t kRowChunk = 256;

// What the threads of one call found wrong.
struct Faults {
  std::atomic<uint8_t> first{0};
  void note(Fault fault) {
    if (fault != Fault::kNone) first.store(static_cast<uint8_t>(fault), std::memory_order_relaxed);
  }
  bool any() const { return first.load(std::memory_order_relaxed) != 0; }
  void raise() const {
    const Fault fault = static_cast<Fault>(first.load());
    TORCH_CHECK(fault != Fault::kOutside, "tile_offsets and stored_levels place a tile beyond the end of its plane or of the scales");
    TORCH_CHECK(fault != Fault::kLevel, "a tile's level (the lesser of its active and its stored level) is not one of 0, 2, 3, 4, 6, 8, 16, 32");
    TORCH_CHECK_INDEX(fault != Fault::kOrder, "order has an index outside the columns of x");
  }
};

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Type::kFloat32;
    case at::kBFloat16: return Type::kBFloat16;
    case at::kHalf: return Type::kFloat16;
    default: TORCH_CHECK(false, "x has dtype (=", x.scalar_type(), "), not float32, bfloat16 or float16");
  }
}

// Where the level of an input under each map is, and its range.
struct InputSource {
  const uint8_t* levels;
  int64_t stride, maps;
  const float* range;  // least and greatest of all rows of x, or null

  int level(int64_t map) const {
    TORCH_CHECK(map < maps, "a row reads map (=", map, "), and there are ", maps, " of its input");
    const int found = levels[map * stride];
    TORCH_CHECK(found == 4 || found == 8 || found == 16 || found == 32, "input level (=", found, ") is not one of 4, 8, 16, 32");
    return found;
  }

  // Whether two inputs are quantized alike, under all maps.
  bool same(const InputSource& other) const {
    if (maps != other.maps) return false;
    for (int64_t map = 0; map < maps; ++map)
      if (levels[map * stride] != other.levels[map * other.stride]) return false;
    return range == other.range || (range && other.range && std::memcmp(range, other.range, 2 * sizeof(float)) == 0);
  }
};

// The rows of x that read one map, and the weights as that map reads them.
struct MapRows {
  int64_t rows;
  const int64_t* row_of;  // null: all of them
  int level;
  const float* range;  // least and greatest of all rows of x, or null
  std::vector<Weight> weights;
};

int64_t in_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Rows of x that are to be quantized as the weights of a part want them, in memory that somebody else keeps.
struct QuantizedRows {
  static constexpr int64_t kAlign = 64;

  // How many bytes the rows take.
  static int64_t bytes(int64_t rows, int level, const Weight& w) {
    const int64_t lanes = level == 16 ? 2 * rows : rows;
    return in_lines(w.groups * lanes * w.group) + in_lines(w.groups * rows * 4) + in_lines(rows * 4);
  }

  QuantizedRows(const MapRows& part, const InputRows& x, char* memory) : x_rows(x) {
    const Weight& w = part.weights[0];
    x_rows.row_of = part.row_of;
    inputs.rows = part.rows;
    inputs.wide = part.level == 16;
    inputs.lanes = inputs.wide ? 2 * part.rows : part.rows;
    inputs.groups = w.groups;
    inputs.group = w.group;
    inputs.level = part.level;
    inputs.low = part.range ? part.range[0] : std::numeric_limits<float>::quiet_NaN();
    inputs.high = part.range ? part.range[1] : inputs.low;
    const int64_t code_bytes = in_lines(w.groups * inputs.lanes * w.group);
    inputs.codes = reinterpret_cast<int8_t*>(memory);
    inputs.sums = reinterpret_cast<float*>(memory + code_bytes);
    inputs.scales = reinterpret_cast<float*>(memory + code_bytes + in_lines(w.groups * part.rows * 4));
  }

  Fault quantize(int64_t row, int64_t row_end) const { return kernels().quantize(x_rows, inputs, row, row_end); }

  Inputs inputs{};
  InputRows x_rows;
};

// Quantized rows and the memory they lie in.
class Quantized {
 public:
  Quantized(const MapRows& part, const Tensor& x, const int64_t* order)
      : memory_(new char[static_cast<size_t>(QuantizedRows::bytes(part.rows, part.level, part.weights[0]) + QuantizedRows::kAlign)]) {
    char* const aligned = memory_.get() + (QuantizedRows::kAlign - reinterpret_cast<uintptr_t>(memory_.get()) % QuantizedRows::kAlign) % QuantizedRows::kAlign;
    const QuantizedRows rows(part, {x.const_data_ptr(), x.stride(0), x.size(1), nullptr, order, type_of(x)}, aligned);
    inputs = rows.inputs;
    Faults faults;
    const bool parallel = part.rows > 1 && worth_threads(part.rows, inputs.groups, inputs.group);
    share(part.rows, 1, parallel, [&](int64_t row, int64_t row_end) { faults.note(rows.quantize(row, row_end)); });
    faults.raise();
  }

  Inputs inputs{};

 private:
  std::unique_ptr<char[]> memory_;
};

// Products of quantized rows with weights that share them, as units of work: a strip of a weight, times a chunk of rows
// where strips are few. All parts go along the weights together: what one has read of a strip the next finds in the cache.
class ProductUnits {
 public:
  // `outputs` has one a weight, with no rows of its own; threads is how many will share the units, 1 for one alone.
  ProductUnits(const std::vector<MapRows>& parts, const std::vector<Inputs>& quantized, std::vector<Output> outputs, int64_t threads)
      : parts_(parts), quantized_(quantized), outputs_(std::move(outputs)) {
    int64_t rows = 0, lanes = 0;
    for (const Inputs& inputs : quantized_) {
      rows = std::max(rows, inputs.rows);
      lanes += inputs.lanes;
    }
    for (const Weight& w : parts_[0].weights) strips_ += w.strips;
    int64_t chunk = std::max<int64_t>(1, std::min(kRowChunk, rows));
    while (threads > 1 && chunk > 32 && over(rows, chunk) * strips_ < 4 * threads) chunk = (chunk + 1) / 2;
    chunks_ = over(rows, chunk);
    lean_ = lanes <= kernels().lean_lanes;
  }

  int64_t count() const { return strips_ * chunks_; }
  int64_t least() const { return lean_ ? 1 : 2; }

  void run(int64_t begin, int64_t end, Faults& faults) const {
    const std::vector<Weight>& weights = parts_[0].weights;
    while (begin < end && !faults.any()) {
      const int64_t c = begin / strips_;
      int64_t strip = begin % strips_;
      size_t w = 0;
      while (strip >= weights[w].strips) strip -= weights[w++].strips;
      int64_t strip_end = std::min(weights[w].strips, strip + end - begin);
      if (parts_.size() > 1) strip_end = std::min(strip_end, strip + least());
      for (size_t i = 0; i < parts_.size(); ++i) {
        const Inputs& q = quantized_[i];
        Output y = outputs_[w];
        y.row_of = parts_[i].row_of;
        faults.note(kernels().product(parts_[i].weights[w], q, y, strip, strip_end, q.rows * c / chunks_, q.rows * (c + 1) / chunks_));
      }
      begin += strip_end - strip;
    }
  }

 private:
  const std::vector<MapRows>& parts_;
  const std::vector<Inputs>& quantized_;
  std::vector<Output> outputs_;
  int64_t strips_ = 0, chunks_ = 0;
  bool lean_ = true;
};

void integer_products(const std::vector<MapRows>& parts, const Tensor& x, const int64_t* order, const std::vector<Tensor>& outputs) {
  std::vector<Quantized> memory;
  std::vector<Inputs> quantized;
  int64_t lanes = 0, strips = 0;
  for (const MapRows& part : parts) {
    memory.emplace_back(part, x, order);
    quantized.push_back(memory.back().inputs);
    lanes += quantized.back().lanes;
  }
  const std::vector<Weight>& weights = parts[0].weights;
  std::vector<Output> targets;
  for (size_t w = 0; w < weights.size(); ++w) {
    strips += weights[w].strips;
    targets.push_back({outputs[w].data_ptr(), weights[w].rows, nullptr, type_of(x)});
  }
  if (strips == 0) return;
  const bool parallel = worth_threads(strips, kTileRows, weights[0].groups, weights[0].group, lanes);
  const ProductUnits units(parts, quantized, std::move(targets), parallel ? at::get_num_threads() : 1);
  Faults faults;
  share(units.count(), units.least(), parallel, [&](int64_t begin, int64_t end) { units.run(begin, end, faults); });
  faults.raise();
}

void unpack_rows(const Weight& w, float* out, int64_t strip, int64_t strip_end) {
  Faults faults;
  share(strip_end - strip, 1, worth_threads(strip_end - strip, kTileRows, w.columns), [&](int64_t begin, int64_t end) {
    faults.note(kernels().unpack(w, out + begin * kTileRows * w.columns, strip + begin, strip + end));
  });
  faults.raise();
}

// Inputs at 32 bits: the float32 product with the unpacked weight, a slab of rows at a time.
void float_products(const MapRows& part, const Tensor& x, const Tensor* order, const std::vector<Tensor>& outputs) {
  Tensor index;
  if (part.row_of) {
    index = at::empty({part.rows}, at::kLong);
    std::copy_n(part.row_of, part.rows, index.data_ptr<int64_t>());
  }
  Tensor x_MK = (part.row_of ? x.index_select(0, index) : x).to(at::kFloat);
  if (order) x_MK = x_MK.index_select(1, *order);
  constexpr int64_t kSlab = 64;  // strips
  for (size_t i = 0; i < part.weights.size(); ++i) {
    const Weight& w = part.weights[i];
    for (int64_t strip = 0; strip < w.strips; strip += kSlab) {
      const int64_t strip_end = std::min(w.strips, strip + kSlab);
      const int64_t first = strip * kTileRows, count = std::min(w.rows, strip_end * kTileRows) - first;
      const Tensor slab = at::empty({count, w.columns}, x_MK.options());
      unpack_rows(w, slab.data_ptr<float>(), strip, strip_end);
      Tensor y = at::linear(x_MK, slab);
      if (w.bias) y += at::from_blob(const_cast<float*>(w.bias) + first, {count}, at::kFloat);
      Tensor target = outputs[i].narrow(1, first, count);
      if (part.row_of) target.index_copy_(0, index, y.to(target.scalar_type()));
      else target.copy_(y);
    }
  }
}

}  // namespace
}  // namespace foveate
