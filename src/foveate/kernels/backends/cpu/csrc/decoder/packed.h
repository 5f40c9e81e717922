// The packed positions of caches, as the op takes them: which tensors hold the keys and values of which head.
#pragma once

#include <vector>

#include "decoder/blocks.h"

namespace foveate {
namespace {

// The packed keys or values of one head, of all sequences.
struct PackedHead {
  PackedTokens first;                       // of the first sequence
  int64_t numbers_sequence, ranges_sequence;  // from sequence to sequence, in bytes and in values

  PackedTokens of(int64_t sequence) const {
    PackedTokens made = first;
    made.numbers += sequence * numbers_sequence;
    if (made.ranges) made.ranges += sequence * ranges_sequence;
    return made;
  }
};

// The packed positions of one block of the decoder.
struct Packed {
  int64_t positions = 0, block = 0;
  std::vector<PackedHead> keys, values;
};

// Tensors of some heads: codes uint8 [N, B, h * D * tokens * bits / 8] and ranges bfloat16 [N, B, h * D, 2], or exact
// numbers [N, B, h, D, tokens] and nothing.
struct PackedPair {
  PackedPair(const Tensor& numbers, const Tensor& ranges, int64_t batch, int64_t head_size, int64_t block) : numbers_(numbers), ranges_(ranges) {
    const bool exact = !ranges.numel();
    TORCH_CHECK(numbers.device().is_cpu() && numbers.is_contiguous() && numbers.dim() == (exact ? 5 : 3) && numbers.size(0) > 0 && numbers.size(1) == batch,
                "packed numbers have shape (=", numbers.sizes(), "), not those of blocks of ", batch, " sequences");
    blocks = numbers.size(0);
    if (exact) {
      heads = numbers.size(2);
      type_ = type_of(numbers);
      TORCH_CHECK(numbers.size(3) == head_size && numbers.size(4) == block, "exact numbers have shape (=", numbers.sizes(), "), not [", blocks, ", ", batch,
                  ", .., ", head_size, ", ", block, "]");
    } else {
      check_vector(numbers, at::kByte, "packed codes");
      check_vector(ranges, at::kBFloat16, "ranges");
      TORCH_CHECK(ranges.dim() == 4 && ranges.size(0) == blocks && ranges.size(1) == batch && ranges.size(2) % head_size == 0 && ranges.size(3) == 2,
                  "ranges have shape (=", ranges.sizes(), "), not [", blocks, ", ", batch, ", a multiple of ", head_size, ", 2]");
      heads = ranges.size(2) / head_size;
      const int64_t count = ranges.size(2) * block;
      bits_ = static_cast<int>(numbers.size(2) * 8 / count);
      TORCH_CHECK((bits_ == 2 || bits_ == 4 || bits_ == 8 || bits_ == 16) && numbers.size(2) * 8 == count * bits_, "codes have shape (=", numbers.sizes(),
                  "), not one of 2, 4, 8 or 16 bits for ", count, " numbers");
    }
  }

  PackedHead head(int64_t place) const {
    const int64_t numbers_each = numbers_.stride(0) * static_cast<int64_t>(numbers_.element_size()), per_sequence = numbers_each / numbers_.size(1);
    PackedHead made{};
    made.first.numbers = static_cast<const char*>(numbers_.const_data_ptr()) + place * (per_sequence / heads);
    made.first.numbers_step = numbers_each;
    made.numbers_sequence = per_sequence;
    made.first.bits = bits_;
    made.first.type = type_;
    if (!bits_) return made;
    made.first.ranges = static_cast<const uint16_t*>(ranges_.const_data_ptr()) + place * (ranges_.stride(1) / heads);
    made.first.ranges_step = ranges_.stride(0);
    made.ranges_sequence = ranges_.stride(1);
    return made;
  }

  int64_t blocks = 0, heads = 0;

 private:
  const Tensor &numbers_, &ranges_;
  int bits_ = 0;  // 0: exact
  Type type_ = Type::kFloat32;
};

// The packed positions of each block of a decoder: `parts` are pairs of tensors, and places, int64 [blocks, 2, kv_heads, 2],
// says in which pair the keys and then the values of a head are, and where in it; -1 where none are packed.
std::vector<Packed> packed_of(const Decoder& decoder, int64_t batch, TensorList parts, const Tensor& places, int64_t block) {
  std::vector<Packed> made(decoder.blocks.size());
  TORCH_CHECK(block >= kBlock && block % kBlock == 0 && kChunk % block == 0, "block (=", block, ") is not 32, 64, 128 or 256 tokens");
  TORCH_CHECK(parts.size() % 2 == 0, "there are ", parts.size(), " packed tensors, not pairs");
  check_vector(places, at::kLong, "places");
  int64_t at = 0;
  for (size_t b = 0; b < made.size(); ++b) {
    const Numbers& n = decoder.blocks[b].numbers;
    Packed& own = made[b];
    own.block = block;
    for (std::vector<PackedHead>* const heads : {&own.keys, &own.values})
      for (int64_t h = 0; h < n.kv_heads; ++h, at += 2) {
        TORCH_CHECK(at + 2 <= places.numel(), "places has ", places.numel(), " values, too few for ", made.size(), " blocks");
        const int64_t pair = places.const_data_ptr<int64_t>()[at], place = places.const_data_ptr<int64_t>()[at + 1];
        TORCH_CHECK_INDEX(pair >= -1 && pair < static_cast<int64_t>(parts.size() / 2), "pair (=", pair, ") is not one of ", parts.size() / 2);
        const bool is_first = heads == &own.keys && !h;
        int64_t blocks = 0;
        if (pair >= 0) {
          const PackedPair held(parts[static_cast<size_t>(2 * pair)], parts[static_cast<size_t>(2 * pair + 1)], batch, n.head_size, block);
          TORCH_CHECK_INDEX(place >= 0 && place < held.heads, "place (=", place, ") is not one of ", held.heads, " heads");
          heads->push_back(held.head(place));
          blocks = held.blocks;
        }
        if (is_first) own.positions = blocks * block;
        TORCH_CHECK(blocks * block == own.positions, "the heads of block ", b, " have ", blocks * block, " and ", own.positions, " packed positions");
      }
  }
  TORCH_CHECK(at == places.numel(), "places has ", places.numel(), " values, not ", at);
  return made;
}

}  // namespace
}  // namespace foveate
