// Saved tensors with AVX-512: 16 elements a vector. Two and four bits are decoded by a table of all values in a register.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "saved/saved.h"
#include "simd/target.h"

#if defined(__x86_64__)

FOVEATE_BEGIN_TARGET(FOVEATE_AVX512)
#include <immintrin.h>

namespace foveate {
namespace {

#include "saved/element_loops-inl.h"
#include "simd/saved_x86-inl.h"

struct Avx512 {
  static constexpr int kLanes = 16;
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef float Floats __attribute__((vector_size(64)));

  static __m512i wide(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Floats load(const float* p) { return (Floats)_mm512_loadu_ps(p); }
  static Floats load(const BFloat16* p) { return (Floats)_mm512_slli_epi32(wide(&p->bits), 16); }
  static Floats load(const Float16* p) { return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, (__m512)v); }
  static void store(BFloat16* p, Floats v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)bfloat16_bits((Words)v)));
  }
  static void store(Float16* p, Floats v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void stream(float* p, Floats v) { _mm512_stream_ps(p, (__m512)v); }
  static void fence() { _mm_sfence(); }
  static Floats splat(float v) { return (Floats)_mm512_set1_ps(v); }
  static Floats min(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
  static Floats max(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
  static Words to_words(Floats v) { return (Words)_mm512_cvtps_epi32((__m512)v); }
  static Words lanes() { return Words{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

  static __m256 upper(Floats v) { return _mm512_extractf32x8_ps((__m512)v, 1); }
  static __m256 lower(Floats v) { return _mm512_castps512_ps256((__m512)v); }
  static float minimum(Floats v) { return minimum_of(_mm256_min_ps(lower(v), upper(v))); }
  static float maximum(Floats v) { return maximum_of(_mm256_max_ps(lower(v), upper(v))); }
  static float total(Floats v) { return sum_of(_mm256_add_ps(lower(v), upper(v))); }

  // The codes of fixed point plus random bytes; up to 8 bits both fit in words.
  template <int BITS>
  static void store_codes(uint8_t* to, const Words (&fixed)[2], Hashes random) {
    const __m256i bytes = (__m256i)random;
    if constexpr (BITS == 16) {
      const __m512i first = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes)), second = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)((fixed[0] + (Words)first) >> 8)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), _mm512_cvtepi32_epi16((__m512i)((fixed[1] + (Words)second) >> 8)));
    } else {
      const __m512i words = _mm512_permutex2var_epi16((__m512i)fixed[0], (__m512i)(lanes() * 0x40004u + 0x20000u), (__m512i)fixed[1]);
      store_fields<BITS>(to, _mm512_cvtepi16_epi8(_mm512_srli_epi16(_mm512_add_epi16(words, _mm512_cvtepu8_epi16(bytes)), 8)));
    }
  }

  // Values of codes: vector k of a block.
  template <int BITS>
  class Decoder {
   public:
    Decoder(float low, float step) : low_(splat(low)), step_(splat(step)) {
      const Words code = lanes() & (BITS < 4 ? (1u << BITS) - 1 : 15u);
      table_ = low_ + (Floats)_mm512_cvtepi32_ps((__m512i)code) * step_;
    }
    Floats operator()(const uint8_t* codes, int k) const {
      if constexpr (BITS == 2) {
        int32_t word;
        std::memcpy(&word, codes + 4 * k, 4);
        return look_up((Words)_mm512_set1_epi32(word) >> (lanes() * 2));
      } else if constexpr (BITS == 4) {
        const __m512i words = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * k)));
        return look_up((Words)_mm512_permutexvar_epi32((__m512i)(lanes() >> 3), words) >> ((lanes() & 7u) * 4));
      } else if constexpr (BITS == 8) {
        return value(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * k))));
      } else {
        return value(wide(reinterpret_cast<const uint16_t*>(codes) + 16 * k));
      }
    }

   private:
    Floats look_up(Words index) const { return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)table_); }
    Floats value(__m512i code) const { return low_ + (Floats)_mm512_cvtepi32_ps(code) * step_; }

    Floats low_, step_, table_;
  };

  template <class T>
  static uint32_t greater(const T* x, float threshold) {
    const __m512 than = _mm512_set1_ps(threshold);
    const uint32_t first = _mm512_cmp_ps_mask((__m512)load(x), than, _CMP_GT_OQ);
    return first | static_cast<uint32_t>(_mm512_cmp_ps_mask((__m512)load(x + 16), than, _CMP_GT_OQ)) << 16;
  }

  static uint32_t unequal(const uint8_t* x, uint8_t v) {
    return _mm256_cmpneq_epi8_mask(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), _mm256_set1_epi8(static_cast<char>(v)));
  }
  static uint32_t unequal(const uint16_t* x, uint16_t v) {
    return _mm512_cmpneq_epi16_mask(_mm512_loadu_si512(x), _mm512_set1_epi16(static_cast<int16_t>(v)));
  }
  static uint32_t unequal(const uint32_t* x, uint32_t v) {
    const __m512i than = _mm512_set1_epi32(static_cast<int>(v));
    const uint32_t first = _mm512_cmpneq_epi32_mask(_mm512_loadu_si512(x), than);
    return first | static_cast<uint32_t>(_mm512_cmpneq_epi32_mask(_mm512_loadu_si512(x + 16), than)) << 16;
  }
  static uint32_t unequal(const uint64_t* x, uint64_t v) {
    const __m512i than = _mm512_set1_epi64(static_cast<int64_t>(v));
    uint32_t word = 0;
    for (int k = 0; k < 4; ++k)
      word |= static_cast<uint32_t>(_mm512_cmpneq_epi64_mask(_mm512_loadu_si512(x + 8 * k), than)) << (8 * k);
    return word;
  }

  static void choose(uint32_t word, uint8_t first, uint8_t second, uint8_t* out) {
    const __m256i from = _mm256_set1_epi8(static_cast<char>(first)), other = _mm256_set1_epi8(static_cast<char>(second));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_mask_blend_epi8(word, from, other));
  }
  static void choose(uint32_t word, uint16_t first, uint16_t second, uint16_t* out) {
    const __m512i from = _mm512_set1_epi16(static_cast<int16_t>(first)), other = _mm512_set1_epi16(static_cast<int16_t>(second));
    _mm512_storeu_si512(out, _mm512_mask_blend_epi16(word, from, other));
  }
  static void choose(uint32_t word, uint32_t first, uint32_t second, uint32_t* out) {
    const __m512i from = _mm512_set1_epi32(static_cast<int>(first)), other = _mm512_set1_epi32(static_cast<int>(second));
    _mm512_storeu_si512(out, _mm512_mask_blend_epi32(static_cast<__mmask16>(word), from, other));
    _mm512_storeu_si512(out + 16, _mm512_mask_blend_epi32(static_cast<__mmask16>(word >> 16), from, other));
  }
  static void choose(uint32_t word, uint64_t first, uint64_t second, uint64_t* out) {
    const __m512i from = _mm512_set1_epi64(static_cast<int64_t>(first)), other = _mm512_set1_epi64(static_cast<int64_t>(second));
    for (int k = 0; k < 4; ++k)
      _mm512_storeu_si512(out + 8 * k, _mm512_mask_blend_epi64(static_cast<__mmask8>(word >> (8 * k)), from, other));
  }
};

#include "simd/saved_kernels-inl.h"

}  // namespace

const SavedKernels* saved_avx512() {
  static const SavedKernels kernels = saved_kernels_of<Avx512>();
  return &kernels;
}

}  // namespace foveate

FOVEATE_END_TARGET
#endif
