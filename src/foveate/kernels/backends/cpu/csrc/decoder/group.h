// The products of a group of weights with one input, as parts of a team's work.
#pragma once

#include <optional>
#include <vector>

#include "planes/choice.h"
#include "planes/reading.h"
#include "team.h"

namespace foveate {
namespace {

// Products that are one part of a team's work: units of strips, one product after the other.
class Products {
 public:
  void clear() {
    integer_.clear();
    float_.clear();
  }
  void add(ProductUnits units) { integer_.push_back(std::move(units)); }
  // Of inputs that stay floats: `x` has rows `stride` apart.
  void add(const MapRows& part, const Weight& weight, const Output& to, const InputRows& x) { float_.push_back({&part, &weight, to, &x}); }

  Units units() const {
    Units all{0};
    for (const ProductUnits& one : integer_) all.count += one.count();
    for (const FloatProduct& one : float_) all.count += one.weight->strips;
    if (integer_.size() == 1 && float_.empty()) all.least = integer_[0].least();
    return all;
  }

  void run(int64_t begin, int64_t end, Faults& faults) const {
    const auto within = [&](int64_t count, const auto& work) {
      const int64_t from = std::max<int64_t>(0, begin), until = std::min(count, end);
      if (from < until) work(from, until);
      begin -= count;
      end -= count;
    };
    for (const ProductUnits& one : integer_) within(one.count(), [&](int64_t from, int64_t until) { one.run(from, until, faults); });
    for (const FloatProduct& one : float_)
      within(one.weight->strips, [&](int64_t from, int64_t until) {
        for (; from < until; ++from) one.strip(from, faults);
      });
  }

 private:
  struct FloatProduct {
    const MapRows* part;
    const Weight* weight;
    Output to;
    const InputRows* x;

    void strip(int64_t strip, Faults& faults) const {
      const Weight& w = *weight;
      std::vector<float> dense(static_cast<size_t>(kTileRows * w.columns));
      faults.note(kernels().unpack(w, dense.data(), strip, strip + 1));
      const int64_t first = strip * kTileRows, count = std::min<int64_t>(kTileRows, w.rows - first);
      for (int64_t r = 0; r < part->rows; ++r) {
        const int64_t row = part->row_of ? part->row_of[r] : r;
        const float* const from = static_cast<const float*>(x->data) + row * x->row_stride;
        float* const into = static_cast<float*>(to.data) + row * to.row_stride + first;
        for (int64_t n = 0; n < count; ++n)
          into[n] = kernels().decoder.dot(from, dense.data() + n * w.columns, w.columns) + (w.bias ? w.bias[first + n] : 0.0f);
      }
    }
  };

  std::vector<ProductUnits> integer_;
  std::vector<FloatProduct> float_;
};

class Group {
 public:
  // Takes the weights as a generation has them.
  void read(const Held& held, const Generation& generation, const std::vector<at::Tensor>& biases) {
    places_ = &held.places;
    for (size_t i = 0; i < held.input_levels.size(); ++i) {
      auto [w, input] = read_by(held, i, &generation);
      set_bias(w, biases[i]);
      weights_.push_back(w);
      inputs_.push_back(input);
    }
  }

  int64_t columns() const { return weights_[0].columns; }

  // The most memory that the quantized rows may take.
  int64_t most_bytes(int64_t rows) const {
    return static_cast<int64_t>(weights_.size()) * (QuantizedRows::bytes(rows, 16, weights_[0]) + 3 * kMaxMaps * QuantizedRows::kAlign);
  }

  int64_t weights() const { return static_cast<int64_t>(weights_.size()); }

  // The maps of each row for weight number `i`, where rows choose.
  std::vector<uint8_t> decide(int64_t i, const Generation& generation, const Tensor& x, const std::vector<uint8_t>& pairs) const {
    const size_t at = static_cast<size_t>(i);
    return decided_maps(generation, (*places_)[at], weights_[at], inputs_[at], x, pairs);
  }
  std::vector<std::vector<uint8_t>> decide(const Generation& generation, const Tensor& x, const std::vector<uint8_t>& pairs) const {
    std::vector<std::vector<uint8_t>> maps;
    for (int64_t i = 0; i < weights(); ++i) maps.push_back(decide(i, generation, x, pairs));
    return maps;
  }

  // Sorts the rows of x by what they read: `maps` has that of each row, once for all weights or once a weight. Quantized
  // rows will lie in `memory`, of `most_bytes`.
  void arrange(const std::vector<std::vector<uint8_t>>& maps, int64_t rows, const InputRows& x, char* memory) {
    memory += (QuantizedRows::kAlign - reinterpret_cast<uintptr_t>(memory) % QuantizedRows::kAlign) % QuantizedRows::kAlign;
    x_ = x;
    classes_.clear();
    products_.reset();
    const auto maps_of = [&](size_t i) -> const std::vector<uint8_t>& { return maps[maps.size() > 1 ? i : 0]; };
    std::vector<bool> done(weights_.size());
    for (size_t first = 0; first < weights_.size(); ++first) {
      if (done[first]) continue;
      classes_.emplace_back();
      Class& made = classes_.back();
      std::vector<Weight> some;
      for (size_t i = first; i < weights_.size(); ++i) {
        if (done[i] || !inputs_[first].same(inputs_[i]) || maps_of(first) != maps_of(i)) continue;
        done[i] = true;
        some.push_back(weights_[i]);
        made.members.push_back(i);
      }
      for (MapRows& part : rows_by_map(maps_of(first), rows, some, inputs_[first], made.row_of)) {
        if (part.level == 32) {
          made.floats.push_back(std::move(part));
          continue;
        }
        made.quantized.emplace_back(part, x, memory);
        made.inputs.push_back(made.quantized.back().inputs);
        memory += QuantizedRows::bytes(part.rows, part.level, part.weights[0]);
        made.parts.push_back(std::move(part));
      }
      if (!made.row_of.empty()) {
        made.place.resize(static_cast<size_t>(rows));
        for (size_t p = 0; p < made.parts.size(); ++p)
          for (int64_t i = 0; i < made.parts[p].rows; ++i) made.place[static_cast<size_t>(made.parts[p].row_of[i])] = {p, i};
      }
    }
  }

  // Quantizes rows [row, row_end) of x.
  void quantize(int64_t row, int64_t row_end, Faults& faults) const {
    for (const Class& one : classes_) {
      if (one.quantized.empty()) continue;
      if (one.row_of.empty()) {
        faults.note(one.quantized[0].quantize(row, row_end));
        continue;
      }
      for (int64_t r = row; r < row_end; ++r) {
        const auto [part, index] = one.place[static_cast<size_t>(r)];
        if (index >= 0) faults.note(one.quantized[part].quantize(index, index + 1));
      }
    }
  }

  // The products with all weights, of rows as they were arranged; they are made once.
  const Products& products(float* const* to, int64_t stride, int64_t threads) {
    if (!products_) {
      Products made;
      add_to(made, to, stride, threads);
      products_ = std::move(made);
    }
    return *products_;
  }

  // Adds the products with all weights; row r of weight i goes to to[i] + r * stride.
  void add_to(Products& products, float* const* to, int64_t stride, int64_t threads) const {
    for (const Class& one : classes_) {
      std::vector<Output> outputs;
      for (const size_t i : one.members) outputs.push_back({to[i], stride, nullptr, Type::kFloat32});
      for (const MapRows& part : one.floats)
        for (size_t w = 0; w < part.weights.size(); ++w) products.add(part, part.weights[w], outputs[w], x_);
      if (!one.parts.empty()) products.add(ProductUnits(one.parts, one.inputs, std::move(outputs), threads));
    }
  }

 private:
  // Where a row is among the quantized ones: of which part, and its number there; -1 where its inputs stay floats.
  struct Place {
    size_t part = 0;
    int64_t index = -1;
  };
  // Weights whose rows are quantized alike.
  struct Class {
    std::vector<size_t> members;
    std::vector<int64_t> row_of;  // empty: all rows read one map
    std::vector<MapRows> parts, floats;
    std::vector<QuantizedRows> quantized;
    std::vector<Inputs> inputs;
    std::vector<Place> place;
  };

  std::vector<Weight> weights_;
  std::vector<InputSource> inputs_;
  const std::vector<int64_t>* places_ = nullptr;
  std::vector<Class> classes_;
  std::optional<Products> products_;
  InputRows x_{};
};

}  // namespace
}  // namespace foveate
