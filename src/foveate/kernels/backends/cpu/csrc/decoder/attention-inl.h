// Attention of a decoder's blocks over cached keys and values, exact or packed.
//
// It takes chunks of 256 cached positions, begun at multiples of 256. A chunk's softmax is a `Partial`; partials are merged
// in ascending order. So the sums of a query's output are made in one order, however many queries there are, and however
// the chunks are shared among threads.
//
// The first positions may be packed. Their blocks are unpacked as they lie, [head_size, tokens], and not transposed: scores
// are sums of columns, and outputs are sums of lanes. simd/kernels-inl.h includes this file after decoder/decoder-inl.h.

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

// The positions of a chunk after its `packed` ones. Those that some query of a tile does not see may hold anything, and a
// weight of 0 would not hide it: each row takes its own positions, and rows go together where they see the same.
template <class V, int ROWS>
void weigh_tile(const QueryTile& tile, int64_t first, int64_t packed, int64_t last, int64_t row, const float* scores, const float* values, int64_t step,
                float* out, int64_t padded) {
  int64_t begin[ROWS], end[ROWS], from = 0, until = kChunk;
  for (int r = 0; r < ROWS; ++r) {
    const int64_t query = (row + r) / tile.heads, seen = tile.position + query + 1 < last ? tile.position + query + 1 : last;
    begin[r] = tile.begin_of(query) > first + packed ? tile.begin_of(query) - first : packed;
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

// The first `count` positions of a chunk, which are packed, as floats: blocks [head_size, tile.block], one after the other.
template <class V>
void unpack_blocks(const QueryTile& tile, const PackedTokens& packed, int64_t first, int64_t count, float* to) {
  const int64_t numbers = tile.head_size * tile.block;
  for (int64_t b = first / tile.block; b * tile.block < first + count; ++b, to += numbers) {
    const char* const from = packed.numbers + b * packed.numbers_step;
    if (!packed.ranges) {
      load_floats<V>(from, packed.type, to, numbers);
      continue;
    }
    const Unpacking unpacking{reinterpret_cast<const uint8_t*>(from), packed.ranges + b * packed.ranges_step, numbers, packed.bits, static_cast<int>(tile.block),
                              Type::kFloat32, to, false};
    kernels().saved->unpack(unpacking, 0, tile.head_size);
  }
}

template <class V, int ROWS, int VECTORS>
inline void score_columns(const float* const (&queries)[ROWS], int64_t size, const float* keys, int64_t step, float* scores) {
  typename V::Floats sums[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < size; ++k)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      const typename V::Floats key = V::floats(keys + k * step + j * V::kRows);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sums[r][j] = V::fma(V::splat(queries[r][k]), key, sums[r][j]);
    }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) V::store_floats(scores + r * kChunk + j * V::kRows, sums[r][j]);
}

// The scores of some rows with the keys of `unpack_blocks`.
template <class V, int ROWS>
void score_blocks(const QueryTile& tile, int64_t row, const float* keys, int64_t count, float* scores) {
  const int64_t block = tile.block, size = tile.head_size;
  const float* queries[ROWS];
  for (int r = 0; r < ROWS; ++r) queries[r] = tile.queries + (row + r) / tile.heads * tile.queries_stride + (row + r) % tile.heads * size;
  for (int64_t first = 0; first < count; first += block, keys += size * block) {
    int64_t p = 0;
    for (; p + 4 * V::kRows <= block; p += 4 * V::kRows) score_columns<V, ROWS, 4>(queries, size, keys + p, block, scores + first + p);
    for (; p < block; p += V::kRows) score_columns<V, ROWS, 1>(queries, size, keys + p, block, scores + first + p);
  }
}

// out[r] += sum of weights[r][p] * values[p], for the values of `unpack_blocks`.
template <class V, int ROWS>
void weigh_blocks(const QueryTile& tile, const float* weights, const float* values, int64_t count, float* out, int64_t padded) {
  using Floats = typename V::Floats;
  constexpr int kChannels = ROWS > 1 ? V::kRows / 2 : V::kRows;  // at once: their sums stay in registers
  const int64_t block = tile.block, size = tile.head_size;
  for (int64_t k = 0; k < size; k += V::kRows) {
    Floats sums[ROWS][V::kRows] = {};
    for (int half = 0; half < V::kRows && k + half < size; half += kChannels) {
      const int64_t left = size - k - half;
      const auto add = [&](const auto& channels) {
        Floats part[ROWS][kChannels] = {};
        for (int64_t first = 0; first < count; first += block) {
          const float* const from = values + first * size + (k + half) * block;
          for (int64_t p = 0; p < block; p += V::kRows) {
            Floats e[ROWS];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) e[r] = V::floats(weights + r * kChunk + first + p);
#pragma GCC unroll 16
            for (int i = 0; i < channels; ++i) {
              const Floats value = V::floats(from + i * block + p);
#pragma GCC unroll 4
              for (int r = 0; r < ROWS; ++r) part[r][i] = V::fma(e[r], value, part[r][i]);
            }
          }
        }
        for (int r = 0; r < ROWS; ++r)
          for (int i = 0; i < kChannels; ++i) sums[r][half + i] = part[r][i];
      };
      if (left >= kChannels) add(std::integral_constant<int, kChannels>{});
      else add(static_cast<int>(left));
    }
    for (int r = 0; r < ROWS; ++r) V::store_floats(out + r * padded + k, V::floats(out + r * padded + k) + sums_of_lanes<V>(sums[r]));
  }
}

// each(number of rows, first of them) for all rows of a tile, up to four at once.
template <class Each>
inline void few_rows_each(int64_t rows, const Each& each) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) each(std::integral_constant<int, 4>{}, r);
  if (rows - r == 3) each(std::integral_constant<int, 3>{}, r);
  if (rows - r == 2) each(std::integral_constant<int, 2>{}, r);
  if (rows - r == 1) each(std::integral_constant<int, 1>{}, r);
}

template <class V>
void attend(const QueryTile& tile, int64_t chunk, const Partial& to, float* scratch) {
  const int64_t size = tile.head_size, padded = (size + V::kRows - 1) / V::kRows * V::kRows, rows = tile.rows();
  const int64_t first = chunk * kChunk, last = tile.end() < first + kChunk ? tile.end() : first + kChunk, count = last - first;
  const int64_t room = padded_head(size);
  float *const keys_copy = scratch, *const values_copy = keys_copy + kChunk * room, *const out = values_copy + kChunk * room,
        *const scores = out + rows * room;
  const int64_t left = tile.packed > first ? tile.packed - first : 0, packed = left < count ? left : count;
  if (packed) {
    unpack_blocks<V>(tile, tile.packed_keys, first, packed, keys_copy);
    unpack_blocks<V>(tile, tile.packed_values, first, packed, values_copy);
  }
  int64_t keys_step = 0, values_step = 0;
  const float *keys = nullptr, *values = nullptr;
  if (packed < count) {
    const int64_t begin = first + packed - tile.packed, copied = packed * room;
    keys = chunk_rows<V>(tile, tile.keys, tile.keys_stride, begin, count - packed, keys_copy + copied, keys_step);
    values = chunk_rows<V>(tile, tile.values, tile.values_stride, begin, count - packed, values_copy + copied, values_step) - packed * values_step;
  }
  if (packed) few_rows_each(rows, [&](auto some, int64_t row) { score_blocks<V, some>(tile, row, keys_copy, packed, scores + row * kChunk); });
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
      if (begin < end && packed < end) score_row<V>(query, keys, keys_step, end - packed, padded, row_scores + packed);
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
  if (packed) few_rows_each(rows, [&](auto some, int64_t row) { weigh_blocks<V, some>(tile, scores + row * kChunk, values_copy, packed, out + row * padded, padded); });
  int64_t r = packed < count ? 0 : rows;
  for (; r + 4 <= rows; r += 4) weigh_tile<V, 4>(tile, first, packed, last, r, scores + r * kChunk, values, values_step, out + r * padded, padded);
  for (; r + 2 <= rows; r += 2) weigh_tile<V, 2>(tile, first, packed, last, r, scores + r * kChunk, values, values_step, out + r * padded, padded);
  for (; r < rows; ++r) weigh_tile<V, 1>(tile, first, packed, last, r, scores + r * kChunk, values, values_step, out + r * padded, padded);
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
