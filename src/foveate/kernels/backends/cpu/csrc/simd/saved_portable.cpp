// Saved tensors on any machine: vectors of the compiler (GCC, Clang) of 4 elements, which become SSE2, NEON, or plain words.

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd/halves.h"
#include "saved/saved.h"

namespace foveate {
namespace {

#include "saved/element_loops-inl.h"

struct Portable {
  static constexpr int kLanes = 4;
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef float Floats __attribute__((vector_size(16)));

  static Floats load(const float* p) { return read<Floats>(p); }
  static Floats load(const BFloat16* p) { return (Floats)(Words{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16); }
  static Floats load(const Float16* p) { return Floats{half(p[0].bits), half(p[1].bits), half(p[2].bits), half(p[3].bits)}; }
  static void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
  static void store(BFloat16* p, Floats v) {
    const Words rounded = bfloat16_bits((Words)v);
    for (int i = 0; i < kLanes; ++i) p[i].bits = static_cast<uint16_t>(rounded[i]);
  }
  static void store(Float16* p, Floats v) {
    for (int i = 0; i < kLanes; ++i) p[i].bits = to_half(v[i]);
  }
  static void stream(float* p, Floats v) { store(p, v); }
  static void fence() {}
  static Floats splat(float v) { return Floats{v, v, v, v}; }
  static Floats min(Floats a, Floats b) { return a < b ? a : b; }
  static Floats max(Floats a, Floats b) { return a > b ? a : b; }
  // Of numbers from 0 to 2^24: adding 2^23 leaves no place for fractions.
  static Words to_words(Floats v) {
    const Floats rounded = (v + 0x1p23f) - 0x1p23f;
    return (Words)__builtin_convertvector(v < 0x1p23f ? rounded : v, Ints);
  }
  static Words lanes() { return Words{0, 1, 2, 3}; }
  static float minimum(Floats v) {
    float low = v[0];
    for (int i = 1; i < kLanes; ++i) low = v[i] < low ? v[i] : low;
    return low;
  }
  static float maximum(Floats v) {
    float high = v[0];
    for (int i = 1; i < kLanes; ++i) high = v[i] > high ? v[i] : high;
    return high;
  }
  static float total(Floats v) { return (v[0] + v[1]) + (v[2] + v[3]); }

  // The codes of fixed point plus random bytes.
  template <int BITS>
  static void store_codes(uint8_t* to, const Words (&fixed)[8], Hashes random) {
    for (int k = 0; k < 8; ++k) {
      uint64_t fields = 0;
      for (int i = 0; i < kLanes; ++i) {
        const uint32_t byte = random[k] >> (8 * i) & 255u;
        fields |= uint64_t{(fixed[k][i] + byte) >> 8} << (BITS * i);
      }
      std::memcpy(to + k * BITS / 2, &fields, BITS / 2);
    }
  }

  // Values of codes: vector k of a block.
  template <int BITS>
  class Decoder {
   public:
    Decoder(float low, float step) : low_(splat(low)), step_(splat(step)) {}
    Floats operator()(const uint8_t* codes, int k) const {
      uint64_t fields = 0;
      std::memcpy(&fields, codes + k * BITS / 2, BITS / 2);
      Ints code;
      for (int i = 0; i < kLanes; ++i) code[i] = static_cast<int32_t>(fields >> (BITS * i) & ((1u << BITS) - 1));
      return low_ + __builtin_convertvector(code, Floats) * step_;
    }

   private:
    Floats low_, step_;
  };

  template <class T>
  static uint32_t greater(const T* x, float threshold) {
    uint32_t word = 0;
    for (int k = 0; k < 8; ++k) {
      const Floats v = load(x + k * kLanes);
      for (int i = 0; i < kLanes; ++i) word |= static_cast<uint32_t>(v[i] > threshold) << (k * kLanes + i);
    }
    return word;
  }
  template <class T>
  static uint32_t unequal(const T* x, T value) {
    return unequal_each(x, value);
  }
  template <class T>
  static void choose(uint32_t word, T first, T second, T* out) {
    choose_each(word, first, second, out);
  }
};

#include "simd/saved_kernels-inl.h"

}  // namespace

const SavedKernels* saved_portable() {
  static const SavedKernels kernels = saved_kernels_of<Portable>();
  return &kernels;
}

}  // namespace foveate
