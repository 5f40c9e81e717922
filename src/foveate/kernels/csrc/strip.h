// The product for few lanes of x: codes go from the planes into the multiplier, and never back to memory.
//
// At one lane the planes' bytes are the time, so a strip is one forward pass over each plane's stream. Sums are integers
// within a group and exact; groups are added in ascending order in float32, so a row's result does not depend on how
// rows are batched. That arithmetic is `finish`, shared with panel.h: the only place where it is written.
//
// Included after tile.h, see there.

// Adds a group's sums of a row: D = 2 sum(c x) - C sum(x), acc = fma(D, step, acc), acc = fma(sum(x), offset, acc).
template <class V>
inline __attribute__((always_inline)) typename V::Floats finish(
    typename V::Floats acc, typename V::Ints doubled, int32_t range, int32_t sum, const TileScales<V>& scale) {
  acc = V::fma(V::to_float(doubled - range * sum), scale.step, acc);
  return V::fma(V::splat(static_cast<float>(sum)), scale.offset, acc);
}

// The doubled sum of a row, from its one lane or its two.
template <class V, bool WIDE, int LANES>
inline __attribute__((always_inline)) typename V::Ints row_sum(const typename V::Ints (&lane)[LANES], int row) {
  if constexpr (WIDE) return (lane[2 * row] << 8) + lane[2 * row + 1];
  else return lane[row];
}

// doubled[i] = 2 sum(c x) of a tile's rows `part`.. and lane i.
template <class V, int KIND, bool REACHED, int LANES>
inline __attribute__((always_inline)) void tile_sums(
    const Tile& tile, int part, const int8_t* x, int group, int reach, typename V::Ints (&doubled)[LANES]) {
  using Words = typename V::Words;
  typename V::Sums high[LANES] = {}, low[LANES] = {};
  Reader<V, KIND> reader(tile, 4 * part);
  auto step = [&](auto odd, int pair) __attribute__((always_inline)) {
    const int8_t* x_step = x + 32 * pair + 16 * decltype(odd)::value;
    const Nibbles<V> a = reader.template anchor<decltype(odd)::value>(pair);
    Words field[4];
    if constexpr (KIND <= 3) {
      V::split(a, field);
#pragma GCC unroll 8
      for (int i = 0; i < LANES; ++i) V::add_split(high[i], field, x_step + i * group);
    } else if constexpr (V::kByteCodes) {
      byte_fields<V, REACHED>(a, reader.template residual<decltype(odd)::value>(pair), reach, field);
#pragma GCC unroll 8
      for (int i = 0; i < LANES; ++i) V::add_bytes(high[i], field, x_step + i * group);
    } else {
      const Nibbles<V> b = reader.template residual<decltype(odd)::value>(pair);
      V::split(a, field);
#pragma GCC unroll 8
      for (int i = 0; i < LANES; ++i) V::add_split(high[i], field, x_step + i * group);
      V::split(b, field);
#pragma GCC unroll 8
      for (int i = 0; i < LANES; ++i) V::add_split(low[i], field, x_step + i * group);
    }
  };
  for (int pair = 0; pair < group / 32; ++pair) {
    reader.begin_pair(pair);
    step(std::integral_constant<int, 0>{}, pair);
    step(std::integral_constant<int, 1>{}, pair);
  }
#pragma GCC unroll 8
  for (int i = 0; i < LANES; ++i) {
    typename V::Ints sum;
    if constexpr (KIND <= 3) sum = V::total_split(high[i]);
    else if constexpr (V::kByteCodes) sum = V::total_bytes(high[i]);
    else sum = (V::total_split(high[i]) << (4 - reach)) + V::total_split(low[i]);
    if constexpr (KIND == 2) doubled[i] = sum;            // 2c was summed
    else if constexpr (KIND == 4) doubled[i] = sum >> 1;  // 4c was summed
    else doubled[i] = sum << 1;
  }
}

template <class V, int LANES>
inline __attribute__((always_inline)) void any_tile_sums(
    const Tile& tile, int part, const int8_t* x, int group, int reach, typename V::Ints (&doubled)[LANES]) {
  switch (tile.kind) {
    case 1: return tile_sums<V, 1, false>(tile, part, x, group, reach, doubled);
    case 2: return tile_sums<V, 2, false>(tile, part, x, group, reach, doubled);
    case 3: return tile_sums<V, 3, false>(tile, part, x, group, reach, doubled);
    case 4:
      if (reach == 0) return tile_sums<V, 4, false>(tile, part, x, group, reach, doubled);
      return tile_sums<V, 4, true>(tile, part, x, group, reach, doubled);
    default:
      if (reach == 0) return tile_sums<V, 5, false>(tile, part, x, group, reach, doubled);
      return tile_sums<V, 5, true>(tile, part, x, group, reach, doubled);
  }
}

// One strip times LANES lanes, from row `row` of x on.
template <class V, int LANES, bool WIDE>
Fault strip_product(const Weight& w, const Inputs& x, const Output& y, int64_t strip, int64_t row) {
  constexpr int kRowsOfX = WIDE ? LANES / 2 : LANES;
  constexpr int kParts = kTileRows / V::kRows;
  typename V::Floats acc[kParts][kRowsOfX] = {};
  Walk walk(w, strip);
  Tile tile;
  for (int64_t group = 0; group < w.groups; ++group) {
    const Fault fault = walk.next(group, tile);
    if (fault != Fault::kNone) return fault;
    if (tile.kind == 0) continue;
    const int8_t* codes = x.codes + (group * x.lanes + row * (WIDE ? 2 : 1)) * w.group;
    const int32_t* sums = x.sums + group * x.rows + row;
    const int32_t range = code_range(tile.kind, w.reach);
    prefetch(tile.scales, kAhead / 2);
    for (int part = 0; part < kParts; ++part) {
      typename V::Ints doubled[LANES];
      any_tile_sums<V, LANES>(tile, part * V::kRows, codes, w.group, w.reach, doubled);
      const TileScales<V> scale(w, tile, strip, part * V::kRows);
#pragma GCC unroll 8
      for (int i = 0; i < kRowsOfX; ++i)
        acc[part][i] = finish<V>(acc[part][i], row_sum<V, WIDE>(doubled, i), range, sums[i], scale);
    }
  }
  for (int i = 0; i < kRowsOfX; ++i) {
    float line[kTileRows];
    for (int part = 0; part < kParts; ++part) V::store_floats(line + part * V::kRows, acc[part][i]);
    store_row<V>(w, x, y, strip, row + i, line);
  }
  return Fault::kNone;
}

// One strip times rows [row, row_end) of x, the strip read again for each V::kLanes lanes.
template <class V, bool WIDE>
Fault strip_rows(const Weight& w, const Inputs& x, const Output& y, int64_t strip, int64_t row, int64_t row_end) {
  constexpr int kEach = WIDE ? 2 : 1;
  while (row < row_end) {
    const int64_t left = (row_end - row) * kEach;
    const int lanes = static_cast<int>(left < V::kLanes ? left : V::kLanes);
    Fault fault = Fault::kNone;
    switch (lanes) {
#define FOVEATE_LANES(n) \
  case n:                \
    if constexpr (n <= V::kLanes && n % kEach == 0) fault = strip_product<V, n, WIDE>(w, x, y, strip, row); \
    break;
      FOVEATE_LANES(1)
      FOVEATE_LANES(2)
      FOVEATE_LANES(3)
      FOVEATE_LANES(4)
      FOVEATE_LANES(5)
      FOVEATE_LANES(6)
      FOVEATE_LANES(7)
      FOVEATE_LANES(8)
#undef FOVEATE_LANES
      default: break;
    }
    if (fault != Fault::kNone) return fault;
    row += lanes / kEach;
  }
  return Fault::kNone;
}
