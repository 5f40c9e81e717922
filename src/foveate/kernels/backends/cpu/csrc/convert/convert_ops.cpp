// The torch side of what changes its form while it moves: checks, memory, threads. Schemas are in kernels/convert/ops.py,
// the meaning in kernels/convert/reference.py.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "checks.h"
#include "convert/convert.h"
#include "simd/kernels.h"
#include "work_queue.h"

namespace foveate {
namespace {

using at::Tensor;

constexpr int64_t kStripRows = 16, kPiece = 1 << 14;  // bytes that a thread takes at a time

void check_matrix(const Tensor& t, const char* name) {
  TORCH_CHECK(t.device().is_cpu(), name, " is on device (=", t.device(), "), not the CPU");
  TORCH_CHECK(t.dim() == 2 && t.is_contiguous(), name, " of shape (=", t.sizes(), ") is not contiguous [N, K]");
  check_memory(t, name);
}

void check_tiles(int64_t rows, int64_t columns, int64_t group) {
  TORCH_CHECK(group == 32 || group == 64 || group == 128, "group (=", group, ") is not 32, 64 or 128");
  TORCH_CHECK(rows % kStripRows == 0 && columns % group == 0, rows, " rows of ", columns, " inputs are not whole tiles of 16 x ", group);
}

// Whether it can be read by words. Bytes that were cut out of others need not be.
bool is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % sizeof(uint32_t) == 0; }

bool is_bfloat(const Tensor& w) {
  TORCH_CHECK(w.scalar_type() == at::kHalf || w.scalar_type() == at::kBFloat16, "dtype (=", w.scalar_type(), ") is not float16 or bfloat16");
  return w.scalar_type() == at::kBFloat16;
}

const uint16_t* halves_of(const Tensor& w) { return static_cast<const uint16_t*>(w.const_data_ptr()); }

// Where the result goes: bytes that are there already, since the first write to new memory costs more than converting.
uint8_t* bytes_for(Tensor& out, int64_t size) {
  check_vector(out, at::kByte, "out");
  TORCH_CHECK(is_aligned(out), "out does not begin at a multiple of 4 bytes");
  TORCH_CHECK(out.dim() == 1 && out.numel() == size, "out of shape (=", out.sizes(), ") is not [", size, "]");
  return out.data_ptr<uint8_t>();
}

void plane_to_tiles(const Tensor& given, int64_t plane, int64_t group, Tensor& out) {
  const Tensor rows = is_aligned(given) ? given : given.clone();
  TORCH_CHECK(rows.scalar_type() == at::kByte, "rows has dtype (=", rows.scalar_type(), "), not ", at::kByte);
  check_matrix(rows, "rows");
  TORCH_CHECK(plane >= 0 && plane < kFormPlanes, "plane (=", plane, ") is not one of 0 to ", kFormPlanes - 1);
  const int bits = kFormBits[plane];
  int64_t columns = 0;
  TORCH_CHECK(!__builtin_mul_overflow(rows.size(1), int64_t{8 / bits}, &columns), "rows of shape (=", rows.sizes(), ") has more than 2^63 inputs");
  check_tiles(rows.size(0), columns, group);
  const int64_t words = rows.size(1) / 4, strips = rows.numel() ? rows.size(0) / kStripRows : 0;
  const uint32_t* const from = reinterpret_cast<const uint32_t*>(rows.const_data_ptr<uint8_t>());
  uint32_t* const to = reinterpret_cast<uint32_t*>(bytes_for(out, rows.numel()));
  const auto run = kernels().convert.strip_to_tiles;
  share(strips, 1, worth_threads(rows.numel()), [&](int64_t strip, int64_t strip_end) {
    for (; strip < strip_end; ++strip) run(from + strip * kStripRows * words, words, words, bits, to + strip * kStripRows * words);
  });
}

Tensor half_extremes(const Tensor& w, int64_t group) {
  const bool bfloat = is_bfloat(w);
  check_matrix(w, "w");
  check_tiles(w.size(0), w.size(1), group);
  const int64_t rows = w.numel() ? w.size(0) : 0, columns = w.size(1), groups = columns / group;
  Tensor found = at::empty({2, w.size(0), groups}, w.options().dtype(at::kFloat));
  const uint16_t* const from = halves_of(w);
  float* const to = found.data_ptr<float>();
  const auto run = kernels().convert.half_extremes;
  share(rows, 1, worth_threads(w.numel()), [&](int64_t row, int64_t row_end) {
    for (; row < row_end; ++row) run(from + row * columns, bfloat, groups, group, to + row * groups, to + (rows + row) * groups);
  });
  return found;
}

void halves_to_planes(const Tensor& w, const Tensor& offset, const Tensor& inverse, int64_t group, at::TensorList out) {
  const bool bfloat = is_bfloat(w);
  check_matrix(w, "w");
  const int64_t rows = w.size(0), columns = w.size(1);
  check_tiles(rows, columns, group);
  const int64_t groups = columns / group, strips = w.numel() ? rows / kStripRows : 0;
  check_vector(offset, at::kFloat, "offset");
  check_vector(inverse, at::kFloat, "inverse");
  for (const Tensor* t : {&offset, &inverse})
    TORCH_CHECK(t->dim() == 2 && t->size(0) == rows && t->size(1) == groups, "offset or inverse of shape (=", t->sizes(), ") is not [", rows, ", ",
                groups, "]");
  TORCH_CHECK(out.size() == kFormPlanes, out.size(), " planes are not ", kFormPlanes);
  HalfStrip whole{halves_of(w), columns, group, bfloat, offset.const_data_ptr<float>(), inverse.const_data_ptr<float>(), {}};
  for (int plane = 0; plane < kFormPlanes; ++plane) {
    Tensor one = out[static_cast<size_t>(plane)];
    whole.planes[plane] = reinterpret_cast<uint32_t*>(bytes_for(one, w.numel() * kFormBits[plane] / 8));
  }
  const auto run = kernels().convert.strip_to_planes;
  share(strips, 1, worth_threads(w.numel()), [&](int64_t strip, int64_t strip_end) {
    for (; strip < strip_end; ++strip) {
      HalfStrip s = whole;
      s.rows += strip * kStripRows * columns;
      s.offset += strip * kStripRows * groups;
      s.inverse += strip * kStripRows * groups;
      for (int plane = 0; plane < kFormPlanes; ++plane) s.planes[plane] += strip * columns * kFormBits[plane] / 2;
      run(s);
    }
  });
}

void upper_halves(const Tensor& codes, int64_t level, Tensor& out) {
  TORCH_CHECK(level == 16 || level == 8 || level == 4, "level (=", level, ") is not 16, 8 or 4");
  check_vector(codes, at::kByte, "codes");
  TORCH_CHECK(codes.dim() == 1 && codes.numel() % 2 == 0, "codes of shape (=", codes.sizes(), ") are not an even number of bytes");
  const int64_t count = codes.numel() / 2;
  const uint8_t* const from = codes.const_data_ptr<uint8_t>();
  uint8_t* const to = bytes_for(out, count);
  const auto run = kernels().convert.upper_halves;
  share(over(count, kPiece), 1, worth_threads(count), [&](int64_t piece, int64_t piece_end) {
    const int64_t begin = piece * kPiece;
    run(from + 2 * begin, static_cast<int>(level), std::min(count, piece_end * kPiece) - begin, to + begin);
  });
}

}  // namespace
}  // namespace foveate

TORCH_LIBRARY_IMPL(foveate, CPU, m) {
  m.impl("plane_to_tiles", foveate::plane_to_tiles);
  m.impl("half_extremes", foveate::half_extremes);
  m.impl("halves_to_planes", foveate::halves_to_planes);
  m.impl("upper_halves", foveate::upper_halves);
}
