// A decoder's blocks in one op: what a call is given, checked (decoder/run.h and decoder/run_parts.h have the work).
//
// kernels/decoder/reference.py is the meaning of the ops.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "decoder/run_parts.h"

namespace foveate {
namespace {

constexpr int64_t kMostPositions = int64_t{1} << 40;

void check_cache(const Tensor& cache, const Tensor& like, int64_t dims, const Numbers& n, size_t block) {
  type_of(cache);
  TORCH_CHECK(cache.device().is_cpu() && cache.scalar_type() == like.scalar_type() && cache.dim() == dims && cache.size(1) == n.kv_heads &&
                  cache.size(-1) == n.head_size && cache.stride(-1) == 1,
              "the cache of block ", block, " has shape (=", cache.sizes(), "), not [.., ", n.kv_heads, dims == 4 ? ", .., " : ", ", n.head_size, "]");
  check_memory(cache, "a cache");
}

// `rows` of x, or the positions of one of its sequences.
void check_angles(const Decoder& decoder, const Tensor& cosine, const Tensor& sine, int64_t batch, int64_t length) {
  check_vector(cosine, at::kFloat, "cosine");
  check_vector(sine, at::kFloat, "sine");
  TORCH_CHECK(cosine.sizes() == sine.sizes() && cosine.dim() == 4 && cosine.size(0) == decoder.rotary_tables && cosine.size(2) == length &&
                  (cosine.size(1) == 1 || cosine.size(1) == batch) && cosine.size(3) == decoder.rotary_size,
              "cosine and sine have shapes (=", cosine.sizes(), ", ", sine.sizes(), "), not [", decoder.rotary_tables, ", 1 or ", batch, ", ", length,
              ", ", decoder.rotary_size, "]");
}

void check_x(const Decoder& decoder, const Tensor& x) {
  TORCH_CHECK(x.dim() == 3 && x.size(2) == decoder.width, "x has shape (=", x.sizes(), "), not [B, S, ", decoder.width, "]");
  type_of(x);
  check_vector(x, x.scalar_type(), "x");
}

// `before` has the packed positions of each block of the decoder.
Tensor blocks_over(const std::shared_ptr<const Decoder>& decoder, std::vector<Packed> before, const Tensor& x, const Tensor& book, TensorList keys,
                   TensorList values, const Tensor& cosine, const Tensor& sine, const std::optional<Tensor>& first, at::IntArrayRef past) {
  const std::shared_ptr<const Pass> pass = pass_of(book);
  check_x(*decoder, x);
  const int64_t batch = x.size(0), length = x.size(1);
  TORCH_CHECK(keys.size() == decoder->blocks.size() && values.size() == keys.size() && past.size() == keys.size(), "there are ", decoder->blocks.size(),
              " blocks, caches of ", keys.size(), " keys and ", values.size(), " values, and ", past.size(), " numbers of past positions");
  std::vector<BlockCache> caches;
  for (size_t b = 0; b < keys.size(); ++b) {
    TORCH_CHECK(past[b] >= 0 && past[b] < kMostPositions, "past (=", past[b], ") is not a number of positions");
    for (const Tensor& cache : {keys[b], values[b]}) {
      check_cache(cache, keys[b], 4, decoder->blocks[b].numbers, b);
      TORCH_CHECK(cache.size(0) == batch && cache.size(2) >= past[b] + length, "the cache of block ", b, " has shape (=", cache.sizes(), "), not [", batch,
                  ", .., ", past[b] + length, " or more, ..]");
    }
    caches.push_back({keys[b], values[b], past[b], std::move(before[b])});
  }
  if (batch * length > kRowsAtOnce)  // rows go through all blocks a chunk at a time, so each block needs its own
    for (size_t b = 1; b < keys.size(); ++b)
      for (size_t other = 0; other < b; ++other)
        TORCH_CHECK(keys[b].const_data_ptr() != keys[other].const_data_ptr(), "blocks ", other, " and ", b, " have one cache, and x has ", batch * length,
                    " rows, more than ", kRowsAtOnce);
  check_angles(*decoder, cosine, sine, batch, length);
  if (first) {
    check_vector(*first, at::kLong, "first");
    TORCH_CHECK(first->numel() == batch, "first has ", first->numel(), " values, not ", batch);
    for (int64_t b = 0; b < batch; ++b)
      TORCH_CHECK(first->const_data_ptr<int64_t>()[b] >= 0, "first (=", first->const_data_ptr<int64_t>()[b], ") is not a position");
  }
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < batch; ++b) sequences.push_back({b * length, length});
  const Call call{decoder, *pass, x, at::empty_like(x), x.sizes().slice(0, 2), std::move(sequences), true, std::move(caches),
                  cosine.const_data_ptr<float>(), sine.const_data_ptr<float>(), cosine.size(1) * length, first ? first->const_data_ptr<int64_t>() : nullptr};
  if (x.numel()) Run(call).run();
  return call.out;
}

Tensor decoder_blocks(const Tensor& x, const Tensor& handle, const Tensor& book, TensorList keys, TensorList values, const Tensor& cosine,
                      const Tensor& sine, const std::optional<Tensor>& first, at::IntArrayRef past) {
  const std::shared_ptr<const Decoder> decoder = decoder_by(handle);
  return blocks_over(decoder, std::vector<Packed>(decoder->blocks.size()), x, book, keys, values, cosine, sine, first, past);
}

Tensor decoder_blocks_packed(const Tensor& x, const Tensor& handle, const Tensor& book, TensorList keys, TensorList values, const Tensor& cosine,
                             const Tensor& sine, const std::optional<Tensor>& first, at::IntArrayRef past, TensorList packed, const Tensor& places,
                             int64_t block) {
  const std::shared_ptr<const Decoder> decoder = decoder_by(handle);
  check_x(*decoder, x);
  return blocks_over(decoder, packed_of(*decoder, x.size(0), packed, places, block), x, book, keys, values, cosine, sine, first, past);
}

Tensor decoder_blocks_paged(const Tensor& x, const Tensor& handle, const Tensor& book, TensorList keys, TensorList values, const Tensor& cosine,
                            const Tensor& sine, const Tensor& lengths, TensorList ends, TensorList reads, TensorList writes) {
  const std::shared_ptr<const Decoder> decoder = decoder_by(handle);
  const std::shared_ptr<const Pass> pass = pass_of(book);
  check_x(*decoder, x);
  TORCH_CHECK(x.size(0) == 1, "x of sequences in pages has shape (=", x.sizes(), "), not [1, S, ", decoder->width, "]");
  const size_t count = decoder->blocks.size();
  TORCH_CHECK(keys.size() == count && values.size() == count && ends.size() == count && reads.size() == count && writes.size() == count, "there are ", count,
              " blocks, and ", keys.size(), " keys, ", values.size(), " values, ", ends.size(), " ends, ", reads.size(), " reads and ", writes.size(), " writes");
  check_vector(lengths, at::kLong, "lengths");
  std::vector<Sequence> sequences;
  int64_t rows = 0;
  for (int64_t i = 0; i < lengths.numel(); ++i) {
    const int64_t length = lengths.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(length >= 0 && length <= x.size(1) - rows, "lengths (=", length, ") are not those of ", x.size(1), " rows");
    sequences.push_back({rows, length});
    rows += length;
  }
  TORCH_CHECK(rows == x.size(1), "lengths are of ", rows, " rows, and x has ", x.size(1));
  std::vector<BlockCache> caches;
  for (size_t b = 0; b < count; ++b) {
    for (const Tensor& cache : {keys[b], values[b]}) check_cache(cache, keys[b], 3, decoder->blocks[b].numbers, b);
    const int64_t places = std::min(keys[b].size(0), values[b].size(0));
    // the same lists serve many blocks, and are looked through once
    const bool known = b > 0 && ends[b].is_same(ends[b - 1]) && reads[b].is_same(reads[b - 1]) && writes[b].is_same(writes[b - 1]) &&
                       places >= std::min(keys[b - 1].size(0), values[b - 1].size(0));
    const int64_t* const end = ends[b].const_data_ptr<int64_t>();
    if (!known) {
      check_vector(ends[b], at::kLong, "ends");
      check_vector(reads[b], at::kLong, "reads");
      check_vector(writes[b], at::kLong, "writes");
      TORCH_CHECK(ends[b].numel() == lengths.numel() + 1 && end[0] == 0 && end[lengths.numel()] == reads[b].numel() && writes[b].numel() == rows, "ends of ",
                  ends[b].numel(), " values, reads of ", reads[b].numel(), " and writes of ", writes[b].numel(), " do not fit ", lengths.numel(),
                  " sequences of ", rows, " rows");
      for (size_t i = 0; i < sequences.size(); ++i)
        TORCH_CHECK(end[i + 1] - end[i] >= sequences[i].length && end[i + 1] <= reads[b].numel(), "ends (=", end[i + 1], ") leave sequence ", i, " fewer than its ",
                    sequences[i].length, " positions");
      for (const Tensor& list : {reads[b], writes[b]})
        for (int64_t i = 0; i < list.numel(); ++i)
          TORCH_CHECK_INDEX(list.const_data_ptr<int64_t>()[i] >= 0 && list.const_data_ptr<int64_t>()[i] < places, "place (=", list.const_data_ptr<int64_t>()[i],
                            ") is not one of ", places);
    }
    caches.push_back({keys[b], values[b], 0, {}, end, reads[b].const_data_ptr<int64_t>(), writes[b].const_data_ptr<int64_t>()});
  }
  check_angles(*decoder, cosine, sine, 1, x.size(1));
  const Call call{decoder, *pass, x, at::empty_like(x), x.sizes().slice(0, 2), std::move(sequences), false, std::move(caches),
                  cosine.const_data_ptr<float>(), sine.const_data_ptr<float>(), x.size(1), nullptr};
  if (x.numel()) Run(call).run();
  return call.out;
}

}  // namespace
}  // namespace foveate

TORCH_LIBRARY_IMPL(foveate, CPU, m) {
  m.impl("decoder_blocks", foveate::decoder_blocks);
  m.impl("decoder_blocks_packed", foveate::decoder_blocks_packed);
  m.impl("decoder_blocks_paged", foveate::decoder_blocks_paged);
}
