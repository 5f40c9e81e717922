// Tiles that are stored as floating point: their products, and their values in the dense weight.
//
// They are few or all, so they have an index of their own, which a product looks up once a strip: a weight without any
// pays for one comparison. A tile's values are [g columns, 16 rows]. They are multiplied with the codes of x, in the
// order of columns, after all groups that are read from planes (docs/format.md, "Exact tiles").
//
// simd/kernels-inl.h includes this file after planes/tile-inl.h.

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The values of exact tile number `tile` as float32.
template <class V>
void widen_exact(const Weight& w, int64_t tile, float* wide) {
  const int64_t count = int64_t{kTileRows} * w.group;
  switch (w.exact.type) {
    case Type::kFloat32:
      std::memcpy(wide, static_cast<const float*>(w.exact.values) + tile * count, static_cast<size_t>(count) * sizeof(float));
      break;
    case Type::kBFloat16: {
      const uint16_t* const from = static_cast<const uint16_t*>(w.exact.values) + tile * count;
      for (int64_t i = 0; i < count; ++i) wide[i] = float_of(static_cast<uint32_t>(from[i]) << 16);
      break;
    }
    case Type::kFloat16: {
      const uint16_t* const from = static_cast<const uint16_t*>(w.exact.values) + tile * count;
      for (int64_t i = 0; i < count; i += V::kRows) V::store_floats(wide + i, V::halves(from + i));
    }
  }
}

// Calls each(group, values [g, 16]) for the exact tiles of a strip that are read as such.
template <class V, class Each>
Fault exact_tiles_of(const Weight& w, int64_t strip, const Each& each) {
  const int64_t begin = w.exact.offsets[strip], end = w.exact.offsets[strip + 1];
  if (begin < 0 || begin > end || end > w.exact.count) return Fault::kOutside;
  alignas(64) float wide[kTileRows * kMaxGroup];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t group = w.exact.numbers[tile] - strip * w.groups;
    if (group < 0 || group >= w.groups) return Fault::kOutside;
    if (w.active_levels[strip * w.groups + group] <= kTopNested) continue;
    widen_exact<V>(w, tile, wide);
    each(group, wide);
  }
  return Fault::kNone;
}

// ROWS rows of x times one exact tile; `apart` floats lie between the sums of two rows.
template <class V, int ROWS, bool WIDE>
void add_exact_tile(const float* wide, const int8_t* codes, int group, float* acc, int64_t apart) {
  constexpr int kParts = kTileRows / V::kRows;
  typename V::Floats sums[ROWS][kParts];
  for (int i = 0; i < ROWS; ++i)
    for (int part = 0; part < kParts; ++part) sums[i][part] = V::floats(acc + i * apart + part * V::kRows);
  for (int k = 0; k < group; ++k) {
    for (int i = 0; i < ROWS; ++i) {
      const int8_t* const lane = codes + (WIDE ? 2 : 1) * i * group + k;
      const typename V::Floats x = V::splat(static_cast<float>(WIDE ? 256 * lane[0] + lane[group] : lane[0]));
      for (int part = 0; part < kParts; ++part) sums[i][part] = V::fma(V::floats(wide + k * kTileRows + part * V::kRows), x, sums[i][part]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int part = 0; part < kParts; ++part) V::store_floats(acc + i * apart + part * V::kRows, sums[i][part]);
}

// Adds the exact tiles of a strip to the sums of rows [row, row_end) of x; those of the first row are at `acc`.
template <class V, bool WIDE>
Fault add_exact_tiles(const Weight& w, const Inputs& x, int64_t strip, int64_t row, int64_t row_end, float* acc, int64_t apart) {
  if (!w.exact.offsets) return Fault::kNone;
  constexpr int kEach = WIDE ? 2 : 1;
  return exact_tiles_of<V>(w, strip, [&](int64_t group, const float* wide) {
    const int8_t* codes = x.codes + (group * x.lanes + row * kEach) * w.group;
    float* to = acc;
    int64_t left = row_end - row;
    for (; left >= 4; left -= 4, codes += 4 * kEach * w.group, to += 4 * apart) add_exact_tile<V, 4, WIDE>(wide, codes, w.group, to, apart);
    for (; left > 0; --left, codes += kEach * w.group, to += apart) add_exact_tile<V, 1, WIDE>(wide, codes, w.group, to, apart);
  });
}
