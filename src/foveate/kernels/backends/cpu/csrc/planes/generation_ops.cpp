// The ops that publish generations, begin passes, and say what a pass reads (planes/generations.h).

#include "planes/generations.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

namespace foveate {
namespace {

using at::Tensor;

// The pass over each book that is open in this thread.
std::unordered_map<int64_t, std::shared_ptr<const Pass>>& open_passes() {
  thread_local std::unordered_map<int64_t, std::shared_ptr<const Pass>> open;
  return open;
}

// The class of each row of this thread's next passes, for each book.
std::unordered_map<int64_t, std::vector<uint8_t>>& next_classes() {
  thread_local std::unordered_map<int64_t, std::vector<uint8_t>> next;
  return next;
}

std::shared_ptr<Book> book_of(const Tensor& book) {
  const int64_t number = number_in(book, "a book");
  const std::shared_ptr<Book> found = NumberTable<Book>::only().find(number);
  TORCH_CHECK(found, "book (=", number, ") stands for no model of this process: its model is gone");
  return found;
}

std::shared_ptr<Pass> begun(Book& book) {
  auto made = std::make_shared<Pass>();
  made->generation = book.current();
  TORCH_CHECK(made->generation, "no levels were published yet");
  return made;
}

Tensor generation_book(const Tensor&, at::IntArrayRef tiles, int64_t inputs) {
  TORCH_CHECK(inputs >= 0 && inputs < int64_t{1} << 32, "inputs (=", inputs, ") is not a number of inputs");
  std::vector<int64_t> begins{0};
  for (const int64_t count : tiles) {
    TORCH_CHECK(count >= 0 && count < int64_t{1} << 40 && begins.back() < int64_t{1} << 40, "tiles (=", count, ") is not a number of tiles");
    begins.push_back(begins.back() + count);
  }
  auto book = std::make_shared<Book>();
  book->tiles = std::make_shared<const std::vector<int64_t>>(std::move(begins));
  book->inputs = inputs;
  return NumberTable<Book>::only().hold(std::move(book));
}

// What `publish` is given for the pairs whose two maps differ, checked: none, or the six tensors that its schema names.
std::shared_ptr<const Choices> choices_in(at::TensorList parts, const Generation& of) {
  if (parts.empty()) return nullptr;
  TORCH_CHECK(parts.size() == 6, "choices are 6 tensors or none, not ", parts.size());
  const Tensor &pairs = parts[0], &thresholds = parts[1], &begins = parts[2], &strips = parts[3], &row_weights = parts[4], &counts = parts[5];
  check_vector(pairs, at::kByte, "pairs of choices");
  check_vector(thresholds, at::kFloat, "thresholds");
  check_vector(begins, at::kLong, "begins");
  check_vector(strips, at::kLong, "strips");
  check_vector(row_weights, at::kFloat, "row_weights");
  check_vector(counts, at::kLong, "counts");
  const int64_t count = pairs.dim() == 2 && pairs.size(1) == 2 ? pairs.size(0) : 0, weights = of.weights(), samples = strips.numel();
  TORCH_CHECK(count >= 1 && count <= kMaxMaps * kMaxMaps, "pairs of choices have shape (=", pairs.sizes(), "), not [1..", kMaxMaps * kMaxMaps, ", 2]");
  TORCH_CHECK(thresholds.dim() == 2 && thresholds.size(0) == count && thresholds.size(1) == weights, "thresholds have shape (=",
              thresholds.sizes(), "), not [", count, ", ", weights, "]");
  TORCH_CHECK(begins.dim() == 2 && begins.size(0) == count && begins.size(1) == weights + 1, "begins have shape (=", begins.sizes(),
              "), not [", count, ", ", weights + 1, "]");
  TORCH_CHECK(row_weights.dim() == 2 && row_weights.size(0) == samples && row_weights.size(1) == kTileRows, "row_weights have shape (=",
              row_weights.sizes(), "), not [", samples, ", ", kTileRows, "]");
  TORCH_CHECK(counts.dim() == 3 && counts.size(0) == count && counts.size(1) == weights && counts.size(2) == 2, "counts have shape (=",
              counts.sizes(), "), not [", count, ", ", weights, ", 2]");
  auto made = std::make_shared<Choices>();
  made->weights = weights;
  std::fill_n(made->of_pair, kMaxMaps * kMaxMaps, int8_t{-1});
  for (int64_t d = 0; d < count; ++d) {
    const uint8_t low = pairs.const_data_ptr<uint8_t>()[2 * d], high = pairs.const_data_ptr<uint8_t>()[2 * d + 1];
    TORCH_CHECK(low < of.maps && high < of.maps && low != high, "a choice is between maps (=", static_cast<int>(low), ", ", static_cast<int>(high),
                "), which are not two of ", of.maps);
    made->of_pair[kMaxMaps * low + high] = static_cast<int8_t>(d);
    const int64_t* begin = begins.const_data_ptr<int64_t>() + d * (weights + 1);
    for (int64_t w = 0; w <= weights; ++w)
      TORCH_CHECK(begin[w] >= (w ? begin[w - 1] : 0) && begin[w] <= samples, "begins (=", begin[w], ") do not rise from 0 to ", samples);
  }
  made->thresholds.assign(thresholds.const_data_ptr<float>(), thresholds.const_data_ptr<float>() + thresholds.numel());
  made->begins.assign(begins.const_data_ptr<int64_t>(), begins.const_data_ptr<int64_t>() + begins.numel());
  made->strips.assign(strips.const_data_ptr<int64_t>(), strips.const_data_ptr<int64_t>() + samples);
  made->row_weights.assign(row_weights.const_data_ptr<float>(), row_weights.const_data_ptr<float>() + row_weights.numel());
  made->counts = counts;
  return made;
}

int64_t publish(const Tensor& book, const Tensor& levels, const Tensor& input_levels, const Tensor& ranges, const Tensor& pairs,
                at::TensorList choices) {
  const std::shared_ptr<Book> into = book_of(book);
  check_vector(levels, at::kByte, "levels");
  check_vector(input_levels, at::kByte, "input_levels");
  check_vector(ranges, at::kFloat, "ranges");
  check_vector(pairs, at::kByte, "pairs");
  TORCH_CHECK(levels.dim() == 2 && levels.size(0) >= 1 && levels.size(0) <= kMaxMaps && levels.size(1) == into->tiles->back(),
              "levels have shape (=", levels.sizes(), "), not [1..", kMaxMaps, ", ", into->tiles->back(), "]");
  TORCH_CHECK(input_levels.dim() == 2 && input_levels.size(0) == levels.size(0) && input_levels.size(1) == into->inputs,
              "input_levels have shape (=", input_levels.sizes(), "), not [", levels.size(0), ", ", into->inputs, "]");
  TORCH_CHECK(ranges.numel() == 2 * into->inputs, "ranges have ", ranges.numel(), " values, not ", 2 * into->inputs);
  TORCH_CHECK(pairs.dim() == 2 && pairs.size(0) >= 1 && pairs.size(1) == 2, "pairs have shape (=", pairs.sizes(), "), not [classes, 2]");
  auto made = std::make_shared<Generation>();
  made->maps = levels.size(0);
  made->tiles = into->tiles;
  made->inputs = into->inputs;
  made->pairs.assign(pairs.const_data_ptr<uint8_t>(), pairs.const_data_ptr<uint8_t>() + pairs.numel());
  for (const uint8_t map : made->pairs)
    TORCH_CHECK(map < made->maps, "a class reads map (=", static_cast<int>(map), "), and there are ", made->maps);
  made->choices = choices_in(choices, *made);
  for (size_t c = 0; c < made->pairs.size(); c += 2)
    TORCH_CHECK(made->pairs[c] == made->pairs[c + 1] || (made->choices && made->choices->of_pair[kMaxMaps * made->pairs[c] + made->pairs[c + 1]] >= 0),
                "class ", c / 2, " reads one of maps ", static_cast<int>(made->pairs[c]), " and ", static_cast<int>(made->pairs[c + 1]),
                ", and no choice says which");
  const std::vector<int64_t>& begins = *into->tiles;
  made->levels.reset(new uint8_t[static_cast<size_t>(std::max<int64_t>(1, kMaxMaps * begins.back()))]);
  for (size_t w = 0; levels.numel() && w + 1 < begins.size(); ++w)
    for (int64_t map = 0; map < made->maps; ++map)
      std::copy(levels.const_data_ptr<uint8_t>() + map * begins.back() + begins[w], levels.const_data_ptr<uint8_t>() + map * begins.back() + begins[w + 1],
                made->levels.get() + kMaxMaps * begins[w] + map * (begins[w + 1] - begins[w]));
  made->input_levels.assign(static_cast<size_t>(kMaxMaps * into->inputs), 8);
  std::copy_n(input_levels.const_data_ptr<uint8_t>(), input_levels.numel(), made->input_levels.begin());
  for (const uint8_t level : made->input_levels)
    TORCH_CHECK(level == 4 || level == 8 || level == 16 || level == 32, "input level (=", static_cast<int>(level), ") is not one of 4, 8, 16, 32");
  made->ranges.assign(ranges.const_data_ptr<float>(), ranges.const_data_ptr<float>() + ranges.numel());
  std::shared_ptr<const Generation> replaced;  // freed after the lock
  const std::lock_guard<std::mutex> lock(into->mutex);
  const int64_t number = into->newest ? into->newest->number + 1 : 1;
  made->number = number;
  replaced = std::exchange(into->newest, std::move(made));
  return number;
}

void rows_of_passes(const Tensor& book, const std::optional<Tensor>& classes) {
  const int64_t number = number_in(book, "a book");
  if (!classes) {
    next_classes().erase(number);
    return;
  }
  check_vector(*classes, at::kByte, "classes");
  next_classes()[number].assign(classes->const_data_ptr<uint8_t>(), classes->const_data_ptr<uint8_t>() + classes->numel());
}

void begin_pass(const Tensor& book, int64_t length) {
  const int64_t number = number_in(book, "a book");
  const std::shared_ptr<Pass> made = begun(*book_of(book));
  TORCH_CHECK(length >= 0, "length (=", length, ") must not be negative");
  made->length = length;
  const auto classes = next_classes().find(number);
  if (classes != next_classes().end()) {
    made->classes = classes->second;
    const size_t known = made->generation->pairs.size() / 2;
    for (uint8_t& one : made->classes)
      if (one >= known) one = 0;  // its request was withdrawn meanwhile
    // rows that are alike need not be told apart, and what no row of x belongs to alone reads as they do
    std::vector<uint8_t>& of = made->classes;
    if (!of.empty() && std::all_of(of.begin(), of.end(), [&](uint8_t one) { return one == of[0]; })) {
      made->common = of[0];
      of.clear();
    }
  }
  open_passes()[number] = made;
}

void end_pass(const Tensor& book) { open_passes().erase(number_in(book, "a book")); }

// What a tensor that was made from a generation reads: it lives as long as that tensor.
template <class T>
Tensor part_of(const std::shared_ptr<const Generation>& generation, const T* data, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type) {
  return at::from_blob(const_cast<T*>(data), sizes, strides, [generation](void*) {}, type);
}

Tensor pass_levels(const Tensor& book, int64_t weight, int64_t strips, int64_t groups) {
  const std::shared_ptr<const Generation> read = pass_of(book)->generation;
  int64_t count = 0;
  TORCH_CHECK(strips >= 0 && groups >= 0 && !__builtin_mul_overflow(strips, groups, &count), "strips (=", strips, ") and groups (=", groups,
              ") are not those of a weight");
  return part_of(read, read->levels_of(weight, count), {kMaxMaps, strips, groups}, {count, groups, 1}, at::kByte);
}

std::tuple<Tensor, Tensor> pass_input(const Tensor& book, int64_t input) {
  const std::shared_ptr<const Generation> read = pass_of(book)->generation;
  TORCH_CHECK(input >= 0 && input < read->inputs, "input (=", input, ") is not one of ", read->inputs);
  Tensor levels = at::empty({kMaxMaps}, at::kByte);
  for (int64_t map = 0; map < kMaxMaps; ++map) levels.data_ptr<uint8_t>()[map] = read->input_levels[static_cast<size_t>(map * read->inputs + input)];
  return {levels, part_of(read, read->ranges.data() + 2 * input, {2}, {1}, at::kFloat)};
}

Tensor pass_rows(const Tensor& book, const Tensor& x, int64_t trailing, const std::optional<Tensor>& owners) {
  TORCH_CHECK(trailing >= 0 && trailing <= x.dim(), "trailing (=", trailing, ") is not a number of dimensions of x");
  int64_t count = 1;
  for (const int64_t size : x.sizes().slice(0, static_cast<size_t>(x.dim() - trailing))) count *= size;
  std::vector<uint8_t> pairs;
  Tensor out = at::zeros({count, 2}, at::kByte);
  if (row_maps(*pass_of(book), x.sizes().slice(0, static_cast<size_t>(x.dim() - trailing)), count, owners, pairs))
    std::copy(pairs.begin(), pairs.end(), out.data_ptr<uint8_t>());
  return out;
}

// The row of the pass that each of `count` tokens of it belongs to, or -1; empty where the rows of the pass are alike.
Tensor pass_owners(const Tensor& book, int64_t count) {
  const std::shared_ptr<const Pass> read = pass_of(book);
  const int64_t rows = static_cast<int64_t>(read->classes.size());
  TORCH_CHECK(count >= 0, "count (=", count, ") must not be negative");
  Tensor out = at::empty({rows ? count : 0}, at::kLong);
  const bool known = rows && (count == rows || count == rows * read->length);
  for (int64_t t = 0; t < out.numel(); ++t) out.data_ptr<int64_t>()[t] = known ? t / (count / rows) : -1;
  return out;
}

int64_t pass_generation(const Tensor& book) { return pass_of(book)->generation->number; }

}  // namespace

std::shared_ptr<const Pass> pass_of(const Tensor& book) {
  const std::shared_ptr<Book> found = book_of(book);
  const auto open = open_passes().find(number_in(book, "a book"));
  return open == open_passes().end() ? begun(*found) : open->second;
}

bool row_maps(const Pass& pass, at::IntArrayRef shape, int64_t count, const std::optional<Tensor>& owners, std::vector<uint8_t>& pairs) {
  const std::vector<uint8_t>& of_class = pass.generation->pairs;
  const int64_t rows = static_cast<int64_t>(pass.classes.size());
  if (rows == 0) {
    const uint8_t* const own = of_class.data() + 2 * pass.common;
    if (own[0] == 0 && own[1] == 0) return false;
    pairs.resize(static_cast<size_t>(2 * count));
    for (int64_t r = 0; r < count; ++r) std::copy_n(own, 2, pairs.begin() + 2 * r);
    return true;
  }
  const auto owner_of_all = [&](const auto& owner) {
    pairs.resize(static_cast<size_t>(2 * count));
    for (int64_t r = 0; r < count; ++r) {
      const int64_t one = owner(r);
      if (one < 0) pairs[static_cast<size_t>(2 * r)] = pairs[static_cast<size_t>(2 * r + 1)] = 0;
      else std::copy_n(of_class.begin() + 2 * pass.classes[static_cast<size_t>(one)], 2, pairs.begin() + 2 * r);
    }
    return true;
  };
  if (owners) {
    check_vector(*owners, at::kLong, "owners");
    TORCH_CHECK(owners->numel() == count, "owners has ", owners->numel(), " values, not one for each of ", count, " rows");
    const int64_t* data = owners->const_data_ptr<int64_t>();
    for (int64_t r = 0; r < count; ++r)
      TORCH_CHECK_INDEX(data[r] >= -1 && data[r] < rows, "owner (=", data[r], ") is not a row of the pass, 0..", rows - 1, ", nor -1");
    return owner_of_all([&](int64_t r) { return data[r]; });
  }
  if (count == rows || count == rows * pass.length || (shape.size() > 1 && shape[0] == rows)) {
    const int64_t each = std::max<int64_t>(1, count / rows);
    return owner_of_all([&](int64_t r) { return r / each; });
  }
  // these rows belong to several rows of the pass, or to none that is known: they read the best map in use, which is 0
  return false;
}

}  // namespace foveate

TORCH_LIBRARY_IMPL(foveate, CPU, m) {
  m.impl("generation_book", foveate::generation_book);
  m.impl("publish", foveate::publish);
  m.impl("rows_of_passes", foveate::rows_of_passes);
  m.impl("pass_owners", foveate::pass_owners);
  m.impl("begin_pass", foveate::begin_pass);
  m.impl("end_pass", foveate::end_pass);
  m.impl("pass_levels", foveate::pass_levels);
  m.impl("pass_input", foveate::pass_input);
  m.impl("pass_rows", foveate::pass_rows);
  m.impl("pass_generation", foveate::pass_generation);
}
