// AVX-512 with VNNI: a vector is a whole chunk, 16 rows x 4 columns, and `vpdpbusd` multiplies its 64 codes by the four
// inputs of the columns and adds them to 16 rows' sums, exactly, in one instruction.
//
// High nibbles are not shifted down: masked in place they are 16 times too large, so they have sums of their own, which
// are divided once a tile. That also makes two chains of sums, enough to hide the instruction's latency at one lane.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "simd/kernels.h"
#include "simd/target.h"

#if defined(__x86_64__)

FOVEATE_BEGIN_TARGET(FOVEATE_AVX512)
#include <immintrin.h>

namespace foveate {
namespace {

struct Avx512 {
  static constexpr int kRows = 16;
  static constexpr int kLanes = 8;
  static constexpr bool kByteCodes = true;
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef float Floats __attribute__((vector_size(64)));

  static Words load(const uint8_t* p) { return (Words)_mm512_loadu_si512(p); }
  static void store(uint8_t* p, Words v) { _mm512_storeu_si512(p, (__m512i)v); }
  static Words select(uint32_t mask, Words set, Words clear) {
    return (Words)_mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(mask)), (__m512i)set, (__m512i)clear, 0xCA);
  }

  static Floats floats(const float* p) { return (Floats)_mm512_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, (__m512)v); }
  static Floats halves(const uint16_t* p) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // A small float is bits 6..13 of a float16, at most 1.9375.
  static Floats small_floats(const uint8_t* p) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return (Floats)_mm512_cvtph_ps(_mm256_slli_epi16(wide, 6));
  }
  static Floats signed_bytes(const uint8_t* p) {
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store_halves(uint16_t* p, Floats v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }
  static Floats splat(float v) { return (Floats)_mm512_set1_ps(v); }
  static Floats to_float(Ints v) { return (Floats)_mm512_cvtepi32_ps((__m512i)v); }
  static Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

  // sum + codes of a quad of columns x its four inputs
  static Ints multiply_add(Ints sum, Words codes, const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(quad));
  }

  static constexpr int kInPlaceLanes = 4;
  // Of fields in place (1, 4, 16 and 64 times too large); of nibbles (the second half 16 times too large); of bytes.
  template <int CHAINS>
  struct Sums {
    Ints part[CHAINS];
  };
  static void split_pairs(Words pairs, Words (&field)[4]) {
    for (int j = 0; j < 4; ++j) field[j] = pairs & (0x03030303u << (2 * j));
  }
  static void split(const auto& nibbles, Words (&field)[4]) {
    field[0] = nibbles.even & 0x0F0F0F0Fu;
    field[1] = nibbles.odd & 0x0F0F0F0Fu;
    field[2] = nibbles.even & 0xF0F0F0F0u;
    field[3] = nibbles.odd & 0xF0F0F0F0u;
  }
  template <int CHAINS>
  static void add_split(Sums<CHAINS>& sums, const Words (&field)[4], const int8_t* x) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Ints& part = sums.part[j * CHAINS / 4];
      part = multiply_add(part, field[j], x + 4 * j);
    }
  }
  template <int CHAINS>
  static void add_bytes(Sums<CHAINS>& sums, const Words (&field)[4], const int8_t* x) {
    add_split(sums, field, x);
  }
  static Ints total_pairs(const Sums<4>& s) { return (s.part[0] + (s.part[1] >> 2)) + ((s.part[2] >> 4) + (s.part[3] >> 6)); }
  static Ints total_split(const Sums<2>& s) { return s.part[0] + (s.part[1] >> 4); }
  static Ints total_split(const Sums<4>& s) { return s.part[0] + s.part[1] + ((s.part[2] + s.part[3]) >> 4); }
  static Ints total_bytes(const Sums<2>& s) { return s.part[0] + s.part[1]; }
  static Ints total_bytes(const Sums<4>& s) { return (s.part[0] + s.part[1]) + (s.part[2] + s.part[3]); }
};

#include "simd/kernels-inl.h"

}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels = kernels_of<Avx512>("avx512_vnni", saved_avx512());
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
  return here ? &kernels : nullptr;
}

}  // namespace foveate

FOVEATE_END_TARGET
#endif
