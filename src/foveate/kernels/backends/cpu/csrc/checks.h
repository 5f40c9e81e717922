// What every op asks of its tensors and sizes before it touches memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace foveate {
namespace {

// ceil(count / each) for count >= 0, however large.
constexpr int64_t over(int64_t count, int64_t each) { return count / each + (count % each != 0); }

// Raises unless all of a tensor lies within its storage, which may have been made smaller than the tensor says.
void check_memory(const at::Tensor& t, const char* name) {
  if (t.numel() == 0) return;
  const at::IntArrayRef sizes = t.sizes(), strides = t.strides();
  int64_t bytes = t.storage_offset() + 1;  // elements, up to the last one
  bool overflow = false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    int64_t reach = 0;
    overflow |= __builtin_mul_overflow(sizes[d] - 1, strides[d], &reach) || __builtin_add_overflow(bytes, reach, &bytes);
  }
  overflow |= __builtin_mul_overflow(bytes, static_cast<int64_t>(t.element_size()), &bytes);
  TORCH_CHECK(!overflow && static_cast<uint64_t>(bytes) <= t.storage().nbytes(), name, " of shape ", sizes,
              " reaches beyond its storage of ", t.storage().nbytes(), " bytes");
}

void check_vector(const at::Tensor& t, at::ScalarType type, const char* name) {
  TORCH_CHECK(t.scalar_type() == type, name, " has dtype (=", t.scalar_type(), "), not ", type);
  TORCH_CHECK(t.device().is_cpu(), name, " is on device (=", t.device(), "), not the CPU");
  TORCH_CHECK(t.is_contiguous(), name, " is not contiguous");
  check_memory(t, name);
}

}  // namespace
}  // namespace foveate
