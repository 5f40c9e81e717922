// The arguments of the kernels of a decoder's blocks that are not products: plain structs that know nothing of torch.
//
// kernels/decoder/reference.py says what the ops compute with them.
#pragma once

#include <cstdint>

#include "planes/planes.h"

namespace foveate {

constexpr int64_t kMaxHead = 512;
constexpr int64_t kChunk = 256;  // cached positions whose scores are held at once

enum class NormKind : uint8_t { kNone, kWeight, kOnePlusWeight };
enum class Activation : uint8_t { kSilu, kGeluTanh, kGelu, kRelu };

// The older keys or values of one sequence and head, packed: blocks of some tokens, each [head_size, tokens].
struct PackedTokens {
  const char* numbers;     // codes, or numbers of a `type`
  const uint16_t* ranges;  // bfloat16 [head_size, 2], low and step of each channel; null: the numbers are exact
  int64_t numbers_step, ranges_step;  // from block to block, in bytes and in values
  int bits;                // of a code
  Type type;
};

// Some query rows of one sequence that share the keys and values of one head: row s * heads + h is that of query s and
// head h.
struct QueryTile {
  const float* queries;  // scaled
  int64_t queries_stride, head_size;
  int64_t queries_count, heads;
  int64_t position;      // of the first query
  int64_t first;         // cached positions before it are padding
  int64_t window;        // positions that a query sees, itself among them; 0: all
  float cap;             // scores are cap * tanh(score / cap); 0: as they are
  const void *keys, *values;  // of one sequence and head
  int64_t keys_stride, values_stride;  // in elements, between two places
  const int64_t* places;  // of each position; null: the position
  Type type;
  int64_t packed;        // so many positions, before those of `keys` and `values`, are packed; a multiple of `block`
  int64_t block;         // tokens of a packed block, of which a chunk has a whole number
  PackedTokens packed_keys, packed_values;

  int64_t rows() const { return queries_count * heads; }
  int64_t end() const { return position + queries_count; }
  // The first position that the first query sees.
  int64_t begin() const { return begin_of(0); }
  int64_t begin_of(int64_t query) const {
    const int64_t least = window ? position + query + 1 - window : 0;
    return least > first ? least : first;
  }
};

// The softmax over some positions, not divided yet: out = sum(exp(score - most) * value), total = sum(exp(score - most)).
struct Partial {
  float* most;   // [rows]
  float* total;  // [rows]
  float* out;    // [rows, head_size]
};

constexpr int64_t kVectorFloats = 16;  // buffers of floats are multiples of it
constexpr int64_t padded_head(int64_t size) { return (size + kVectorFloats - 1) / kVectorFloats * kVectorFloats; }
// Floats that `attend` needs: the keys and values of a chunk, scores, and a row of queries.
constexpr int64_t attend_scratch(int64_t rows, int64_t head_size) { return (2 * kChunk + rows) * padded_head(head_size) + rows * kChunk; }

struct DecoderKernels {
  void (*load)(const void* from, Type type, float* to, int64_t count);
  void (*store)(const float* from, void* to, Type type, int64_t count);
  float (*dot)(const float* x, const float* y, int64_t count);
  // y = x / sqrt(mean(x^2) + eps), times a weight; y may be x.
  void (*norm)(const float* x, float* y, int64_t count, const float* weight, float eps, NormKind kind);
  // x[i] and x[i + half] turned by an angle, in place.
  void (*rotate)(float* x, const float* cosine, const float* sine, int64_t size);
  // y = activation(gate) * up
  void (*gate)(const float* gate, const float* up, float* y, int64_t count, Activation activation);
  void (*attend)(const QueryTile& tile, int64_t chunk, const Partial& to, float* scratch);
  // Adds the partial `from` to `into`, both of one row.
  void (*merge)(const Partial& from, const Partial& into, int64_t head_size);
};

}  // namespace foveate
