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

// The codes of least cost, sum over streams of level_weight * (wanted - value)^2, of all 256: the first of equals.
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
  int best = 0;
  for (int a = 1; a < kCodes; ++a)
    if (cost[a] < cost[best]) best = a;
  return {best, static_cast<int>(code[best])};
}

// Columns [at, at + WIDE vectors) of the product of the column of each stream with the metric of rows.
template <class V, int WIDE>
inline void weigh(const ColumnBlock& d, int64_t at) {
  typename V::Floats sum[kStreams][WIDE] = {};
  for (int64_t i = 0; i < d.rows; ++i) {
    typename V::Floats row[WIDE];
    for (int w = 0; w < WIDE; ++w) row[w] = V::floats(d.gradients + i * d.padded + at + w * V::kRows);
    for (int s = 0; s < kStreams; ++s) {
      const typename V::Floats each = V::splat(d.column[s * d.padded + i]);
      for (int w = 0; w < WIDE; ++w) sum[s][w] = V::fma(each, row[w], sum[s][w]);
    }
  }
  for (int s = 0; s < kStreams; ++s)
    for (int w = 0; w < WIDE; ++w) V::store_floats(d.weighed + s * d.padded + at + w * V::kRows, sum[s][w]);
}

template <class V>
inline void weigh_all(const ColumnBlock& d) {
  constexpr int kWide = V::kRows == kCodes ? 4 : 2;  // as many sums as there are registers
  int64_t at = 0;
  for (; at + kWide * V::kRows <= d.padded; at += kWide * V::kRows) weigh<V, kWide>(d, at);
  for (; at < d.padded; at += V::kRows) weigh<V, 1>(d, at);
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

// The codes that are best for what is wanted, written down; values are those of the codes.
inline bool exchange(const ColumnBlock& d, int64_t i, int64_t j, const float (&wanted)[kStreams], float (&values)[kStreams]) {
  const float scale = d.scales[i * d.grid_stride + d.group_of[j]], offset = d.offsets[i * d.grid_stride + d.group_of[j]];
  uint8_t &anchor = d.anchor[i * d.stride + j], &residual = d.residual[i * d.stride + j];
  const uint8_t before[2] = {anchor, residual};
  const float gain2 = d.gains[i], gain3 = d.gains[d.rows + i];
  if (scale > 0.0f) {  // else all of the group is at its offset, whatever the codes
    const float per_step = 1.0f / scale;
    float steps[kStreams];
    for (int s = 0; s < kStreams; ++s) steps[s] = (wanted[s] - offset) * per_step;
    const Codes best = best_codes(steps, d.level_weights, d.widening, gain2, gain3);
    anchor = static_cast<uint8_t>(best.anchor);
    residual = static_cast<uint8_t>(best.residual);
  }
  code_values(anchor, residual, d.widening, gain2, gain3, values);
  for (int s = 0; s < kStreams; ++s) values[s] = offset + scale * values[s];
  return anchor != before[0] || residual != before[1];
}

template <class V>
inline void coordinate_descent(const ColumnBlock& d) {
  for (int64_t j = 0; j < d.columns; ++j) {
    const float* const between = d.between + j * d.between_stride;
    const float own = between[j];
    for (int s = 0; s < kStreams; ++s)
      for (int64_t i = 0; i < d.rows; ++i) d.column[s * d.padded + i] = d.pull[(s * d.rows + i) * kBlockColumns + j];
    if (d.gradients) weigh_all<V>(d);
    double form = 0.0, gained = 0.0;
    for (int64_t i = 0; i < d.rows; ++i) {
      const float w = d.w[i * d.stride + j], metric = d.gradients ? d.gradients[i * d.padded + i] : 1.0f;
      float* const error = d.errors + i * d.stride + j;
      const float* const pulled = (d.gradients ? d.weighed : d.column) + i;
      float wanted[kStreams], values[kStreams], here = 0.0f, less = 0.0f;
      for (int s = 0; s < kStreams; ++s) {
        const float pull = pulled[s * d.padded];
        here += d.level_weights[s] * (error[s * d.plane] * pull);
        wanted[s] = w + error[s * d.plane] - pull / metric / own;
      }
      form += static_cast<double>(here);
      if (!exchange(d, i, j, wanted, values)) continue;
      float change[kStreams];
      for (int s = 0; s < kStreams; ++s) {
        const float now = values[s] - w, before = error[s * d.plane], best = wanted[s] - w;
        less += d.level_weights[s] * ((before - best) * (before - best) - (now - best) * (now - best));
        const float by = now - before;
        error[s * d.plane] = now;
        change[s] = by * own;
        float* const row = d.pull + (s * d.rows + i) * kBlockColumns;
        for (int64_t k = j + 1; k < d.columns; ++k) row[k] += by * between[k];
      }
      gained += static_cast<double>(less * metric);
      if (d.gradients) spread<V>(d, i, change);
    }
    d.form[0] += form;
    d.form[1] += gained * static_cast<double>(own);
  }
}

template <class V>
inline void error_feedback(const ColumnBlock& d) {
  for (int64_t j = 0; j < d.columns; ++j) {
    const float* const between = d.between + j * d.between_stride;
    __builtin_memset(d.weighed, 0, sizeof(float) * static_cast<size_t>(kStreams * d.padded));
    for (int64_t i = 0; i < d.rows; ++i) {
      float wanted[kStreams], values[kStreams], missed[kStreams];
      for (int s = 0; s < kStreams; ++s) wanted[s] = d.pull[(s * d.rows + i) * kBlockColumns + j] - d.weighed[s * d.padded + i];
      exchange(d, i, j, wanted, values);
      for (int s = 0; s < kStreams; ++s) {
        missed[s] = wanted[s] - values[s];
        float* const row = d.pull + (s * d.rows + i) * kBlockColumns;
        row[j] -= values[s];
        for (int64_t k = j + 1; k < d.columns; ++k) row[k] -= row[j] * between[k];
      }
      if (d.gradients) spread<V>(d, i, missed);
    }
  }
}
