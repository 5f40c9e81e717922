// What the AVX2 and the AVX-512 kernels on saved tensors share.
//
// Each of the two source files includes this one after the target pragma and immintrin.h, in its anonymous namespace.

// 32 codes as bytes, in fields of BITS.
template <int BITS>
static inline void store_fields(uint8_t* to, __m256i bytes) {
  if constexpr (BITS == 8) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
  } else {
    const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(1 | 1 << (8 + BITS)));  // first + second << BITS
    if constexpr (BITS == 4) {
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
    } else {
      const __m256i quads = _mm256_madd_epi16(pairs, _mm256_set1_epi32(1 | 16 << 16));
      const __m256i first = _mm256_shuffle_epi8(quads, _mm256_set1_epi32(0x0C080400));
      const int lower = _mm256_extract_epi32(first, 0), upper = _mm256_extract_epi32(first, 4);
      std::memcpy(to, &lower, 4);
      std::memcpy(to + 4, &upper, 4);
    }
  }
}

static inline float minimum_of(__m256 v) {
  __m128 low = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  low = _mm_min_ps(low, _mm_movehl_ps(low, low));
  return _mm_cvtss_f32(_mm_min_ss(low, _mm_movehdup_ps(low)));
}
static inline float maximum_of(__m256 v) {
  __m128 high = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  high = _mm_max_ps(high, _mm_movehl_ps(high, high));
  return _mm_cvtss_f32(_mm_max_ss(high, _mm_movehdup_ps(high)));
}
static inline float sum_of(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
