// Weights by handle: a small tensor that stands for all that a call takes besides x and biases.
//
// A graph that torch has compiled checks each tensor that goes into it, at every call: ten a weight are a millisecond for
// a small model. A handle is a number that is never used again. The weights are kept until the handle's
// storage is freed; a copy of a handle stands for the same weights as long as the first one lives, and then for none,
// which is an error. Levels and ranges are read through the tensors that are kept, so a switch is seen.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include "planes/stored.h"

#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

namespace foveate {
namespace {

struct Held {
  std::vector<at::Tensor> tensors;       // of all weights; each call checks all of these again, and asks where their
                                         // memory is: a tensor may be resized, set to other memory, or moved meanwhile
  std::vector<int64_t> geometries;
  std::vector<at::Tensor> input_levels;  // one a weight
  std::vector<at::Tensor> input_ranges;  // one a weight, or none
};

struct HandleTable {
  std::shared_mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const Held>> held;
  int64_t last = 0;
};

// Never destroyed: handles may outlive everything when a process ends.
HandleTable& handle_table() {
  static HandleTable* const one = new HandleTable;
  return *one;
}

at::Tensor plane_handle(at::TensorList weights, at::IntArrayRef geometries, at::TensorList input_levels, at::TensorList input_ranges) {
  Held made{weights.vec(), geometries.vec(), input_levels.vec(), input_ranges.vec()};
  TORCH_CHECK(geometries.size() == input_levels.size() * kGeometryNumbers, "there are ", input_levels.size(), " input levels, and ", geometries.size(),
              " numbers of geometries, not ", kGeometryNumbers, " an input level");
  TORCH_CHECK(input_ranges.empty() || input_ranges.size() == input_levels.size(), "there are ", input_levels.size(),
              " input levels, and ", input_ranges.size(), " input ranges");
  for (const at::Tensor& range : input_ranges) check_input_range(range);
  for (size_t i = 0; i < input_levels.size(); ++i) {
    check_input_level(input_levels[i]);
    weight_of(weights, geometries, i, 0);  // raises here what a call would raise
  }
  auto held = std::make_shared<const Held>(std::move(made));
  HandleTable& all = handle_table();
  const std::unique_lock<std::shared_mutex> lock(all.mutex);
  const int64_t number = ++all.last;
  all.held.emplace(number, std::move(held));
  const auto release = [number](void* memory) {
    delete static_cast<int64_t*>(memory);
    std::shared_ptr<const Held> last;  // freed after the lock
    HandleTable& from = handle_table();
    const std::unique_lock<std::shared_mutex> lock(from.mutex);
    const auto found = from.held.find(number);
    last.swap(found->second);
    from.held.erase(found);
  };
  return at::from_blob(new int64_t(number), {1}, release, at::kLong);
}

std::shared_ptr<const Held> held_by(const at::Tensor& handle) {
  check_vector(handle, at::kLong, "a handle");
  TORCH_CHECK(handle.numel() == 1, "a handle has ", handle.numel(), " values, not one");
  const int64_t number = *handle.const_data_ptr<int64_t>();
  HandleTable& all = handle_table();
  const std::shared_lock<std::shared_mutex> lock(all.mutex);
  const auto found = all.held.find(number);
  TORCH_CHECK(found != all.held.end(), "handle (=", number, ") stands for no weight of this process: its weight is gone");
  return found->second;
}

}  // namespace
}  // namespace foveate
