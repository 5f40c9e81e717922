// A decoder's blocks but for their products: norms, rotary positions, gates, and attention over cached keys and values.
//
// Attention takes chunks of 256 cached positions, begun at multiples of 256. A chunk's softmax is a `Partial`; partials are
// merged in ascending order. So the sums of a query's output are made in one order, however many queries there are, and
// however the chunks are shared among threads.
//
// Sums are made in the lanes of the machine's vectors: other instruction sets round otherwise, by a few units of the last
// place. simd/kernels-inl.h includes this file after planes/rows-inl.h.

template <class V>
inline typename V::Floats exponential(typename V::Floats given) {
  using Floats = typename V::Floats;
  using Bits = typename V::Ints;
  const Floats least = V::splat(-87.0f), most = V::splat(88.0f);
  Floats x = given == given ? given : V::splat(0.0f);  // a NaN's bits are no number to add to
  x = x < least ? least : x;
  x = x > most ? most : x;
  const Floats shifted = V::fma(x, V::splat(1.44269504f), V::splat(kRound));
  const Floats whole = shifted - V::splat(kRound);
  Floats r = V::fma(whole, V::splat(-0.693145752f), x);
  r = V::fma(whole, V::splat(-1.42860677e-6f), r);
  Floats p = V::splat(1.98756915e-4f);
  for (const float c : {1.39819995e-3f, 8.33345205e-3f, 4.16657962e-2f, 1.66666654e-1f, 0.5f}) p = V::fma(p, r, V::splat(c));
  p = V::fma(p, r * r, r) + V::splat(1.0f);
  const Floats found = (Floats)((Bits)p + ((Bits)shifted << 23));
  return given == given ? found : given;
}

template <class V>
inline typename V::Floats hyperbolic_tangent(typename V::Floats x) {
  const typename V::Floats one = V::splat(1.0f);
  return one - V::splat(2.0f) / (exponential<V>(x + x) + one);
}

template <class V>
inline float lanes_total(typename V::Floats v) {
  float part[V::kRows];
  V::store_floats(part, v);
  for (int width = V::kRows / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

template <class V>
void load_floats(const void* from, Type type, float* to, int64_t count) {
  load_row<V>({from, 0, count, nullptr, nullptr, type}, 0, to);
}

template <class V>
void store_floats_as(const float* from, void* to, Type type, int64_t count) {
  if (type == Type::kFloat32) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  uint16_t* const out = static_cast<uint16_t*>(to);
  if (type == Type::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(from[i]);
    return;
  }
  int64_t i = 0;
  for (; i + V::kRows <= count; i += V::kRows) V::store_halves(out + i, V::floats(from + i));
  if (i == count) return;
  float tail[V::kRows] = {};
  uint16_t half[V::kRows];
  std::memcpy(tail, from + i, static_cast<size_t>(count - i) * sizeof(float));
  V::store_halves(half, V::floats(tail));
  std::memcpy(out + i, half, static_cast<size_t>(count - i) * sizeof(uint16_t));
}

template <class V>
float dot_row(const float* x, const float* y, int64_t count) {
  typename V::Floats sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * V::kRows <= count; i += 2 * V::kRows)
    for (int j = 0; j < 2; ++j) sums[j] = V::fma(V::floats(x + i + j * V::kRows), V::floats(y + i + j * V::kRows), sums[j]);
  float total = lanes_total<V>(sums[0] + sums[1]);
  for (; i < count; ++i) total += x[i] * y[i];
  return total;
}

template <class V>
void norm_row(const float* x, float* y, int64_t count, const float* weight, float eps, NormKind kind) {
  typename V::Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * V::kRows <= count; i += 4 * V::kRows)
    for (int j = 0; j < 4; ++j) {
      const typename V::Floats v = V::floats(x + i + j * V::kRows);
      sums[j] = V::fma(v, v, sums[j]);
    }
  float total = lanes_total<V>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(count) + eps);
  const float more = kind == NormKind::kOnePlusWeight ? 1.0f : 0.0f;
  for (i = 0; i < count; ++i) y[i] = x[i] * scale * (weight[i] + more);
}

inline void rotate_row(float* x, const float* cosine, const float* sine, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float front = x[i], back = x[i + half];
    x[i] = front * cosine[i] - back * sine[i];
    x[i + half] = back * cosine[i + half] + front * sine[i + half];
  }
}

template <class V, Activation ACTIVATION>
inline typename V::Floats activated(typename V::Floats x) {
  using Floats = typename V::Floats;
  const Floats one = V::splat(1.0f), zero = V::splat(0.0f), half = V::splat(0.5f);
  if constexpr (ACTIVATION == Activation::kSilu) return x / (one + exponential<V>(zero - x));
  else if constexpr (ACTIVATION == Activation::kRelu) return x > zero ? x : zero;
  else if constexpr (ACTIVATION == Activation::kGeluTanh) {
    const Floats inner = V::splat(0.797884561f) * V::fma(V::splat(0.044715f) * x * x, x, x);
    return half * x * (one + hyperbolic_tangent<V>(inner));
  } else {
    float line[V::kRows];
    V::store_floats(line, x);
    for (float& v : line) v = 0.5f * v * (1.0f + std::erf(v * 0.707106781f));
    return V::floats(line);
  }
}

template <class V, Activation ACTIVATION>
void gate_with(const float* gate, const float* up, float* y, int64_t count) {
  int64_t i = 0;
  for (; i + V::kRows <= count; i += V::kRows) V::store_floats(y + i, activated<V, ACTIVATION>(V::floats(gate + i)) * V::floats(up + i));
  if (i == count) return;
  float tail[V::kRows] = {};
  std::memcpy(tail, gate + i, static_cast<size_t>(count - i) * sizeof(float));
  V::store_floats(tail, activated<V, ACTIVATION>(V::floats(tail)));
  for (int64_t k = i; k < count; ++k) y[k] = tail[k - i] * up[k];
}

template <class V>
void gate_row(const float* gate, const float* up, float* y, int64_t count, Activation activation) {
  switch (activation) {
    case Activation::kSilu: return gate_with<V, Activation::kSilu>(gate, up, y, count);
    case Activation::kGeluTanh: return gate_with<V, Activation::kGeluTanh>(gate, up, y, count);
    case Activation::kGelu: return gate_with<V, Activation::kGelu>(gate, up, y, count);
    case Activation::kRelu: return gate_with<V, Activation::kRelu>(gate, up, y, count);
  }
}

// The lanes of a and then of b, every second one from `FIRST` on.
template <class V, int FIRST>
inline typename V::Floats every_second(typename V::Floats a, typename V::Floats b) {
  typename V::Floats picked;
#if defined(__clang__)
  for (int i = 0; i < V::kRows; ++i) picked[i] = 2 * i < V::kRows ? a[2 * i + FIRST] : b[2 * i + FIRST - V::kRows];
#else
  typename V::Ints lanes;
  for (int i = 0; i < V::kRows; ++i) lanes[i] = 2 * i + FIRST;
  picked = __builtin_shuffle(a, b, lanes);
#endif
  return picked;
}

// Lane i of what is returned has the sum of the lanes of v[i].
template <class V>
inline __attribute__((always_inline)) typename V::Floats sums_of_lanes(typename V::Floats (&v)[V::kRows]) {
#pragma GCC unroll 4
  for (int count = V::kRows / 2; count; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) v[i] = every_second<V, 0>(v[2 * i], v[2 * i + 1]) + every_second<V, 1>(v[2 * i], v[2 * i + 1]);
  return v[0];
}

// The keys or values of a chunk as rows of floats, `step` apart: where they lie, or copied.
template <class V>
const float* chunk_rows(const QueryTile& tile, const void* data, int64_t stride, int64_t begin, int64_t count, float* copy, int64_t& step) {
  const int64_t size = tile.head_size;
  if (tile.type == Type::kFloat32 && size % V::kRows == 0 && !tile.places) {
    step = stride;
    return static_cast<const float*>(data) + begin * stride;
  }
  step = padded_head(size);
  for (int64_t p = 0; p < count; ++p) {
    float* const row = copy + p * step;
    load_row<V>({data, stride, size, nullptr, nullptr, tile.type}, tile.places ? tile.places[begin + p] : begin + p, row);
    for (int64_t k = size; k < step; ++k) row[k] = 0.0f;
  }
  return copy;
}

// The scores of one query with `count` keys, at most kChunk; up to a multiple of kRows of them are written.
template <class V>
void score_row(const float* query, const float* keys, int64_t step, int64_t count, int64_t size, float* scores) {
  using Floats = typename V::Floats;
  for (int64_t p = 0; p < count; p += V::kRows) {
    Floats sums[V::kRows];
    if (p + V::kRows <= count) {
      const float* const key = keys + p * step;
#pragma GCC unroll 16
      for (int i = 0; i < V::kRows; ++i) sums[i] = V::splat(0.0f);
      for (int64_t k = 0; k < size; k += V::kRows) {
        const Floats q = V::floats(query + k);
#pragma GCC unroll 16
        for (int i = 0; i < V::kRows; ++i) sums[i] = V::fma(q, V::floats(key + i * step + k), sums[i]);
      }
    } else {
      for (int i = 0; i < V::kRows; ++i) {
        sums[i] = V::splat(0.0f);
        if (p + i >= count) continue;
        for (int64_t k = 0; k < size; k += V::kRows) sums[i] = V::fma(V::floats(query + k), V::floats(keys + (p + i) * step + k), sums[i]);
      }
    }
    V::store_floats(scores + p, sums_of_lanes<V>(sums));
  }
}

// Scores of positions [begin, end) of a chunk become exp(score - most), all others 0.
template <class V>
void soften_row(float* scores, int64_t count, int64_t begin, int64_t end, float cap, float& most, float& total) {
  using Floats = typename V::Floats;
  const float none = -__builtin_inff();
  const int64_t padded = (count + V::kRows - 1) / V::kRows * V::kRows;
  if (cap > 0.0f)
    for (int64_t p = 0; p < padded; p += V::kRows)
      V::store_floats(scores + p, V::splat(cap) * hyperbolic_tangent<V>(V::floats(scores + p) / V::splat(cap)));
  for (int64_t p = 0; p < begin; ++p) scores[p] = none;
  for (int64_t p = end; p < padded; ++p) scores[p] = none;
  Floats largest = V::splat(none);
  auto strange = largest != largest;
  for (int64_t p = 0; p < padded; p += V::kRows) {
    const Floats v = V::floats(scores + p);
    largest = v > largest ? v : largest;
    strange |= v != v;
  }
  float lanes[V::kRows];
  V::store_floats(lanes, largest);
  most = none;
  for (const float v : lanes) most = v > most ? v : most;
  Floats sum = V::splat(0.0f);
  for (int64_t p = 0; p < padded; p += V::kRows) {
    const Floats v = V::floats(scores + p);
    const Floats e = v > V::splat(none) ? exponential<V>(v - V::splat(most)) : V::splat(0.0f);
    V::store_floats(scores + p, e);
    sum = sum + e;
  }
  total = lanes_total<V>(sum);
  // a score that is no number, or is infinite, leaves no number
  if (!(most < -none)) total = __builtin_nanf("");
  for (int i = 0; i < V::kRows; ++i)
    if (strange[i]) total = __builtin_nanf("");
}

// out[r] += sum of scores[r][p] * values[p], in ascending order, for ROWS rows and VECTORS vectors of columns.
template <class V, int ROWS, int VECTORS>
void weigh_columns(const float* scores, const float* values, int64_t step, int64_t begin, int64_t end, float* out, int64_t out_step) {
  using Floats = typename V::Floats;
  Floats sums[ROWS][VECTORS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < VECTORS; ++k) sums[r][k] = V::floats(out + r * out_step + k * V::kRows);
  for (int64_t p = begin; p < end; ++p) {
    const float* const value = values + p * step;
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Floats e = V::splat(scores[r * kChunk + p]);
#pragma GCC unroll 4
      for (int k = 0; k < VECTORS; ++k) sums[r][k] = V::fma(e, V::floats(value + k * V::kRows), sums[r][k]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < VECTORS; ++k) V::store_floats(out + r * out_step + k * V::kRows, sums[r][k]);
}

template <class V, int ROWS>
void weigh_rows(const float* scores, const float* values, int64_t step, int64_t begin, int64_t end, float* out, int64_t padded) {
  constexpr int kBlock = 4 * V::kRows;
  int64_t k = 0;
  for (; k + kBlock <= padded; k += kBlock) weigh_columns<V, ROWS, 4>(scores, values + k, step, begin, end, out + k, padded);
  for (; k < padded; k += V::kRows) weigh_columns<V, ROWS, 1>(scores, values + k, step, begin, end, out + k, padded);
}

// Positions that some query of a tile does not see may hold anything, and a weight of 0 would not hide it: each row takes
// its own positions, and rows go together where they see the same.
template <class V, int ROWS>
void weigh_tile(const QueryTile& tile, int64_t first, int64_t last, int64_t row, const float* scores, const float* values, int64_t step,
                float* out, int64_t padded) {
  int64_t begin[ROWS], end[ROWS], from = 0, until = kChunk;
  for (int r = 0; r < ROWS; ++r) {
    const int64_t query = (row + r) / tile.heads, seen = tile.position + query + 1 < last ? tile.position + query + 1 : last;
    begin[r] = tile.begin_of(query) > first ? tile.begin_of(query) - first : 0;
    end[r] = seen > first ? seen - first : 0;
    from = begin[r] > from ? begin[r] : from;
    until = end[r] < until ? end[r] : until;
  }
  until = until > from ? until : from;
  for (int r = 0; r < ROWS; ++r)
    weigh_rows<V, 1>(scores + r * kChunk, values, step, begin[r], end[r] < from ? end[r] : from, out + r * padded, padded);
  weigh_rows<V, ROWS>(scores, values, step, from, until, out, padded);
  for (int r = 0; r < ROWS; ++r) weigh_rows<V, 1>(scores + r * kChunk, values, step, until, end[r], out + r * padded, padded);
}

template <class V>
void attend(const QueryTile& tile, int64_t chunk, const Partial& to, float* scratch) {
  const int64_t size = tile.head_size, padded = (size + V::kRows - 1) / V::kRows * V::kRows, rows = tile.rows();
  const int64_t first = chunk * kChunk, last = tile.end() < first + kChunk ? tile.end() : first + kChunk, count = last - first;
  const int64_t room = padded_head(size);
  float *const keys_copy = scratch, *const values_copy = keys_copy + kChunk * room, *const out = values_copy + kChunk * room,
        *const scores = out + rows * room;
  int64_t keys_step, values_step;
  const float* const keys = chunk_rows<V>(tile, tile.keys, tile.keys_stride, first, count, keys_copy, keys_step);
  const float* const values = chunk_rows<V>(tile, tile.values, tile.values_stride, first, count, values_copy, values_step);
  float line[kMaxHead + kVectorFloats];
  for (int64_t s = 0; s < tile.queries_count; ++s) {
    const int64_t begin = tile.begin_of(s) > first ? tile.begin_of(s) - first : 0;
    const int64_t end = tile.position + s + 1 < last ? tile.position + s + 1 - first : count;
    for (int64_t h = 0; h < tile.heads; ++h) {
      const int64_t row = s * tile.heads + h;
      const float* query = tile.queries + s * tile.queries_stride + h * size;
      if (padded != size) {
        std::memcpy(line, query, static_cast<size_t>(size) * sizeof(float));
        for (int64_t k = size; k < padded; ++k) line[k] = 0.0f;
        query = line;
      }
      float* const row_scores = scores + row * kChunk;
      if (begin < end) score_row<V>(query, keys, keys_step, end, size == padded ? size : padded, row_scores);
      for (int64_t p = begin < end ? (end + V::kRows - 1) / V::kRows * V::kRows : 0; p < kChunk; ++p) row_scores[p] = 0.0f;
      if (begin < end) {
        soften_row<V>(row_scores, end, begin, end, tile.cap, to.most[row], to.total[row]);
      } else {
        to.most[row] = -__builtin_inff();
        to.total[row] = 0.0f;
      }
    }
  }
  std::memset(out, 0, static_cast<size_t>(rows * padded) * sizeof(float));
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) weigh_tile<V, 4>(tile, first, last, r, scores + r * kChunk, values, values_step, out + r * padded, padded);
  for (; r + 2 <= rows; r += 2) weigh_tile<V, 2>(tile, first, last, r, scores + r * kChunk, values, values_step, out + r * padded, padded);
  for (; r < rows; ++r) weigh_tile<V, 1>(tile, first, last, r, scores + r * kChunk, values, values_step, out + r * padded, padded);
  for (r = 0; r < rows; ++r) std::memcpy(to.out + r * size, out + r * padded, static_cast<size_t>(size) * sizeof(float));
}

template <class V>
void merge(const Partial& from, const Partial& into, int64_t size) {
  if (from.total[0] == 0.0f) return;
  if (into.total[0] == 0.0f) {
    into.most[0] = from.most[0];
    into.total[0] = from.total[0];
    std::memcpy(into.out, from.out, static_cast<size_t>(size) * sizeof(float));
    return;
  }
  const float most = from.most[0] > into.most[0] ? from.most[0] : into.most[0];
  float scale[V::kRows];
  V::store_floats(scale, exponential<V>(V::splat(into.most[0] - most)));
  const float old = scale[0];
  V::store_floats(scale, exponential<V>(V::splat(from.most[0] - most)));
  const float now = scale[0];
  into.most[0] = most;
  into.total[0] = into.total[0] * old + from.total[0] * now;
  for (int64_t k = 0; k < size; ++k) into.out[k] = into.out[k] * old + from.out[k] * now;
}

template <class V>
DecoderKernels decoder_kernels_of() {
  return {load_floats<V>, store_floats_as<V>, dot_row<V>, norm_row<V>, rotate_row, gate_row<V>, attend<V>, merge<V>};
}
