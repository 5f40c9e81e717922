// The codes of a weight, one element after another: by error feedback and by coordinate descent.
//
// Every instruction set gives the same bits: the arithmetic is always in 16 lanes, whatever the width of the machine's
// vectors. simd/kernels-inl.h includes this file.

constexpr int kCodes = 16;
typedef float Sixteen __attribute__((vector_size(64)));

inline Sixteen sixteen(float v) { return Sixteen{} + v; }

inline Sixteen load_sixteen(const float* p) {
  Sixteen v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline float total_of(const Sixteen& v) {
  float part[8];
  for (int i = 0; i < 8; ++i) part[i] = v[i] + v[i + 8];
  for (int width = 4; width; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

typedef int32_t SixteenInts __attribute__((vector_size(64)));
typedef int32_t EightInts __attribute__((vector_size(32)));
typedef int32_t FourInts __attribute__((vector_size(16)));

// The lane of the least of 16 costs, none negative. Costs that differ by less than 2^-19 are alike, and the first of
// those is taken: the lane stands in the last bits of the cost, so that one comparison finds both.
inline int least_lane(const Sixteen& cost) {
  constexpr SixteenInts kLanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const SixteenInts key = ((SixteenInts)cost & ~15) | kLanes;
  EightInts halves[2];
  __builtin_memcpy(halves, &key, sizeof halves);
  const EightInts eight = halves[0] < halves[1] ? halves[0] : halves[1];
  FourInts quarters[2];
  __builtin_memcpy(quarters, &eight, sizeof quarters);
  const FourInts four = quarters[0] < quarters[1] ? quarters[0] : quarters[1];
  const int32_t left = four[0] < four[1] ? four[0] : four[1], right = four[2] < four[3] ? four[2] : four[3];
  return (left < right ? left : right) & 15;
}

// The values of all anchors at levels 2, 3 and 4, in steps from the offset, before gains.
inline const Sixteen* anchor_values() {
  static const struct Table {
    Sixteen of[kAnchors];
    Table() {
      for (int a = 0; a < kCodes; ++a) {
        float values[kStreams];
        code_values(a, 0, 1.0f, 1.0f, 1.0f, values);
        for (int s = 0; s < kAnchors; ++s) of[s][a] = values[s];
      }
    }
  } table;
  return table.of;
}

struct Codes {
  int anchor, residual;
};

// The codes of least cost, sum over streams of level_weight * (wanted - value)^2, of all 256.
inline Codes best_codes(const float (&wanted)[kStreams], const float (&level_weights)[kStreams], float widening, float gain2, float gain3) {
  const Sixteen* const table = anchor_values();
  const float gains[kAnchors] = {gain2, gain3, 1.0f};
  Sixteen cost{};
  for (int s = 0; s < kAnchors; ++s) {
    const Sixteen left = wanted[s] - table[s] * gains[s];
    cost += left * left * level_weights[s];
  }
  // what is wanted of the residual at 6 and at 8 bits, in its own steps, counted from code 0
  const float per_step = 16.0f / widening;
  const Sixteen six = (wanted[3] - table[2]) * per_step + 7.5f, eight = (wanted[4] - table[2]) * per_step + 7.5f;
  const Sixteen near = eight < -1.0f ? sixteen(-1.0f) : eight > 16.0f ? sixteen(16.0f) : eight;
  const Sixteen rounded = (near + 0x1.8p23f) - 0x1.8p23f;
  Sixteen least = sixteen(0x1p120f), code = sixteen(0.0f);
  for (int q = 0; q < 4; ++q) {  // 6 bits see which four of the residuals it is of, 8 bits which of the four
    const float low = static_cast<float>(4 * q), high = low + 3.0f;
    const Sixteen residual = rounded < low ? sixteen(low) : rounded > high ? sixteen(high) : rounded;
    const Sixteen left6 = six - (low + 1.5f), left8 = eight - residual;
    const Sixteen both = left6 * left6 * level_weights[3] + left8 * left8 * level_weights[4];
    code = both < least ? residual : code;
    least = both < least ? both : least;
  }
  cost += least * (widening * widening / 256.0f);
  const int best = least_lane(cost);
  return {best, static_cast<int>(code[best])};
}

// Columns [at, at + WIDE vectors) of the product of each stream of a column with the metric of rows.
template <class V, int WIDE>
inline void weigh(const ColumnBlock& d, const float* column, int64_t at) {
  typename V::Floats sum[kStreams][WIDE] = {};
  for (int64_t i = 0; i < d.rows; ++i) {
    typename V::Floats row[WIDE];
    for (int w = 0; w < WIDE; ++w) row[w] = V::floats(d.gradients + i * d.padded + at + w * V::kRows);
    for (int s = 0; s < kStreams; ++s) {
      const typename V::Floats each = V::splat(column[s * d.padded + i]);
      for (int w = 0; w < WIDE; ++w) sum[s][w] = V::fma(each, row[w], sum[s][w]);
    }
  }
  for (int s = 0; s < kStreams; ++s)
    for (int w = 0; w < WIDE; ++w) V::store_floats(d.weighed + s * d.padded + at + w * V::kRows, sum[s][w]);
}

template <class V>
inline void weigh_all(const ColumnBlock& d, const float* column) {
  constexpr int kWide = V::kRows == kCodes ? 4 : 2;  // as many sums as there are registers
  int64_t at = 0;
  for (; at + kWide * V::kRows <= d.padded; at += kWide * V::kRows) weigh<V, kWide>(d, column, at);
  for (; at < d.padded; at += V::kRows) weigh<V, 1>(d, column, at);
}

// Adds what a change of row i means for the rows behind it; rows before it are not read again.
template <class V>
inline void spread(const ColumnBlock& d, int64_t i, const float (&change)[kStreams]) {
  typename V::Floats each[kStreams];
  for (int s = 0; s < kStreams; ++s) each[s] = V::splat(change[s]);
  for (int64_t k = (i + 1) / kCodes * kCodes; k < d.padded; k += V::kRows) {
    const typename V::Floats row = V::floats(d.gradients + i * d.padded + k);
    for (int s = 0; s < kStreams; ++s) {
      float* const to = d.weighed + s * d.padded + k;
      V::store_floats(to, V::fma(each[s], row, V::floats(to)));
    }
  }
}

// Adds the columns `of` before column j of a block to column j, each times sign * between[.., j].
template <class V>
inline void add_earlier(const ColumnBlock& d, int64_t j, const float* of, float sign) {
  const int64_t size = kStreams * d.padded;
  float times[kBlockColumns];
  for (int64_t k = 0; k < j; ++k) times[k] = sign * d.between[k * d.between_stride + j];
  float* const to = d.pull + j * size;
  for (int64_t at = 0; at < size; at += kCodes)
    for (int64_t lane = 0; lane < kCodes; lane += V::kRows) {
      typename V::Floats sum = V::floats(to + at + lane);
      for (int64_t k = 0; k < j; ++k) sum = V::fma(V::splat(times[k]), V::floats(of + k * size + at + lane), sum);
      V::store_floats(to + at + lane, sum);
    }
}

// The codes of row i in a column that are best for what is wanted, written down; values are those of the codes.
inline bool exchange(const ColumnBlock& d, int64_t i, int64_t j, const float (&wanted)[kStreams], float (&values)[kStreams]) {
  const int64_t grid = d.group_of[j] * d.padded + i, at = j * d.padded + i;
  const float scale = d.scales[grid], offset = d.offsets[grid], gain2 = d.gains[i], gain3 = d.gains[d.padded + i];
  const uint8_t before[2] = {d.anchor[at], d.residual[at]};
  if (scale > 0.0f) {  // else all of the group is at its offset, whatever the codes
    float steps[kStreams];
    for (int s = 0; s < kStreams; ++s) steps[s] = (wanted[s] - offset) * d.per_step[grid];
    const Codes best = best_codes(steps, d.level_weights, d.widening, gain2, gain3);
    d.anchor[at] = static_cast<uint8_t>(best.anchor);
    d.residual[at] = static_cast<uint8_t>(best.residual);
  }
  code_values(d.anchor[at], d.residual[at], d.widening, gain2, gain3, values);
  for (int s = 0; s < kStreams; ++s) values[s] = offset + scale * values[s];
  return d.anchor[at] != before[0] || d.residual[at] != before[1];
}

template <class V>
inline void coordinate_descent(const ColumnBlock& d) {
  const int64_t size = kStreams * d.padded;
  __builtin_memset(d.changes, 0, sizeof(float) * static_cast<size_t>(d.columns * size));
  float* const over_metric = d.weighed + size;
  for (int64_t j = 0; j < d.columns; ++j) {
    const float own = d.between[j * d.between_stride + j], over_own = 1.0f / own;
    float *const column = d.pull + j * size, *const errors = d.errors + j * size, *const changes = d.changes + j * size;
    add_earlier<V>(d, j, d.changes, 1.0f);
    if (d.gradients) weigh_all<V>(d, column);
    const float* const pulled = d.gradients ? d.weighed : column;
    for (int64_t i = 0; i < d.rows; ++i) over_metric[i] = 1.0f / (d.gradients ? d.gradients[i * d.padded + i] : 1.0f) * over_own;
    double form = 0.0, gained = 0.0;
    for (int64_t i = 0; i < d.rows; ++i) {
      const float w = d.w[j * d.padded + i];
      float wanted[kStreams], values[kStreams], here = 0.0f, less = 0.0f;
      for (int s = 0; s < kStreams; ++s) {
        const float pull = pulled[s * d.padded + i], error = errors[s * d.padded + i];
        here += d.level_weights[s] * (error * pull);
        wanted[s] = w + error - pull * over_metric[i];
      }
      form += static_cast<double>(here);
      if (!exchange(d, i, j, wanted, values)) continue;
      float change[kStreams];
      for (int s = 0; s < kStreams; ++s) {
        float& error = errors[s * d.padded + i];
        const float now = values[s] - w, best = wanted[s] - w, by = now - error;
        less += d.level_weights[s] * ((error - best) * (error - best) - (now - best) * (now - best));
        error = now;
        changes[s * d.padded + i] = by;
        change[s] = by * own;
      }
      gained += static_cast<double>(less * (d.gradients ? d.gradients[i * d.padded + i] : 1.0f));
      if (d.gradients) spread<V>(d, i, change);
    }
    d.form[0] += form;
    d.form[1] += gained * static_cast<double>(own);
  }
}

template <class V>
inline void error_feedback(const ColumnBlock& d) {
  const int64_t size = kStreams * d.padded;
  for (int64_t j = 0; j < d.columns; ++j) {
    float* const column = d.pull + j * size;
    add_earlier<V>(d, j, d.pull, -1.0f);
    __builtin_memset(d.weighed, 0, sizeof(float) * static_cast<size_t>(size));
    for (int64_t i = 0; i < d.rows; ++i) {
      float wanted[kStreams], values[kStreams], missed[kStreams];
      for (int s = 0; s < kStreams; ++s) wanted[s] = column[s * d.padded + i] - d.weighed[s * d.padded + i];
      exchange(d, i, j, wanted, values);
      for (int s = 0; s < kStreams; ++s) {
        missed[s] = wanted[s] - values[s];
        column[s * d.padded + i] -= values[s];
      }
      if (d.gradients) spread<V>(d, i, missed);
    }
  }
}
