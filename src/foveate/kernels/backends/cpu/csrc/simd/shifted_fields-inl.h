// Fields of codes that are shifted down to the low bits of their bytes. A product then needs one sum, which is right as it
// is. AVX-512 leaves fields in place instead.
//
// The source file of an instruction set includes this file before its primitives `V`, which extend it
// (simd/kernels-inl.h has the rule for -inl.h). BYTES is the size of a vector.

template <int BYTES>
struct ShiftedFields {
  typedef uint32_t Words __attribute__((vector_size(BYTES)));
  typedef int32_t Ints __attribute__((vector_size(BYTES)));
  template <int>
  using Sums = Ints;

  static Words select(uint32_t mask, Words set, Words clear) { return (set & mask) | (clear & ~mask); }
  static void split_pairs(Words pairs, Words (&field)[4]) {
    for (int j = 0; j < 4; ++j) field[j] = (pairs >> (2 * j)) & 0x03030303u;
  }
  static void split(const auto& nibbles, Words (&field)[4]) {
    field[0] = nibbles.even & 0x0F0F0F0Fu;
    field[1] = nibbles.odd & 0x0F0F0F0Fu;
    field[2] = (nibbles.even >> 4) & 0x0F0F0F0Fu;
    field[3] = (nibbles.odd >> 4) & 0x0F0F0F0Fu;
  }
  static Ints total_split(Ints sums) { return sums; }
  static Ints total_pairs(Ints sums) { return sums; }
};
