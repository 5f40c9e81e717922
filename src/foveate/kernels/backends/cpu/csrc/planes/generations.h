// Generations: all levels and ranges of one model, published at once, and passes that pin one.
//
// A writer composes the levels of up to 8 maps on its own and publishes them as a new generation, which is one exchange
// of a pointer. A generation never changes. A pass (one call of the outermost module) pins the newest generation when it
// begins, and all products of the pass read that one. Outside of any pass a product reads the newest. The memory of a
// generation is freed when it is not the newest and no pass, and no tensor that was made from it, needs it.
//
// Each row of x reads one map of the generation. A row belongs to a class, and the generation says for each class which
// pair of maps (low, high) its rows read; class 0 is that of rows for which nothing was asked.
//
// Where the two maps of a pair differ, the input decides, weight by weight (planes/choice.h); a generation then holds what
// that takes: sampled strips of each weight, the weights of their rows, and a threshold.
//
// Torch code knows the generations of a model by its book, a small tensor. `begin_pass` and `end_pass` say that they
// change it. So no compiler moves products, which take the book, to the other side of them, or drops one of them. Which
// pass is open is known for each thread.
#pragma once

#include "planes/number_table.h"
#include "planes/planes.h"

#include <atomic>
#include <vector>

namespace foveate {

// What the decisions between two maps take, for each of D pairs of maps and each weight of the model.
struct Choices {
  int64_t weights = 0;
  int8_t of_pair[kMaxMaps * kMaxMaps];  // the number of a pair (low, high) at kMaxMaps * low + high, or -1
  std::vector<float> thresholds;        // [D, weights]: the higher map is read where the estimated error is above
  std::vector<int64_t> begins;          // [D, weights + 1]: where the sampled strips of each weight begin
  std::vector<int64_t> strips;          // the sampled strips
  std::vector<float> row_weights;       // [strips, kTileRows]
  at::Tensor counts;                    // int64 [D, weights, 2]: rows that were decided, and those that read the higher map
};

struct Generation {
  int64_t number = 0;
  int64_t maps = 0, inputs = 0;
  std::shared_ptr<const std::vector<int64_t>> tiles;  // where each weight's tiles begin, and last how many there are
  std::unique_ptr<uint8_t[]> levels;  // for each weight [kMaxMaps, its tiles], of which the first `maps` are written
  std::vector<uint8_t> input_levels;  // [kMaxMaps, inputs]
  std::vector<float> ranges;          // [inputs, 2]: the least and the greatest; zeros: each row has its own scale
  std::vector<uint8_t> pairs;         // [classes, 2]: the maps, low and high, of each class of rows
  std::shared_ptr<const Choices> choices;  // null where no class has two maps

  int64_t weights() const { return static_cast<int64_t>(tiles->size()) - 1; }

  // The levels of weight number `weight`, which must have so many tiles.
  const uint8_t* levels_of(int64_t weight, int64_t count) const {
    TORCH_CHECK(weight >= 0 && weight < weights(), "weight (=", weight, ") is not one of the ", weights(), " of the pass's model");
    const int64_t first = (*tiles)[static_cast<size_t>(weight)], own = (*tiles)[static_cast<size_t>(weight) + 1] - first;
    TORCH_CHECK(own == count, "weight ", weight, " of the pass's model has ", own, " tiles, not ", count);
    return levels.get() + kMaxMaps * first;
  }
};

// Which generations a model has: the newest.
struct Book {
  static constexpr int64_t kFirstNumber = 0;

  std::mutex mutex;
  std::shared_ptr<const Generation> newest;
  std::shared_ptr<const std::vector<int64_t>> tiles;
  int64_t inputs = 0;

  std::shared_ptr<const Generation> current() {
    const std::lock_guard<std::mutex> lock(mutex);
    return newest;
  }
};

struct Pass {
  std::shared_ptr<const Generation> generation;
  std::vector<uint8_t> classes;  // of each row that the pass knows; empty: all are of class `common`
  uint8_t common = 0;
  int64_t length = 0;            // tokens of each such row, where the outermost module was given rows of tokens; else 0
};

// The pass over a book that is open in this thread; outside of any, one over the newest generation.
std::shared_ptr<const Pass> pass_of(const at::Tensor& book);

// The maps (low, high) of each of `count` rows of x, in `pairs` [count, 2]; false where all rows read map 0. `owners` says
// which row of the pass each row of x belongs to; without it that follows from the shape of x.
bool row_maps(const Pass& pass, at::IntArrayRef shape, int64_t count, const std::optional<at::Tensor>& owners, std::vector<uint8_t>& pairs);

}  // namespace foveate
