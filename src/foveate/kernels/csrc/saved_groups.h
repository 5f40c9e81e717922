// Groups of few bits: the least and greatest value of a group, its range, and its codes, in one pass over memory. A few
// groups at a time stay in the first cache: their extremes, then all their ranges side by side, then their codes, while
// the next ones are prefetched.
//
// Included after an instruction set's vectors `V`: kLanes, Floats and Words (compiler vectors), load, store, min, max,
// multiply_add, to_words (nearest even), least, most and total of a vector, lanes (0, 1, ...), store_codes, Decoder.

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
  alignas(64) T tail_[kMostGroup];
};

// 2^F, the fixed point of codes.
constexpr int fraction_bits(int bits) { return bits == 16 ? 8 : 16; }

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

// NaN and 0 where there is none; `most` is NaN if any element is not finite.
static inline Range range_of(float least, float most, float steps, float limit) {
  const uint32_t word = word_of(least + 0.0f);
  const uint32_t cut = word & 0xFFFF0000u;
  const float low = float_of(least < 0.0f && word != cut ? cut + 0x10000u : cut);
  const float quotient = (most - low) / steps;
  float step = float_of((word_of(quotient) + 0xFFFFu) & 0xFFFF0000u);
  step = step < kLeastStep ? kLeastStep : step;
  if (low + steps * step < most) step = float_of(word_of(step) + 0x10000u);
  if (!(most > low)) step = 0.0f;
  const bool usable = low >= -limit && low + steps * step <= limit && most <= limit;
  return usable ? Range{low, step} : Range{float_of(0x7FC00000u), 0.0f};
}

template <class V, class T>
void extremes(const T* x, int group, float& least, float& most) {
  constexpr int kVectors = kBlock / V::kLanes;
  typename V::Floats low[kVectors], high[kVectors], strange[kVectors];
#pragma GCC unroll 8
  for (int k = 0; k < kVectors; ++k) {
    low[k] = high[k] = V::load(x + k * V::kLanes);
    strange[k] = low[k] * 0.0f;
  }
  for (int i = kBlock; i < group; i += kBlock)
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) {
      const typename V::Floats v = V::load(x + i + k * V::kLanes);
      low[k] = V::min(low[k], v);
      high[k] = V::max(high[k], v);
      strange[k] = V::multiply_add(v, V::splat(0.0f), strange[k]);
    }
#pragma GCC unroll 8
  for (int k = 1; k < kVectors; ++k) {
    low[0] = V::min(low[0], low[k]);
    high[0] = V::max(high[0], high[k]);
    strange[0] += strange[k];
  }
  least = V::least(low[0]);
  most = V::most(high[0]) + V::total(strange[0]);  // 0 or NaN
}

// Uniform on 0..65535, for a block at a time: see `uniform_16` of the reference.
template <class V>
class Uniform {
 public:
  explicit Uniform(uint64_t seed) : seed_(seed) {}

  void block(int64_t block, typename V::Words (&r)[kBlock / V::kLanes]) {
    if (block >> 16 != page_) turn_to(block >> 16);
    constexpr int kHashes = 16 / V::kLanes;
    const uint32_t start = static_cast<uint32_t>(block & 0xFFFF) * 16 + first_;
#pragma GCC unroll 4
    for (int k = 0; k < kHashes; ++k) {
      typename V::Words h = V::lanes() + (start + static_cast<uint32_t>(k * V::kLanes));
      h = (h ^ (h >> 16)) * 0x7FEB352Du;
      h = ((h ^ (h >> 15)) + second_) * 0x846CA68Bu;
      h ^= h >> 16;
      r[k] = h & 0xFFFFu;
      r[k + kHashes] = h >> 16;
    }
  }

 private:
  void turn_to(int64_t page) {
    page_ = page;
    uint64_t z = seed_ + (static_cast<uint64_t>(page) + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    first_ = static_cast<uint32_t>(z);
    second_ = static_cast<uint32_t>(z >> 32);
  }

  const uint64_t seed_;
  int64_t page_ = -1;
  uint32_t first_ = 0, second_ = 0;
};

// The codes' fixed point before rounding.
template <class V>
typename V::Words fixed_point(typename V::Floats v, float low, float scale, float top) {
  return V::to_words(V::min((v - low) * scale, V::splat(top)));
}

template <class V, class T, int BITS, bool RANDOM>
void pack_groups(const Packing& p, int64_t group, int64_t group_end) {
  constexpr int kVectors = kBlock / V::kLanes;
  constexpr int kFraction = fraction_bits(BITS);
  constexpr float kOne = 1 << kFraction;
  constexpr float kSteps = (1 << BITS) - 1;
  const int64_t group_bytes = int64_t{p.group} * BITS / 8;
  const int64_t fit = kBatchElements / p.group;
  const int64_t batch = fit < kBatchGroups ? fit : kBatchGroups;
  const int64_t ahead = batch * p.group;
  Groups<T> groups(p.x, p.n, p.group);
  Uniform<V> uniform(p.seed);
  for (; group < group_end; group += batch) {
    const int64_t count = group_end - group < batch ? group_end - group : batch;
    float least[kBatchGroups], most[kBatchGroups], scale[kBatchGroups];
    for (int64_t i = 0; i < count; ++i) extremes<V>(groups.at(group + i), p.group, least[i], most[i]);
    for (int64_t i = 0; i < count; ++i) {
      const Range range = range_of(least[i], most[i], kSteps, p.limit);
      p.ranges[2 * (group + i)] = static_cast<uint16_t>(word_of(range.low) >> 16);
      p.ranges[2 * (group + i) + 1] = static_cast<uint16_t>(word_of(range.step) >> 16);
      least[i] = range.low;
      scale[i] = range.step > 0.0f ? kOne / range.step : 0.0f;
    }
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* const codes = p.codes + (group + i) * group_bytes;
      const float low = least[i];
      if (low != low) {
        std::memset(codes, 0, static_cast<size_t>(group_bytes));
        continue;
      }
      const T* const from = groups.at(group + i);
      const int64_t block = (group + i) * (p.group / kBlock);
      for (int b = 0; b < p.group / kBlock; ++b) {
        const T* const at = from + b * kBlock;
        for (int line = 0; line < kBlock; line += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(at + line + ahead, 0, 3);
        typename V::Words code[kVectors];
        if constexpr (RANDOM) {
          uniform.block(block + b, code);
          if constexpr (kFraction < 16)
            for (int k = 0; k < kVectors; ++k) code[k] >>= 16 - kFraction;
        } else {
          for (int k = 0; k < kVectors; ++k) code[k] = typename V::Words{} + (1u << (kFraction - 1));
        }
#pragma GCC unroll 8
        for (int k = 0; k < kVectors; ++k)
          code[k] = (code[k] + fixed_point<V>(V::load(at + k * V::kLanes), low, scale[i], kSteps * kOne)) >> kFraction;
        V::template store_codes<BITS>(codes + b * (kBlock * BITS / 8), code);
      }
      if (const int missing = groups.missing(group + i)) {  // what fills up a group has code 0
        const int64_t from_bit = int64_t{p.group - missing} * BITS;
        uint8_t* rest = codes + from_bit / 8;
        if (from_bit % 8) *rest = static_cast<uint8_t>(*rest & ((1 << from_bit % 8) - 1)), ++rest;
        std::memset(rest, 0, static_cast<size_t>(codes + group_bytes - rest));
      }
    }
  }
}

template <class V, class T, int BITS>
void unpack_groups(const Unpacking& p, int64_t group, int64_t group_end) {
  constexpr int kVectors = kBlock / V::kLanes;
  T* const out = static_cast<T*>(p.out);
  for (; group < group_end; ++group) {
    const uint8_t* codes = p.codes + group * p.group * BITS / 8;
    const typename V::template Decoder<BITS> decode(float_of(uint32_t{p.ranges[2 * group]} << 16), float_of(uint32_t{p.ranges[2 * group + 1]} << 16));
    alignas(64) T tail[kMostGroup];
    const int64_t start = group * p.group;
    const bool full = start + p.group <= p.n;
    T* const to = full ? out + start : tail;
    for (int b = 0; b < p.group; b += kBlock, codes += kBlock * BITS / 8)
#pragma GCC unroll 8
      for (int k = 0; k < kVectors; ++k) V::store(to + b + k * V::kLanes, decode(codes, k));
    if (!full) std::memcpy(out + start, tail, static_cast<size_t>(p.n - start) * sizeof(T));
  }
}

// Exact sums of f (2^F - f), at most 2^40: two sums of 16 bits of each product.
template <class V, class T>
void variance_groups(const Variance& p, int64_t group, int64_t group_end) {
  constexpr int kVectors = kBlock / V::kLanes;
  Groups<T> groups(p.x, p.n, p.group);
  const int64_t all = (p.n + p.group - 1) / p.group;
  for (; group < group_end; ++group) {
    const T* const from = groups.at(group);
    float least, most;
    extremes<V>(from, p.group, least, most);
    for (int64_t level = 0; level < p.levels; ++level) {
      const int bits = static_cast<int>(p.bits[level]);
      const uint32_t one = 1u << fraction_bits(bits);
      const float steps = static_cast<float>((1 << bits) - 1);
      const Range range = range_of(least, most, steps, p.limit);
      float& out = p.out[level * all + group];
      out = range.low;
      if (range.low != range.low) continue;
      const float scale = range.step > 0.0f ? static_cast<float>(one) / range.step : 0.0f;
      typename V::Words lower{}, upper{}, product{};
      const auto add = [&](const T* at) {
        const typename V::Words f = fixed_point<V>(V::load(at), range.low, scale, steps * static_cast<float>(one)) & (one - 1);
        product = f * (one - f);
        lower += product & 0xFFFFu;
        upper += product >> 16;
      };
      for (int i = 0; i < p.group; i += kBlock)
#pragma GCC unroll 8
        for (int k = 0; k < kVectors; ++k) add(from + i + k * V::kLanes);
      int64_t sum = 0;
      for (int i = 0; i < V::kLanes; ++i) sum += int64_t{lower[i]} + (int64_t{upper[i]} << 16);
      sum -= int64_t{groups.missing(group)} * product[V::kLanes - 1];  // what fills up the group is its last element
      const double square = static_cast<double>(range.step) * static_cast<double>(range.step);
      out = static_cast<float>(square * static_cast<double>(sum) / (static_cast<double>(one) * static_cast<double>(one)));
    }
  }
}

template <class V, class T, int BITS>
void pack_bits(const Packing& p, int64_t group, int64_t group_end) {
  if (p.random) return pack_groups<V, T, BITS, true>(p, group, group_end);
  pack_groups<V, T, BITS, false>(p, group, group_end);
}

template <class V, class T>
void pack_type(const Packing& p, int64_t group, int64_t group_end) {
  if (p.bits == 2) return pack_bits<V, T, 2>(p, group, group_end);
  if (p.bits == 4) return pack_bits<V, T, 4>(p, group, group_end);
  if (p.bits == 8) return pack_bits<V, T, 8>(p, group, group_end);
  pack_bits<V, T, 16>(p, group, group_end);
}

template <class V, class T>
void unpack_type(const Unpacking& p, int64_t group, int64_t group_end) {
  if (p.bits == 2) return unpack_groups<V, T, 2>(p, group, group_end);
  if (p.bits == 4) return unpack_groups<V, T, 4>(p, group, group_end);
  if (p.bits == 8) return unpack_groups<V, T, 8>(p, group, group_end);
  unpack_groups<V, T, 16>(p, group, group_end);
}

// each(T{}) with the C++ type of a Type.
template <class Each>
void with_type(Type type, const Each& each) {
  if (type == Type::kFloat32) return each(float{});
  if (type == Type::kBFloat16) return each(BFloat16{});
  each(Float16{});
}

template <class V>
void pack(const Packing& p, int64_t group, int64_t group_end) {
  with_type(p.type, [&](auto type) { pack_type<V, decltype(type)>(p, group, group_end); });
}

template <class V>
void unpack(const Unpacking& p, int64_t group, int64_t group_end) {
  with_type(p.type, [&](auto type) { unpack_type<V, decltype(type)>(p, group, group_end); });
}

template <class V>
void variance(const Variance& p, int64_t group, int64_t group_end) {
  with_type(p.type, [&](auto type) { variance_groups<V, decltype(type)>(p, group, group_end); });
}
