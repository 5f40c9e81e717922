// The experts of a mixture: which ones each row of a chunk takes, and their products.
//
// A row of the chunk and one of its experts are a *route*. Routes are sorted by expert, so that the rows of an expert lie
// side by side, and the products of all experts are one part of the team's work. What a row gets is added up in the order
// of its experts' ranks, and so depends on no other row.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "decoder/blocks.h"
#include "decoder/group.h"

namespace foveate {
namespace {

// The experts of one row, the likeliest first, and their weights. `scores` is memory for one float an expert.
inline void route_row(const Block& block, const float* x, int64_t width, float* scores, int64_t* experts, float* weights) {
  const Numbers& n = block.numbers;
  const float* const router = block.router.const_data_ptr<float>();
  float most = -std::numeric_limits<float>::infinity(), total = 0.0f, taken = 0.0f;
  for (int64_t e = 0; e < n.experts; ++e) {
    scores[e] = kernels().decoder.dot(x, router + e * width, width);
    most = std::max(most, scores[e]);
  }
  for (int64_t e = 0; e < n.experts; ++e) total += scores[e] = std::exp(scores[e] - most);
  for (int64_t k = 0; k < n.top_k; ++k) {
    int64_t best = 0;
    for (int64_t e = 1; e < n.experts; ++e)
      if (scores[e] > scores[best]) best = e;
    experts[k] = best;
    weights[k] = scores[best] / total;
    taken += weights[k];
    scores[best] = -1.0f;  // below all that were not taken
  }
  if (n.normalized)
    for (int64_t k = 0; k < n.top_k; ++k) weights[k] /= taken;
}

class Mixture {
 public:
  // Sorts the routes of all rows: `experts` [rows, top_k]. One thread.
  void sort(const Block& block, const Generation& generation, int64_t rows, const std::vector<int64_t>& experts) {
    const Numbers& n = block.numbers;
    const int64_t routes = rows * n.top_k;
    std::vector<int64_t> counts(static_cast<size_t>(n.experts) + 1);
    for (int64_t r = 0; r < routes; ++r) ++counts[static_cast<size_t>(experts[static_cast<size_t>(r)]) + 1];
    for (int64_t e = 0; e < n.experts; ++e) counts[static_cast<size_t>(e) + 1] += counts[static_cast<size_t>(e)];
    active_.clear();
    for (int64_t e = 0; e < n.experts; ++e) {
      const int64_t first = counts[static_cast<size_t>(e)], last = counts[static_cast<size_t>(e) + 1];
      if (first == last) continue;
      active_.push_back({first, last - first, {}, {}});
      const std::vector<Tensor> no_bias{Tensor(no_bias_)};
      active_.back().up.read(*block.up[static_cast<size_t>(e)], generation, no_bias);
      active_.back().down.read(*block.down[static_cast<size_t>(e)], generation, no_bias);
    }
    route_of_.resize(static_cast<size_t>(routes));
    row_of_.resize(static_cast<size_t>(routes));
    expert_of_.resize(static_cast<size_t>(routes));
    for (int64_t r = 0; r < routes; ++r) {
      const int64_t at = counts[static_cast<size_t>(experts[static_cast<size_t>(r)])]++;
      route_of_[static_cast<size_t>(r)] = at;
      row_of_[static_cast<size_t>(at)] = r / n.top_k;
    }
    for (size_t a = 0; a < active_.size(); ++a)
      std::fill_n(expert_of_.begin() + active_[a].first, active_[a].rows, a);
  }

  int64_t routes() const { return static_cast<int64_t>(row_of_.size()); }
  int64_t row_of(int64_t route) const { return row_of_[static_cast<size_t>(route)]; }
  // Where the route of a row to its expert of rank k is.
  int64_t route_of(int64_t row, int64_t k, int64_t top_k) const { return route_of_[static_cast<size_t>(row * top_k + k)]; }

  // The maps of each row of each expert, from the pairs of the rows; where they are chosen, by the inputs of the routes.
  void arrange(bool down, const Generation& generation, const std::vector<uint8_t>& pairs, bool chooses, float* inputs, int64_t stride, char* memory) {
    for (Active& one : active_) {
      Group& group = down ? one.down : one.up;
      std::vector<uint8_t> own;
      if (!pairs.empty())
        for (int64_t r = one.first; r < one.first + one.rows; ++r) own.insert(own.end(), pairs.begin() + 2 * row_of(r), pairs.begin() + 2 * row_of(r) + 2);
      float* const x = inputs + one.first * stride;
      const int64_t columns = group.columns();
      std::vector<std::vector<uint8_t>> maps;
      if (chooses) maps = group.decide(generation, at::from_blob(x, {one.rows, columns}, {stride, 1}, at::kFloat), own);
      else maps.push_back(chosen_maps(own));
      group.arrange(maps, one.rows, {x, stride, columns, nullptr, nullptr, Type::kFloat32}, memory);
      memory += group.most_bytes(one.rows);
    }
  }

  // The most memory that `arrange` takes.
  static int64_t most_bytes(const Block& block, int64_t rows) {
    const int64_t routes = rows * block.numbers.top_k;
    const auto of = [&](const Weight& w) { return QuantizedRows::bytes(routes, 16, w) + std::min(routes, block.numbers.experts) * 6 * kMaxMaps * QuantizedRows::kAlign; };
    return std::max(of(block.up[0]->weights[0]), of(block.down[0]->weights[0]));
  }

  void quantize(bool down, int64_t route, Faults& faults) const {
    const Active& one = active_[expert_of_[static_cast<size_t>(route)]];
    (down ? one.down : one.up).quantize(route - one.first, route - one.first + 1, faults);
  }

  // Adds the products of all routes; route r goes to to + r * stride.
  void add_to(Products& products, bool down, float* to, int64_t stride, int64_t threads) const {
    for (const Active& one : active_) {
      float* const own = to + one.first * stride;
      (down ? one.down : one.up).add_to(products, &own, stride, threads);
    }
  }

 private:
  // An expert that some rows take: its routes are `rows` from `first` on.
  struct Active {
    int64_t first, rows;
    Group up, down;
  };

  const Tensor no_bias_ = at::empty({0}, at::kFloat);
  std::vector<Active> active_;
  std::vector<int64_t> route_of_, row_of_;
  std::vector<size_t> expert_of_;
};

}  // namespace
}  // namespace foveate
