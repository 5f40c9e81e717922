// What happens to rows of x and y, and to rows of the dense weight: quantize, store, unpack, embed.
//
// Quantization is defined to the bit: inv = q_max / max|x| in float32, code = round_half_even(x * inv), scale =
// max|x| / q_max. Where inv overflows (max|x| is 0, or nearly) the row is zeros with scale 0; where max|x| is not
// finite the codes are zeros and the scale NaN. Rounding adds 1.5 * 2^23 in float32, where the last place is 1: half to
// even, on every machine. Compile with -ffp-contract=off: a fused product would round once where this rounds twice.
//
// Included after tile.h, see there.

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

// Nearest even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// Row `row` of x as float32.
template <class V>
void load_row(const Source& x, int64_t row, float* line) {
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

// One group of one row: codes of 8 bits, or of 16 in two lanes, and their sum.
template <bool WIDE>
int32_t quantize_group(const float* line, float inverse, int group, int8_t* codes) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  int32_t sum = 0;
  for (int k = 0; k < group; ++k) {
    const int32_t code = static_cast<int32_t>(bits_of(line[k] * inverse + kRound)) - 0x4B400000;
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

template <class V>
Fault quantize(const Source& x, const Inputs& q, int64_t row, int64_t row_end) {
  const int64_t padded = q.groups * q.group;
  std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(2 * padded)]);
  float* line = scratch.get();
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
    int32_t top = 0;  // of |x| as integers, which order as the floats do, NaN last
    for (int64_t k = 0; k < padded; ++k) {
      const int32_t bits = static_cast<int32_t>(bits_of(ordered[k]) & 0x7FFFFFFFu);
      top = bits > top ? bits : top;
    }
    const float largest = float_of(static_cast<uint32_t>(top));
    const bool finite = top < 0x7F800000;
    const float inverse = q.q_max / largest;
    const bool usable = finite && bits_of(inverse) < 0x7F800000u;
    q.scales[row] = usable ? largest / q.q_max : finite ? 0.0f : float_of(0x7FC00000u);
    for (int64_t group = 0; group < q.groups; ++group) {
      int8_t* codes = q.codes + (group * q.lanes + row * (q.wide ? 2 : 1)) * q.group;
      float& sum = q.sums[group * q.rows + row];
      if (!usable) {
        std::memset(codes, 0, static_cast<size_t>(q.wide ? 2 * q.group : q.group));
        sum = 0.0f;
      } else if (q.wide) {
        sum = static_cast<float>(quantize_group<true>(ordered + group * q.group, inverse, q.group, codes));
      } else {
        sum = static_cast<float>(quantize_group<false>(ordered + group * q.group, inverse, q.group, codes));
      }
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
  Walk walk(w);
  walk.begin(strip);
  Tile tile;
  alignas(64) uint8_t codes[kTileRows * kMaxGroup];
  float step[kTileRows], offset[kTileRows];
  for (int64_t group = 0; group < w.groups; ++group) {
    const Fault fault = walk.next(group, tile);
    if (fault != Fault::kNone) return fault;
    const int64_t first = group * w.group;
    const int64_t left = w.columns - first;
    const int columns = static_cast<int>(left < w.group ? left : w.group);
    if (tile.kind == 0) {
      for (int r = row; r < row_end; ++r)
        std::memset(out + (r - row) * w.columns + first, 0, static_cast<size_t>(columns) * sizeof(float));
      continue;
    }
    unpack_tile<V>(tile, w.group, w.reach, codes);
    for (int r = 0; r < kTileRows; r += V::kRows) {
      const TileScales<V> scale(tile.scales, r, unit_of<V>(w, tile.kind, strip, r));
      V::store_floats(step + r, scale.step);
      V::store_floats(offset + r, scale.offset);
    }
    const int32_t range = code_range(tile.kind, w.reach);
    for (int r = row; r < row_end; ++r)
      expand_row(codes, r, kCodeShift[tile.kind], range, step[r], offset[r], columns, out + (r - row) * w.columns + first);
  }
  return Fault::kNone;
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
