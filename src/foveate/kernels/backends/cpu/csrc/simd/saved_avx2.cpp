// Saved tensors with AVX2: 8 elements a vector.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "saved/saved.h"
#include "simd/target.h"

#if defined(__x86_64__)

FOVEATE_BEGIN_TARGET(FOVEATE_AVX2)
#include <immintrin.h>

namespace foveate {
namespace {

#include "saved/element_loops-inl.h"
#include "simd/saved_x86-inl.h"

struct Avx2 {
  static constexpr int kLanes = 8;
  typedef uint32_t Words __attribute__((vector_size(32)));
  typedef float Floats __attribute__((vector_size(32)));

  static __m256i bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m256i wide(const uint16_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Floats load(const float* p) { return (Floats)_mm256_loadu_ps(p); }
  static Floats load(const BFloat16* p) { return (Floats)_mm256_slli_epi32(wide(&p->bits), 16); }
  static Floats load(const Float16* p) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(float* p, Floats v) { _mm256_storeu_ps(p, (__m256)v); }
  static void store(BFloat16* p, Floats v) {
    const __m256i rounded = (__m256i)bfloat16_bits((Words)v);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store(Float16* p, Floats v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void stream(float* p, Floats v) { _mm256_stream_ps(p, (__m256)v); }
  static void fence() { _mm_sfence(); }
  static Floats splat(float v) { return (Floats)_mm256_set1_ps(v); }
  static Floats min(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
  static Floats max(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
  static Words to_words(Floats v) { return (Words)_mm256_cvtps_epi32((__m256)v); }
  static Words lanes() { return Words{0, 1, 2, 3, 4, 5, 6, 7}; }
  static float minimum(Floats v) { return minimum_of((__m256)v); }
  static float maximum(Floats v) { return maximum_of((__m256)v); }
  static float total(Floats v) { return sum_of((__m256)v); }

  // The codes of fixed point plus random bytes; up to 8 bits both fit in words. Packing works in halves of vectors, and
  // leaves the quarters in the order 0 2 1 3.
  template <int BITS>
  static void store_codes(uint8_t* to, const Words (&fixed)[4], Hashes random) {
    const __m128i half[2] = {_mm256_castsi256_si128((__m256i)random), _mm256_extracti128_si256((__m256i)random, 1)};
    __m256i words[2];
    for (int k = 0; k < 2; ++k) {
      Words first = fixed[2 * k], second = fixed[2 * k + 1];
      if constexpr (BITS == 16) {
        first = (first + (Words)_mm256_cvtepu8_epi32(half[k])) >> 8;
        second = (second + (Words)_mm256_cvtepu8_epi32(_mm_srli_si128(half[k], 8))) >> 8;
      }
      words[k] = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)first, (__m256i)second), 0xD8);
    }
    if constexpr (BITS == 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words[0]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), words[1]);
    } else {
      for (int k = 0; k < 2; ++k) words[k] = _mm256_srli_epi16(_mm256_add_epi16(words[k], _mm256_cvtepu8_epi16(half[k])), 8);
      store_fields<BITS>(to, _mm256_permute4x64_epi64(_mm256_packus_epi16(words[0], words[1]), 0xD8));
    }
  }

  // Values of codes: vector k of a block.
  template <int BITS>
  class Decoder {
   public:
    Decoder(float low, float step) : low_(splat(low)), step_(splat(step)) {
      table_ = low_ + (Floats)_mm256_cvtepi32_ps((__m256i)(lanes() & 3u)) * step_;
    }
    Floats operator()(const uint8_t* codes, int k) const {
      if constexpr (BITS == 2) {
        uint16_t word;
        std::memcpy(&word, codes + 2 * k, 2);
        const Words index = (Words)_mm256_set1_epi32(word) >> (lanes() * 2);
        return (Floats)_mm256_permutevar8x32_ps((__m256)table_, (__m256i)index);
      } else if constexpr (BITS == 4) {
        int32_t word;
        std::memcpy(&word, codes + 4 * k, 4);
        return value((__m256i)((Words)_mm256_set1_epi32(word) >> (lanes() * 4) & 15u));
      } else if constexpr (BITS == 8) {
        return value(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * k))));
      } else {
        return value(wide(reinterpret_cast<const uint16_t*>(codes) + 8 * k));
      }
    }

   private:
    Floats value(__m256i code) const { return low_ + (Floats)_mm256_cvtepi32_ps(code) * step_; }

    Floats low_, step_, table_;
  };

  template <class T>
  static uint32_t greater(const T* x, float threshold) {
    uint32_t word = 0;
    for (int k = 0; k < 4; ++k) {
      const __m256 more = _mm256_cmp_ps((__m256)load(x + 8 * k), _mm256_set1_ps(threshold), _CMP_GT_OQ);
      word |= static_cast<uint32_t>(_mm256_movemask_ps(more)) << (8 * k);
    }
    return word;
  }

  static uint32_t unequal(const uint8_t* x, uint8_t v) {
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes(x), _mm256_set1_epi8(static_cast<char>(v)))));
  }
  static uint32_t unequal(const uint16_t* x, uint16_t v) {
    const __m256i than = _mm256_set1_epi16(static_cast<int16_t>(v));
    const __m256i equal = _mm256_packs_epi16(_mm256_cmpeq_epi16(bytes(x), than), _mm256_cmpeq_epi16(bytes(x + 16), than));
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(equal, 0xD8)));
  }
  static uint32_t unequal(const uint32_t* x, uint32_t v) {
    const __m256i than = _mm256_set1_epi32(static_cast<int>(v));
    uint32_t equal = 0;
    for (int k = 0; k < 4; ++k)
      equal |= static_cast<uint32_t>(_mm256_movemask_ps((__m256)_mm256_cmpeq_epi32(bytes(x + 8 * k), than))) << (8 * k);
    return ~equal;
  }
  static uint32_t unequal(const uint64_t* x, uint64_t v) {
    const __m256i than = _mm256_set1_epi64x(static_cast<int64_t>(v));
    uint32_t equal = 0;
    for (int k = 0; k < 8; ++k)
      equal |= static_cast<uint32_t>(_mm256_movemask_pd((__m256d)_mm256_cmpeq_epi64(bytes(x + 4 * k), than))) << (4 * k);
    return ~equal;
  }

  template <class T>
  static void choose(uint32_t word, T first, T second, T* out) {
    choose_each(word, first, second, out);
  }
};

#include "simd/saved_kernels-inl.h"

}  // namespace

const SavedKernels* saved_avx2() {
  static const SavedKernels kernels = saved_kernels_of<Avx2>();
  return &kernels;
}

}  // namespace foveate

FOVEATE_END_TARGET
#endif
