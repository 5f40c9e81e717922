// AVX2: a vector is 8 rows x 4 columns. `vpmaddubsw` adds two products of a code and an input in 16 bits, and would
// saturate on bytes (2 x 255 x 127 > 32767); on nibbles eight products fit. So codes are always nibbles here: four
// fields are added in 16 bits, then widened, and levels 6 and 8 are two nibble products, put together in integers.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "simd/kernels.h"
#include "simd/target.h"

#if defined(__x86_64__)

FOVEATE_BEGIN_TARGET(FOVEATE_AVX2)
#include <immintrin.h>

namespace foveate {
namespace {

#include "simd/shifted_fields-inl.h"

struct Avx2 : ShiftedFields<32> {
  static constexpr int kRows = 8;
  static constexpr int kLanes = 4;
  static constexpr bool kByteCodes = false;
  typedef float Floats __attribute__((vector_size(32)));

  static Words load(const uint8_t* p) { return (Words)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(uint8_t* p, Words v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)v); }

  static Floats floats(const float* p) { return (Floats)_mm256_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, (__m256)v); }
  static Floats halves(const uint16_t* p) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  // A small float is bits 6..13 of a float16, at most 1.9375.
  static Floats small_floats(const uint8_t* p) {
    const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return (Floats)_mm256_cvtph_ps(_mm_slli_epi16(wide, 6));
  }
  static Floats signed_bytes(const uint8_t* p) {
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void store_halves(uint16_t* p, Floats v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }
  static Floats splat(float v) { return (Floats)_mm256_set1_ps(v); }
  static Floats to_float(Ints v) { return (Floats)_mm256_cvtepi32_ps((__m256i)v); }
  static Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

  static constexpr int kInPlaceLanes = kLanes;
  static __m256i products(Words codes, const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    return _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(quad));
  }
  static void add_split(Ints& sums, const Words (&field)[4], const int8_t* x) {
    const __m256i front = _mm256_add_epi16(products(field[0], x), products(field[1], x + 4));
    const __m256i back = _mm256_add_epi16(products(field[2], x + 8), products(field[3], x + 12));
    sums += (Ints)_mm256_madd_epi16(_mm256_add_epi16(front, back), _mm256_set1_epi16(1));
  }
};

#include "simd/kernels-inl.h"

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = kernels_of<Avx2>("avx2", saved_avx2());
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return here ? &kernels : nullptr;
}

}  // namespace foveate

FOVEATE_END_TARGET
#endif
