// Weights by handle: a small tensor that stands for all that a call takes besides x, the pass and biases.
//
// A graph that torch has compiled checks each tensor that goes into it, at every call: ten a weight are a millisecond for
// a small model. The levels that a call reads are those of its pass, at the places that the handle knows. Without a pass
// they are those of the tensors that the handle keeps, and so are a layer's by itself.
#pragma once

#include "planes/generations.h"
#include "planes/stored.h"

#include <vector>

namespace foveate {
namespace {

struct Held {
  static constexpr int64_t kFirstNumber = 0;

  std::vector<at::Tensor> tensors;       // of all weights; each call checks all of these again, and asks where their
                                         // memory is: a tensor may be resized, set to other memory, or moved meanwhile
  std::vector<int64_t> geometries;
  std::vector<at::Tensor> input_levels;  // one a weight
  std::vector<at::Tensor> input_ranges;  // one a weight, or none
  std::vector<int64_t> places, inputs;   // the numbers of each weight and each input in their model; or none
};

at::Tensor plane_handle(at::TensorList weights, at::IntArrayRef geometries, at::TensorList input_levels, at::TensorList input_ranges,
                        at::IntArrayRef places, at::IntArrayRef inputs) {
  Held made{weights.vec(), geometries.vec(), input_levels.vec(), input_ranges.vec(), places.vec(), inputs.vec()};
  TORCH_CHECK(geometries.size() == input_levels.size() * kGeometryNumbers, "there are ", input_levels.size(), " input levels, and ", geometries.size(),
              " numbers of geometries, not ", kGeometryNumbers, " an input level");
  TORCH_CHECK(input_ranges.empty() || input_ranges.size() == input_levels.size(), "there are ", input_levels.size(),
              " input levels, and ", input_ranges.size(), " input ranges");
  TORCH_CHECK(places.size() == inputs.size() && (places.empty() || places.size() == input_levels.size()), "there are ", input_levels.size(),
              " input levels, and places of ", places.size(), " weights and ", inputs.size(), " inputs");
  for (const at::Tensor& range : input_ranges) check_input_range(range);
  for (size_t i = 0; i < input_levels.size(); ++i) {
    check_input_level(input_levels[i]);
    weight_of(weights, geometries, i);  // raises here what a call would raise
  }
  return NumberTable<const Held>::only().hold(std::make_shared<const Held>(std::move(made)));
}

std::shared_ptr<const Held> held_by(const at::Tensor& handle) {
  const int64_t number = number_in(handle, "a handle");
  const std::shared_ptr<const Held> found = NumberTable<const Held>::only().find(number);
  TORCH_CHECK(found, "handle (=", number, ") stands for no weight of this process: its weight is gone");
  return found;
}

}  // namespace
}  // namespace foveate
