// What happens to rows of x and y, and to rows of the dense weight: quantize, store, unpack, embed.
//
// Quantization is defined to the bit, in float32 (docs/format.md, "Inputs"). At 8 and 16 bits: inv = q_max / max|x|,
// code = round_half_even(x * inv), scale = max|x| / q_max. At 4 bits each block of 32 has a zero point and a step of 1 to
// 8 units, the unit being the row's scale, and codes are counted in units: products take them as they are. A range given
// for all rows stands, at 4 and 8 bits, for each row's own: codes are held within it, and blocks are alike. Where the
// inverse overflows (all zeros, or nearly) the row is zeros with scale 0; where a value is not finite the codes are zeros
// and the scale NaN. Rounding adds 1.5 * 2^23 in float32, where the last place is 1: half to even, on every machine.
// Compile with -ffp-contract=off: a fused product would round once where this rounds twice.
//
// simd/kernels-inl.h includes this file after planes/exact-inl.h.

// Nearest even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// Row `row` of x as float32.
template <class V>
void load_row(const InputRows& x, int64_t row, float* line) {
  if (x.columns == 0) return;  // and there may be no memory
  const int64_t offset = (x.row_of ? x.row_of[row] : row) * x.row_stride;
  if (x.type == Type::kFloat32) {
    std::memcpy(line, static_cast<const float*>(x.data) + offset, static_cast<size_t>(x.columns) * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(x.data) + offset;
  int64_t k = 0;
  if (x.type == Type::kBFloat16) {
    for (; k < x.columns; ++k) line[k] = float_of(static_cast<uint32_t>(from[k]) << 16);
    return;
  }
  for (; k + V::kRows <= x.columns; k += V::kRows) V::store_floats(line + k, V::halves(from + k));
  uint16_t tail[V::kRows] = {};
  float wide[V::kRows];
  for (int64_t i = k; i < x.columns; ++i) tail[i - k] = from[i];
  V::store_floats(wide, V::halves(tail));
  for (int64_t i = k; i < x.columns; ++i) line[i] = wide[i - k];
}

// How values become codes: code = round(x * inverse) within least..most, x ~ code * step.
struct Grid {
  float inverse, step, least, most;
  bool usable() const { return bits_of(inverse) < 0x7F800000u; }
};

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
constexpr int kBlock = 32;             // inputs of level 4 that share a step and a zero point

// The step that 16 codes need from `low` (at most 0) to `high` (at least 0).
inline float step_of(float low, float high) { return high / 15.0f - low / 15.0f; }

// 16 codes around a zero point.
inline Grid grid_from(float low, float inverse, float step) {
  const float from = -low * inverse;
  const float zero = from < 15.0f ? from + kRound - kRound : 15.0f;
  return {inverse, step, -zero, 15.0f - zero};
}

// One grid for values from `low` to `high`, both finite.
inline Grid grid_of(int level, float low, float high) {
  if (level == 4) {
    low = low < 0.0f ? low : 0.0f;
    high = high > 0.0f ? high : 0.0f;
    const float step = step_of(low, high);
    return grid_from(low, 1.0f / step, step);
  }
  const float below = low < 0.0f ? -low : low, above = high < 0.0f ? -high : high;
  const float largest = below > above ? below : above;
  const float q_max = level == 8 ? 127.0f : 32512.0f;
  return {q_max / largest, largest / q_max, -q_max, q_max};
}

// One group of one row: codes of 8 bits, or of 16 in two lanes, and their sum.
template <bool WIDE, bool HELD>
int32_t quantize_group(const float* line, const Grid& grid, int group, int8_t* codes) {
  int32_t sum = 0;
  for (int k = 0; k < group; ++k) {
    float value = line[k] * grid.inverse;
    if constexpr (HELD) {
      value = value > grid.least ? value : grid.least;
      value = value < grid.most ? value : grid.most;
    }
    const int32_t code = static_cast<int32_t>(bits_of(value + kRound)) - 0x4B400000;
    sum += code;
    if constexpr (WIDE) {
      const int8_t low = static_cast<int8_t>(code);
      codes[k] = static_cast<int8_t>((code - low) >> 8);
      codes[k + group] = low;
    } else {
      codes[k] = static_cast<int8_t>(code);
    }
  }
  return sum;
}

// The least and the greatest of a row and 0; false where a value is not finite. Floats are compared as integers, which
// order as they do once the negative ones are turned over, and which compilers find least and greatest of in lanes.
inline bool extremes(const float* line, int64_t count, float& low, float& high) {
  int32_t least = 0, most = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int32_t bits = static_cast<int32_t>(bits_of(line[k]));
    const int32_t key = bits ^ ((bits >> 31) & 0x7FFFFFFF);
    least = key < least ? key : least;
    most = key > most ? key : most;
  }
  low = float_of(static_cast<uint32_t>(least ^ ((least >> 31) & 0x7FFFFFFF)));
  high = float_of(static_cast<uint32_t>(most));
  return most < 0x7F800000 && (bits_of(low) & 0x7FFFFFFFu) < 0x7F800000u;
}

// A row at level 4: each block's extremes, then the row's unit, then the codes. `limits` holds two floats a block.
// Returns the row's scale.
inline float quantize_blocks(const float* line, const Inputs& q, int64_t row, float* limits) {
  const int64_t blocks = q.groups * q.group / kBlock;
  float largest = 0.0f;
  bool finite = true;
  for (int64_t block = 0; block < blocks; ++block) {
    float* const at = limits + 2 * block;
    finite &= extremes(line + block * kBlock, kBlock, at[0], at[1]);
    const float step = step_of(at[0], at[1]);
    largest = step > largest ? step : largest;
  }
  const float unit = 0.125f * largest, inverse = 1.0f / unit;
  const bool usable = finite && bits_of(inverse) < 0x7F800000u;
  for (int64_t group = 0; group < q.groups; ++group) {
    int8_t* codes = q.codes + (group * q.lanes + row) * q.group;
    int32_t sum = 0;
    if (!usable) std::memset(codes, 0, static_cast<size_t>(q.group));
    else
      for (int k = 0; k < q.group; k += kBlock) {
        const int64_t block = (group * q.group + k) / kBlock;
        const float low = limits[2 * block], units = step_of(low, limits[2 * block + 1]) * inverse;
        int32_t times = static_cast<int32_t>(units);
        times += static_cast<float>(times) < units;
        times = times < 1 ? 1 : times > 8 ? 8 : times;
        const Grid grid = grid_from(low, inverse / static_cast<float>(times), unit);
        sum += times * quantize_group<false, true>(line + block * kBlock, grid, kBlock, codes + k);
        for (int i = k; i < k + kBlock; ++i) codes[i] = static_cast<int8_t>(codes[i] * times);
      }
    q.sums[group * q.rows + row] = static_cast<float>(sum);
  }
  return usable ? unit : finite ? 0.0f : float_of(0x7FC00000u);
}

template <class V>
Fault quantize(const InputRows& x, const Inputs& q, int64_t row, int64_t row_end) {
  const int64_t padded = q.groups * q.group;
  std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(2 * padded + 2 * padded / kBlock)]);
  float* line = scratch.get();
  // a range that holds nothing, or is not finite, is none
  const bool finite_range = q.low - q.low == 0.0f && q.high - q.high == 0.0f;
  const Grid fixed = finite_range && q.level != 16 ? grid_of(q.level, q.low, q.high) : Grid{float_of(0x7FC00000u), 0.0f, 0.0f, 0.0f};
  const bool is_fixed = fixed.usable();
  for (; row < row_end; ++row) {
    float* ordered = line;
    load_row<V>(x, row, line);
    if (x.order) {
      ordered = line + padded;
      for (int64_t k = 0; k < x.columns; ++k) {
        if (static_cast<uint64_t>(x.order[k]) >= static_cast<uint64_t>(x.columns)) return Fault::kOrder;
        ordered[k] = line[x.order[k]];
      }
    }
    for (int64_t k = x.columns; k < padded; ++k) ordered[k] = 0.0f;
    if (q.level == 4 && !is_fixed) {
      q.scales[row] = quantize_blocks(ordered, q, row, line + 2 * padded);
      continue;
    }
    float low, high;
    const bool finite = extremes(ordered, padded, low, high);
    const Grid grid = is_fixed ? fixed : grid_of(q.level, low, high);
    const bool usable = finite && grid.usable();
    q.scales[row] = usable ? grid.step : finite ? 0.0f : float_of(0x7FC00000u);
    for (int64_t group = 0; group < q.groups; ++group) {
      int8_t* codes = q.codes + (group * q.lanes + row * (q.wide ? 2 : 1)) * q.group;
      const float* from = ordered + group * q.group;
      int32_t sum = 0;
      if (!usable) std::memset(codes, 0, static_cast<size_t>(q.wide ? 2 * q.group : q.group));
      else if (q.wide) sum = quantize_group<true, false>(from, grid, q.group, codes);
      else if (is_fixed) sum = quantize_group<false, true>(from, grid, q.group, codes);
      else sum = quantize_group<false, false>(from, grid, q.group, codes);
      q.sums[group * q.rows + row] = static_cast<float>(sum);
    }
  }
  return Fault::kNone;
}

// y = acc * scale (+ bias) for 16 rows of the weight and row `row` of x, in the type of y. Whole strips in float32 go
// straight to y, and others by copies whose size the compiler knows: at many rows of x this is a tenth of the time.
template <class V>
void store_row(const Weight& w, const Inputs& x, const Output& y, int64_t strip, int64_t row, const float* acc) {
  const int64_t first = strip * kTileRows;
  const int64_t left = w.rows - first;
  const int count = static_cast<int>(left < kTileRows ? left : kTileRows);
  const int64_t offset = (y.row_of ? y.row_of[row] : row) * y.row_stride + first;
  const typename V::Floats scale = V::splat(x.scales[row]);
  if (count == kTileRows && y.type == Type::kFloat32) {
    float* const to = static_cast<float*>(y.data) + offset;
    for (int n = 0; n < kTileRows; n += V::kRows) {
      const typename V::Floats scaled = V::floats(acc + n) * scale;
      V::store_floats(to + n, w.bias ? scaled + V::floats(w.bias + first + n) : scaled);
    }
    return;
  }
  float line[kTileRows];
  for (int n = 0; n < kTileRows; n += V::kRows) V::store_floats(line + n, V::floats(acc + n) * scale);
  if (w.bias)
    for (int n = 0; n < count; ++n) line[n] += w.bias[first + n];
  if (y.type == Type::kFloat32) {
    std::memcpy(static_cast<float*>(y.data) + offset, line, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  uint16_t half[kTileRows];
  if (y.type == Type::kBFloat16)
    for (int n = 0; n < kTileRows; ++n) half[n] = to_bfloat16(line[n]);
  else
    for (int n = 0; n < kTileRows; n += V::kRows) V::store_halves(half + n, V::floats(line + n));
  uint16_t* const to = static_cast<uint16_t*>(y.data) + offset;
  if (count == kTileRows) std::memcpy(to, half, sizeof(half));
  else std::memcpy(to, half, static_cast<size_t>(count) * sizeof(uint16_t));
}

// One row of one unpacked tile: w = fma(2c - C, step, offset).
inline void expand_row(const uint8_t* codes, int row, int shift, int32_t range, float step, float offset, int columns, float* out) {
  uint8_t line[kMaxGroup];
  for (int quad = 0; quad < (columns + 3) / 4; ++quad) std::memcpy(line + 4 * quad, codes + 64 * quad + 4 * row, 4);
  for (int k = 0; k < columns; ++k) out[k] = __builtin_fmaf(static_cast<float>((2 * line[k] >> shift) - range), step, offset);
}

// Rows [row, row_end) of a strip of the dense weight, to consecutive rows of `out`.
template <class V>
Fault unpack_strip(const Weight& w, int64_t strip, int row, int row_end, float* out) {
  TileCursor cursor(w);
  cursor.begin(strip);
  Tile tile;
  alignas(64) uint8_t codes[kTileRows * kMaxGroup];
  float step[kTileRows], offset[kTileRows];
  for (int64_t group = 0; group < w.groups; ++group) {
    const Fault fault = cursor.next(group, tile);
    if (fault != Fault::kNone) return fault;
    const int64_t first = group * w.group;
    const int64_t left = w.columns - first;
    const int columns = static_cast<int>(left < w.group ? left : w.group);
    if (tile.kind == 0) {
      for (int r = row; r < row_end; ++r)
        std::memset(out + (r - row) * w.columns + first, 0, static_cast<size_t>(columns) * sizeof(float));
      continue;
    }
    unpack_tile<V>(tile, w.group, w.anchor_step, codes);
    for (int r = 0; r < kTileRows; r += V::kRows) {
      const TileScales<V> scale(tile, r, unit_of<V>(w, tile.kind, strip, r));
      V::store_floats(step + r, scale.step);
      V::store_floats(offset + r, scale.offset);
    }
    const int32_t range = code_range(tile.kind, w.anchor_step);
    for (int r = row; r < row_end; ++r)
      expand_row(codes, r, kCodeShift[tile.kind], range, step[r], offset[r], columns, out + (r - row) * w.columns + first);
  }
  if (!w.exact.offsets) return Fault::kNone;
  return exact_tiles_of<V>(w, strip, [&](int64_t group, const float* wide) {
    const int64_t first = group * w.group, end = first + w.group < w.columns ? first + w.group : w.columns;
    for (int r = row; r < row_end; ++r)
      for (int64_t k = first; k < end; ++k) out[(r - row) * w.columns + k] = wide[(k - first) * kTileRows + r];
  });
}

template <class V>
Fault unpack(const Weight& w, float* out, int64_t strip, int64_t strip_end) {
  for (const int64_t begin = strip; strip < strip_end; ++strip) {
    const int64_t left = w.rows - strip * kTileRows;
    const int rows = static_cast<int>(left < kTileRows ? left : kTileRows);
    const Fault fault = unpack_strip<V>(w, strip, 0, rows, out + (strip - begin) * kTileRows * w.columns);
    if (fault != Fault::kNone) return fault;
  }
  return Fault::kNone;
}

template <class V>
Fault embed(const Weight& w, const int64_t* indices, float* out, int64_t i, int64_t i_end) {
  for (; i < i_end; ++i) {
    const int row = static_cast<int>(indices[i] % kTileRows);
    const Fault fault = unpack_strip<V>(w, indices[i] / kTileRows, row, row + 1, out + i * w.columns);
    if (fault != Fault::kNone) return fault;
  }
  return Fault::kNone;
}
