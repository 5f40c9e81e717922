// The torch side of the CPU kernels: checks, memory, threads. Schemas and meaning are in Python (kernels/planes/ops.py,
// kernels/planes/reference.py); this file only registers for the CPU.
//
// The shapes of arguments are checked first (planes/stored.h). The kernels check the tile index as they read it.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "planes/choice.h"
#include "planes/handles.h"
#include "planes/products.h"
#include "planes/reading.h"

namespace foveate {
namespace {

using at::Tensor;
using at::TensorList;

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

std::shared_ptr<const Held> held_by(const at::Tensor& handle) {
  const int64_t number = number_in(handle, "a handle");
  const std::shared_ptr<const Held> found = NumberTable<const Held>::only().find(number);
  TORCH_CHECK(found, "handle (=", number, ") stands for no weight of this process: its weight is gone");
  return found;
}

namespace {

std::string cpu_isa(std::string force) {
  if (!force.empty()) active.store(find_kernels(force));
  return kernels().name;
}

// M, which without columns is not seen from the number of elements.
int64_t rows_of(const Tensor& x) {
  if (const int64_t columns = x.size(-1)) return x.numel() / columns;
  int64_t rows = 1;
  for (const int64_t size : x.sizes().slice(0, static_cast<size_t>(x.dim() - 1)))
    TORCH_CHECK(!__builtin_mul_overflow(rows, size, &rows), "x of shape (=", x.sizes(), ") has more than 2^63 rows");
  return rows;
}

// x as a matrix, whose rows are contiguous.
Tensor matrix_of(const Tensor& x) {
  TORCH_CHECK(x.dim() > 0, "x has no dimension of columns");
  type_of(x);
  check_memory(x, "x");
  const Tensor x_MK = x.dim() == 2 ? x : x.reshape({rows_of(x), x.size(-1)});
  return x_MK.stride(1) == 1 ? x_MK : x_MK.contiguous();
}

// x times weights that share it, with their biases set. `maps` has the map of each row, or is empty: all read map 0.
std::vector<Tensor> multiply(const Tensor& x, const std::vector<Weight>& weights, const InputSource& input, const std::vector<uint8_t>& maps,
                             const std::optional<Tensor>& order) {
  const size_t count = weights.size();
  const Tensor x_MK = matrix_of(x);
  const int64_t columns = x.size(-1), m = x_MK.size(0);

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

  std::vector<Tensor> flat;
  for (size_t i = 0; i < count; ++i) flat.push_back(outputs[i].dim() == 2 ? outputs[i] : outputs[i].view({m, weights[i].rows}));
  std::vector<int64_t> row_of;
  std::vector<MapRows> integers;
  for (MapRows& part : rows_by_map(maps, m, weights, input, row_of)) {
    if (part.level == 32) float_products(part, x_MK, order ? &*order : nullptr, flat);
    else integers.push_back(std::move(part));
  }
  if (!integers.empty()) integer_products(integers, x_MK, order_data, flat);
  return outputs;
}

// The pairs of maps that a tensor gives, one for each of m rows.
std::vector<uint8_t> pairs_in(const std::optional<Tensor>& maps, int64_t m) {
  if (!maps) return {};
  check_vector(*maps, at::kByte, "maps");
  TORCH_CHECK(maps->dim() == 2 && maps->size(0) == m && maps->size(1) == 2, "maps have shape (=", maps->sizes(), "), not [", m, ", 2]");
  return {maps->const_data_ptr<uint8_t>(), maps->const_data_ptr<uint8_t>() + maps->numel()};
}

std::vector<Tensor> plane_linear(const Tensor& x, TensorList tensors, TensorList biases, at::IntArrayRef geometries,
                                 const Tensor& input_level, const std::optional<Tensor>& maps,
                                 const std::optional<Tensor>& order, const std::optional<Tensor>& input_range) {
  const size_t count = biases.size();
  TORCH_CHECK(tensors.size() == count * kTensors, "there are ", count, " biases, and ", tensors.size(), " tensors of weights, not ",
              kTensors, " a bias");
  TORCH_CHECK(x.dim() > 0, "x has no dimension of columns");
  check_input_level(input_level);
  if (input_range) check_input_range(*input_range);
  std::vector<Weight> weights;
  weights.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    weights.push_back(weight_of(tensors, geometries, i));
    set_bias(weights.back(), biases[i]);
  }
  const float* const range = input_range ? input_range->const_data_ptr<float>() : nullptr;
  const InputSource input{input_level.const_data_ptr<uint8_t>(), 1, input_level.numel(), range};
  return multiply(x, weights, input, chosen_maps(pairs_in(maps, rows_of(x))), order);
}

at::Tensor plane_handle(at::TensorList weights, at::IntArrayRef geometries, at::TensorList input_levels, at::TensorList input_ranges,
                        at::IntArrayRef places, at::IntArrayRef inputs) {
  Held made{weights.vec(), geometries.vec(), input_levels.vec(), input_ranges.vec(), places.vec(), inputs.vec(), {}, {}};
  TORCH_CHECK(geometries.size() == input_levels.size() * kGeometryNumbers, "there are ", input_levels.size(), " input levels, and ", geometries.size(),
              " numbers of geometries, not ", kGeometryNumbers, " an input level");
  TORCH_CHECK(input_ranges.empty() || input_ranges.size() == input_levels.size(), "there are ", input_levels.size(),
              " input levels, and ", input_ranges.size(), " input ranges");
  TORCH_CHECK(places.size() == inputs.size() && (places.empty() || places.size() == input_levels.size()), "there are ", input_levels.size(),
              " input levels, and places of ", places.size(), " weights and ", inputs.size(), " inputs");
  for (const at::Tensor& range : input_ranges) check_input_range(range);
  for (size_t i = 0; i < input_levels.size(); ++i) {
    check_input_level(input_levels[i]);
    made.weights.push_back(weight_of(weights, geometries, i));  // raises here what a call would raise
  }
  for (const Tensor& t : made.tensors) made.seen.push_back(Held::look(t));
  return NumberTable<const Held>::only().hold(std::make_shared<const Held>(std::move(made)));
}

// The products of the weights of a handle with one x: those that quantize it alike in one go.
std::vector<Tensor> plane_linear_by_handle(const Tensor& x, const Tensor& handle, const std::optional<Tensor>& book,
                                           const std::optional<Tensor>& owners, TensorList biases, at::IntArrayRef rows) {
  const std::shared_ptr<const Held> held = held_by(handle);
  const std::shared_ptr<const Pass> reading = book ? pass_of(*book) : nullptr;
  const size_t count = held->input_levels.size();
  TORCH_CHECK(rows.size() == count, "there are ", count, " weights, and rows of ", rows.size());
  TORCH_CHECK(biases.empty() || biases.size() == count, "there are ", count, " weights, and ", biases.size(), " biases");
  TORCH_CHECK(x.dim() > 0, "x has no dimension of columns");
  std::vector<Weight> weights;
  std::vector<InputSource> inputs;
  weights.reserve(count);
  inputs.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    auto [w, input] = read_by(*held, i, reading ? reading->generation.get() : nullptr);
    TORCH_CHECK(w.rows == rows[i], "rows (=", rows[i], ") are not those of the weight, ", w.rows);
    if (!biases.empty()) set_bias(w, biases[i]);
    weights.push_back(w);
    inputs.push_back(input);
  }
  if (count == 0) return {};
  std::vector<uint8_t> pairs;
  if (reading) row_maps(*reading, x.sizes().slice(0, static_cast<size_t>(x.dim() - 1)), rows_of(x), owners, pairs);
  // the maps of each row: the same for all weights, or decided for each
  std::vector<std::vector<uint8_t>> maps;
  if (differ(pairs)) {
    const Tensor x_MK = matrix_of(x);
    for (size_t i = 0; i < count; ++i) maps.push_back(decided_maps(*reading->generation, held->places[i], weights[i], inputs[i], x_MK, pairs));
  } else {
    maps.push_back(chosen_maps(pairs));
  }
  const auto maps_of = [&](size_t i) -> const std::vector<uint8_t>& { return maps[maps.size() > 1 ? i : 0]; };
  std::vector<Tensor> outputs(count);
  for (size_t first = 0; first < count; ++first) {
    if (outputs[first].defined()) continue;
    std::vector<Weight> some;
    std::vector<size_t> places;
    for (size_t i = first; i < count; ++i) {
      if (outputs[i].defined() || !inputs[first].same(inputs[i]) || maps_of(first) != maps_of(i)) continue;
      some.push_back(weights[i]);
      places.push_back(i);
    }
    std::vector<Tensor> found = multiply(x, some, inputs[first], maps_of(first), std::nullopt);
    for (size_t i = 0; i < places.size(); ++i) outputs[places[i]] = std::move(found[i]);
  }
  return outputs;
}

// The maps of each row of x for one weight of a pass, as `plane_linear_by_handle` decides them: pairs whose two are the same.
Tensor pass_choice(const Tensor& book, at::IntArrayRef places, const Tensor& x, TensorList tensors, at::IntArrayRef geometry, const Tensor& maps) {
  TORCH_CHECK(places.size() == 2, "places are those of a weight and of its input, not ", places.size(), " numbers");
  const Tensor x_MK = matrix_of(x);
  std::vector<uint8_t> pairs = pairs_in(maps, x_MK.size(0));
  if (differ(pairs)) {
    const std::shared_ptr<const Generation> generation = pass_of(book)->generation;
    const Weight w = weight_of(tensors, geometry, 0);
    const std::vector<uint8_t> decided = decided_maps(*generation, places[0], w, input_of(*generation, places[1]), x_MK, pairs);
    for (size_t r = 0; r < decided.size(); ++r) pairs[2 * r] = pairs[2 * r + 1] = decided[r];
  }
  Tensor out = at::empty({x_MK.size(0), 2}, at::kByte);
  if (!pairs.empty()) std::memcpy(out.data_ptr(), pairs.data(), pairs.size());
  return out;
}

// The estimated error of reading map maps[0] instead of map maps[1], for each row of x.
Tensor plane_error(const Tensor& x, TensorList tensors, at::IntArrayRef geometry, const Tensor& input_level, const std::optional<Tensor>& input_range,
                   at::IntArrayRef maps, const Tensor& strips, const Tensor& row_weights) {
  check_input_level(input_level);
  if (input_range) check_input_range(*input_range);
  check_vector(strips, at::kLong, "strips");
  check_vector(row_weights, at::kFloat, "row_weights");
  TORCH_CHECK(maps.size() == 2, "maps are a lower and a higher one, not ", maps.size());
  TORCH_CHECK(row_weights.numel() / kTileRows == strips.numel() && row_weights.numel() % kTileRows == 0, "row_weights have ", row_weights.numel(),
              " values, not ", kTileRows, " for each of ", strips.numel(), " strips");
  const Tensor x_MK = matrix_of(x);
  const Weight w = weight_of(tensors, geometry, 0);
  const InputSource input{input_level.const_data_ptr<uint8_t>(), 1, input_level.numel(), input_range ? input_range->const_data_ptr<float>() : nullptr};
  Tensor out = at::zeros({x_MK.size(0)}, at::kFloat);
  const Sample sample{strips.const_data_ptr<int64_t>(), row_weights.const_data_ptr<float>(), strips.numel()};
  estimated_errors(x_MK, w, input, {maps[0], maps[1]}, sample, {nullptr, x_MK.size(0)}, out.data_ptr<float>());
  return out;
}

// Makes a weight read map `map`.
void read_map(Weight& w, int64_t map) {
  TORCH_CHECK(map >= 0 && map < w.maps, "map (=", map, ") is not one of ", w.maps);
  w.active_levels += map * w.map_stride;
}

Tensor plane_unpack(TensorList weight, at::IntArrayRef geometry, int64_t map) {
  TORCH_CHECK(weight.size() == kTensors, "a weight is ", kTensors, " tensors, not ", weight.size());
  Weight w = weight_of(weight, geometry, 0);
  read_map(w, map);
  Tensor out = at::empty({w.rows, w.columns}, weight[0].options().dtype(at::kFloat));
  if (out.numel()) unpack_rows(w, out.data_ptr<float>(), 0, w.strips);
  return out;
}

Tensor plane_embedding(const Tensor& indices, TensorList weight, at::IntArrayRef geometry, const std::optional<Tensor>& maps) {
  TORCH_CHECK(weight.size() == kTensors, "a weight is ", kTensors, " tensors, not ", weight.size());
  const Weight w = weight_of(weight, geometry, 0);
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
  const std::vector<uint8_t> map_of = better_maps(pairs_in(maps, count));
  for (const uint8_t map : map_of) TORCH_CHECK(map < w.maps, "an index reads map (=", static_cast<int>(map), "), and there are ", w.maps);
  float* to = out.data_ptr<float>();
  Faults faults;
  share(count, 1, worth_threads(count, w.columns, 4), [&](int64_t begin, int64_t end) {
    while (begin < end) {  // a run of indices that read one map
      Weight read = w;
      int64_t run_end = end;
      if (!map_of.empty()) {
        const uint8_t map = map_of[static_cast<size_t>(begin)];
        read_map(read, map);
        run_end = std::find_if(map_of.begin() + begin, map_of.begin() + end, [map](uint8_t other) { return other != map; }) - map_of.begin();
      }
      faults.note(kernels().embed(read, at, to, begin, run_end));
      begin = run_end;
    }
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
  m.impl("pass_choice", foveate::pass_choice);
  m.impl("plane_error", foveate::plane_error);
  m.impl("plane_embedding", foveate::plane_embedding);
}

TORCH_LIBRARY_IMPL(foveate, CompositeExplicitAutograd, m) { m.impl("_cpu_isa", foveate::cpu_isa); }
