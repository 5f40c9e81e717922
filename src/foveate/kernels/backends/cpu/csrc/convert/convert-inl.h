// What changes its form while it moves: planes to the order of tiles, weights of 16 bits to planes, codes to fewer bits.
//
// Every instruction set gives the same bits. simd/kernels-inl.h includes this file after collect/collect-inl.h, which has
// 16 lanes and how they are rounded.

typedef uint32_t SixteenWords __attribute__((vector_size(64)));
typedef int32_t SixteenInts __attribute__((vector_size(64)));
typedef uint16_t SixteenHalves __attribute__((vector_size(32)));
typedef uint16_t Pairs __attribute__((vector_size(64)));
typedef uint8_t PairedBytes __attribute__((vector_size(32)));

template <class T>
inline T load_as(const void* p) {
  T v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store_as(void* p, const T& v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Lanes of two vectors: STRIDE of one and STRIDE of the other in turn, the even parts of both or the odd ones.
template <int STRIDE, bool ODD, int... LANES>
inline SixteenWords woven(const SixteenWords& a, const SixteenWords& b, std::integer_sequence<int, LANES...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, ((LANES & STRIDE) ? 16 + LANES - (ODD ? 0 : STRIDE) : LANES + (ODD ? STRIDE : 0))...);
#else
  constexpr SixteenInts kFrom{((LANES & STRIDE) ? 16 + LANES - (ODD ? 0 : STRIDE) : LANES + (ODD ? STRIDE : 0))...};
  return __builtin_shuffle(a, b, kFrom);
#endif
}

template <int STRIDE>
inline void woven_pairs(SixteenWords (&v)[16]) {
  constexpr std::make_integer_sequence<int, 16> kLanes{};
  for (int i = 0; i < 16; ++i) {
    if (i & STRIDE) continue;
    const SixteenWords a = v[i], b = v[i + STRIDE];
    v[i] = woven<STRIDE, false>(a, b, kLanes);
    v[i + STRIDE] = woven<STRIDE, true>(a, b, kLanes);
  }
}

// 16 x 16 words, rows and columns exchanged.
inline void transpose(SixteenWords (&v)[16]) {
  woven_pairs<8>(v);
  woven_pairs<4>(v);
  woven_pairs<2>(v);
  woven_pairs<1>(v);
}

// Exchanges bit `high` and bit `low` of the number of each field within its word.
template <int BITS, int HIGH, int LOW>
inline SixteenWords exchanged(const SixteenWords& words) {
  constexpr int kShift = ((1 << HIGH) - (1 << LOW)) * BITS;
  constexpr uint32_t kMask = [] {
    uint32_t mask = 0;
    for (int field = 0; field < 32 / BITS; ++field)
      if ((field >> LOW & 1) && !(field >> HIGH & 1)) mask |= ((1u << BITS) - 1) << (BITS * field);
    return mask;
  }();
  const SixteenWords moved = ((words >> kShift) ^ words) & kMask;
  return words ^ moved ^ (moved << kShift);
}

// Words whose fields are in the order of columns, with their fields in the order of a tile: 2-bit fields go from (j, i) to
// (i, j), 1-bit fields from (o, j, i) to (i, j, o), each of j and i two bits.
template <int BITS>
inline SixteenWords in_tile_order(const SixteenWords& words) {
  if constexpr (BITS == 2) {
    return exchanged<2, 2, 0>(exchanged<2, 3, 1>(words));
  } else {
    return exchanged<1, 1, 0>(exchanged<1, 2, 0>(exchanged<1, 3, 0>(exchanged<1, 4, 1>(words))));
  }
}

template <int BITS>
inline void strip_of_bits(const uint32_t* rows, int64_t stride, int64_t words, uint32_t* out) {
  int64_t w = 0;
  for (; w + 16 <= words; w += 16) {
    SixteenWords block[16];
    for (int r = 0; r < 16; ++r) block[r] = in_tile_order<BITS>(load_as<SixteenWords>(rows + r * stride + w));
    transpose(block);
    for (int c = 0; c < 16; ++c) store_as(out + (w + c) * 16, block[c]);
  }
  for (; w < words; ++w) {
    SixteenWords column;
    for (int r = 0; r < 16; ++r) column[r] = rows[r * stride + w];
    store_as(out + w * 16, in_tile_order<BITS>(column));
  }
}

inline void strip_to_tiles(const uint32_t* rows, int64_t stride, int64_t words, int bits, uint32_t* out) {
  if (bits == 2) {
    strip_of_bits<2>(rows, stride, words, out);
  } else {
    strip_of_bits<1>(rows, stride, words, out);
  }
}

// 16 numbers of 16 bits.
template <class V, bool BFLOAT>
inline Sixteen sixteen_halves(const uint16_t* p) {
  Sixteen v;
  if constexpr (BFLOAT) {
    v = (Sixteen)(__builtin_convertvector(load_as<SixteenHalves>(p), SixteenWords) << 16);
  } else if constexpr (V::kRows == 16) {
    v = (Sixteen)V::halves(p);
  } else {
    float part[16];
    for (int i = 0; i < 16; i += V::kRows) V::store_floats(part + i, V::halves(p + i));
    v = load_sixteen(part);
  }
  return v;
}

template <class V, bool BFLOAT>
inline void extremes_of(const uint16_t* row, int64_t groups, int64_t group, float* least, float* greatest) {
  Sixteen nothing{};  // NaN where a number is not finite
  for (int64_t g = 0; g < groups; ++g, row += group) {
    Sixteen low = sixteen_halves<V, BFLOAT>(row), high = low;
    nothing += low * 0.0f;
    for (int64_t k = 16; k < group; k += 16) {
      const Sixteen v = sixteen_halves<V, BFLOAT>(row + k);
      low = least_of(v, low);
      high = most_of(v, high);
      nothing += v * 0.0f;
    }
    least[g] = least_in(low);
    greatest[g] = most_in(high);
  }
  const float all = total_of(nothing);
  if (all == 0.0f) return;
  for (int64_t g = 0; g < groups; ++g) least[g] = greatest[g] = all;
}

template <class V>
inline void half_extremes(const uint16_t* row, bool bfloat, int64_t groups, int64_t group, float* least, float* greatest) {
  if (bfloat) {
    extremes_of<V, true>(row, groups, group, least, greatest);
  } else {
    extremes_of<V, false>(row, groups, group, least, greatest);
  }
}

// 16 columns of a strip: four words of four codes each, a lane for each row.
template <class V, bool BFLOAT>
inline void codes_of(const HalfStrip& s, int64_t column, SixteenWords* quads) {
  const int64_t groups = s.columns / s.group, g = column / s.group;
  SixteenWords codes[16];
  for (int r = 0; r < 16; ++r) {
    const Sixteen v = sixteen_halves<V, BFLOAT>(s.rows + r * s.columns + column);
    const Sixteen at = (v - s.offset[r * groups + g]) * s.inverse[r * groups + g] + 127.5f;
    // rounded to the nearest integer, which is in the lowest bits then
    codes[r] = (SixteenWords)(least_of(most_of(at, Sixteen{}), sixteen(255.0f)) + 0x1.8p23f);
  }
  transpose(codes);
  for (int q = 0; q < 4; ++q) {
    const SixteenWords* const c = codes + 4 * q;
    quads[q] = (c[0] & 0xFFu) | (c[1] & 0xFFu) << 8 | (c[2] & 0xFFu) << 16 | c[3] << 24;
  }
}

template <class V, bool BFLOAT>
inline void planes_of(const HalfStrip& s) {
  for (int64_t column = 0; column < s.columns; column += 32) {
    SixteenWords quads[8];
    codes_of<V, BFLOAT>(s, column, quads);
    codes_of<V, BFLOAT>(s, column + 16, quads + 4);
    for (int plane = 0; plane < kFormPlanes; ++plane) {
      const int shift = kFormShifts[plane];
      if (kFormBits[plane] == 2) {
        for (int half = 0; half < 2; ++half) {
          SixteenWords word{};
          for (int n = 0; n < 4; ++n) word |= (quads[4 * half + n] >> shift & 0x03030303u) << (2 * n);
          store_as(s.planes[plane] + (column / 16 + half) * 16, word);
        }
      } else {
        SixteenWords word{};
        for (int n = 0; n < 8; ++n) word |= (quads[n] >> shift & 0x01010101u) << (2 * (n % 4) + n / 4);
        store_as(s.planes[plane] + column / 32 * 16, word);
      }
    }
  }
}

template <class V>
inline void strip_to_planes(const HalfStrip& s) {
  if (s.bfloat) {
    planes_of<V, true>(s);
  } else {
    planes_of<V, false>(s);
  }
}

template <int LEVEL, class T>
inline T upper_half(const T& pair) {
  if constexpr (LEVEL == 16) {
    return pair >> 8;
  } else if constexpr (LEVEL == 8) {
    return (pair >> 4 & 0x0F) | (pair >> 8 & 0xF0);
  } else {
    return (pair >> 2 & 0x03) | (pair >> 4 & 0x0C) | (pair >> 6 & 0x30) | (pair >> 8 & 0xC0);
  }
}

template <int LEVEL>
inline void halves_of_codes(const uint8_t* codes, int64_t count, uint8_t* out) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) store_as(out + i, __builtin_convertvector(upper_half<LEVEL>(load_as<Pairs>(codes + 2 * i)), PairedBytes));
  for (; i < count; ++i) out[i] = static_cast<uint8_t>(upper_half<LEVEL>(static_cast<uint32_t>(codes[2 * i] | codes[2 * i + 1] << 8)));
}

inline void upper_halves(const uint8_t* codes, int level, int64_t count, uint8_t* out) {
  if (level == 16) {
    halves_of_codes<16>(codes, count, out);
  } else if (level == 8) {
    halves_of_codes<8>(codes, count, out);
  } else {
    halves_of_codes<4>(codes, count, out);
  }
}

template <class V>
constexpr ConvertKernels convert_kernels_of() {
  return {strip_to_tiles, half_extremes<V>, strip_to_planes<V>, upper_halves};
}
