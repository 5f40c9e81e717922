// The product for few lanes of x: codes go from the planes into the multiplier, and never back to memory.
//
// At one lane the planes' bytes are the time, so a strip is one forward pass over each plane's stream. Sums are integers
// within a group and exact; groups are added in ascending order in float32, so a row's result does not depend on how
// rows are batched. That arithmetic is `Finish`, shared with planes/panel-inl.h: the only place where it is written.
//
// simd/kernels-inl.h includes this file after planes/rows-inl.h.

// How a tile's sums become a part of y, for `V::kRows` rows of the weight. With D = 2 sum(c x) - C sum(x):
//
//     acc = fma(float(D), s * unit, acc)        acc = fma(sum(x), m, acc)
//
// What comes in is sums of 2^shift c (see planes/tile-inl.h). Of one lane they are below 2^22, and so is half of C sum(x): float32
// holds 2^shift D / 2 exactly, and s * unit takes the power of two. Sums of two lanes need integers, and round once.
template <class V>
struct Finish {
  typename V::Floats step, offset;
  float centre;   // 2^shift C / 2
  int32_t range;  // C
  int shift;

  Finish() = default;
  inline __attribute__((always_inline)) Finish(const Tile& tile, int row, typename V::Floats unit, int anchor_step, bool wide) {
    const TileScales<V> scale(tile, row, unit);
    shift = kCodeShift[tile.kind];
    range = code_range(tile.kind, anchor_step);
    centre = 0.5f * static_cast<float>(range << shift);
    step = wide ? scale.step : scale.step * (2.0f / static_cast<float>(1 << shift));
    offset = scale.offset;
  }

  // Adds row `row` of x: its one lane, or its two.
  template <bool WIDE, int LANES>
  inline __attribute__((always_inline)) typename V::Floats add(
      typename V::Floats acc, const typename V::Ints (&lane)[LANES], int row, float sum) const {
    const typename V::Floats sums = V::splat(sum);
    typename V::Floats d;
    if constexpr (WIDE) {
      const typename V::Ints doubled = ((lane[2 * row] << 1 >> shift) << 8) + (lane[2 * row + 1] << 1 >> shift);
      d = V::to_float(doubled - range * static_cast<int32_t>(sum));
    } else {
      d = V::fma(sums, V::splat(-centre), V::to_float(lane[row]));
    }
    return V::fma(sums, offset, V::fma(d, step, acc));
  }
};

// sums[i] = sum(2^shift c x) of a tile's rows and lane i. With GROUP the size of the group is known beforehand.
template <class V, int KIND, bool REACHED, int LANES, int GROUP>
inline __attribute__((always_inline)) void tile_sums(
    Reader<V, KIND>& reader, const int8_t* x, int group, int anchor_step, typename V::Ints (&sums)[LANES]) {
  using Words = typename V::Words;
  // one lane alone would wait for its own sums: it has more of them
  constexpr bool kInPlace = KIND == 1 && LANES <= V::kInPlaceLanes;
  constexpr int kChains = kInPlace || LANES <= 2 ? 4 : 2;
  // codes that overlap take longer to merge than a lane or two to multiply twice
  constexpr bool kBytes = V::kByteCodes && !(REACHED && LANES <= 2);
  typename V::template Sums<kChains> high[LANES] = {}, low[LANES] = {};
  auto step = [&](auto odd, int pair) __attribute__((always_inline)) {
    constexpr int kOdd = decltype(odd)::value;
    const int8_t* x_step = x + 32 * pair + 16 * kOdd;
    Words field[4];
    if constexpr (kInPlace) {
      V::split_pairs(reader.pairs(2 * pair + kOdd), field);
#pragma GCC unroll 8
      for (int i = 0; i < LANES; ++i) V::add_split(high[i], field, x_step + i * group);
    } else if constexpr (KIND <= 3) {
      V::split(reader.template anchor<kOdd>(pair), field);
#pragma GCC unroll 8
      for (int i = 0; i < LANES; ++i) V::add_split(high[i], field, x_step + i * group);
    } else if constexpr (kBytes) {
      const Nibbles<V> a = reader.template anchor<kOdd>(pair);
      byte_fields<V, REACHED>(a, reader.template residual<kOdd>(pair), anchor_step, field);
#pragma GCC unroll 8
      for (int i = 0; i < LANES; ++i) V::add_bytes(high[i], field, x_step + i * group);
    } else {
      const Nibbles<V> a = reader.template anchor<kOdd>(pair), b = reader.template residual<kOdd>(pair);
      V::split(a, field);
#pragma GCC unroll 8
      for (int i = 0; i < LANES; ++i) V::add_split(high[i], field, x_step + i * group);
      V::split(b, field);
#pragma GCC unroll 8
      for (int i = 0; i < LANES; ++i) V::add_split(low[i], field, x_step + i * group);
    }
  };
  const auto both = [&](int pair) __attribute__((always_inline)) {
    reader.begin_pair(pair);
    step(std::integral_constant<int, 0>{}, pair);
    step(std::integral_constant<int, 1>{}, pair);
  };
  if constexpr (GROUP > 0) {
#pragma GCC unroll 4
    for (int pair = 0; pair < GROUP / 32; ++pair) both(pair);
  } else {
    for (int pair = 0; pair < group / 32; ++pair) both(pair);
  }
#pragma GCC unroll 8
  for (int i = 0; i < LANES; ++i) {
    if constexpr (kInPlace) sums[i] = V::total_pairs(high[i]);
    else if constexpr (KIND <= 3) sums[i] = V::total_split(high[i]);
    else if constexpr (kBytes) sums[i] = V::total_bytes(high[i]);
    else sums[i] = V::total_split(high[i]) * (REACHED ? anchor_step : kOwnAnchorStep) + V::total_split(low[i]);
  }
}

// Adds one tile of any level to the rows' accumulators: where levels differ from tile to tile, all that is inline.
template <class V, int LANES, bool WIDE>
inline __attribute__((always_inline)) void tile_product(const Weight& w, const Tile& tile, int64_t strip, int64_t ahead,
                                                        const int8_t* codes, const float* x_sums, typename V::Floats* acc) {
  constexpr int kRowsOfX = WIDE ? LANES / 2 : LANES;
  for (int part = 0; part < kTileRows / V::kRows; ++part) {
    const int first = part * V::kRows;
    typename V::Ints sums[LANES];
    auto read = [&](auto kind, auto reached) __attribute__((always_inline)) {
      Reader<V, decltype(kind)::value> reader(tile, 4 * first, ahead);
      tile_sums<V, decltype(kind)::value, decltype(reached)::value, LANES, 0>(reader, codes, w.group, w.anchor_step, sums);
    };
    switch (tile.kind) {
      case 1: read(std::integral_constant<int, 1>{}, std::false_type{}); break;
      case 2: read(std::integral_constant<int, 2>{}, std::false_type{}); break;
      case 3: read(std::integral_constant<int, 3>{}, std::false_type{}); break;
      case 4:
        if (w.anchor_step == kOwnAnchorStep) read(std::integral_constant<int, 4>{}, std::false_type{});
        else read(std::integral_constant<int, 4>{}, std::true_type{});
        break;
      default:
        if (w.anchor_step == kOwnAnchorStep) read(std::integral_constant<int, 5>{}, std::false_type{});
        else read(std::integral_constant<int, 5>{}, std::true_type{});
    }
    const Finish<V> finish(tile, first, unit_of<V>(w, tile.kind, strip, first), w.anchor_step, WIDE);
#pragma GCC unroll 8
    for (int i = 0; i < kRowsOfX; ++i) acc[part * kRowsOfX + i] = finish.template add<WIDE>(acc[part * kRowsOfX + i], sums, i, x_sums[i]);
  }
}

// Adds the tiles of one level from `group` to `end` to the rows' accumulators.
template <class V, int KIND, bool REACHED, int LANES, bool WIDE, int GROUP>
void run_of_group(const Weight& w, const Inputs& x, Tile tile, int64_t strip, int64_t row, int64_t group, int64_t end,
                 TilePrefetcher* prefetcher, int64_t ahead, typename V::Floats* to) {
  constexpr int kRowsOfX = WIDE ? LANES / 2 : LANES;
  constexpr int kParts = kTileRows / V::kRows;
  typename V::Floats acc[kParts][kRowsOfX], unit[kParts];
  for (int part = 0; part < kParts; ++part) {
    unit[part] = unit_of<V>(w, KIND, strip, part * V::kRows);
    for (int i = 0; i < kRowsOfX; ++i) acc[part][i] = to[part * kRowsOfX + i];
  }
  tile.kind = KIND;
  const int64_t lanes_apart = x.lanes * w.group;
  const int8_t* codes = x.codes + group * lanes_apart + row * (WIDE ? 2 : 1) * w.group;
  const float* x_sums = x.sums + group * x.rows + row;
  for (; group < end; ++group) {
    if (prefetcher) prefetcher->step();
    else prefetch(tile.scales, kScalesAhead);
    for (int part = 0; part < kParts; ++part) {
      typename V::Ints sums[LANES];
      Reader<V, KIND> reader(tile, 4 * part * V::kRows, ahead);
      tile_sums<V, KIND, REACHED, LANES, GROUP>(reader, codes, w.group, w.anchor_step, sums);
      const Finish<V> finish(tile, part * V::kRows, unit[part], w.anchor_step, WIDE);
#pragma GCC unroll 8
      for (int i = 0; i < kRowsOfX; ++i) acc[part][i] = finish.template add<WIDE>(acc[part][i], sums, i, x_sums[i]);
    }
    for (int p = 0; p < KIND; ++p) tile.planes[p] += tile_bytes(p, w.group);
    tile.scales += 2 * kTileRows;
    codes += lanes_apart;
    x_sums += x.rows;
  }
  for (int part = 0; part < kParts; ++part)
    for (int i = 0; i < kRowsOfX; ++i) to[part * kRowsOfX + i] = acc[part][i];
}

// At one lane a tile is so little work that a loop over its columns would be a large part of it.
template <class V, int KIND, bool REACHED, int LANES, bool WIDE, class... Arguments>
inline __attribute__((always_inline)) void run_product(const Weight& w, Arguments&... arguments) {
  if constexpr (LANES == 1) {
    if (w.group == 128) return run_of_group<V, KIND, REACHED, LANES, WIDE, 128>(w, arguments...);
    if (w.group == 64) return run_of_group<V, KIND, REACHED, LANES, WIDE, 64>(w, arguments...);
  }
  run_of_group<V, KIND, REACHED, LANES, WIDE, 0>(w, arguments...);
}

// One strip times LANES lanes, from row `row` of x on. `cursor` is at the strip's beginning.
template <class V, int LANES, bool WIDE>
Fault strip_product(const Weight& w, const Inputs& x, const Output& y, TileCursor& cursor, TilePrefetcher* prefetcher, int64_t strip, int64_t row) {
  constexpr int kRowsOfX = WIDE ? LANES / 2 : LANES;
  constexpr int kParts = kTileRows / V::kRows;
  typename V::Floats acc[kParts * kRowsOfX] = {};
  Tile tile;
  int64_t end;
  for (int64_t group = 0; group < w.groups; group = end) {
    if (!cursor.at_uniform_run(group)) {
      end = group + 1;
      const Fault fault = cursor.next(group, tile);
      if (fault != Fault::kNone) return fault;
      if (prefetcher) prefetcher->step();
      if (tile.kind == 0) continue;
      if (!prefetcher) prefetch(tile.scales, kScalesAhead);
      const int8_t* codes = x.codes + (group * x.lanes + row * (WIDE ? 2 : 1)) * w.group;
      tile_product<V, LANES, WIDE>(w, tile, strip, prefetcher ? 0 : kAheadMixed, codes, x.sums + group * x.rows + row, acc);
      continue;
    }
    const Fault fault = cursor.run(group, tile, end);
    if (fault != Fault::kNone) return fault;
    const int64_t ahead = prefetcher ? 0 : cursor.ahead(tile.kind);
    switch (tile.kind) {
      case 0:
        for (; prefetcher && group < end; ++group) prefetcher->step();
        break;
      case 1: run_product<V, 1, false, LANES, WIDE>(w, x, tile, strip, row, group, end, prefetcher, ahead, acc); break;
      case 2: run_product<V, 2, false, LANES, WIDE>(w, x, tile, strip, row, group, end, prefetcher, ahead, acc); break;
      case 3: run_product<V, 3, false, LANES, WIDE>(w, x, tile, strip, row, group, end, prefetcher, ahead, acc); break;
      case 4:
        if (w.anchor_step == kOwnAnchorStep) run_product<V, 4, false, LANES, WIDE>(w, x, tile, strip, row, group, end, prefetcher, ahead, acc);
        else run_product<V, 4, true, LANES, WIDE>(w, x, tile, strip, row, group, end, prefetcher, ahead, acc);
        break;
      default:
        if (w.anchor_step == kOwnAnchorStep) run_product<V, 5, false, LANES, WIDE>(w, x, tile, strip, row, group, end, prefetcher, ahead, acc);
        else run_product<V, 5, true, LANES, WIDE>(w, x, tile, strip, row, group, end, prefetcher, ahead, acc);
    }
  }
  for (int i = 0; i < kRowsOfX; ++i) {
    float line[kTileRows];
    for (int part = 0; part < kParts; ++part) V::store_floats(line + part * V::kRows, acc[part * kRowsOfX + i]);
    const Fault fault = add_exact_tiles<V, WIDE>(w, x, strip, row + i, row + i + 1, line, 0);
    if (fault != Fault::kNone) return fault;
    store_row<V>(w, x, y, strip, row + i, line);
  }
  return Fault::kNone;
}

// One strip times rows [row, row_end) of x, read again for each V::kLanes lanes.
template <class V, bool WIDE>
Fault strip_rows(const Weight& w, const Inputs& x, const Output& y, TileCursor& cursor, TilePrefetcher& ahead, int64_t strip, int64_t row,
                 int64_t row_end) {
  const int64_t first = row;
  TilePrefetcher* prefetcher = nullptr;
  cursor.begin(strip);
  if (cursor.gaps) {
    ahead.begin(strip);
    prefetcher = &ahead;
  }
  constexpr int kEach = WIDE ? 2 : 1;
  while (row < row_end) {
    const int64_t left = (row_end - row) * kEach;
    const int lanes = static_cast<int>(left < V::kLanes ? left : V::kLanes);
    Fault fault = Fault::kNone;
    if (row != first) cursor.begin(strip);
    switch (lanes) {
#define FOVEATE_LANES(n) \
  case n:                \
    if constexpr (n <= V::kLanes && n % kEach == 0) fault = strip_product<V, n, WIDE>(w, x, y, cursor, prefetcher, strip, row); \
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
