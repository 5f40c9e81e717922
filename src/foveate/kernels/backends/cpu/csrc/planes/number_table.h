// Values that torch code holds by number: a small tensor stands for something that lives in C++.
//
// A number is never used again. Its value is kept until the storage of the tensor that was made for it is freed. A copy
// of that tensor stands for the same value as long as the first one lives, and then for none, which is an error.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include "checks.h"

#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace foveate {
namespace {

template <class T>
class NumberTable {
 public:
  // Never destroyed: tensors may outlive everything when a process ends.
  static NumberTable& only() {
    static NumberTable* const one = new NumberTable;
    return *one;
  }

  // A tensor, int64 [1], that stands for a value.
  at::Tensor hold(std::shared_ptr<T> value) {
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    const int64_t number = ++last_;
    held_.emplace(number, std::move(value));
    const auto release = [number](void* memory) {
      delete static_cast<int64_t*>(memory);
      std::shared_ptr<T> freed;  // after the lock
      NumberTable& from = only();
      const std::unique_lock<std::shared_mutex> held(from.mutex_);
      const auto found = from.held_.find(number);
      freed.swap(found->second);
      from.held_.erase(found);
    };
    return at::from_blob(new int64_t(number), {1}, release, at::kLong);
  }

  // What a number stands for; null if it stands for nothing.
  std::shared_ptr<T> find(int64_t number) {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    const auto found = held_.find(number);
    return found == held_.end() ? nullptr : found->second;
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<T>> held_;
  int64_t last_ = T::kFirstNumber;
};

// The number that a tensor holds.
int64_t number_in(const at::Tensor& tensor, const char* name) {
  check_vector(tensor, at::kLong, name);
  TORCH_CHECK(tensor.numel() == 1, name, " has ", tensor.numel(), " values, not one");
  return *tensor.const_data_ptr<int64_t>();
}

}  // namespace
}  // namespace foveate
