// One call of a decoder: its rows, chunk by chunk, through all blocks, as parts of the work of one team of threads.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "decoder/blocks.h"
#include "decoder/group.h"
#include "decoder/mixture.h"
#include "decoder/packed.h"
#include "decoder/plan.h"
#include "decoder/scratch.h"
#include "team.h"

namespace foveate {
namespace {

constexpr int64_t kRowsAtOnce = 512;
constexpr int64_t kRoutesAtOnce = 2048;  // rows times the experts that each takes
constexpr int64_t kSplitRows = 16;    // rows of a chunk up to which chunks of cached positions are units of work
constexpr int64_t kTileQueries = 32;  // queries, times the heads that share keys, of one unit of attention

int64_t tile_queries(const Numbers& n) { return std::max<int64_t>(1, kTileQueries * n.kv_heads / n.heads); }

// Consecutive rows of x that are the newest positions of one sequence.
struct Sequence {
  int64_t row, length;
};

// Where the keys and values of a block are: sequence s, head h and position p at s * sequence + h * head + place * position
// elements, where place is p; or of pages, where places are listed.
struct BlockCache {
  Tensor keys, values;  // [B, heads, T, D], or pages [places, heads, D]
  int64_t past = 0;     // positions of them that are in use
  Packed packed;        // the positions before them
  const int64_t* ends = nullptr;   // of pages: [sequences + 1], where the places of each sequence are in `reads`
  const int64_t* reads = nullptr;  // the places of all positions of each sequence, the new ones included
  const int64_t* writes = nullptr; // the place of each row of x

  bool paged() const { return ends != nullptr; }
  int64_t past_of(int64_t sequence, int64_t length) const { return paged() ? ends[sequence + 1] - ends[sequence] - length : packed.positions + past; }
  static int64_t bytes(const Tensor& t, int64_t elements) { return elements * static_cast<int64_t>(t.element_size()); }
  // The first byte of a sequence's head; of pages that of the head alone.
  char* memory(const Tensor& t, int64_t sequence, int64_t head) const {
    const int64_t at = paged() ? head * t.stride(1) : sequence * t.stride(0) + head * t.stride(1);
    return static_cast<char*>(t.data_ptr()) + bytes(t, at);
  }
  int64_t stride(const Tensor& t) const { return t.stride(paged() ? 0 : 2); }
};

// What one call is given, checked.
struct Call {
  const std::shared_ptr<const Decoder>& decoder;
  const Pass& pass;
  Tensor x, out;                    // [.., H]
  at::IntArrayRef shape;            // of x without H, by which rows belong to the pass
  std::vector<Sequence> sequences;  // in the order of their rows
  bool together;                    // sequences of one length, of which each chunk takes the same positions
  std::vector<BlockCache> caches;   // of each block
  const float *cosine, *sine;       // [tables, angles, rotary size]
  int64_t angles;                   // of all rows of x, or of the positions of one sequence
  const int64_t* first;             // [sequences], or null

  int64_t width() const { return x.size(-1); }
  int64_t rows() const { return x.numel() / width(); }
};

class Run {
 public:
  explicit Run(const Call& call) : call_(call), decoder_(*call.decoder), threads_(at::get_num_threads()), plan_(Plan::of_thread()) {
    const int64_t sequences = static_cast<int64_t>(call.sequences.size());
    whole_ = call.together ? call.sequences[0].length : call.rows();
    step_ = std::min(whole_, call.together ? std::max<int64_t>(1, kRowsAtOnce / sequences) : kRowsAtOnce);
    if (decoder_.most_top_k) step_ = std::max<int64_t>(1, std::min(step_, kRoutesAtOnce / decoder_.most_top_k / (call.together ? sequences : 1)));
    most_rows_ = call.together ? step_ * sequences : step_;
    if (most_rows_ <= kSplitRows)
      for (const BlockCache& cache : call.caches)
        for (int64_t s = 0; s < sequences; ++s) {
          const int64_t length = call.sequences[static_cast<size_t>(s)].length;
          splits_ = std::max(splits_, over(cache.past_of(s, length) + length, kChunk));
        }
    row_maps(call.pass, call.shape, call.rows(), std::nullopt, pairs_);
    chooses_ = differ(pairs_);
    plan_.read(call.decoder, call.pass.generation);
    if (plan_.slot_rows != most_rows_) {
      std::fill_n(plan_.slot_bytes, kGroups, 0);
      for (size_t b = 0; b < plan_.groups.size(); ++b) {
        const Block& block = decoder_.blocks[b];
        for (int g = 0; g < kGroups; ++g) {
          const bool routed = block.numbers.experts && g >= kGateUp;
          const int64_t most = routed ? Mixture::most_bytes(block, most_rows_) : plan_.groups[b][static_cast<size_t>(g)].most_bytes(most_rows_);
          plan_.slot_bytes[g] = std::max(plan_.slot_bytes[g], most);
        }
      }
      plan_.slot_rows = most_rows_;
    }
    for (const Block& block : decoder_.blocks) {
      block.check_router(decoder_.width);
      const int64_t rows = std::min(tile_queries(block.numbers), step_) * block.numbers.shared();
      thread_floats_ = std::max(thread_floats_, attend_scratch(rows, block.numbers.head_size) + rows * (2 + block.numbers.head_size));
    }
    scratch_.emplace(decoder_, most_rows_, splits_, plan_.slot_bytes, thread_floats_, threads_);
  }

  void run() {
    for (int64_t begin = 0; begin < whole_; begin += step_) {
      prepare(begin, std::min(whole_, begin + step_));
      run_team(true, [&](Member& member) { chunk(member); });
      faults_.raise();
    }
  }

 private:
  // Rows of a chunk that belong to one sequence: positions from..until of those that are new in it.
  struct Segment {
    int64_t sequence, from, until, row;
  };
  struct Tile {
    size_t segment;
    int64_t from, until;
  };

  const Segment& segment_of(int64_t row) const { return segments_[segment_of_row_[static_cast<size_t>(row)]]; }
  int64_t row_of_x(int64_t row) const {
    const Segment& s = segment_of(row);
    return call_.sequences[static_cast<size_t>(s.sequence)].row + s.from + row - s.row;
  }
  const float* angle(const float* table, const Block& block, int64_t row) const {
    const Segment& s = segment_of(row);
    const int64_t at = call_.angles == call_.rows() ? row_of_x(row) : s.from + row - s.row;
    return table + (block.numbers.rotary_table * call_.angles + at) * decoder_.rotary_size;
  }
  static int64_t projected(const Numbers& n) { return n.queries() + 2 * n.keys(); }
  InputRows input_rows(int64_t columns) const { return {scratch_->input, columns, columns, nullptr, nullptr, Type::kFloat32}; }
  Partial partial(int64_t row, int64_t head, int64_t split) const {
    const int64_t at = (row * decoder_.most_heads + head) * splits_ + split;
    return {scratch_->totals + 2 * at, scratch_->totals + 2 * at + 1, scratch_->weighed + at * decoder_.most_head_size};
  }

  // Before the team begins with a chunk of rows.
  void prepare(int64_t begin, int64_t end);
  // All blocks of a chunk, as one thread of a team goes through them.
  void chunk(Member& member);
  void multiply(Member& member, Group& group, int g, const std::array<float*, 3>& to, int64_t stride);
  void add_output(const Block& block, NormSlot norm, int64_t row);
  void position_row(const Block& block, const BlockCache& cache, int64_t row);
  QueryTile tile_of(const Block& block, const BlockCache& cache, const Tile& tile, int64_t head) const;
  void attention(Member& member, const Block& block, const BlockCache& cache);
  void mlp(Member& member, const Block& block, std::array<Group, kGroups>& groups);
  void experts(Member& member, const Block& block);
  template <class Each>
  void each_row(Member& member, int64_t count, const Each& run) {
    member.part([&] { return Units{count}; }, [&](int64_t row, int64_t row_end) {
      for (; row < row_end; ++row) run(row);
    });
  }
  void merge_row(const Block& block, int64_t row);

  const Call& call_;
  const Decoder& decoder_;
  const int64_t threads_;
  int64_t whole_ = 0, step_ = 0, most_rows_ = 0, splits_ = 1, thread_floats_ = 0;
  std::optional<Scratch> scratch_;
  Plan& plan_;
  std::vector<uint8_t> pairs_, chunk_pairs_;
  std::vector<std::vector<uint8_t>> decided_;  // of each weight of a group, the maps of the rows
  bool chooses_ = false;
  int64_t rows_ = 0;
  std::vector<Segment> segments_;
  std::vector<size_t> segment_of_row_;
  Products products_;  // of experts
  Mixture mixture_;
  std::vector<int64_t> routes_;  // the experts of each row
  std::vector<float> route_weights_;
  Faults faults_;
};

void Run::prepare(int64_t begin, int64_t end) {
  segments_.clear();
  segment_of_row_.clear();
  rows_ = 0;
  for (size_t i = 0; i < call_.sequences.size(); ++i) {
    const Sequence& one = call_.sequences[i];
    const int64_t offset = call_.together ? 0 : one.row;
    const int64_t from = std::max<int64_t>(0, begin - offset), until = std::min(one.length, end - offset);
    if (from >= until) continue;
    segments_.push_back({static_cast<int64_t>(i), from, until, rows_});
    rows_ += until - from;
    segment_of_row_.resize(static_cast<size_t>(rows_), segments_.size() - 1);
  }
  chunk_pairs_.clear();
  if (!pairs_.empty())
    for (int64_t row = 0; row < rows_; ++row) chunk_pairs_.insert(chunk_pairs_.end(), pairs_.begin() + 2 * row_of_x(row), pairs_.begin() + 2 * row_of_x(row) + 2);
  Plan::Arranged now;
  if (!chooses_) now = {rows_, most_rows_, threads_, scratch_->hidden, chunk_pairs_};
  if (!chooses_ && now == plan_.arranged) return;
  plan_.arranged = {};
  if (chooses_) return;  // then groups are arranged as their inputs are there
  const std::vector<std::vector<uint8_t>> maps{chosen_maps(chunk_pairs_)};
  for (size_t b = 0; b < plan_.groups.size(); ++b)
    for (size_t g = 0; g < (decoder_.blocks[b].numbers.experts ? kGateUp : kGroups); ++g) {
      Group& group = plan_.groups[b][g];
      group.arrange(maps, rows_, input_rows(group.columns()), scratch_->slots[g]);
    }
  plan_.arranged = std::move(now);
}

void Run::chunk(Member& member) {
  const DecoderKernels& isa = kernels().decoder;
  const int64_t width = decoder_.width, row_bytes = width * static_cast<int64_t>(call_.x.element_size());
  const Type type = type_of(call_.x);
  float *const hidden = scratch_->hidden, *const input = scratch_->input, *const projections = scratch_->projected;
  const auto quantize = [&](Group& group, int64_t row) {
    if (!chooses_) group.quantize(row, row + 1, faults_);
  };
  for (size_t number = 0; number < decoder_.blocks.size(); ++number) {
    const Block& block = decoder_.blocks[number];
    const BlockCache& cache = call_.caches[number];
    std::array<Group, kGroups>& groups = plan_.groups[number];
    const Numbers& n = block.numbers;
    each_row(member, rows_, [&](int64_t row) {
      if (number) add_output(decoder_.blocks[number - 1], kMlpOutputNorm, row);
      else isa.load(static_cast<const char*>(call_.x.const_data_ptr()) + row_of_x(row) * row_bytes, type, hidden + row * width, width);
      block.norms[kInputNorm].row(hidden + row * width, input + row * width, width);
      quantize(groups[kQkv], row);
    });
    multiply(member, groups[kQkv], kQkv, {projections, projections + n.queries(), projections + n.queries() + n.keys()}, projected(n));
    each_row(member, rows_, [&](int64_t row) { position_row(block, cache, row); });
    attention(member, block, cache);
    each_row(member, rows_, [&](int64_t row) {
      merge_row(block, row);
      quantize(groups[kOutput], row);
    });
    multiply(member, groups[kOutput], kOutput, {scratch_->output}, width);
    each_row(member, rows_, [&](int64_t row) {
      add_output(block, kOutputNorm, row);
      block.norms[kMlpNorm].row(hidden + row * width, input + row * width, width);
      if (!n.experts) quantize(groups[kGateUp], row);
    });
    if (n.experts) experts(member, block);
    else mlp(member, block, groups);
  }
  each_row(member, rows_, [&](int64_t row) {
    add_output(decoder_.blocks.back(), kMlpOutputNorm, row);
    decoder_.last.row(hidden + row * width, input + row * width, width);
    isa.store(input + row * width, static_cast<char*>(call_.out.data_ptr()) + row_of_x(row) * row_bytes, type, width);
  });
}

}  // namespace
}  // namespace foveate
