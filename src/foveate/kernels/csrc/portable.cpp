// Any machine: vectors of the compiler (GCC, Clang), 4 rows x 4 columns, which become SSE2, NEON, or plain words.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "planes.h"

namespace foveate {
namespace {

struct Portable {
  static constexpr int kRows = 4;
  static constexpr int kLanes = 2;
  static constexpr bool kByteCodes = false;
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef float Floats __attribute__((vector_size(16)));

  static Words load(const uint8_t* p) { return read<Words>(p); }
  static void store(uint8_t* p, Words v) { std::memcpy(p, &v, sizeof v); }
  static Words select(uint32_t mask, Words set, Words clear) { return (set & mask) | (clear & ~mask); }

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
  template <int>
  using Sums = Ints;
  static void split_pairs(Words pairs, Words (&field)[4]) {
    for (int j = 0; j < 4; ++j) field[j] = (pairs >> (2 * j)) & 0x03030303u;
  }
  static void split(const auto& nibbles, Words (&field)[4]) {
    field[0] = nibbles.even & 0x0F0F0F0Fu;
    field[1] = nibbles.odd & 0x0F0F0F0Fu;
    field[2] = (nibbles.even >> 4) & 0x0F0F0F0Fu;
    field[3] = (nibbles.odd >> 4) & 0x0F0F0F0Fu;
  }
  static void add_split(Ints& sums, const Words (&field)[4], const int8_t* x) {
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 4; ++i) sums += (Ints)((field[j] >> (8 * i)) & 0xFFu) * static_cast<int32_t>(x[4 * j + i]);
  }
  static Ints total_split(Ints sums) { return sums; }
  static Ints total_pairs(Ints sums) { return sums; }

 private:
  template <class T>
  static T read(const void* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }

  static float half(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t rest = bits & 0x7FFFu;
    uint32_t out;
    if (rest >= 0x7C00u) {
      out = 0x7F800000u | (rest << 13);
    } else if (rest >= 0x0400u) {
      out = (rest << 13) + 0x38000000u;
    } else {
      const float subnormal = static_cast<float>(rest) * 0x1p-24f;
      std::memcpy(&out, &subnormal, 4);
    }
    out |= sign;
    return read<float>(&out);
  }

  // Nearest even, as the instructions do.
  static uint16_t to_half(float value) {
    uint32_t bits = read<uint32_t>(&value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    bits &= 0x7FFFFFFFu;
    if (bits > 0x7F800000u) return sign | 0x7E00u;
    if (bits >= 0x47800000u) return sign | 0x7C00u;
    if (bits < 0x38800000u) {  // subnormal: adding 2^-1 * 2^0 puts its last place at 2^-24
      const float aligned = read<float>(&bits) + 0.5f;
      return static_cast<uint16_t>(sign | (read<uint32_t>(&aligned) - 0x3F000000u));
    }
    return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xFFFu + ((bits >> 13) & 1u)) >> 13));
  }
};

#include "driver.h"

}  // namespace

const Kernels* portable_kernels() {
  static const Kernels kernels = kernels_of<Portable>("portable");
  return &kernels;
}

}  // namespace foveate
