// Weights by handle: a small tensor that stands for the ten tensors and the form of a weight.
//
// A graph that torch has compiled checks each tensor that goes into it, at every call: ten a weight are a millisecond for
// a small model. A handle is a number that is never used again. The weight is kept until the handle's storage is freed; a
// copy of a handle stands for the same weight as long as the first one lives, and then for none, which is an error.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

namespace foveate {
namespace {

struct Held {
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> form;
};

struct Shelf {
  std::shared_mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<const Held>> held;
  int64_t last = 0;
};

// Never destroyed: handles may outlive everything when a process ends.
Shelf& shelf() {
  static Shelf* const one = new Shelf;
  return *one;
}

at::Tensor plane_handle(at::TensorList weight, at::IntArrayRef form) {
  auto held = std::make_shared<const Held>(Held{weight.vec(), form.vec()});
  Shelf& all = shelf();
  const std::unique_lock<std::shared_mutex> lock(all.mutex);
  const int64_t number = ++all.last;
  all.held.emplace(number, std::move(held));
  const auto release = [number](void* memory) {
    delete static_cast<int64_t*>(memory);
    std::shared_ptr<const Held> last;  // freed after the lock
    Shelf& from = shelf();
    const std::unique_lock<std::shared_mutex> lock(from.mutex);
    const auto found = from.held.find(number);
    last.swap(found->second);
    from.held.erase(found);
  };
  return at::from_blob(new int64_t(number), {1}, release, at::kLong);
}

std::shared_ptr<const Held> held_by(const at::Tensor& handle) {
  TORCH_CHECK(handle.scalar_type() == at::kLong && handle.numel() == 1 && handle.device().is_cpu(), "a handle is one int64 on the CPU");
  const int64_t number = *handle.const_data_ptr<int64_t>();
  Shelf& all = shelf();
  const std::shared_lock<std::shared_mutex> lock(all.mutex);
  const auto found = all.held.find(number);
  TORCH_CHECK(found != all.held.end(), "handle (=", number, ") stands for no weight of this process: its weight is gone");
  return found->second;
}

}  // namespace
}  // namespace foveate
