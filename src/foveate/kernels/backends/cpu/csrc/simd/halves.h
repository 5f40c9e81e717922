// float16 in integers, for machines whose instructions for it we do not use.
#pragma once

#include <cstdint>
#include <cstring>

namespace foveate {
namespace {

template <class T>
T read(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline float half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t rest = bits & 0x7FFFu;
  uint32_t out;
  if (rest >= 0x7C00u) {
    out = 0x7F800000u | (rest << 13);
  } else if (rest >= 0x0400u) {
    out = (rest << 13) + 0x38000000u;
  } else {
    const float subnormal = static_cast<float>(rest) * 0x1p-24f;
    std::memcpy(&out, &subnormal, 4);
  }
  out |= sign;
  return read<float>(&out);
}

// Nearest even, as the instructions do.
inline uint16_t to_half(float value) {
  uint32_t bits = read<uint32_t>(&value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return sign | 0x7E00u;
  if (bits >= 0x47800000u) return sign | 0x7C00u;
  if (bits < 0x38800000u) {  // subnormal: adding 2^-1 * 2^0 puts its last place at 2^-24
    const float aligned = read<float>(&bits) + 0.5f;
    return static_cast<uint16_t>(sign | (read<uint32_t>(&aligned) - 0x3F000000u));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xFFFu + ((bits >> 13) & 1u)) >> 13));
}

}  // namespace
}  // namespace foveate
