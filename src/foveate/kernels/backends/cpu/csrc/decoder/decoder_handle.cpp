// The op that makes the handle of a decoder: all checks that do not depend on a call.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <unordered_set>
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
  Norm norm{static_cast<NormKind>(kind), static_cast<float>(eps), weight, size};
  norm.check();
  if (norm.kind != NormKind::kNone) norm.values = weight.const_data_ptr<float>();
  return norm;
}

// A weight of an expert, alone in its handle.
std::shared_ptr<const Held> expert_of(const Tensor& handle, int64_t rows, int64_t columns) {
  std::shared_ptr<const Held> held = held_by(handle);
  TORCH_CHECK(held->weights.size() == 1 && !held->places.empty(), "an expert's handle has ", held->weights.size(), " weights, or does not say where they are");
  TORCH_CHECK(held->weights[0].rows == rows && held->weights[0].columns == columns, "an expert's weight is ", held->weights[0].rows, " x ",
              held->weights[0].columns, ", not ", rows, " x ", columns);
  return held;
}

// Notes what the tensors of the blocks' groups, biases and norms lie in, each once.
void note_memory(Decoder& decoder) {
  std::unordered_set<const void*> known;
  const auto note = [&](const Tensor& t) {
    if (!t.has_storage() || !known.insert(t.storage().unsafeGetStorageImpl()).second) return;
    decoder.memory.push_back({t.storage(), t.storage().data(), t.storage().nbytes()});
  };
  for (const Block& block : decoder.blocks) {
    for (const auto& held : block.groups)
      if (held)
        for (size_t t = 0; t < held->tensors.size(); ++t)
          if (t % kTensors + 1 < kTensors) note(held->tensors[t]);  // active levels are those of a pass
    for (const auto& biases : block.biases)
      for (const Tensor& bias : biases) note(bias);
    for (const Norm& norm : block.norms)
      if (norm.kind != NormKind::kNone) note(norm.weight);
  }
  if (decoder.last.kind != NormKind::kNone) note(decoder.last.weight);
}

Tensor decoder_handle(TensorList groups, TensorList biases, TensorList norms, TensorList routers, TensorList experts, at::IntArrayRef numbers,
                      at::ArrayRef<double> constants) {
  constexpr size_t kNumbersOfBlock = kNumbers + kNorms, kConstantsOfBlock = kConstants + kNorms;
  const size_t count = groups.size() / kGroups;
  TORCH_CHECK(groups.size() == count * kGroups && biases.size() == count * kBiases && norms.size() == count * kNorms + 1 && routers.size() == count &&
                  numbers.size() == count * kNumbersOfBlock + 4 && constants.size() == count * kConstantsOfBlock + 1,
              "of ", count, " blocks there are ", groups.size(), " groups, ", biases.size(), " biases, ", norms.size(), " norms, ", routers.size(), " routers, ", numbers.size(),
              " numbers and ", constants.size(), " constants");
  Decoder made;
  const int64_t* const last = numbers.data() + count * kNumbersOfBlock;  // the last norm's kind, the width, and the tables
  made.width = last[1];
  made.rotary_size = last[2];
  made.rotary_tables = last[3];
  TORCH_CHECK(made.width > 0 && made.rotary_size >= 0 && made.rotary_size % 2 == 0 && made.rotary_tables >= 1, "width (=", made.width, "), rotary size (=",
              made.rotary_size, ") or tables (=", made.rotary_tables, ") are none");
  made.last = norm_of(norms.back(), last[0], constants.back(), made.width);
  size_t next_expert = 0;
  for (size_t b = 0; b < count; ++b) {
    Block block{};
    std::memcpy(&block.numbers, numbers.data() + b * kNumbersOfBlock, sizeof(Numbers));
    std::memcpy(&block.constants, constants.data() + b * kConstantsOfBlock, sizeof(Constants));
    const Numbers& n = block.numbers;
    TORCH_CHECK(n.heads > 0 && n.heads < int64_t{1} << 24 && n.kv_heads > 0 && n.heads % n.kv_heads == 0 && n.head_size > 0 && n.head_size <= kMaxHead, "block ", b, " has ", n.heads,
                " heads, ", n.kv_heads, " of keys, of size ", n.head_size, ", at most ", kMaxHead);
    TORCH_CHECK((n.rotary_size == 0 || n.rotary_size == made.rotary_size) && n.rotary_size <= n.head_size && n.rotary_table >= 0 &&
                    n.rotary_table < made.rotary_tables && n.window >= 0 && n.activation >= 0 && n.activation <= 3,
                "block ", b, " has a rotary size (=", n.rotary_size, "), a table (=", n.rotary_table, "), a window (=", n.window, ") or an activation (=",
                n.activation, ") that there is not");
    const bool is_mixture = n.experts > 0;
    TORCH_CHECK(n.experts >= 0 && n.experts < int64_t{1} << 20 && (!is_mixture || (n.top_k >= 1 && n.top_k <= n.experts)), "block ", b, " has ", n.experts,
                " experts, of which a row takes ", n.top_k);
    size_t bias = b * kBiases;
    for (size_t g = 0; g < kGroups; ++g) {
      if (is_mixture && (g == kGateUp || g == kDown)) continue;
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
    if (is_mixture) {
      block.router = routers[b];
      block.check_router(made.width);
      TORCH_CHECK(next_expert + static_cast<size_t>(2 * n.experts) <= experts.size(), "there are ", experts.size(), " handles of experts, fewer than blocks have");
      block.inner = held_by(experts[next_expert + 1])->weights.at(0).columns;
      for (int64_t e = 0; e < n.experts; ++e) {
        block.up.push_back(expert_of(experts[next_expert++], 2 * block.inner, made.width));
        block.down.push_back(expert_of(experts[next_expert++], made.width, block.inner));
      }
      made.most_top_k = std::max(made.most_top_k, n.top_k);
      made.most_routed = std::max({made.most_routed, made.width, block.inner});
    } else {
      block.inner = weight(kDown, 0).columns;
      expect(kGateUp, made.width, {block.inner, block.inner});
      expect(kDown, block.inner, {made.width});
    }
    expect(kQkv, made.width, {n.queries(), n.keys(), n.keys()});
    expect(kOutput, n.queries(), {made.width});
    for (size_t slot = 0; slot < kNorms; ++slot) {
      const bool is_head = slot == kQueryNorm || slot == kKeyNorm;
      const int64_t whole = slot == kQueryNorm ? n.queries() : n.keys(), size = is_head ? (n.whole_norms ? whole : n.head_size) : made.width;
      block.norms[slot] = norm_of(norms[b * kNorms + slot], numbers[b * kNumbersOfBlock + kNumbers + slot], constants[b * kConstantsOfBlock + kConstants + slot], size);
    }
    made.most_input = std::max({made.most_input, made.width, n.queries(), block.inner});
    const int64_t of_experts = std::max<int64_t>(1, n.top_k) * std::max(2 * block.inner, made.width);
    made.most_projected = std::max({made.most_projected, n.queries() + 2 * n.keys(), is_mixture ? of_experts : 2 * block.inner});
    made.most_heads = std::max(made.most_heads, n.heads);
    made.most_head_size = std::max(made.most_head_size, n.head_size);
    made.blocks.push_back(std::move(block));
  }
  note_memory(made);
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
