// What the calls of a decoder prepare before their work, kept by each thread for its next call.
//
// Token after token the same weights are read from the same generation by the same number of rows. To look at them all
// again, a dozen tensors a weight, and to lay their inputs out again, takes as long as a tenth of a small model's token,
// the more since the weights that a token streams through the caches leave nothing of it there.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "decoder/blocks.h"
#include "decoder/group.h"

namespace foveate {
namespace {

struct Plan {
  // How rows were arranged last: so many of them, which read these maps, in memory that begins there.
  struct Arranged {
    int64_t rows = 0, most_rows = 0, threads = 0;
    const void* memory = nullptr;
    std::vector<uint8_t> pairs;
    bool operator==(const Arranged& other) const {
      return rows == other.rows && most_rows == other.most_rows && threads == other.threads && memory == other.memory && pairs == other.pairs;
    }
  };

  std::vector<std::array<Group, kGroups>> groups;  // of each block
  Arranged arranged;
  int64_t slot_rows = 0;  // for how many rows the bytes are that the groups' inputs take
  int64_t slot_bytes[kGroups] = {};

  static Plan& of_thread() {
    thread_local Plan plan;
    return plan;
  }

  // Reads the weights of all groups, unless they are those of the same decoder and generation, and lie where they lay.
  void read(const std::shared_ptr<const Decoder>& decoder, const std::shared_ptr<const Generation>& generation) {
    const bool in_place = decoder->is_in_place();
    if (in_place && is_same(decoder_, decoder) && is_same(generation_, generation)) return;
    decoder_.reset();  // until all is read
    groups.clear();
    groups.resize(decoder->blocks.size());
    arranged = {};
    slot_rows = 0;
    decoder->last.check();
    for (size_t b = 0; b < groups.size(); ++b) {
      const Block& block = decoder->blocks[b];
      for (const Norm& norm : block.norms) norm.check();
      for (int g = 0; g < (block.numbers.experts ? kGateUp : kGroups); ++g) groups[b][g].read(*block.groups[g], *generation, block.biases[g]);
    }
    if (!in_place) return;
    decoder_ = decoder;
    generation_ = generation;
  }

 private:
  template <class T>
  static bool is_same(const std::weak_ptr<T>& kept, const std::shared_ptr<T>& now) {
    return !kept.owner_before(now) && !now.owner_before(kept);
  }

  // neither is kept alive: where it is gone, what was read is never used again
  std::weak_ptr<const Decoder> decoder_;
  std::weak_ptr<const Generation> generation_;
};

}  // namespace
}  // namespace foveate
