// Statistics: sums over rows, what rounding an input row changes, squared gradients of samples.
//
// Every instruction set gives the same bits: the arithmetic is always in 16 lanes, whatever the width of the machine's
// vectors. simd/kernels-inl.h includes this file after rounding/choose_codes-inl.h, which has the 16 lanes.

constexpr int64_t kInputBlock = 32;  // inputs of level 4 that share a step
constexpr float kBlockUnits = 8.0f, kFourCodes = 15.0f, kEightCode = 127.0f, kLeastLargest = 1e-30f;
constexpr float kInfinity = __builtin_inff();

inline void store_sixteen(float* p, const Sixteen& v) { __builtin_memcpy(p, &v, sizeof v); }
inline Sixteen least_of(const Sixteen& a, const Sixteen& b) { return a < b ? a : b; }
inline Sixteen most_of(const Sixteen& a, const Sixteen& b) { return a > b ? a : b; }

template <class Take>
inline float folded(const Sixteen& v, const Take& take) {
  float part[8];
  for (int i = 0; i < 8; ++i) part[i] = take(v[i], v[i + 8]);
  for (int width = 4; width; width /= 2)
    for (int i = 0; i < width; ++i) part[i] = take(part[i], part[i + width]);
  return part[0];
}
inline float least_in(const Sixteen& v) {
  return folded(v, [](float a, float b) { return a < b ? a : b; });
}
inline float most_in(const Sixteen& v) {
  return folded(v, [](float a, float b) { return a > b ? a : b; });
}

inline void row_sums(const float* x, int64_t stride, int64_t rows, int64_t columns, float* squares, RowTotals& totals) {
  Sixteen least = sixteen(kInfinity), most = sixteen(-kInfinity);
  const int64_t whole = columns / kCodes * kCodes;
  for (int64_t t = 0; t < rows; ++t) {
    const float* const row = x + t * stride;
    Sixteen sum{};
    for (int64_t k = 0; k < whole; k += kCodes) {
      const Sixteen v = load_sixteen(row + k);
      store_sixteen(squares + k, load_sixteen(squares + k) + v * v);
      sum += v;
      least = least_of(v, least);
      most = most_of(v, most);
    }
    float rest = total_of(sum);
    for (int64_t k = whole; k < columns; ++k) {
      const float v = row[k];
      squares[k] += v * v;
      rest += v;
      totals.least = v < totals.least ? v : totals.least;
      totals.most = v > totals.most ? v : totals.most;
    }
    totals.sum += static_cast<double>(rest);
  }
  const float low = least_in(least), high = most_in(most);
  totals.least = low < totals.least ? low : totals.least;
  totals.most = high > totals.most ? high : totals.most;
}

// Rounded to the nearest integer, halves to even; for magnitudes below 2^22.
inline Sixteen nearest(const Sixteen& v) { return (v + 0x1.8p23f) - 0x1.8p23f; }
inline float nearest(float v) { return (v + 0x1.8p23f) - 0x1.8p23f; }

// Calls each(block of 32 values of x, of toward, number of the block), the last one filled up with zeros.
template <class Each>
inline void blocks_of(const float* x, const float* toward, int64_t columns, const Each& each) {
  int64_t k = 0;
  for (; k + kInputBlock <= columns; k += kInputBlock) each(x + k, toward + k, k / kInputBlock);
  if (k == columns) return;
  float x_rest[kInputBlock] = {}, toward_rest[kInputBlock] = {};
  for (int64_t i = 0; i < columns - k; ++i) x_rest[i] = x[k + i], toward_rest[i] = toward[k + i];
  each(x_rest, toward_rest, k / kInputBlock);
}

inline void input_changes(const float* x, const float* toward, int64_t columns, float* ranges, double& four, double& eight) {
  float largest = kLeastLargest, widest = 0.0f;
  blocks_of(x, toward, columns, [&](const float* v, const float*, int64_t block) {
    const Sixteen a = load_sixteen(v), b = load_sixteen(v + kCodes);
    const float low = least_in(least_of(least_of(a, b), Sixteen{})), high = most_in(most_of(most_of(a, b), Sixteen{}));
    ranges[2 * block] = low;
    ranges[2 * block + 1] = high / kFourCodes - low / kFourCodes;
    widest = ranges[2 * block + 1] > widest ? ranges[2 * block + 1] : widest;
    largest = high > largest ? high : largest;
    largest = -low > largest ? -low : largest;
  });
  const float unit = widest / kBlockUnits, per_unit = 1.0f / unit;
  const float step8 = largest / kEightCode, per_step8 = kEightCode / largest;
  Sixteen sum4{}, sum8{};
  blocks_of(x, toward, columns, [&](const float* v, const float* to, int64_t block) {
    float times = __builtin_ceilf(ranges[2 * block + 1] * per_unit);
    times = times < 1.0f ? 1.0f : times > kBlockUnits ? kBlockUnits : times;
    const float inverse = per_unit / times;
    float zero = nearest(-ranges[2 * block] * inverse);
    zero = zero > kFourCodes ? kFourCodes : zero;
    const Sixteen lowest = sixteen(-zero), highest = sixteen(kFourCodes - zero);
    for (int64_t i = 0; i < kInputBlock; i += kCodes) {
      const Sixteen value = load_sixteen(v + i), direction = load_sixteen(to + i);
      const Sixteen code4 = least_of(highest, most_of(lowest, nearest(value * inverse))) * times;
      sum4 += (code4 * unit - value) * direction;
      sum8 += (nearest(value * per_step8) * step8 - value) * direction;
    }
  });
  four = widest > 0.0f && per_unit < kInfinity ? static_cast<double>(total_of(sum4)) : 0.0;
  eight = static_cast<double>(total_of(sum8));
}

// Outputs and columns of a tile of squared gradients, whose sums over a sample's rows are in registers.
constexpr int64_t kTileOutputs = 4;

// 16 columns in the vectors of the machine.
template <class V>
struct Columns {
  static constexpr int kParts = kCodes / V::kRows;
  typename V::Floats part[kParts];
};

template <class V, int OUTPUTS, int WIDE>
inline void gradient_tile(const SampleGradients& d, int64_t n, int64_t k) {
  for (int64_t b = 0; b < d.samples; ++b) {
    Columns<V> sum[OUTPUTS][WIDE] = {};
    for (int64_t t = 0; t < d.rows; ++t) {
      const float* const row = d.x + (b * d.rows + t) * d.columns + k;
      for (int o = 0; o < OUTPUTS; ++o) {
        const typename V::Floats g = V::splat(d.g[((n + o) * d.samples + b) * d.rows + t]);
        for (int w = 0; w < WIDE; ++w)
          for (int p = 0; p < Columns<V>::kParts; ++p)
            sum[o][w].part[p] = V::fma(g, V::floats(row + w * kCodes + p * V::kRows), sum[o][w].part[p]);
      }
    }
    for (int o = 0; o < OUTPUTS; ++o)
      for (int w = 0; w < WIDE; ++w)
        for (int p = 0; p < Columns<V>::kParts; ++p) {
          float* const to = d.total + (n + o) * d.columns + k + w * kCodes + p * V::kRows;
          V::store_floats(to, V::fma(sum[o][w].part[p], sum[o][w].part[p], V::floats(to)));
        }
  }
}

// The same for columns that are too few for a vector, and in the same order of additions.
inline void gradient_column(const SampleGradients& d, int64_t n, int64_t k) {
  float& total = d.total[n * d.columns + k];
  for (int64_t b = 0; b < d.samples; ++b) {
    float sum = 0.0f;
    for (int64_t t = 0; t < d.rows; ++t)
      sum = __builtin_fmaf(d.g[(n * d.samples + b) * d.rows + t], d.x[(b * d.rows + t) * d.columns + k], sum);
    total = __builtin_fmaf(sum, sum, total);
  }
}

template <class V>
inline void squared_gradients(const SampleGradients& d, int64_t column, int64_t column_end) {
  constexpr int kWide = V::kRows == kCodes ? 4 : 1;
  const int64_t tiled = d.outputs / kTileOutputs * kTileOutputs;
  int64_t k = column;
  for (; k + kWide * kCodes <= column_end; k += kWide * kCodes) {
    for (int64_t n = 0; n < tiled; n += kTileOutputs) gradient_tile<V, kTileOutputs, kWide>(d, n, k);
    for (int64_t n = tiled; n < d.outputs; ++n) gradient_tile<V, 1, kWide>(d, n, k);
  }
  for (; k + kCodes <= column_end; k += kCodes)
    for (int64_t n = 0; n < d.outputs; ++n) gradient_tile<V, 1, 1>(d, n, k);
  for (; k < column_end; ++k)
    for (int64_t n = 0; n < d.outputs; ++n) gradient_column(d, n, k);
}

template <class V>
constexpr CollectKernels collect_kernels_of() {
  return {row_sums, input_changes, squared_gradients<V>};
}
