// The torch side of the CPU kernels: checks, memory, threads. Schemas and meaning are in Python (kernels/planes/ops.py,
// kernels/planes/reference.py); this file only registers for the CPU.
//
// The shapes of arguments are checked first (planes/stored.h). The kernels check the tile index as they read it.
//
// The unit of work is a strip of one weight. Where strips are few, it is a strip times a chunk of the rows of x. The
// threads take units from a queue (work_queue.h).

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "planes/handles.h"
#include "planes/planes.h"
#include "planes/stored.h"
#include "simd/kernels.h"
#include "work_queue.h"

namespace foveate {
namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kRowChunk = 256;

const Kernels* find_kernels(const std::string& name) {
  const Kernels* const all[] = {avx512_kernels(), avx2_kernels(), portable_kernels()};
  for (const Kernels* kernels : all)
    if (kernels && (name.empty() || name == kernels->name)) return kernels;
  TORCH_CHECK(false, "instruction set (=", name, ") is not one of avx512_vnni, avx2, portable, or this machine does not have it");
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* now = active.load(std::memory_order_relaxed);
  if (!now) {
    const char* forced = std::getenv("FOVEATE_CPU");
    now = find_kernels(forced ? forced : "");
    active.store(now);
  }
  return *now;
}

namespace {

std::string cpu_isa(std::string force) {
  if (!force.empty()) active.store(find_kernels(force));
  return kernels().name;
}

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
    TORCH_CHECK(fault != Fault::kLevel, "a tile's level (the lesser of its active and its stored level) is not one of 0, 2, 3, 4, 6, 8");
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

// The rows of x that one map serves, and the weights as that map reads them.
struct Pass {
  int64_t rows;
  const int64_t* row_of;  // null: all of them
  int level;
  const float* range;  // least and greatest of all rows of x, or null
  std::vector<Weight> weights;
};

int64_t in_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Quantized rows and the memory they lie in.
class Quantized {
 public:
  Quantized(const Pass& pass, const Tensor& x, const int64_t* order)
      : rows_{x.const_data_ptr(), x.stride(0), x.size(1), pass.row_of, order, type_of(x)} {
    const Weight& w = pass.weights[0];
    inputs.rows = pass.rows;
    inputs.wide = pass.level == 16;
    inputs.lanes = inputs.wide ? 2 * pass.rows : pass.rows;
    inputs.groups = w.groups;
    inputs.group = w.group;
    inputs.level = pass.level;
    inputs.low = pass.range ? pass.range[0] : std::numeric_limits<float>::quiet_NaN();
    inputs.high = pass.range ? pass.range[1] : inputs.low;
    const int64_t code_bytes = in_lines(w.groups * inputs.lanes * w.group);
    const int64_t sum_bytes = in_lines(w.groups * pass.rows * 4);
    memory_.reset(new char[static_cast<size_t>(code_bytes + sum_bytes + pass.rows * 4 + 64)]);
    char* const aligned = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64;
    inputs.codes = reinterpret_cast<int8_t*>(aligned);
    inputs.sums = reinterpret_cast<float*>(aligned + code_bytes);
    inputs.scales = reinterpret_cast<float*>(aligned + code_bytes + sum_bytes);
    Faults faults;
    const bool parallel = pass.rows > 1 && worth_threads(pass.rows, w.groups, w.group);
    share(pass.rows, 1, parallel,
          [&](int64_t row, int64_t row_end) { faults.note(kernels().quantize(rows_, inputs, row, row_end)); });
    faults.raise();
  }

  Inputs inputs{};

 private:
  InputRows rows_;
  std::unique_ptr<char[]> memory_;
};

// All passes go along the weights together: what one has read of a strip the next finds in the cache.
void integer_passes(const std::vector<Pass>& passes, const Tensor& x, const int64_t* order, const std::vector<Tensor>& outputs) {
  const Kernels& isa = kernels();
  std::vector<Quantized> quantized;
  int64_t rows = 0, lanes = 0;
  for (const Pass& pass : passes) {
    quantized.emplace_back(pass, x, order);
    rows = std::max(rows, pass.rows);
    lanes += quantized.back().inputs.lanes;
  }
  const std::vector<Weight>& weights = passes[0].weights;
  int64_t strips = 0;
  for (const Weight& w : weights) strips += w.strips;
  if (strips == 0) return;
  const bool parallel = worth_threads(strips, kTileRows, weights[0].groups, weights[0].group, lanes);
  int64_t chunk = std::min(kRowChunk, rows);
  while (parallel && chunk > 32 && (rows + chunk - 1) / chunk * strips < 4 * at::get_num_threads()) chunk = (chunk + 1) / 2;
  const int64_t chunks = (rows + chunk - 1) / chunk;
  const bool lean = lanes <= isa.lean_lanes;
  Faults faults;
  share(strips * chunks, lean ? 1 : 2, parallel, [&](int64_t begin, int64_t end) {
    while (begin < end && !faults.any()) {
      const int64_t c = begin / strips;
      int64_t strip = begin % strips;
      size_t w = 0;
      while (strip >= weights[w].strips) strip -= weights[w++].strips;
      int64_t strip_end = std::min(weights[w].strips, strip + end - begin);
      if (passes.size() > 1) strip_end = std::min(strip_end, strip + (lean ? 1 : 2));
      for (size_t i = 0; i < passes.size(); ++i) {
        const Inputs& q = quantized[i].inputs;
        const Output y{outputs[w].data_ptr(), weights[w].rows, passes[i].row_of, type_of(x)};
        faults.note(isa.product(passes[i].weights[w], q, y, strip, strip_end, q.rows * c / chunks, q.rows * (c + 1) / chunks));
      }
      begin += strip_end - strip;
    }
  });
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
void float_pass(const Pass& pass, const Tensor& x, const Tensor* order, const std::vector<Tensor>& outputs) {
  Tensor index;
  if (pass.row_of) {
    index = at::empty({pass.rows}, at::kLong);
    std::copy_n(pass.row_of, pass.rows, index.data_ptr<int64_t>());
  }
  Tensor x_MK = (pass.row_of ? x.index_select(0, index) : x).to(at::kFloat);
  if (order) x_MK = x_MK.index_select(1, *order);
  constexpr int64_t kSlab = 64;  // strips
  for (size_t i = 0; i < pass.weights.size(); ++i) {
    const Weight& w = pass.weights[i];
    for (int64_t strip = 0; strip < w.strips; strip += kSlab) {
      const int64_t strip_end = std::min(w.strips, strip + kSlab);
      const int64_t first = strip * kTileRows, count = std::min(w.rows, strip_end * kTileRows) - first;
      const Tensor slab = at::empty({count, w.columns}, x_MK.options());
      unpack_rows(w, slab.data_ptr<float>(), strip, strip_end);
      Tensor y = at::linear(x_MK, slab);
      if (w.bias) y += at::from_blob(const_cast<float*>(w.bias) + first, {count}, at::kFloat);
      Tensor target = outputs[i].narrow(1, first, count);
      if (pass.row_of) target.index_copy_(0, index, y.to(target.scalar_type()));
      else target.copy_(y);
    }
  }
}

// Whether two weights of a handle quantize their input alike: levels and ranges are the same, bit by bit.
bool same_inputs(const Held& held, size_t a, size_t b) {
  const auto same = [a, b](const std::vector<Tensor>& of, size_t bytes) {
    return of.empty() || std::memcmp(of[a].const_data_ptr(), of[b].const_data_ptr(), bytes) == 0;
  };
  return same(held.input_levels, 2) && same(held.input_ranges, 2 * sizeof(float));
}

int input_level_of(const Tensor& input_level, int map) {
  const int level = input_level.const_data_ptr<uint8_t>()[map];
  TORCH_CHECK(level == 4 || level == 8 || level == 16 || level == 32, "input level (=", level, ") is not one of 4, 8, 16, 32");
  return level;
}

void set_bias(Weight& w, const Tensor& bias) {
  if (bias.numel() == 0) return;
  check_vector(bias, at::kFloat, "a bias");
  TORCH_CHECK(bias.numel() == w.rows, "a bias has ", bias.numel(), " values, not ", w.rows);
  w.bias = bias.const_data_ptr<float>();
}

// M, which without columns is not seen from the number of elements.
int64_t rows_of(const Tensor& x) {
  if (const int64_t columns = x.size(-1)) return x.numel() / columns;
  int64_t rows = 1;
  for (const int64_t size : x.sizes().slice(0, static_cast<size_t>(x.dim() - 1)))
    TORCH_CHECK(!__builtin_mul_overflow(rows, size, &rows), "x of shape (=", x.sizes(), ") has more than 2^63 rows");
  return rows;
}

// x times weights that share it, with their biases set and the active levels of map 0.
std::vector<Tensor> multiply(const Tensor& x, const std::vector<Weight>& weights, const Tensor& input_level,
                             const std::optional<Tensor>& choice, const std::optional<Tensor>& order, const float* range) {
  const size_t count = weights.size();
  TORCH_CHECK(x.dim() > 0, "x has no dimension of columns");
  type_of(x);
  check_memory(x, "x");
  const int64_t columns = x.size(-1), m = rows_of(x);
  Tensor x_MK = x.dim() == 2 ? x : x.reshape({m, columns});
  if (x_MK.stride(1) != 1) x_MK = x_MK.contiguous();

  std::vector<Tensor> outputs;
  outputs.reserve(count);
  auto shape = x.sizes().vec();
  for (const Weight& w : weights) {
    TORCH_CHECK(w.columns == columns, "x has ", columns, " columns, the weight ", w.columns);
    TORCH_CHECK(w.group == weights[0].group, "weights that share an input have groups of ", weights[0].group, " and of ", w.group);
    shape.back() = w.rows;
    outputs.push_back(at::empty(shape, x.options()));
  }
  const int64_t* order_data = nullptr;
  if (order) {
    check_vector(*order, at::kLong, "order");
    TORCH_CHECK(order->numel() == columns, "order has ", order->numel(), " values, not ", columns);
    order_data = order->const_data_ptr<int64_t>();
  }
  if (std::all_of(outputs.begin(), outputs.end(), [](const Tensor& y) { return y.numel() == 0; })) return outputs;

  std::vector<int64_t> row_of;
  int64_t split = m;  // rows of map 0, then those of map 1
  if (choice) {
    TORCH_CHECK(choice->scalar_type() == at::kByte || choice->scalar_type() == at::kBool, "choice has dtype (=",
                choice->scalar_type(), "), not bool or uint8");
    TORCH_CHECK(choice->numel() == m, "choice has ", choice->numel(), " values, not one for each of ", m, " rows");
    check_memory(*choice, "choice");
    const Tensor chosen = choice->contiguous();
    const uint8_t* which = static_cast<const uint8_t*>(chosen.const_data_ptr());
    split = std::count(which, which + m, uint8_t{0});
    if (split != 0 && split != m) {
      row_of.resize(m);
      for (int64_t r = 0, at[2] = {0, split}; r < m; ++r) row_of[at[which[r] != 0]++] = r;
    }
  }
  std::vector<Tensor> flat;
  for (size_t i = 0; i < count; ++i) flat.push_back(outputs[i].dim() == 2 ? outputs[i] : outputs[i].view({m, weights[i].rows}));
  std::vector<Pass> passes;
  for (int map = 0; map < 2; ++map) {
    Pass pass{map ? m - split : split, row_of.empty() ? nullptr : row_of.data() + (map ? split : 0), input_level_of(input_level, map), range, weights};
    if (pass.rows == 0) continue;
    if (map)
      for (Weight& w : pass.weights) w.active_levels += w.strips * w.groups;
    if (pass.level == 32) float_pass(pass, x_MK, order ? &*order : nullptr, flat);
    else passes.push_back(std::move(pass));
  }
  if (!passes.empty()) integer_passes(passes, x_MK, order_data, flat);
  return outputs;
}

std::vector<Tensor> plane_linear(const Tensor& x, TensorList tensors, TensorList biases, at::IntArrayRef geometries,
                                 const Tensor& input_level, const std::optional<Tensor>& choice,
                                 const std::optional<Tensor>& order, const std::optional<Tensor>& input_range) {
  const size_t count = biases.size();
  TORCH_CHECK(tensors.size() == count * kTensors, "there are ", count, " biases, and ", tensors.size(), " tensors of weights, not ",
              kTensors, " a bias");
  check_input_level(input_level);
  if (input_range) check_input_range(*input_range);
  std::vector<Weight> weights;
  weights.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    weights.push_back(weight_of(tensors, geometries, i, 0));
    set_bias(weights.back(), biases[i]);
  }
  return multiply(x, weights, input_level, choice, order, input_range ? input_range->const_data_ptr<float>() : nullptr);
}

// The products of the weights of a handle with one x: those that quantize it alike in one go.
std::vector<Tensor> plane_linear_by_handle(const Tensor& x, const Tensor& handle, TensorList biases, at::IntArrayRef rows) {
  const std::shared_ptr<const Held> held = held_by(handle);
  const std::vector<Tensor>& levels = held->input_levels;
  const auto range = [&](size_t i) { return held->input_ranges.empty() ? nullptr : held->input_ranges[i].const_data_ptr<float>(); };
  const size_t count = levels.size();
  TORCH_CHECK(rows.size() == count, "there are ", count, " weights, and rows of ", rows.size());
  TORCH_CHECK(biases.empty() || biases.size() == count, "there are ", count, " weights, and ", biases.size(), " biases");
  std::vector<Weight> weights;
  weights.reserve(count);
  bool alike = true;
  for (size_t i = 0; i < count; ++i) {
    weights.push_back(weight_of(held->tensors, held->geometries, i, 0));
    check_input_level(levels[i]);
    if (!held->input_ranges.empty()) check_input_range(held->input_ranges[i]);
    TORCH_CHECK(weights[i].rows == rows[i], "rows (=", rows[i], ") are not those of the weight, ", weights[i].rows);
    if (!biases.empty()) set_bias(weights[i], biases[i]);
    alike = alike && same_inputs(*held, 0, i);
  }
  if (count == 0) return {};
  if (alike) return multiply(x, weights, levels[0], std::nullopt, std::nullopt, range(0));
  std::vector<Tensor> outputs(count);
  for (size_t first = 0; first < count; ++first) {
    if (outputs[first].defined()) continue;
    std::vector<Weight> some;
    std::vector<size_t> places;
    for (size_t i = first; i < count; ++i) {
      if (outputs[i].defined() || !same_inputs(*held, first, i)) continue;
      some.push_back(weights[i]);
      places.push_back(i);
    }
    std::vector<Tensor> found = multiply(x, some, levels[first], std::nullopt, std::nullopt, range(first));
    for (size_t i = 0; i < places.size(); ++i) outputs[places[i]] = std::move(found[i]);
  }
  return outputs;
}

Tensor plane_unpack(TensorList weight, at::IntArrayRef geometry, int64_t map) {
  TORCH_CHECK(weight.size() == kTensors, "a weight is ", kTensors, " tensors, not ", weight.size());
  const Weight w = weight_of(weight, geometry, 0, map);
  Tensor out = at::empty({w.rows, w.columns}, weight[0].options().dtype(at::kFloat));
  if (out.numel()) unpack_rows(w, out.data_ptr<float>(), 0, w.strips);
  return out;
}

Tensor plane_embedding(const Tensor& indices, TensorList weight, at::IntArrayRef geometry, int64_t map) {
  TORCH_CHECK(weight.size() == kTensors, "a weight is ", kTensors, " tensors, not ", weight.size());
  const Weight w = weight_of(weight, geometry, 0, map);
  TORCH_CHECK(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt, "indices have dtype (=",
              indices.scalar_type(), "), not int64 or int32");
  check_memory(indices, "indices");
  const Tensor index = indices.to(at::kLong).contiguous();
  const int64_t* at = index.const_data_ptr<int64_t>();
  const int64_t count = index.numel();
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK_INDEX(at[i] >= 0 && at[i] < w.rows, "index (=", at[i], ") is not a row of the embedding, 0..", w.rows - 1);
  auto shape = indices.sizes().vec();
  shape.push_back(w.columns);
  Tensor out = at::empty(shape, weight[0].options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
  float* to = out.data_ptr<float>();
  Faults faults;
  share(count, 1, worth_threads(count, w.columns, 4), [&](int64_t begin, int64_t end) {
    faults.note(kernels().embed(w, at, to, begin, end));
  });
  faults.raise();
  return out;
}

}  // namespace
}  // namespace foveate

TORCH_LIBRARY_IMPL(foveate, CPU, m) {
  m.impl("plane_linear", foveate::plane_linear);
  m.impl("plane_linear_no_grad", foveate::plane_linear);
  m.impl("plane_linear_by_handle", foveate::plane_linear_by_handle);
  m.impl("plane_handle", foveate::plane_handle);
  m.impl("plane_unpack", foveate::plane_unpack);
  m.impl("plane_embedding", foveate::plane_embedding);
}

TORCH_LIBRARY_IMPL(foveate, CompositeExplicitAutograd, m) { m.impl("_cpu_isa", foveate::cpu_isa); }
