// A decoder's blocks in one op: all its products, norms, rotary positions, attention and gates, by one team of threads.
//
// kernels/decoder/reference.py is the meaning of the ops. Rows are taken in chunks, so that a long prompt needs bounded
// memory. Within a chunk every step is a part of the team's work: over rows, over strips of weights, or over heads.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <memory>
#include <optional>
#include <vector>

#include "decoder/blocks.h"
#include "decoder/group.h"
#include "planes/number_table.h"
#include "team.h"

namespace foveate {
namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kRowsAtOnce = 512;
constexpr int64_t kTileQueries = 32;  // query rows, times the heads that share keys, of one unit of attention

// The decoder that a handle stands for.
std::shared_ptr<const Decoder> decoder_by(const Tensor& handle) {
  const int64_t number = number_in(handle, "a decoder's handle");
  const std::shared_ptr<const Decoder> found = NumberTable<const Decoder>::only().find(number);
  TORCH_CHECK(found, "decoder (=", number, ") stands for no decoder of this process: it is gone");
  return found;
}

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

int64_t tile_queries(const Numbers& n) { return std::max<int64_t>(1, kTileQueries * n.kv_heads / n.heads); }

// What one call is given, checked.
struct Call {
  const Decoder& decoder;
  const Pass& pass;
  Tensor x, out;  // [B, S, H]
  TensorList keys, values;
  const float *cosine, *sine;  // [tables, B or 1, S, rotary size]
  bool shared_positions;       // one sequence of positions for all of B
  const int64_t* first;        // [B], or null
  at::IntArrayRef past;        // of each block
  int64_t most_past;

  int64_t batch() const { return x.size(0); }
  int64_t length() const { return x.size(1); }
};

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
      totals = floats(2 * rows * decoder.most_heads * chunks);
      weighed = floats(rows * decoder.most_heads * chunks * decoder.most_head_size);
      for (int g = 0; g < kGroups; ++g) slots[g] = part(slot_bytes[g]);
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
  float* own;               // of each thread

 private:
  std::unique_ptr<char[]> memory_;
};

class Run {
 public:
  Run(const Call& call, int64_t rows_at_once)
      : call_(call),
        decoder_(call.decoder),
        chunks_(call.length() == 1 ? over(call.most_past + 1, kChunk) : 1),
        threads_(at::get_num_threads()),
        groups_(call.decoder.blocks.size()) {
    std::vector<uint8_t> pairs;
    row_maps(call.pass, call.x.sizes().slice(0, 2), call.batch() * call.length(), std::nullopt, pairs);
    chooses_ = differ(pairs);
    pairs_ = std::move(pairs);
    for (size_t b = 0; b < groups_.size(); ++b)
      for (int g = 0; g < kGroups; ++g) groups_[b][g].read(*decoder_.blocks[b].groups[g], *call.pass.generation, decoder_.blocks[b].biases[g]);
    int64_t slot_bytes[kGroups] = {};
    for (auto& block : groups_)
      for (int g = 0; g < kGroups; ++g) slot_bytes[g] = std::max(slot_bytes[g], block[g].most_bytes(call.batch() * rows_at_once));
    for (const Block& block : decoder_.blocks) {
      const Numbers& n = block.numbers;
      const int64_t most = std::min(tile_queries(n), rows_at_once) * (n.heads / n.kv_heads);
      thread_floats_ = std::max(thread_floats_, attend_scratch(most, n.head_size) + most * (2 + n.head_size));
    }
    scratch_.emplace(decoder_, call.batch() * rows_at_once, chunks_, slot_bytes, thread_floats_, threads_);
  }

  // Rows [begin, end) of each sequence, by one thread of a team.
  void chunk(Team& team, int64_t thread, int64_t begin, int64_t end);
  // Before the team begins with a chunk.
  void prepare(int64_t begin, int64_t end);
  void raise() const { faults_.raise(); }

 private:
  int64_t rows() const { return call_.batch() * (end_ - begin_); }
  const float* angles(const float* table, const Block& block, int64_t row) const {
    const int64_t s = row % (end_ - begin_) + begin_, b = call_.shared_positions ? 0 : row / (end_ - begin_);
    const int64_t tables_rows = (call_.shared_positions ? 1 : call_.batch()) * call_.length();
    return table + ((block.numbers.rotary_table * tables_rows) + b * call_.length() + s) * decoder_.rotary_size;
  }
  static int64_t projected(const Numbers& n) { return n.queries() + 2 * n.keys(); }
  // What the rows of a group's input are, for its products.
  InputRows input_rows(int64_t columns) const { return {scratch_->input, columns, columns, nullptr, nullptr, Type::kFloat32}; }
  void products(Team& team, int64_t thread, Group& group, int g, const std::array<float*, 3>& to, int64_t stride);
  void attention(Team& team, int64_t thread, const Block& block, size_t number);
  void add_output(const Block& block, const float* from, NormSlot norm, int64_t row);
  void position_row(const Block& block, size_t number, int64_t row);
  void merge_row(const Block& block, int64_t row);
  QueryTile tile_of(const Block& block, size_t number, int64_t sequence, int64_t head, int64_t from, int64_t until) const;
  Partial partial(int64_t row, int64_t head, int64_t chunk) const {
    const int64_t at = (row * decoder_.most_heads + head) * chunks_ + chunk;
    return {scratch_->totals + 2 * at, scratch_->totals + 2 * at + 1, scratch_->weighed + at * decoder_.most_head_size};
  }

  const Call& call_;
  const Decoder& decoder_;
  const int64_t chunks_;
  const int64_t threads_;
  int64_t thread_floats_ = 0;
  std::optional<Scratch> scratch_;
  std::vector<std::array<Group, kGroups>> groups_;
  std::vector<uint8_t> pairs_, chunk_pairs_;
  bool chooses_ = false;
  int64_t begin_ = 0, end_ = 0;
  Faults faults_;
};

void Run::prepare(int64_t begin, int64_t end) {
  begin_ = begin;
  end_ = end;
  chunk_pairs_.clear();
  if (!pairs_.empty())
    for (int64_t b = 0; b < call_.batch(); ++b)
      chunk_pairs_.insert(chunk_pairs_.end(), pairs_.begin() + 2 * (b * call_.length() + begin), pairs_.begin() + 2 * (b * call_.length() + end));
  if (chooses_) return;
  const std::vector<uint8_t> maps = chosen_maps(chunk_pairs_);
  for (auto& block : groups_)
    for (int g = 0; g < kGroups; ++g) block[g].arrange({maps}, rows(), input_rows(block[g].columns()), scratch_->slots[g]);
}

// The products of a group with the rows of its input, which are in `input`, and quantized where nothing is to be chosen.
void Run::products(Team& team, int64_t thread, Group& group, int g, const std::array<float*, 3>& to, int64_t stride) {
  if (chooses_) {
    team.part(thread, 1, 1, [&](int64_t, int64_t) {
      const Tensor x = at::from_blob(scratch_->input, {rows(), group.columns()}, at::kFloat);
      group.arrange(group.decide(*call_.pass.generation, x, chunk_pairs_), rows(), input_rows(group.columns()), scratch_->slots[g]);
    });
    team.part(thread, rows(), 1, [&](int64_t row, int64_t row_end) { group.quantize(row, row_end, faults_); });
  }
  group.multiply(team, thread, to.data(), stride, threads_, faults_);
}

// hidden += what a group of a block has put out, which some decoders norm first.
void Run::add_output(const Block& block, const float* from, NormSlot norm, int64_t row) {
  const int64_t width = decoder_.width;
  float* const hidden = scratch_->hidden + row * width;
  const float* output = from + row * width;
  if (block.norms[norm].kind != NormKind::kNone) {
    float* const normed = scratch_->input + row * width;
    block.norms[norm].row(output, normed, width);
    output = normed;
  }
  const float scale = static_cast<float>(block.constants.residual);
  for (int64_t k = 0; k < width; ++k) hidden[k] += scale * output[k];
}

// Norms and turns the queries and keys of a row, and stores its keys and values.
void Run::position_row(const Block& block, size_t number, int64_t row) {
  const Numbers& n = block.numbers;
  const DecoderKernels& isa = kernels().decoder;
  float* const queries = scratch_->projected + row * projected(n);
  float *const keys = queries + n.queries(), *const values = keys + n.keys();
  const int64_t b = row / (end_ - begin_), position = call_.past[number] + begin_ + row % (end_ - begin_);
  const auto ready = [&](float* heads, int64_t count, NormSlot norm) {
    if (block.norms[norm].kind != NormKind::kNone) {
      const int64_t each = n.whole_norms ? count * n.head_size : n.head_size;
      for (int64_t k = 0; k < count * n.head_size; k += each) block.norms[norm].row(heads + k, heads + k, each);
    }
    if (n.rotary_size)
      for (int64_t h = 0; h < count; ++h)
        isa.rotate(heads + h * n.head_size, angles(call_.cosine, block, row), angles(call_.sine, block, row), n.rotary_size);
  };
  ready(queries, n.heads, kQueryNorm);
  ready(keys, n.kv_heads, kKeyNorm);
  for (int64_t k = 0; k < n.queries(); ++k) queries[k] *= static_cast<float>(block.constants.scale);
  const auto append = [&](const Tensor& cache, const float* from) {
    char* const memory = static_cast<char*>(cache.data_ptr());
    for (int64_t h = 0; h < n.kv_heads; ++h) {
      const int64_t at = b * cache.stride(0) + h * cache.stride(1) + position * cache.stride(2);
      isa.store(from + h * n.head_size, memory + at * static_cast<int64_t>(cache.element_size()), type_of(cache), n.head_size);
    }
  };
  append(call_.keys[number], keys);
  append(call_.values[number], values);
}

QueryTile Run::tile_of(const Block& block, size_t number, int64_t sequence, int64_t head, int64_t from, int64_t until) const {
  const Numbers& n = block.numbers;
  const int64_t shared = n.heads / n.kv_heads, row = sequence * (end_ - begin_) + from - begin_;
  const auto memory = [&](const Tensor& cache) {
    return static_cast<const char*>(cache.const_data_ptr()) + (sequence * cache.stride(0) + head * cache.stride(1)) * static_cast<int64_t>(cache.element_size());
  };
  const Tensor &keys = call_.keys[number], &values = call_.values[number];
  QueryTile tile{};
  tile.queries = scratch_->projected + row * projected(n) + head * shared * n.head_size;
  tile.queries_stride = projected(n);
  tile.head_size = n.head_size;
  tile.queries_count = until - from;
  tile.heads = shared;
  tile.position = call_.past[number] + from;
  tile.first = call_.first ? call_.first[sequence] : 0;
  tile.window = n.window;
  tile.cap = static_cast<float>(block.constants.cap);
  tile.keys = memory(keys);
  tile.values = memory(values);
  tile.keys_stride = keys.stride(2);
  tile.values_stride = values.stride(2);
  tile.type = type_of(keys);
  return tile;
}

// Units are a head of a sequence and some of its queries; of one query a sequence, a head and a chunk of its positions.
void Run::attention(Team& team, int64_t thread, const Block& block, size_t number) {
  const Numbers& n = block.numbers;
  const int64_t shared = n.heads / n.kv_heads, queries = tile_queries(n), length = end_ - begin_;
  const int64_t tiles = over(length, queries), heads = call_.batch() * n.kv_heads;
  float* const memory = scratch_->own + thread * thread_floats_;
  team.part(thread, heads * tiles * chunks_, 1, [&](int64_t unit, int64_t unit_end) {
    float* const totals = memory + attend_scratch(std::min(queries, length) * shared, n.head_size);
    for (; unit < unit_end; ++unit) {
      // later tiles see more, and are taken first
      const int64_t chunk = unit % chunks_, head = unit / chunks_ % heads, tile_number = tiles - 1 - unit / chunks_ / heads;
      const int64_t from = begin_ + tile_number * queries, until = std::min(end_, from + queries);
      const QueryTile tile = tile_of(block, number, head / n.kv_heads, head % n.kv_heads, from, until);
      const int64_t rows = tile.rows(), first_row = head / n.kv_heads * length + from - begin_, first_head = head % n.kv_heads * shared;
      const Partial found{totals, totals + rows, totals + 2 * rows};
      const int64_t begin = tile.begin() / kChunk, end = over(tile.end(), kChunk);
      const auto each_row = [&](const auto& take) {
        for (int64_t r = 0; r < rows; ++r)
          take(Partial{found.most + r, found.total + r, found.out + r * n.head_size}, partial(first_row + r / shared, first_head + r % shared, chunk));
      };
      each_row([](const Partial&, const Partial& into) { into.total[0] = 0.0f; });
      const int64_t last = chunks_ > 1 ? std::min(end, chunk + 1) : end;
      for (int64_t c = chunks_ > 1 ? std::max(begin, chunk) : begin; c < last; ++c) {
        kernels().decoder.attend(tile, c, found, memory);
        each_row([&](const Partial& from_chunk, const Partial& into) { kernels().decoder.merge(from_chunk, into, n.head_size); });
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
    for (int64_t c = 1; c < chunks_; ++c) kernels().decoder.merge(partial(row, h, c), all, n.head_size);
    const float scale = all.total[0] == 0.0f ? 0.0f : 1.0f / all.total[0];
    for (int64_t k = 0; k < n.head_size; ++k) to[h * n.head_size + k] = all.total[0] == 0.0f ? 0.0f : all.out[k] * scale;
  }
}

void Run::chunk(Team& team, int64_t thread, int64_t begin, int64_t end) {
  const DecoderKernels& isa = kernels().decoder;
  const int64_t width = decoder_.width, length = end - begin;
  const Type type = type_of(call_.x);
  const int64_t bytes = static_cast<int64_t>(call_.x.element_size());
  const auto row_of_x = [&](int64_t row) { return (row / length * call_.length() + begin + row % length) * width * bytes; };
  float *const hidden = scratch_->hidden, *const input = scratch_->input, *const projections = scratch_->projected,
        *const output = scratch_->output;
  const auto each_row = [&](const auto& run) {
    team.part(thread, rows(), 1, [&](int64_t row, int64_t row_end) {
      for (; row < row_end; ++row) run(row);
    });
  };
  const auto quantize = [&](Group& group, int64_t row) {
    if (!chooses_) group.quantize(row, row + 1, faults_);
  };
  for (size_t number = 0; number < decoder_.blocks.size(); ++number) {
    const Block& block = decoder_.blocks[number];
    std::array<Group, kGroups>& groups = groups_[number];
    const Numbers& n = block.numbers;
    each_row([&](int64_t row) {
      if (number) add_output(decoder_.blocks[number - 1], output, kMlpOutputNorm, row);
      else isa.load(static_cast<const char*>(call_.x.const_data_ptr()) + row_of_x(row), type, hidden + row * width, width);
      block.norms[kInputNorm].row(hidden + row * width, input + row * width, width);
      quantize(groups[kQkv], row);
    });
    products(team, thread, groups[kQkv], kQkv, {projections, projections + n.queries(), projections + n.queries() + n.keys()}, projected(n));
    each_row([&](int64_t row) { position_row(block, number, row); });
    attention(team, thread, block, number);
    each_row([&](int64_t row) {
      merge_row(block, row);
      quantize(groups[kOutput], row);
    });
    products(team, thread, groups[kOutput], kOutput, {output}, width);
    each_row([&](int64_t row) {
      add_output(block, output, kOutputNorm, row);
      block.norms[kMlpNorm].row(hidden + row * width, input + row * width, width);
      quantize(groups[kGateUp], row);
    });
    products(team, thread, groups[kGateUp], kGateUp, {projections, projections + block.inner}, 2 * block.inner);
    each_row([&](int64_t row) {
      const float* const gate = projections + row * 2 * block.inner;
      isa.gate(gate, gate + block.inner, input + row * block.inner, block.inner, static_cast<Activation>(n.activation));
      quantize(groups[kDown], row);
    });
    products(team, thread, groups[kDown], kDown, {output}, width);
  }
  each_row([&](int64_t row) {
    if (!decoder_.blocks.empty()) add_output(decoder_.blocks.back(), output, kMlpOutputNorm, row);
    decoder_.last.row(hidden + row * width, input + row * width, width);
    isa.store(input + row * width, static_cast<char*>(call_.out.data_ptr()) + row_of_x(row), type, width);
  });
}

Tensor decoder_blocks(const Tensor& x, const Tensor& handle, const Tensor& book, TensorList keys, TensorList values, const Tensor& cosine,
                      const Tensor& sine, const std::optional<Tensor>& first, at::IntArrayRef past) {
  const std::shared_ptr<const Decoder> decoder = decoder_by(handle);
  const std::shared_ptr<const Pass> pass = pass_of(book);
  TORCH_CHECK(x.dim() == 3 && x.size(2) == decoder->width, "x has shape (=", x.sizes(), "), not [B, S, ", decoder->width, "]");
  type_of(x);
  check_vector(x, x.scalar_type(), "x");
  const int64_t batch = x.size(0), length = x.size(1);
  TORCH_CHECK(keys.size() == decoder->blocks.size() && values.size() == keys.size() && past.size() == keys.size(), "there are ", decoder->blocks.size(),
              " blocks, caches of ", keys.size(), " keys and ", values.size(), " values, and ", past.size(), " numbers of past positions");
  int64_t most_past = 0;
  for (const int64_t one : past) {
    TORCH_CHECK(one >= 0 && one < int64_t{1} << 40, "past (=", one, ") is not a number of positions");
    most_past = std::max(most_past, one);
  }
  for (size_t b = 0; b < keys.size(); ++b) {
    const Numbers& n = decoder->blocks[b].numbers;
    for (const Tensor& cache : {keys[b], values[b]}) {
      type_of(cache);
      TORCH_CHECK(cache.device().is_cpu() && cache.scalar_type() == keys[b].scalar_type() && cache.dim() == 4 && cache.size(0) == batch && cache.size(1) == n.kv_heads &&
                      cache.size(2) >= past[b] + length && cache.size(3) == n.head_size && cache.stride(3) == 1,
                  "the cache of block ", b, " has shape (=", cache.sizes(), "), not [", batch, ", ", n.kv_heads, ", ", past[b] + length, " or more, ",
                  n.head_size, "]");
      check_memory(cache, "a cache");
    }
  }
  check_vector(cosine, at::kFloat, "cosine");
  check_vector(sine, at::kFloat, "sine");
  TORCH_CHECK(cosine.sizes() == sine.sizes() && cosine.dim() == 4 && cosine.size(0) == decoder->rotary_tables && cosine.size(2) == length &&
                  (cosine.size(1) == 1 || cosine.size(1) == batch) && cosine.size(3) == decoder->rotary_size,
              "cosine and sine have shapes (=", cosine.sizes(), ", ", sine.sizes(), "), not [", decoder->rotary_tables, ", 1 or ", batch, ", ", length,
              ", ", decoder->rotary_size, "]");
  if (first) {
    check_vector(*first, at::kLong, "first");
    TORCH_CHECK(first->numel() == batch, "first has ", first->numel(), " values, not ", batch);
    for (int64_t b = 0; b < batch; ++b)
      TORCH_CHECK(first->const_data_ptr<int64_t>()[b] >= 0, "first (=", first->const_data_ptr<int64_t>()[b], ") is not a position");
  }
  const Call call{*decoder, *pass, x, at::empty_like(x), keys, values, cosine.const_data_ptr<float>(), sine.const_data_ptr<float>(),
                  cosine.size(1) == 1, first ? first->const_data_ptr<int64_t>() : nullptr, past, most_past};
  if (x.numel() == 0) return call.out;
  const int64_t at_once = std::min(length, std::max<int64_t>(1, kRowsAtOnce / batch));
  Run run(call, at_once);
  for (int64_t begin = 0; begin < length; begin += at_once) {
    const int64_t end = std::min(length, begin + at_once);
    run.prepare(begin, end);
    run_team(true, [&](Team& team, int64_t thread) { run.chunk(team, thread, begin, end); });
    run.raise();
  }
  return call.out;
}

}  // namespace
}  // namespace foveate

TORCH_LIBRARY_IMPL(foveate, CPU, m) {
  m.impl("decoder_handle", foveate::decoder_handle);
  m.impl("decoder_blocks", foveate::decoder_blocks);
}
