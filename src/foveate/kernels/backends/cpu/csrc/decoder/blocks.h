// The blocks of a decoder by handle: weights, norms and numbers, checked once.
#pragma once

#include <array>
#include <cstring>
#include <memory>
#include <vector>

#include "decoder/decoder.h"
#include "planes/handles.h"
#include "simd/kernels.h"

namespace foveate {

// The groups of weights of a block that share an input, and how many weights each may have: q, k and v, or one that is
// all three; the output of attention; gate and up, or one that is both; down.
enum GroupSlot { kQkv, kOutput, kGateUp, kDown, kGroups };
constexpr size_t kGroupWeights[kGroups] = {3, 1, 2, 1};
constexpr size_t kBiases = 7;

enum NormSlot { kInputNorm, kQueryNorm, kKeyNorm, kOutputNorm, kMlpNorm, kMlpOutputNorm, kNorms };

struct Norm {
  NormKind kind = NormKind::kNone;
  float eps = 0.0f;
  at::Tensor weight;  // float32
  int64_t size = 0;
  const float* values = nullptr;  // where the weight was when the handle was made

  // Raises where the weight is not what it was when the handle was made.
  void check() const {
    if (kind == NormKind::kNone) return;
    check_vector(weight, at::kFloat, "a norm's weight");
    TORCH_CHECK(weight.numel() == size, "a norm's weight has ", weight.numel(), " values, not ", size);
    TORCH_CHECK(!values || weight.const_data_ptr<float>() == values, "a norm's weight was moved after its handle was made");
  }

  // y may be x.
  void row(const float* x, float* y, int64_t count) const {
    if (kind != NormKind::kNone) kernels().decoder.norm(x, y, count, values, eps, kind);
    else if (x != y) std::memcpy(y, x, static_cast<size_t>(count) * sizeof(float));
  }
};

// The numbers of a block, in the order in which `decoder_handle` takes them.
struct Numbers {
  int64_t heads, kv_heads, head_size;
  int64_t rotary_size;   // 0: no rotary positions
  int64_t rotary_table;  // which table of angles
  int64_t window;        // positions that a query sees; 0: all
  int64_t whole_norms;   // queries and keys are normed whole, not head by head
  int64_t activation;
  int64_t experts;     // 0: one MLP
  int64_t top_k;       // experts of a row
  int64_t normalized;  // whether the weights of a row's experts add up to 1

  int64_t queries() const { return heads * head_size; }
  int64_t keys() const { return kv_heads * head_size; }
  int64_t shared() const { return heads / kv_heads; }  // heads that share keys
};
struct Constants {
  double scale;     // of scores
  double cap;       // of scores; 0: none
  double residual;  // by which outputs are multiplied before they are added
};
constexpr size_t kNumbers = sizeof(Numbers) / sizeof(int64_t), kConstants = sizeof(Constants) / sizeof(double);

struct Block {
  Numbers numbers;
  Constants constants;
  std::array<std::shared_ptr<const Held>, kGroups> groups;
  std::array<std::vector<at::Tensor>, kGroups> biases;  // one a weight, empty where it has none
  std::array<Norm, kNorms> norms;
  int64_t inner;
  // of a mixture
  at::Tensor router;  // float32 [experts, width]
  std::vector<std::shared_ptr<const Held>> up, down;

  void check_router(int64_t width) const {
    if (!numbers.experts) return;
    check_vector(router, at::kFloat, "a router");
    TORCH_CHECK(router.dim() == 2 && router.size(0) == numbers.experts && router.size(1) == width, "a router has shape (=", router.sizes(), "), not [",
                numbers.experts, ", ", width, "]");
  }
};

struct Decoder {
  static constexpr int64_t kFirstNumber = 0;

  // Memory that the weights, biases and norms lie in, which is kept, and where it was when the handle was made. A tensor
  // that is set to other memory is not followed: a weight is replaced as a whole, and then has another handle.
  struct Memory {
    c10::Storage storage;
    const void* data;
    size_t bytes;
  };
  std::vector<Memory> memory;

  // Whether all of it is where it was, and as large: nobody has resized or moved it.
  bool is_in_place() const {
    for (const Memory& one : memory)
      if (one.storage.data() != one.data || one.storage.nbytes() != one.bytes) return false;
    return true;
  }

  std::vector<Block> blocks;
  Norm last;
  int64_t width = 0, rotary_size = 0, rotary_tables = 0;
  // the most of any block: of what its groups are given and put out, and of its heads
  int64_t most_input = 0, most_projected = 0, most_heads = 0, most_head_size = 0, most_routed = 0, most_top_k = 0;
};

// The decoder that a handle stands for.
std::shared_ptr<const Decoder> decoder_by(const at::Tensor& handle);

}  // namespace foveate
