// The memory of one call of a decoder.
#pragma once

#include <algorithm>
#include <memory>

#include "decoder/blocks.h"
#include "planes/products.h"

namespace foveate {
namespace {

// The memory of one call, as large as its chunks of rows need: parts of one block, which the calling thread keeps for its
// next call, since new memory costs more than what is computed in it.
struct Scratch {
  Scratch(const Decoder& decoder, int64_t rows, int64_t chunks, const int64_t (&slot_bytes)[kGroups], int64_t thread_floats, int64_t threads) {
    const auto lay_out = [&](char* memory) {
      int64_t used = 0;
      const auto part = [&](int64_t bytes) {
        char* const at = memory ? memory + used : nullptr;
        used += in_lines(bytes);
        return at;
      };
      const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(part(count * static_cast<int64_t>(sizeof(float)))); };
      hidden = floats(rows * decoder.width);
      input = floats(rows * std::max(decoder.most_input, decoder.width));
      projected = floats(rows * decoder.most_projected);
      output = floats(rows * decoder.width);
      for (int g = 0; g < kGroups; ++g) slots[g] = part(slot_bytes[g]);
      routed = floats(rows * decoder.most_top_k * decoder.most_routed);
      // what is above stays where it is when more positions are cached
      totals = floats(2 * rows * decoder.most_heads * chunks);
      weighed = floats(rows * decoder.most_heads * chunks * decoder.most_head_size);
      own = floats(thread_floats * threads);
      return used;
    };
    const int64_t bytes = lay_out(nullptr) + QuantizedRows::kAlign;
    thread_local std::unique_ptr<char[]> kept;
    thread_local int64_t kept_bytes = 0;
    char* memory;
    if (bytes > kKeptBytes) {
      memory_.reset(new char[static_cast<size_t>(bytes)]);
      memory = memory_.get();
    } else {
      if (bytes > kept_bytes) {
        kept.reset();
        kept.reset(new char[static_cast<size_t>(bytes)]);
        kept_bytes = bytes;
      }
      memory = kept.get();
    }
    lay_out(memory + (QuantizedRows::kAlign - reinterpret_cast<uintptr_t>(memory) % QuantizedRows::kAlign) % QuantizedRows::kAlign);
  }

  static constexpr int64_t kKeptBytes = 64 << 20;

  float* hidden;            // [rows, width], the residual stream
  float* input;             // [rows, columns of a group]
  float* projected;         // [rows, queries, keys and values, or gate and up]
  float* output;            // [rows, width], what attention or the MLP puts out
  float *totals, *weighed;  // the partials of attention
  char* slots[kGroups];     // quantized rows
  float* routed;            // [rows, experts of a row], the input of each row's experts, then of their second products
  float* own;               // of each thread

 private:
  std::unique_ptr<char[]> memory_;
};

}  // namespace
}  // namespace foveate
