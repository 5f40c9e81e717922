// The torch side of the kernels on saved tensors: checks, memory, threads. Schemas are in kernels/saved/ops.py, meanings
// in kernels/saved/reference.py.

#include "saved/saved.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <mutex>
#include <tuple>
#include <vector>

#include "checks.h"
#include "simd/kernels.h"
#include "work_queue.h"

namespace foveate {
namespace {

using at::Tensor;

constexpr int64_t kPieceGroups = 32;      // the smallest piece of a thread: it streams
constexpr int64_t kPieceBlocks = 512;
constexpr int64_t kChunk = 1 << 14;       // elements of a partial sum of moments
constexpr int64_t kStreamFrom = 8 << 20;  // bytes from which a tensor is written past the caches
constexpr int64_t kMaxElements = int64_t{1} << 56;  // their bits are still counted in int64

const SavedKernels& saved() { return *kernels().saved; }

void check_dense(const Tensor& x) {
  TORCH_CHECK(x.is_non_overlapping_and_dense(), "x of shape ", x.sizes(), " and strides ", x.strides(), " has gaps or overlaps in memory");
  check_memory(x, "x");
}

// A number of elements that the caller says, before anything is computed of it.
void check_count(int64_t n) { TORCH_CHECK(n >= 0 && n <= kMaxElements, "n (=", n, ") is not in 0..", kMaxElements); }

Type float_type(const Tensor& x) {
  check_dense(x);
  switch (x.scalar_type()) {
    case at::kFloat: return Type::kFloat32;
    case at::kBFloat16: return Type::kBFloat16;
    case at::kHalf: return Type::kFloat16;
    default: TORCH_CHECK(false, "x has dtype (=", x.scalar_type(), "), not float32, bfloat16 or float16");
  }
}

float limit_of(Type type) {
  if (type == Type::kFloat16) return 65504.0f;
  return type == Type::kBFloat16 ? 0x1.FEp127f : std::numeric_limits<float>::max();
}

void check_group(at::IntArrayRef bits, int64_t group) {
  for (const int64_t each : bits) TORCH_CHECK(each == 2 || each == 4 || each == 8 || each == 16, "bits (=", each, ") is not one of 2, 4, 8, 16");
  TORCH_CHECK(group >= kBlock && group <= kLargestGroup && group % kBlock == 0, "group (=", group, ") is not a multiple of ", kBlock, " from ",
              kBlock, " to ", kLargestGroup);
}

Tensor new_empty(const Tensor& like, at::IntArrayRef shape, at::ScalarType type) { return at::empty(shape, like.options().dtype(type)); }

std::tuple<Tensor, Tensor> group_pack(const Tensor& x, int64_t bits, int64_t group, std::optional<int64_t> seed) {
  check_group({bits}, group);
  const Type type = float_type(x);
  const int64_t n = x.numel(), groups = over(n, group);
  Tensor codes = new_empty(x, {groups * group * bits / 8}, at::kByte);
  Tensor ranges = new_empty(x, {groups, 2}, at::kBFloat16);
  const Packing packing{x.const_data_ptr(), type, n, static_cast<int>(bits), static_cast<int>(group), limit_of(type), seed.has_value(),
                        static_cast<uint64_t>(seed.value_or(0)), codes.data_ptr<uint8_t>(), static_cast<uint16_t*>(ranges.data_ptr())};
  const auto run = saved().pack;
  share(groups, kPieceGroups, worth_threads(n), [&](int64_t begin, int64_t end) { run(packing, begin, end); });
  return {codes, ranges};
}

Tensor group_unpack(const Tensor& codes, const Tensor& ranges, int64_t bits, int64_t group, int64_t n, at::ScalarType dtype) {
  check_group({bits}, group);
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "dtype (=", dtype, ") is not float32, bfloat16 or float16");
  check_count(n);
  const int64_t groups = over(n, group), bytes = groups * group * bits / 8;
  TORCH_CHECK(codes.sizes() == at::IntArrayRef{bytes} && ranges.sizes() == at::IntArrayRef({groups, 2}) &&
                  codes.scalar_type() == at::kByte && ranges.scalar_type() == at::kBFloat16 && codes.is_contiguous() && ranges.is_contiguous(),
              "codes ", codes.sizes(), " and ranges ", ranges.sizes(), " are not those of n (=", n, ") elements in groups of ", group, " with ",
              bits, " bits, uint8 [", bytes, "] and bfloat16 [", groups, ", 2]");
  check_memory(codes, "codes");
  check_memory(ranges, "ranges");
  Tensor out = new_empty(codes, {n}, dtype);
  const Type type = dtype == at::kFloat ? Type::kFloat32 : dtype == at::kHalf ? Type::kFloat16 : Type::kBFloat16;
  const bool stream = type == Type::kFloat32 && n * 4 >= kStreamFrom && reinterpret_cast<uintptr_t>(out.data_ptr()) % 64 == 0;
  const Unpacking unpacking{codes.const_data_ptr<uint8_t>(), static_cast<const uint16_t*>(ranges.const_data_ptr()), n, static_cast<int>(bits),
                            static_cast<int>(group), type, out.data_ptr(), stream};
  const auto run = saved().unpack;
  share(groups, kPieceGroups, worth_threads(n), [&](int64_t begin, int64_t end) { run(unpacking, begin, end); });
  return out;
}

Tensor group_variance(const Tensor& x, at::IntArrayRef bits, int64_t group) {
  check_group(bits, group);
  const Type type = float_type(x);
  const int64_t n = x.numel(), groups = over(n, group), levels = static_cast<int64_t>(bits.size());
  Tensor out = new_empty(x, {levels, groups}, at::kFloat);
  const Variance variance{x.const_data_ptr(), type, n, static_cast<int>(group), limit_of(type), bits.data(), levels, out.data_ptr<float>()};
  const auto run = saved().variance;
  share(groups, kPieceGroups, worth_threads(n), [&](int64_t begin, int64_t end) { run(variance, begin, end); });
  return out;
}

Tensor mask_pack(const Tensor& x, double threshold) {
  TORCH_CHECK(at::isFloatingType(x.scalar_type()) || x.scalar_type() == at::kBool, "x has dtype (=", x.scalar_type(), "), not a float or bool");
  const at::ScalarType dtype = x.scalar_type();
  // other floats are compared as float32 or float64, by way of a copy
  const bool direct = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  if (!direct) {
    check_dense(x);
    const Tensor above = dtype == at::kDouble ? x.gt(threshold) : x.to(at::kFloat).gt(threshold);
    return mask_pack(above.to(at::kHalf), 0.5);
  }
  const Type type = float_type(x);
  const int64_t n = x.numel();
  Tensor bits = new_empty(x, {over(n, 8)}, at::kByte);
  const auto run = saved().mask;
  share(over(n, kBlock), kPieceBlocks, worth_threads(n), [&](int64_t begin, int64_t end) {
    run(x.const_data_ptr(), type, n, static_cast<float>(threshold), bits.data_ptr<uint8_t>(), begin, end);
  });
  return bits;
}

uint64_t element(const void* x, int64_t bytes, int64_t i) {
  uint64_t word = 0;
  std::memcpy(&word, static_cast<const char*>(x) + i * bytes, static_cast<size_t>(bytes));
  return word;
}

void check_bytes(const Tensor& x) {
  const int64_t bytes = x.element_size();
  TORCH_CHECK(bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8, "x has dtype (=", x.scalar_type(), "), whose elements are not 1, 2, 4 or 8 bytes");
}

std::tuple<Tensor, Tensor> two_values_pack(const Tensor& x) {
  check_bytes(x);
  check_dense(x);
  const int64_t n = x.numel(), bytes = x.element_size();
  const std::tuple<Tensor, Tensor> third_value{new_empty(x, {0}, at::kByte), new_empty(x, {0}, x.scalar_type())};
  if (n == 0) return third_value;
  const void* const data = x.const_data_ptr();
  const uint64_t first = element(data, bytes, 0);
  int64_t place = 1;
  while (place < n && element(data, bytes, place) == first) ++place;
  const uint64_t second = place < n ? element(data, bytes, place) : first;
  for (int64_t i = place; i < std::min(n, place + kBlock); ++i)  // most tensors end here, and no memory was asked for
    if (const uint64_t third = element(data, bytes, i); third != first && third != second) return third_value;
  Tensor bits = new_empty(x, {over(n, 8)}, at::kByte);
  Tensor values = new_empty(x, {2}, x.scalar_type());
  const TwoValues two{data, static_cast<int>(bytes), n, first, second, bits.data_ptr<uint8_t>()};
  std::atomic<bool> no_third{true};
  const auto run = saved().two_values;
  share(over(n, kBlock), kPieceBlocks, worth_threads(n), [&](int64_t begin, int64_t end) {
    if (no_third.load(std::memory_order_relaxed) && !run(two, begin, end)) no_third.store(false, std::memory_order_relaxed);
  });
  if (!no_third) return third_value;
  std::memcpy(values.data_ptr(), &first, static_cast<size_t>(bytes));
  std::memcpy(static_cast<char*>(values.data_ptr()) + bytes, &second, static_cast<size_t>(bytes));
  return {bits, values};
}

Tensor mask_unpack(const Tensor& bits, const Tensor& values, int64_t n) {
  TORCH_CHECK(values.sizes() == at::IntArrayRef{2}, "values ", values.sizes(), " is not [2]");
  check_count(n);
  TORCH_CHECK(bits.sizes() == at::IntArrayRef{over(n, 8)} && bits.scalar_type() == at::kByte && bits.is_contiguous(), "bits ",
              bits.sizes(), " is not uint8 [", over(n, 8), "], one bit for each of n (=", n, ") elements");
  check_bytes(values);
  check_memory(bits, "bits");
  check_memory(values, "values");
  const Tensor pair = values.contiguous();
  const int64_t bytes = pair.element_size();
  Tensor out = new_empty(values, {n}, values.scalar_type());
  const Choosing choosing{bits.const_data_ptr<uint8_t>(), {element(pair.const_data_ptr(), bytes, 0), element(pair.const_data_ptr(), bytes, 1)},
                          static_cast<int>(bytes), n, out.data_ptr()};
  const auto run = saved().choose;
  share(over(n, kBlock), kPieceBlocks, worth_threads(n), [&](int64_t begin, int64_t end) { run(choosing, begin, end); });
  return out;
}

Integer integer_type(at::ScalarType type, const char* what) {
  switch (type) {
    case at::kBool:
    case at::kByte: return Integer::kUInt8;
    case at::kChar: return Integer::kInt8;
    case at::kShort: return Integer::kInt16;
    case at::kInt: return Integer::kInt32;
    case at::kLong: return Integer::kInt64;
    default: TORCH_CHECK(false, what, " (=", type, "), not an integer or bool");
  }
}

void check_narrow(int64_t bits) {
  TORCH_CHECK(bits == 1 || bits == 2 || bits == 4 || bits == 8 || bits == 16 || bits == 32, "bits (=", bits, ") is not one of 1, 2, 4, 8, 16, 32");
}

Tensor narrow_pack(const Tensor& x, int64_t bits, int64_t low) {
  check_narrow(bits);
  const Integer type = integer_type(x.scalar_type(), "x has dtype");
  check_dense(x);
  const int64_t n = x.numel();
  Tensor codes = new_empty(x, {over(n * bits, 8)}, at::kByte);
  const Narrowing narrowing{const_cast<void*>(x.const_data_ptr()), type, n, static_cast<int>(bits), low, codes.data_ptr<uint8_t>()};
  std::atomic<bool> inside{true};
  const auto run = saved().narrow;
  share(over(n, kBlock), kPieceBlocks, worth_threads(n), [&](int64_t begin, int64_t end) {
    if (!run(narrowing, begin, end)) inside.store(false, std::memory_order_relaxed);
  });
  int64_t maximum = 0;
  if (__builtin_add_overflow(low, (int64_t{1} << bits) - 1, &maximum)) maximum = std::numeric_limits<int64_t>::max();
  TORCH_CHECK(inside, "x has values outside ", low, "..", maximum, ", the integers that ", bits, " bits hold from low");
  return codes;
}

Tensor narrow_unpack(const Tensor& codes, int64_t bits, int64_t low, int64_t n, at::ScalarType dtype) {
  check_narrow(bits);
  const Integer type = integer_type(dtype, "dtype");
  check_count(n);
  TORCH_CHECK(codes.sizes() == at::IntArrayRef{over(n * bits, 8)} && codes.scalar_type() == at::kByte && codes.is_contiguous(), "codes ",
              codes.sizes(), " is not uint8 [", over(n * bits, 8), "], ", bits, " bits for each of n (=", n, ") elements");
  check_memory(codes, "codes");
  Tensor out = new_empty(codes, {n}, dtype);
  const Narrowing widening{out.data_ptr(), type, n, static_cast<int>(bits), low, const_cast<uint8_t*>(codes.const_data_ptr<uint8_t>())};
  const auto run = saved().widen;
  share(over(n, kBlock), kPieceBlocks, worth_threads(n), [&](int64_t begin, int64_t end) { run(widening, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> moments(const Tensor& x, int64_t bins) {
  const Type type = float_type(x);
  TORCH_CHECK(bins >= 1, "bins (=", bins, ") is not at least 1");
  const int64_t n = x.numel(), chunks = over(n, kChunk);
  const void* const data = x.const_data_ptr();
  Tensor result = at::empty({7}, x.options().dtype(at::kDouble));
  Tensor histogram = at::zeros({bins}, x.options().dtype(at::kLong));
  const SavedKernels& run = saved();
  std::vector<Moments> parts(static_cast<size_t>(chunks));
  share(chunks, 1, worth_threads(n), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) parts[static_cast<size_t>(c)] = run.moments(data, type, c * kChunk, std::min(n, (c + 1) * kChunk));
  });
  Moments all{0, 0, 0, 0.0, std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()};
  for (const Moments& part : parts) {
    all.finite += part.finite;
    all.zeros += part.zeros;
    all.not_finite += part.not_finite;
    all.sum += part.sum;
    all.minimum = std::min(all.minimum, part.minimum);
    all.maximum = std::max(all.maximum, part.maximum);
  }
  const double none = std::numeric_limits<double>::quiet_NaN();
  const double mean = all.finite ? all.sum / static_cast<double>(all.finite) : none;
  double squares = 0.0;
  if (all.finite) {
    const double per_unit = all.maximum > all.minimum ? static_cast<double>(bins) / (all.maximum - all.minimum) : 0.0;
    std::vector<double> spreads(static_cast<size_t>(chunks));
    std::mutex turn;
    share(chunks, 1, worth_threads(n), [&](int64_t begin, int64_t end) {
      std::vector<int64_t> own(static_cast<size_t>(bins));
      for (int64_t c = begin; c < end; ++c)
        spreads[static_cast<size_t>(c)] =
            run.spread(data, type, c * kChunk, std::min(n, (c + 1) * kChunk), mean, all.minimum, per_unit, bins, own.data());
      const std::lock_guard<std::mutex> lock(turn);
      int64_t* const to = histogram.data_ptr<int64_t>();
      for (int64_t i = 0; i < bins; ++i) to[i] += own[static_cast<size_t>(i)];
    });
    for (const double part : spreads) squares += part;
  }
  const double values[7] = {static_cast<double>(all.finite), mean, squares, all.finite ? all.minimum + 0.0 : none, all.finite ? all.maximum + 0.0 : none,
                            static_cast<double>(all.zeros), static_cast<double>(all.not_finite)};
  std::memcpy(result.data_ptr<double>(), values, sizeof values);
  return {result, histogram};
}

}  // namespace
}  // namespace foveate

TORCH_LIBRARY_IMPL(foveate, CPU, m) {
  m.impl("group_pack", foveate::group_pack);
  m.impl("group_unpack", foveate::group_unpack);
  m.impl("group_variance", foveate::group_variance);
  m.impl("mask_pack", foveate::mask_pack);
  m.impl("two_values_pack", foveate::two_values_pack);
  m.impl("mask_unpack", foveate::mask_unpack);
  m.impl("narrow_pack", foveate::narrow_pack);
  m.impl("narrow_unpack", foveate::narrow_unpack);
  m.impl("moments", foveate::moments);
}
