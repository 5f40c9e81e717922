// What the parts of a decoder's blocks do: products, positions, attention, one MLP or experts.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "decoder/run.h"

namespace foveate {
namespace {

// The products of a group with the rows of its input, which are quantized already where nothing is to be chosen.
void Run::multiply(Member& member, Group& group, int g, const std::array<float*, 3>& to, int64_t stride) {
  if (chooses_) {
    // the decision of each weight is a unit
    member.part(
        [&] {
          decided_.assign(static_cast<size_t>(group.weights()), {});
          return Units{group.weights()};
        },
        [&](int64_t i, int64_t end) {
          const Tensor x = at::from_blob(scratch_->input, {rows_, group.columns()}, at::kFloat);
          for (; i < end; ++i) decided_[static_cast<size_t>(i)] = group.decide(i, *call_.pass.generation, x, chunk_pairs_);
        });
    member.alone([&] { group.arrange(decided_, rows_, input_rows(group.columns()), scratch_->slots[g]); });
    each_row(member, rows_, [&](int64_t row) { group.quantize(row, row + 1, faults_); });
  }
  const auto products = [&]() -> const Products& { return group.products(to.data(), stride, threads_); };
  member.part([&] { return products().units(); }, [&](int64_t begin, int64_t end) { products().run(begin, end, faults_); });
}

// hidden += what attention or the MLP of a block has put out, which some decoders norm first.
void Run::add_output(const Block& block, NormSlot norm, int64_t row) {
  const int64_t width = decoder_.width;
  float* const hidden = scratch_->hidden + row * width;
  const float* output = scratch_->output + row * width;
  if (block.norms[norm].kind != NormKind::kNone) {
    float* const normed = scratch_->input + row * width;
    block.norms[norm].row(output, normed, width);
    output = normed;
  }
  const float scale = static_cast<float>(block.constants.residual);
  for (int64_t k = 0; k < width; ++k) hidden[k] += scale * output[k];
}

// Norms and turns the queries and keys of a row, and stores its keys and values.
void Run::position_row(const Block& block, const BlockCache& cache, int64_t row) {
  const Numbers& n = block.numbers;
  const DecoderKernels& isa = kernels().decoder;
  float* const queries = scratch_->projected + row * projected(n);
  float *const keys = queries + n.queries(), *const values = keys + n.keys();
  const auto ready = [&](float* heads, int64_t count, NormSlot norm) {
    if (block.norms[norm].kind != NormKind::kNone) {
      const int64_t each = n.whole_norms ? count * n.head_size : n.head_size;
      for (int64_t k = 0; k < count * n.head_size; k += each) block.norms[norm].row(heads + k, heads + k, each);
    }
    if (n.rotary_size)
      for (int64_t h = 0; h < count; ++h)
        isa.rotate(heads + h * n.head_size, angle(call_.cosine, block, row), angle(call_.sine, block, row), n.rotary_size);
  };
  ready(queries, n.heads, kQueryNorm);
  ready(keys, n.kv_heads, kKeyNorm);
  for (int64_t k = 0; k < n.queries(); ++k) queries[k] *= static_cast<float>(block.constants.scale);
  const Segment& s = segment_of(row);
  const int64_t position = cache.paged() ? cache.writes[row_of_x(row)] : cache.past + s.from + row - s.row;
  const auto append = [&](const Tensor& into, const float* from) {
    for (int64_t h = 0; h < n.kv_heads; ++h) {
      char* const to = cache.memory(into, s.sequence, h) + BlockCache::bytes(into, position * cache.stride(into));
      isa.store(from + h * n.head_size, to, type_of(into), n.head_size);
    }
  };
  append(cache.keys, keys);
  append(cache.values, values);
}

QueryTile Run::tile_of(const Block& block, const BlockCache& cache, const Tile& tile, int64_t head) const {
  const Numbers& n = block.numbers;
  const Segment& s = segments_[tile.segment];
  const int64_t length = call_.sequences[static_cast<size_t>(s.sequence)].length, row = s.row + tile.from - s.from;
  QueryTile made{};
  made.queries = scratch_->projected + row * projected(n) + head * n.shared() * n.head_size;
  made.queries_stride = projected(n);
  made.head_size = n.head_size;
  made.queries_count = tile.until - tile.from;
  made.heads = n.shared();
  made.position = cache.past_of(s.sequence, length) + tile.from;
  made.first = call_.first ? call_.first[s.sequence] : 0;
  made.window = n.window;
  made.cap = static_cast<float>(block.constants.cap);
  made.keys = cache.memory(cache.keys, s.sequence, head);
  made.values = cache.memory(cache.values, s.sequence, head);
  made.keys_stride = cache.stride(cache.keys);
  made.values_stride = cache.stride(cache.values);
  made.places = cache.paged() ? cache.reads + cache.ends[s.sequence] : nullptr;
  made.type = type_of(cache.keys);
  made.packed = cache.packed.positions;
  if (made.packed) {
    made.block = cache.packed.block;
    made.packed_keys = cache.packed.keys[static_cast<size_t>(head)].of(s.sequence);
    made.packed_values = cache.packed.values[static_cast<size_t>(head)].of(s.sequence);
  }
  return made;
}

// Units are a head of a sequence and some of its queries; where queries are few, a head and a chunk of positions.
void Run::attention(Member& member, const Block& block, const BlockCache& cache) {
  const Numbers& n = block.numbers;
  const int64_t shared = n.shared(), queries = tile_queries(n);
  std::vector<Tile> tiles;
  for (size_t i = 0; i < segments_.size(); ++i)
    for (int64_t from = segments_[i].from; from < segments_[i].until; from += queries) tiles.push_back({i, from, std::min(segments_[i].until, from + queries)});
  float* const memory = scratch_->own + member.thread() * thread_floats_;
  float* const totals = memory + attend_scratch(std::min(queries, step_) * shared, n.head_size);
  const int64_t count = static_cast<int64_t>(tiles.size());
  member.part([&] { return Units{count * n.kv_heads * splits_}; }, [&](int64_t unit, int64_t unit_end) {
    for (; unit < unit_end; ++unit) {
      // later tiles see more, and are taken first
      const int64_t split = unit % splits_, head = unit / splits_ % n.kv_heads;
      const Tile& own = tiles[static_cast<size_t>(count - 1 - unit / splits_ / n.kv_heads)];
      const QueryTile tile = tile_of(block, cache, own, head);
      const int64_t tile_rows = tile.rows(), first_row = segments_[own.segment].row + own.from - segments_[own.segment].from;
      const Partial found{totals, totals + tile_rows, totals + 2 * tile_rows};
      const auto each_row = [&](const auto& take) {
        for (int64_t r = 0; r < tile_rows; ++r)
          take(Partial{found.most + r, found.total + r, found.out + r * n.head_size}, partial(first_row + r / shared, head * shared + r % shared, split));
      };
      each_row([](const Partial&, const Partial& into) { into.total[0] = 0.0f; });
      const int64_t begin = tile.begin() / kChunk, end = over(tile.end(), kChunk), last = splits_ > 1 ? std::min(end, split + 1) : end;
      for (int64_t c = splits_ > 1 ? std::max(begin, split) : begin; c < last; ++c) {
        kernels().decoder.attend(tile, c, found, memory);
        each_row([&](const Partial& from, const Partial& into) { kernels().decoder.merge(from, into, n.head_size); });
      }
    }
  });
}

// What attention gives for a row, from the partials of its heads: the input of the output projection.
void Run::merge_row(const Block& block, int64_t row) {
  const Numbers& n = block.numbers;
  float* const to = scratch_->input + row * n.queries();
  for (int64_t h = 0; h < n.heads; ++h) {
    const Partial all = partial(row, h, 0);
    for (int64_t split = 1; split < splits_; ++split) kernels().decoder.merge(partial(row, h, split), all, n.head_size);
    const float scale = 1.0f / all.total[0];
    for (int64_t k = 0; k < n.head_size; ++k) to[h * n.head_size + k] = all.total[0] == 0.0f ? 0.0f : all.out[k] * scale;
  }
}

// From the quantized rows of `input` to `output`.
void Run::mlp(Member& member, const Block& block, std::array<Group, kGroups>& groups) {
  float* const projections = scratch_->projected;
  multiply(member, groups[kGateUp], kGateUp, {projections, projections + block.inner}, 2 * block.inner);
  each_row(member, rows_, [&](int64_t row) {
    const float* const gate = projections + row * 2 * block.inner;
    kernels().decoder.gate(gate, gate + block.inner, scratch_->input + row * block.inner, block.inner, static_cast<Activation>(block.numbers.activation));
    if (!chooses_) groups[kDown].quantize(row, row + 1, faults_);
  });
  multiply(member, groups[kDown], kDown, {scratch_->output}, decoder_.width);
}

// From the rows of `input` to `output`, through the experts of each.
void Run::experts(Member& member, const Block& block) {
  const Numbers& n = block.numbers;
  const Generation& generation = *call_.pass.generation;
  const int64_t width = decoder_.width, inner = block.inner, routes = rows_ * n.top_k;
  float *const routed = scratch_->routed, *const projections = scratch_->projected;
  member.alone([&] {
    routes_.resize(static_cast<size_t>(routes));
    route_weights_.resize(static_cast<size_t>(routes));
  });
  member.part([&] { return Units{rows_}; }, [&](int64_t row, int64_t row_end) {
    std::vector<float> scores(static_cast<size_t>(n.experts));
    for (; row < row_end; ++row)
      route_row(block, scratch_->input + row * width, width, scores.data(), routes_.data() + row * n.top_k, route_weights_.data() + row * n.top_k);
  });
  const auto arrange = [&](bool down, int64_t stride) {
    mixture_.arrange(down, generation, chunk_pairs_, chooses_, routed, stride, scratch_->slots[down ? kDown : kGateUp]);
  };
  const auto multiplied = [&](bool down, int64_t stride) {
    member.part(
        [&] {
          products_.clear();
          mixture_.add_to(products_, down, projections, stride, threads_);
          return products_.units();
        },
        [&](int64_t begin, int64_t end) { products_.run(begin, end, faults_); });
  };
  // what is chosen is chosen by the inputs, once they are there
  const auto chosen = [&](bool down, int64_t stride) {
    if (!chooses_) return;
    member.alone([&] { arrange(down, stride); });
    each_row(member, routes, [&](int64_t route) { mixture_.quantize(down, route, faults_); });
  };
  member.alone([&] {
    mixture_.sort(block, generation, rows_, routes_);
    if (chooses_) return;
    arrange(false, width);
    arrange(true, inner);
  });
  each_row(member, routes, [&](int64_t route) {
    std::memcpy(routed + route * width, scratch_->input + mixture_.row_of(route) * width, static_cast<size_t>(width) * sizeof(float));
    if (!chooses_) mixture_.quantize(false, route, faults_);
  });
  chosen(false, width);
  multiplied(false, 2 * inner);
  each_row(member, routes, [&](int64_t route) {
    const float* const gate = projections + route * 2 * inner;
    kernels().decoder.gate(gate, gate + inner, routed + route * inner, inner, static_cast<Activation>(n.activation));
    if (!chooses_) mixture_.quantize(true, route, faults_);
  });
  chosen(true, inner);
  multiplied(true, width);
  each_row(member, rows_, [&](int64_t row) {
    float* const to = scratch_->output + row * width;
    std::memset(to, 0, static_cast<size_t>(width) * sizeof(float));
    for (int64_t k = 0; k < n.top_k; ++k) {
      const float weight = route_weights_[static_cast<size_t>(row * n.top_k + k)];
      const float* const from = projections + mixture_.route_of(row, k, n.top_k) * width;
      for (int64_t i = 0; i < width; ++i) to[i] += weight * from[i];
    }
  });
}

}  // namespace
}  // namespace foveate
