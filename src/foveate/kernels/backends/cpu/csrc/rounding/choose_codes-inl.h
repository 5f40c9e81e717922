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
        code_values(a, 0, 1.0f, 1.0f, values);
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
inline Codes best_codes(const float (&wanted)[kStreams], const float (&level_weights)[kStreams], float gain2, float gain3) {
  const Sixteen* const table = anchor_values();
  const float gains[kAnchors] = {gain2, gain3, 1.0f};
  Sixteen cost{};
  for (int s = 0; s < kAnchors; ++s) {
    const Sixteen left = wanted[s] - table[s] * gains[s];
    cost += left * left * level_weights[s];
  }
  // what is wanted of the residual at 6 and at 8 bits, in sixteenths of a step, counted from code 0
  const Sixteen six = (wanted[3] - table[2]) * 16.0f + 7.5f, eight = (wanted[4] - table[2]) * 16.0f + 7.5f;
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
  cost += least * (1.0f / 256.0f);
  int best = 0;
  for (int a = 1; a < kCodes; ++a)
    if (cost[a] < cost[best]) best = a;
  return {best, static_cast<int>(code[best])};
}

// Row i of [R, padded] times a column of each stream.
inline void times_column(const ColumnBlock& d, int64_t i, float (&sums)[kStreams]) {
  const float* const row = d.gradients + i * d.padded;
  Sixteen sum[kStreams] = {};
  for (int64_t k = 0; k < d.padded; k += kCodes) {
    const Sixteen part = load_sixteen(row + k);
    for (int s = 0; s < kStreams; ++s) sum[s] += part * load_sixteen(d.column + s * d.padded + k);
  }
  for (int s = 0; s < kStreams; ++s) sums[s] = total_of(sum[s]);
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
    const Codes best = best_codes(steps, d.level_weights, gain2, gain3);
    anchor = static_cast<uint8_t>(best.anchor);
    residual = static_cast<uint8_t>(best.residual);
  }
  code_values(anchor, residual, gain2, gain3, values);
  for (int s = 0; s < kStreams; ++s) values[s] = offset + scale * values[s];
  return anchor != before[0] || residual != before[1];
}

inline void coordinate_descent(const ColumnBlock& d) {
  for (int64_t j = 0; j < d.columns; ++j) {
    const float* const between = d.between + j * d.between_stride;
    const float own = between[j];
    for (int s = 0; s < kStreams; ++s)
      for (int64_t i = 0; i < d.rows; ++i) d.column[s * d.padded + i] = d.pull[(s * d.rows + i) * kBlockColumns + j];
    for (int64_t i = 0; i < d.rows; ++i) {
      const float w = d.w[i * d.stride + j];
      float* const error = d.errors + i * d.stride + j;
      float wanted[kStreams], values[kStreams];
      if (d.gradients) times_column(d, i, wanted);
      for (int s = 0; s < kStreams; ++s) {
        const float pulled = d.gradients ? wanted[s] / d.gradients[i * d.padded + i] : d.column[s * d.padded + i];
        wanted[s] = w + error[s * d.plane] - pulled / own;
      }
      if (!exchange(d, i, j, wanted, values)) continue;
      for (int s = 0; s < kStreams; ++s) {
        const float now = values[s] - w, change = now - error[s * d.plane];
        error[s * d.plane] = now;
        d.column[s * d.padded + i] += change * own;
        float* const row = d.pull + (s * d.rows + i) * kBlockColumns;
        for (int64_t k = j + 1; k < d.columns; ++k) row[k] += change * between[k];
      }
    }
  }
}

inline void error_feedback(const ColumnBlock& d) {
  for (int64_t j = 0; j < d.columns; ++j) {
    const float* const between = d.between + j * d.between_stride;
    __builtin_memset(d.column, 0, sizeof(float) * static_cast<size_t>(kStreams * d.padded));
    for (int64_t i = 0; i < d.rows; ++i) {
      float wanted[kStreams] = {}, values[kStreams];
      if (d.gradients) times_column(d, i, wanted);
      for (int s = 0; s < kStreams; ++s) wanted[s] = d.pull[(s * d.rows + i) * kBlockColumns + j] - wanted[s];
      exchange(d, i, j, wanted, values);
      for (int s = 0; s < kStreams; ++s) {
        d.column[s * d.padded + i] = wanted[s] - values[s];
        float* const row = d.pull + (s * d.rows + i) * kBlockColumns;
        row[j] -= values[s];
        for (int64_t k = j + 1; k < d.columns; ++k) row[k] -= row[j] * between[k];
      }
    }
  }
}
