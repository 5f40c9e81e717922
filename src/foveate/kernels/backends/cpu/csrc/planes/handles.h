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

struct Held {
  static constexpr int64_t kFirstNumber = 0;

  std::vector<at::Tensor> tensors;       // of all weights; each call asks again where their memory is: a tensor may be
                                         // resized, set to other memory, or moved meanwhile
  std::vector<int64_t> geometries;
  std::vector<at::Tensor> input_levels;  // one a weight
  std::vector<at::Tensor> input_ranges;  // one a weight, or none
  std::vector<int64_t> places, inputs;   // the numbers of each weight and each input in their model; or none

  // A weight as it was when the handle was made, and what its tensors were like then.
  struct Seen {
    const void* data;
    int64_t count;
    size_t bytes;
    bool operator==(const Seen& other) const { return data == other.data && count == other.count && bytes == other.bytes; }
  };
  std::vector<Weight> weights;
  std::vector<Seen> seen;  // of each tensor

  static Seen look(const at::Tensor& t) { return {t.is_contiguous() ? t.const_data_ptr() : nullptr, t.numel(), t.storage().nbytes()}; }

  // Weight number `i`, but for its active levels: checked again where a tensor is not what it was.
  Weight weight(size_t i) const {
    for (size_t t = i * kTensors; t + 1 < (i + 1) * kTensors; ++t)
      if (!(look(tensors[t]) == seen[t])) return weight_of(tensors, geometries, i);
    return weights[i];
  }
};

// What a handle stands for.
std::shared_ptr<const Held> held_by(const at::Tensor& handle);

}  // namespace foveate
