// What an instruction set that has nothing better for it does in plain loops, and what all of them do alike.
//
// The source file of an instruction set includes this file before its primitives `V` (simd/kernels-inl.h has the rule for
// -inl.h).

// The words of floats, rounded to bfloat16, nearest even: 16 bits of each.
template <class Words>
Words bfloat16_bits(Words word) {
  return (word + (0x7FFFu + (word >> 16 & 1u))) >> 16;
}

// One bit for each of 32 elements: whether it differs from the value.
template <class T>
uint32_t unequal_each(const T* x, T value) {
  uint32_t word = 0;
  for (int i = 0; i < kBlock; ++i) word |= static_cast<uint32_t>(x[i] != value) << i;
  return word;
}

// 32 elements: the second where a bit is set, else the first.
template <class T>
void choose_each(uint32_t word, T first, T second, T* out) {
  const T change = first ^ second;
  for (int i = 0; i < kBlock; ++i) out[i] = static_cast<T>(first ^ (change & static_cast<T>(-static_cast<T>(word >> i & 1))));
}
