// A decoder's blocks but for their products and attention: norms, rotary positions, gates.
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
