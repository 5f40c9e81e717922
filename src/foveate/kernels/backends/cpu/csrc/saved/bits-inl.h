// Bits for elements: masks, two values, narrow integers. Loops that the compiler turns into vectors where it can; what it
// cannot see through, comparing 32 elements to a word, is V::greater and V::unequal.
//
// simd/saved_kernels-inl.h includes this file after saved/groups-inl.h.

// A block's word of bits, of which the last may have fewer bytes in memory.
static inline void put_word(uint8_t* bits, int64_t block, int64_t n, uint32_t word) {
  const int64_t left = (n - block * kBlock + 7) / 8;
  if (left >= 4) {
    std::memcpy(bits + block * 4, &word, 4);
  } else {
    std::memcpy(bits + block * 4, &word, static_cast<size_t>(left));
  }
}
static inline uint32_t get_word(const uint8_t* bits, int64_t block, int64_t n) {
  const int64_t left = (n - block * kBlock + 7) / 8;
  uint32_t word = 0;
  if (left >= 4) {
    std::memcpy(&word, bits + block * 4, 4);
  } else {
    std::memcpy(&word, bits + block * 4, static_cast<size_t>(left));
  }
  return word;
}

// each(x, block) for every block; the last one, where it is not full, from a copy filled up with its first element.
template <class T, class Each>
bool for_each_block(const T* x, int64_t n, int64_t block, int64_t block_end, const Each& each) {
  for (; block < block_end; ++block) {
    const T* from = x + block * kBlock;
    T tail[kBlock];
    const int64_t left = n - block * kBlock;
    if (left < kBlock) {
      for (int i = 0; i < kBlock; ++i) tail[i] = from[i < left ? i : 0];
      from = tail;
    }
    if (!each(from, block)) return false;
  }
  return true;
}

static inline uint32_t real_bits(int64_t block, int64_t n) {
  const int64_t left = n - block * kBlock;
  return left < kBlock ? (1u << left) - 1 : ~0u;
}

template <class V>
void mask(const void* x, Type type, int64_t n, float threshold, uint8_t* bits, int64_t block, int64_t block_end) {
  with_type(type, [&](auto kind) {
    using T = decltype(kind);
    for_each_block(static_cast<const T*>(x), n, block, block_end, [&](const T* from, int64_t b) {
      put_word(bits, b, n, V::greater(from, threshold) & real_bits(b, n));
      return true;
    });
  });
}

// each(T{}) with the unsigned integer of so many bytes.
template <class Each>
void with_word(int bytes, const Each& each) {
  if (bytes == 1) return each(uint8_t{});
  if (bytes == 2) return each(uint16_t{});
  if (bytes == 4) return each(uint32_t{});
  each(uint64_t{});
}

template <class V, class T>
bool two_values_of(const TwoValues& p, int64_t block, int64_t block_end) {
  const T first = static_cast<T>(p.first), second = static_cast<T>(p.second);
  return for_each_block(static_cast<const T*>(p.x), p.n, block, block_end, [&](const T* from, int64_t b) {
    const uint32_t other = V::unequal(from, first);
    if (other & V::unequal(from, second)) return false;
    put_word(p.bits, b, p.n, other & real_bits(b, p.n));
    return true;
  });
}

template <class V>
bool two_values(const TwoValues& p, int64_t block, int64_t block_end) {
  bool only_two = true;
  with_word(p.bytes, [&](auto word) { only_two = two_values_of<V, decltype(word)>(p, block, block_end); });
  return only_two;
}

template <class V, class T>
void choose_of(const Choosing& p, int64_t block, int64_t block_end) {
  const T first = static_cast<T>(p.values[0]), second = static_cast<T>(p.values[1]);
  for (; block < block_end; ++block) {
    const uint32_t word = get_word(p.bits, block, p.n);
    T* const out = static_cast<T*>(p.out) + block * kBlock;
    const int64_t left = p.n - block * kBlock;
    if (left >= kBlock) {
      V::choose(word, first, second, out);
    } else {
      for (int i = 0; i < left; ++i) out[i] = word >> i & 1 ? second : first;
    }
  }
}

template <class V>
void choose(const Choosing& p, int64_t block, int64_t block_end) {
  with_word(p.bytes, [&](auto word) { choose_of<V, decltype(word)>(p, block, block_end); });
}

// each(T{}) with the C++ type of an Integer.
template <class Each>
bool with_integer(Integer type, const Each& each) {
  if (type == Integer::kUInt8) return each(uint8_t{});
  if (type == Integer::kInt8) return each(int8_t{});
  if (type == Integer::kInt16) return each(int16_t{});
  if (type == Integer::kInt32) return each(int32_t{});
  return each(int64_t{});
}

template <int BITS>
void put_fields(const uint32_t (&code)[kBlock], uint8_t* to) {
  constexpr int kEach = BITS < 8 ? 8 / BITS : 1;
  constexpr int kBytes = BITS < 8 ? 1 : BITS / 8;
  for (int i = 0; i < kBlock / kEach; ++i) {
    uint32_t field = 0;
    for (int j = 0; j < kEach; ++j) field |= code[i * kEach + j] << (BITS < 8 ? j * BITS : 0);
    std::memcpy(to + i * kBytes, &field, kBytes);
  }
}
template <int BITS>
void get_fields(const uint8_t* from, uint32_t (&code)[kBlock]) {
  constexpr int kEach = BITS < 8 ? 8 / BITS : 1;
  constexpr int kBytes = BITS < 8 ? 1 : BITS / 8;
  constexpr uint32_t kMask = BITS < 8 ? (1u << (BITS < 8 ? BITS : 0)) - 1 : ~0u;
  for (int i = 0; i < kBlock / kEach; ++i) {
    uint32_t field = 0;
    std::memcpy(&field, from + i * kBytes, kBytes);
    for (int j = 0; j < kEach; ++j) code[i * kEach + j] = field >> (BITS < 8 ? j * BITS : 0) & kMask;
  }
}

// each(integral constant) with the bits of a field.
template <class Each>
void with_bits(int bits, const Each& each) {
  if (bits == 1) return each(std::integral_constant<int, 1>{});
  if (bits == 2) return each(std::integral_constant<int, 2>{});
  if (bits == 4) return each(std::integral_constant<int, 4>{});
  if (bits == 8) return each(std::integral_constant<int, 8>{});
  if (bits == 16) return each(std::integral_constant<int, 16>{});
  each(std::integral_constant<int, 32>{});
}

template <class V>
bool narrow(const Narrowing& p, int64_t block, int64_t block_end) {
  const uint64_t maximum = (uint64_t{1} << p.bits) - 1;
  const uint64_t low = static_cast<uint64_t>(p.low);
  return with_integer(p.type, [&](auto kind) {
    using T = decltype(kind);
    return for_each_block(static_cast<const T*>(p.x), p.n, block, block_end, [&](const T* from, int64_t b) {
      uint32_t code[kBlock];
      uint64_t seen = 0;
      for (int i = 0; i < kBlock; ++i) {
        const uint64_t wide = static_cast<uint64_t>(static_cast<int64_t>(from[i])) - low;  // below low it is huge
        seen |= wide;
        code[i] = static_cast<uint32_t>(wide);
      }
      if (seen > maximum) return false;
      const int64_t left = p.n - b * kBlock;
      for (int64_t i = left; i < kBlock; ++i) code[i] = 0;
      with_bits(p.bits, [&](auto bits) {
        uint8_t* const to = p.codes + b * kBlock * bits / 8;
        if (left >= kBlock) return put_fields<bits>(code, to);
        uint8_t tail[kBlock * 4];
        put_fields<bits>(code, tail);
        std::memcpy(to, tail, static_cast<size_t>((left * bits + 7) / 8));
      });
      return true;
    });
  });
}

template <class V>
void widen(const Narrowing& p, int64_t block, int64_t block_end) {
  const uint64_t low = static_cast<uint64_t>(p.low);
  with_integer(p.type, [&](auto kind) {
    using T = decltype(kind);
    for (; block < block_end; ++block) {
      const int64_t left = p.n - block * kBlock < kBlock ? p.n - block * kBlock : kBlock;
      uint32_t code[kBlock];
      with_bits(p.bits, [&](auto bits) {
        const uint8_t* const from = p.codes + block * kBlock * bits / 8;
        if (left == kBlock) return get_fields<bits>(from, code);
        uint8_t tail[kBlock * 4] = {};
        std::memcpy(tail, from, static_cast<size_t>((left * bits + 7) / 8));
        get_fields<bits>(tail, code);
      });
      T* const out = static_cast<T*>(p.x) + block * kBlock;
      if (left == kBlock) {
        for (int i = 0; i < kBlock; ++i) out[i] = static_cast<T>(code[i] + low);
      } else {
        for (int i = 0; i < left; ++i) out[i] = static_cast<T>(code[i] + low);
      }
    }
    return true;
  });
}
