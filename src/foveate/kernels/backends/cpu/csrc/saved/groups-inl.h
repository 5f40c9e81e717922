// Groups of few bits: the minimum and maximum of a group, its range, and its codes, in one pass over memory. A few
// groups at a time stay in the first cache: their extremes, then all their ranges side by side, then their codes, while
// the next ones are prefetched.
//
// simd/saved_kernels-inl.h says where this file is included, and what `V` gives.

constexpr int kBatchElements = 2048;
constexpr int kBatchGroups = 32;

// The elements of a group; those of a last group that is not full come from a copy, filled up with the last one.
template <class T>
class Groups {
 public:
  Groups(const void* x, int64_t n, int group) : x_(static_cast<const T*>(x)), full_(n / group), group_(group), rest_(static_cast<int>(n % group)) {}

  const T* at(int64_t group) {
    if (group < full_) return x_ + group * group_;
    std::memcpy(tail_, x_ + full_ * group_, static_cast<size_t>(rest_) * sizeof(T));
    for (int i = rest_; i < group_; ++i) tail_[i] = tail_[rest_ - 1];
    return tail_;
  }
  // How many elements of a group are not there.
  int missing(int64_t group) const { return group < full_ ? 0 : group_ - rest_; }

 private:
  const T* const x_;
  const int64_t full_;
  const int group_, rest_;
  alignas(64) T tail_[kLargestGroup];
};

struct Range {
  float low, step;
};

static inline uint32_t word_of(float v) {
  uint32_t word;
  std::memcpy(&word, &v, 4);
  return word;
}
static inline float float_of(uint32_t word) {
  float v;
  std::memcpy(&v, &word, 4);
  return v;
}

// NaN and 0 where there is none; `maximum` is NaN if any element is not finite.
static inline Range range_of(float minimum, float maximum, float steps, float limit) {
  const uint32_t word = word_of(minimum + 0.0f);
  const uint32_t cut = word & 0xFFFF0000u;
  const float low = float_of(minimum < 0.0f && word != cut ? cut + 0x10000u : cut);
  const float span = maximum - low;
  const float quotient = span / steps;
  float step = float_of((word_of(quotient) + 0xFFFFu) & 0xFFFF0000u);
  step = step < kSmallestStep ? kSmallestStep : step;
  if (steps * step < span || low + steps * step < maximum) step = float_of(word_of(step) + 0x10000u);
  if (!(maximum > low)) step = 0.0f;
  const bool usable = low >= -limit && low + steps * step <= limit && maximum <= limit;
  return usable ? Range{low, step} : Range{float_of(0x7FC00000u), 0.0f};
}

// 256 / step, rounded down, so that no code is greater than the last one.
static inline float scale_of(float step) {
  const float nearest = 256.0f / step;
  const bool above = static_cast<double>(nearest) * static_cast<double>(step) > 256.0;
  return step > 0.0f ? float_of(word_of(nearest) - (above ? 1 : 0)) : 0.0f;
}

// Whether all of a group are finite, for when their sum is not: it may only have overflowed.
template <class V, class T>
bool all_finite(const T* x, int group) {
  typename V::Floats not_finite{};
  for (int i = 0; i < group; i += V::kLanes) not_finite += V::load(x + i) * 0.0f;  // 0 or NaN
  return V::total(not_finite) == 0.0f;
}

// The minimum and maximum of a group; the maximum is NaN if any element is not finite, which the sum of all tells.
template <class V, class T>
void extremes(const T* x, int group, float& minimum, float& maximum) {
  constexpr int kVectors = kBlock / V::kLanes;
  typename V::Floats low[kVectors], high[kVectors], sum[kVectors];
#pragma GCC unroll 8
  for (int k = 0; k < kVectors; ++k) low[k] = high[k] = sum[k] = V::load(x + k * V::kLanes);
  for (int i = kBlock; i < group; i += kBlock)
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) {
      const typename V::Floats v = V::load(x + i + k * V::kLanes);
      low[k] = V::min(low[k], v);
      high[k] = V::max(high[k], v);
      sum[k] += v;
    }
#pragma GCC unroll 8
  for (int k = 1; k < kVectors; ++k) {
    low[0] = V::min(low[0], low[k]);
    high[0] = V::max(high[0], high[k]);
    sum[0] += sum[k];
  }
  minimum = V::minimum(low[0]);
  maximum = V::maximum(high[0]);
  const float total = V::total(sum[0]);
  if (__builtin_expect(!(total - total == 0.0f), 0) && !all_finite<V>(x, group)) maximum = float_of(0x7FC00000u);
}

// Bytes that are uniform, 32 for each block: see `uniform` of the reference. Blocks follow one another.
class Uniform {
 public:
  Uniform(uint64_t seed, int64_t block) : seed_(seed), block_(block) { turn(); }

  Hashes next() {
    Hashes h = counter_;
    counter_ += 8u;
    h = (h ^ (h >> 16)) * 0x7FEB352Du;
    h = ((h ^ (h >> 15)) + second_) * 0x846CA68Bu;
    if ((++block_ & 0xFFFF) == 0) turn();
    return h ^ (h >> 16);
  }

  void skip(int64_t blocks) {
    block_ += blocks;
    turn();
  }

 private:
  void turn() {  // to the keys of the page
    uint64_t z = seed_ + (static_cast<uint64_t>(block_ >> 16) + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    counter_ = Hashes{0, 1, 2, 3, 4, 5, 6, 7} + (static_cast<uint32_t>(z) + static_cast<uint32_t>(block_ & 0xFFFF) * 8);
    second_ = Hashes{} + static_cast<uint32_t>(z >> 32);
  }

  const uint64_t seed_;
  int64_t block_;
  Hashes counter_, second_;
};

// The codes' fixed point before rounding.
template <class V>
typename V::Words fixed_point(typename V::Floats v, float low, float scale) {
  return V::to_words((v - low) * scale);
}

// Zeros for the last codes of a group, which fill it up.
static inline void clear_codes(uint8_t* codes, int group, int missing, int bits) {
  const int from_bit = (group - missing) * bits;
  uint8_t* rest = codes + from_bit / 8;
  uint8_t* const end = codes + group * bits / 8;
  if (from_bit % 8) *rest = static_cast<uint8_t>(*rest & ((1 << from_bit % 8) - 1)), ++rest;
  std::memset(rest, 0, static_cast<size_t>(end - rest));
}

template <class V, class T, int BITS, bool RANDOM>
void pack_groups(const Packing& p, int64_t group, int64_t group_end) {
  constexpr int kVectors = kBlock / V::kLanes;
  constexpr float kSteps = (1 << BITS) - 1;
  constexpr int kCodeBytes = kBlock * BITS / 8;
  const int group_size = p.group, group_blocks = group_size / kBlock;
  const int64_t fit = kBatchElements / group_size;
  const int64_t batch = fit < kBatchGroups ? fit : kBatchGroups;
  const int64_t ahead = batch * group_size;
  Groups<T> groups(p.x, p.n, group_size);
  Uniform uniform(p.seed, group * group_blocks);
  uint8_t* codes = p.codes + group * group_blocks * kCodeBytes;
  for (; group < group_end; group += batch) {
    const int count = static_cast<int>(group_end - group < batch ? group_end - group : batch);
    float low[kBatchGroups], maximum[kBatchGroups], scale[kBatchGroups];
    for (int i = 0; i < count; ++i) extremes<V>(groups.at(group + i), group_size, low[i], maximum[i]);
    for (int i = 0; i < count; ++i) {
      const Range range = range_of(low[i], maximum[i], kSteps, p.limit);
      p.ranges[2 * (group + i)] = static_cast<uint16_t>(word_of(range.low) >> 16);
      p.ranges[2 * (group + i) + 1] = static_cast<uint16_t>(word_of(range.step) >> 16);
      low[i] = range.low;
      scale[i] = scale_of(range.step);
    }
    for (int i = 0; i < count; ++i, codes += group_blocks * kCodeBytes) {
      if (low[i] != low[i]) {
        std::memset(codes, 0, static_cast<size_t>(group_blocks * kCodeBytes));
        uniform.skip(group_blocks);
        continue;
      }
      const T* const from = groups.at(group + i);
      for (int b = 0; b < group_blocks; ++b) {
        const T* const at = from + b * kBlock;
        for (int line = 0; line < kBlock; line += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(at + line + ahead, 0, 2);  // to the second cache
        typename V::Words fixed[kVectors];
#pragma GCC unroll 8
        for (int k = 0; k < kVectors; ++k) fixed[k] = fixed_point<V>(V::load(at + k * V::kLanes), low[i], scale[i]);
        const Hashes random = RANDOM ? uniform.next() : Hashes{} + 0x80808080u;
        V::template store_codes<BITS>(codes + b * kCodeBytes, fixed, random);
      }
      if (const int missing = groups.missing(group + i)) clear_codes(codes, group_size, missing, BITS);
    }
  }
}

// STREAM: past the caches, for what is larger than they are.
template <class V, class T, int BITS, bool STREAM>
void unpack_groups(const Unpacking& p, int64_t group, int64_t group_end) {
  constexpr int kVectors = kBlock / V::kLanes;
  T* const out = static_cast<T*>(p.out);
  for (; group < group_end; ++group) {
    const uint8_t* codes = p.codes + group * p.group * BITS / 8;
    const typename V::template Decoder<BITS> decode(float_of(uint32_t{p.ranges[2 * group]} << 16), float_of(uint32_t{p.ranges[2 * group + 1]} << 16));
    alignas(64) T tail[kLargestGroup];
    const int64_t start = group * p.group;
    const bool full = start + p.group <= p.n;
    T* const to = full ? out + start : tail;
    for (int b = 0; b < p.group; b += kBlock, codes += kBlock * BITS / 8)
#pragma GCC unroll 8
      for (int k = 0; k < kVectors; ++k) {
        if constexpr (STREAM) {
          V::stream(to + b + k * V::kLanes, decode(codes, k));
        } else {
          V::store(to + b + k * V::kLanes, decode(codes, k));
        }
      }
    if (!full) std::memcpy(out + start, tail, static_cast<size_t>(p.n - start) * sizeof(T));
  }
  if constexpr (STREAM) V::fence();
}

// Exact sums of f (256 - f).
template <class V, class T>
void variance_groups(const Variance& p, int64_t group, int64_t group_end) {
  constexpr int kVectors = kBlock / V::kLanes;
  Groups<T> groups(p.x, p.n, p.group);
  const int64_t all = (p.n + p.group - 1) / p.group;
  for (; group < group_end; ++group) {
    const T* const from = groups.at(group);
    float minimum, maximum;
    extremes<V>(from, p.group, minimum, maximum);
    for (int64_t level = 0; level < p.levels; ++level) {
      const Range range = range_of(minimum, maximum, static_cast<float>((1 << p.bits[level]) - 1), p.limit);
      float& out = p.out[level * all + group];
      out = range.low;
      if (range.low != range.low) continue;
      const float scale = scale_of(range.step);
      typename V::Words sums[kVectors] = {}, product{};
      for (int i = 0; i < p.group; i += kBlock)
#pragma GCC unroll 8
        for (int k = 0; k < kVectors; ++k) {
          const typename V::Words f = fixed_point<V>(V::load(from + i + k * V::kLanes), range.low, scale) & 255u;
          product = f * (256u - f);
          sums[k] += product;
        }
      int64_t sum = 0;
      for (int k = 0; k < kVectors; ++k)
        for (int i = 0; i < V::kLanes; ++i) sum += sums[k][i];
      sum -= int64_t{groups.missing(group)} * product[V::kLanes - 1];  // what fills up the group is its last element
      const double square = static_cast<double>(range.step) * static_cast<double>(range.step);
      out = static_cast<float>(square * static_cast<double>(sum) / 65536.0);
    }
  }
}

// each(T{}) with the C++ type of a Type.
template <class Each>
void with_type(Type type, const Each& each) {
  if (type == Type::kFloat32) return each(float{});
  if (type == Type::kBFloat16) return each(BFloat16{});
  each(Float16{});
}

// each(integral constant) with the bits of a code.
template <class Each>
void with_code_bits(int bits, const Each& each) {
  if (bits == 2) return each(std::integral_constant<int, 2>{});
  if (bits == 4) return each(std::integral_constant<int, 4>{});
  if (bits == 8) return each(std::integral_constant<int, 8>{});
  each(std::integral_constant<int, 16>{});
}

template <class V>
void pack(const Packing& p, int64_t group, int64_t group_end) {
  with_type(p.type, [&](auto type) {
    with_code_bits(p.bits, [&](auto bits) {
      if (p.random) return pack_groups<V, decltype(type), bits, true>(p, group, group_end);
      pack_groups<V, decltype(type), bits, false>(p, group, group_end);
    });
  });
}

template <class V>
void unpack(const Unpacking& p, int64_t group, int64_t group_end) {
  with_type(p.type, [&](auto type) {
    using T = decltype(type);
    with_code_bits(p.bits, [&](auto bits) {
      if constexpr (std::is_same_v<T, float>)
        if (p.stream) return unpack_groups<V, T, bits, true>(p, group, group_end);
      unpack_groups<V, T, bits, false>(p, group, group_end);
    });
  });
}

template <class V>
void variance(const Variance& p, int64_t group, int64_t group_end) {
  with_type(p.type, [&](auto type) { variance_groups<V, decltype(type)>(p, group, group_end); });
}
