// The op that makes the handle of a decoder: all checks that do not depend on a call.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "decoder/blocks.h"
#include "planes/number_table.h"
#include "planes/reading.h"

namespace foveate {
namespace {

using at::Tensor;
using at::TensorList;

Norm norm_of(const Tensor& weight, int64_t kind, double eps, int64_t size) {
  TORCH_CHECK(kind >= 0 && kind <= 2, "a norm's kind (=", kind, ") is not one of 0, 1, 2");
  Norm norm{static_cast<NormKind>(kind), static_cast<float>(eps), weight};
  if (norm.kind == NormKind::kNone) return norm;
  check_vector(weight, at::kFloat, "a norm's weight");
  TORCH_CHECK(weight.numel() == size, "a norm's weight has ", weight.numel(), " values, not ", size);
  return norm;
}

Tensor decoder_handle(TensorList groups, TensorList biases, TensorList norms, at::IntArrayRef numbers, at::ArrayRef<double> constants) {
  constexpr size_t kNumbersOfBlock = kNumbers + kNorms, kConstantsOfBlock = kConstants + kNorms;
  const size_t count = groups.size() / kGroups;
  TORCH_CHECK(groups.size() == count * kGroups && biases.size() == count * kBiases && norms.size() == count * kNorms + 1 &&
                  numbers.size() == count * kNumbersOfBlock + 4 && constants.size() == count * kConstantsOfBlock + 1,
              "of ", count, " blocks there are ", groups.size(), " groups, ", biases.size(), " biases, ", norms.size(), " norms, ", numbers.size(),
              " numbers and ", constants.size(), " constants");
  Decoder made;
  const int64_t* const last = numbers.data() + count * kNumbersOfBlock;  // the last norm's kind, the width, and the tables
  made.width = last[1];
  made.rotary_size = last[2];
  made.rotary_tables = last[3];
  TORCH_CHECK(made.width > 0 && made.rotary_size >= 0 && made.rotary_size % 2 == 0 && made.rotary_tables >= 1, "width (=", made.width, "), rotary size (=",
              made.rotary_size, ") or tables (=", made.rotary_tables, ") are none");
  made.last = norm_of(norms.back(), last[0], constants.back(), made.width);
  for (size_t b = 0; b < count; ++b) {
    Block block{};
    std::memcpy(&block.numbers, numbers.data() + b * kNumbersOfBlock, sizeof(Numbers));
    std::memcpy(&block.constants, constants.data() + b * kConstantsOfBlock, sizeof(Constants));
    const Numbers& n = block.numbers;
    TORCH_CHECK(n.heads > 0 && n.kv_heads > 0 && n.heads % n.kv_heads == 0 && n.head_size > 0 && n.head_size <= kMaxHead, "block ", b, " has ", n.heads,
                " heads, ", n.kv_heads, " of keys, of size ", n.head_size, ", at most ", kMaxHead);
    TORCH_CHECK((n.rotary_size == 0 || n.rotary_size == made.rotary_size) && n.rotary_size <= n.head_size && n.rotary_table >= 0 &&
                    n.rotary_table < made.rotary_tables && n.window >= 0 && n.activation >= 0 && n.activation <= 3,
                "block ", b, " has a rotary size (=", n.rotary_size, "), a table (=", n.rotary_table, "), a window (=", n.window, ") or an activation (=",
                n.activation, ") that there is not");
    size_t bias = b * kBiases;
    for (size_t g = 0; g < kGroups; ++g) {
      block.groups[g] = held_by(groups[b * kGroups + g]);
      const size_t weights = block.groups[g]->weights.size();
      TORCH_CHECK(weights == 1 || weights == kGroupWeights[g], "group ", g, " of block ", b, " has ", weights, " weights");
      TORCH_CHECK(!block.groups[g]->places.empty(), "group ", g, " of block ", b, " does not say where its weights are in a pass");
      for (size_t i = 0; i < weights; ++i) {
        const Tensor& one = biases[bias + i];
        Weight w = block.groups[g]->weights[i];
        TORCH_CHECK(w.columns == block.groups[g]->weights[0].columns && w.group == block.groups[g]->weights[0].group, "weights of group ", g, " of block ", b,
                    " differ in columns or in the size of groups");
        set_bias(w, one);
        block.biases[g].push_back(one);
      }
      bias += kGroupWeights[g];
    }
    const auto weight = [&](GroupSlot g, size_t i) -> const Weight& { return block.groups[g]->weights[i]; };
    const auto expect = [&](GroupSlot g, int64_t columns, std::vector<int64_t> rows) {
      const size_t weights = block.groups[g]->weights.size();
      int64_t all = 0;
      for (const int64_t one : rows) all += one;
      if (weights != rows.size()) rows = {all};
      for (size_t i = 0; i < weights; ++i)
        TORCH_CHECK(weight(g, i).columns == columns && weight(g, i).rows == rows[i], "weight ", i, " of group ", static_cast<int>(g), " of block ", b, " is ",
                    weight(g, i).rows, " x ", weight(g, i).columns, ", not ", rows[i], " x ", columns);
    };
    block.inner = weight(kDown, 0).columns;
    expect(kQkv, made.width, {n.queries(), n.keys(), n.keys()});
    expect(kOutput, n.queries(), {made.width});
    expect(kGateUp, made.width, {block.inner, block.inner});
    expect(kDown, block.inner, {made.width});
    for (size_t slot = 0; slot < kNorms; ++slot) {
      const bool is_head = slot == kQueryNorm || slot == kKeyNorm;
      const int64_t whole = slot == kQueryNorm ? n.queries() : n.keys(), size = is_head ? (n.whole_norms ? whole : n.head_size) : made.width;
      block.norms[slot] = norm_of(norms[b * kNorms + slot], numbers[b * kNumbersOfBlock + kNumbers + slot], constants[b * kConstantsOfBlock + kConstants + slot], size);
    }
    made.most_input = std::max({made.most_input, made.width, n.queries(), block.inner});
    made.most_projected = std::max({made.most_projected, n.queries() + 2 * n.keys(), 2 * block.inner});
    made.most_heads = std::max(made.most_heads, n.heads);
    made.most_head_size = std::max(made.most_head_size, n.head_size);
    made.blocks.push_back(std::move(block));
  }
  return NumberTable<const Decoder>::only().hold(std::make_shared<const Decoder>(std::move(made)));
}

}  // namespace

std::shared_ptr<const Decoder> decoder_by(const at::Tensor& handle) {
  const int64_t number = number_in(handle, "a decoder's handle");
  const std::shared_ptr<const Decoder> found = NumberTable<const Decoder>::only().find(number);
  TORCH_CHECK(found, "decoder (=", number, ") stands for no decoder of this process: it is gone");
  return found;
}

}  // namespace foveate

TORCH_LIBRARY_IMPL(foveate, CPU, m) { m.impl("decoder_handle", foveate::decoder_handle); }
