// Any machine: vectors of the compiler (GCC, Clang), 4 rows x 4 columns, which become SSE2, NEON, or plain words.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "simd/halves.h"
#include "simd/kernels.h"

namespace foveate {
namespace {

#include "simd/shifted_fields-inl.h"

struct Portable : ShiftedFields<16> {
  static constexpr int kRows = 4;
  static constexpr int kLanes = 2;
  static constexpr bool kByteCodes = false;
  typedef float Floats __attribute__((vector_size(16)));

  static Words load(const uint8_t* p) { return read<Words>(p); }
  static void store(uint8_t* p, Words v) { std::memcpy(p, &v, sizeof v); }

  static Floats floats(const float* p) { return read<Floats>(p); }
  static void store_floats(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
  static Floats halves(const uint16_t* p) { return Floats{half(p[0]), half(p[1]), half(p[2]), half(p[3])}; }
  // A small float is bits 6..13 of a float16, at most 1.9375.
  static Floats small_floats(const uint8_t* p) {
    Floats v;
    for (int i = 0; i < kRows; ++i) v[i] = half(static_cast<uint16_t>(p[i] << 6));
    return v;
  }
  static Floats signed_bytes(const uint8_t* p) {
    Floats v;
    for (int i = 0; i < kRows; ++i) v[i] = static_cast<float>(static_cast<int8_t>(p[i]));
    return v;
  }
  static void store_halves(uint16_t* p, Floats v) {
    for (int i = 0; i < kRows; ++i) p[i] = to_half(v[i]);
  }
  static Floats splat(float v) { return Floats{v, v, v, v}; }
  static Floats to_float(Ints v) { return __builtin_convertvector(v, Floats); }
  static Floats fma(Floats a, Floats b, Floats c) {
    for (int i = 0; i < kRows; ++i) c[i] = std::fmaf(a[i], b[i], c[i]);
    return c;
  }

  static constexpr int kInPlaceLanes = kLanes;
  static void add_split(Ints& sums, const Words (&field)[4], const int8_t* x) {
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 4; ++i) sums += (Ints)((field[j] >> (8 * i)) & 0xFFu) * static_cast<int32_t>(x[4 * j + i]);
  }
};

#include "simd/kernels-inl.h"

}  // namespace

const Kernels* portable_kernels() {
  static const Kernels kernels = kernels_of<Portable>("portable", saved_portable());
  return &kernels;
}

}  // namespace foveate
