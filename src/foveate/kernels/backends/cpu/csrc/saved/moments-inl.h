// The moments of a tensor's values, in two passes. Each pass has eight sums of float64 that are added in one order, so the
// result depends on neither threads nor instructions.
//
// simd/saved_kernels-inl.h includes this file after saved/groups-inl.h.

constexpr int kSums = 8;

// each(eight values, how many are real) over elements [begin, end).
template <class V, class T, class Each>
void for_each_eight(const T* x, int64_t begin, int64_t end, const Each& each) {
  for (; begin < end; begin += kBlock) {
    alignas(64) float v[kBlock];
    const int64_t left = end - begin;
    if (left >= kBlock) {
      for (int k = 0; k < kBlock; k += V::kLanes) V::store(v + k, V::load(x + begin + k));
    } else {
      T tail[kBlock] = {};
      std::memcpy(tail, x + begin, static_cast<size_t>(left) * sizeof(T));
      for (int k = 0; k < kBlock; k += V::kLanes) V::store(v + k, V::load(tail + k));
    }
    for (int i = 0; i < kBlock && i < left; i += kSums) each(v + i, left - i < kSums ? static_cast<int>(left - i) : kSums);
  }
}

static inline double total_of(const double (&sum)[kSums]) {
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

template <class V>
Moments moments(const void* x, Type type, int64_t begin, int64_t end) {
  double sum[kSums] = {};
  float minimum[kSums], maximum[kSums];
  int32_t finite[kSums] = {}, zeros[kSums] = {};
  for (int i = 0; i < kSums; ++i) minimum[i] = float_of(0x7F800000u), maximum[i] = -minimum[i];
  with_type(type, [&](auto kind) {
    using T = decltype(kind);
    for_each_eight<V>(static_cast<const T*>(x), begin, end, [&](const float* v, int count) {
      if (count == kSums) {
        for (int i = 0; i < kSums; ++i) {
          const bool is = v[i] - v[i] == 0.0f;
          finite[i] += is;
          zeros[i] += v[i] == 0.0f;
          sum[i] += is ? static_cast<double>(v[i]) : 0.0;
          minimum[i] = is && v[i] < minimum[i] ? v[i] : minimum[i];
          maximum[i] = is && v[i] > maximum[i] ? v[i] : maximum[i];
        }
        return;
      }
      for (int i = 0; i < count; ++i) {
        if (!(v[i] - v[i] == 0.0f)) continue;
        ++finite[i];
        zeros[i] += v[i] == 0.0f;
        sum[i] += static_cast<double>(v[i]);
        minimum[i] = v[i] < minimum[i] ? v[i] : minimum[i];
        maximum[i] = v[i] > maximum[i] ? v[i] : maximum[i];
      }
    });
  });
  Moments result{0, 0, end - begin, total_of(sum), static_cast<double>(minimum[0]), static_cast<double>(maximum[0])};
  for (int i = 0; i < kSums; ++i) {
    result.finite += finite[i];
    result.zeros += zeros[i];
    if (minimum[i] < result.minimum) result.minimum = static_cast<double>(minimum[i]);
    if (maximum[i] > result.maximum) result.maximum = static_cast<double>(maximum[i]);
  }
  result.not_finite -= result.finite;
  return result;
}

template <class V>
double spread(const void* x, Type type, int64_t begin, int64_t end, double mean, double minimum, double per_unit, int64_t bins, int64_t* histogram) {
  double sum[kSums] = {};
  with_type(type, [&](auto kind) {
    using T = decltype(kind);
    for_each_eight<V>(static_cast<const T*>(x), begin, end, [&](const float* v, int count) {
      double place[kSums];
      for (int i = 0; i < kSums; ++i) {
        const bool is = v[i] - v[i] == 0.0f && i < count;
        const double value = static_cast<double>(v[i]);
        const double deviation = is ? value - mean : 0.0;
        sum[i] += deviation * deviation;
        place[i] = is ? (value - minimum) * per_unit : -1.0;
      }
      for (int i = 0; i < kSums; ++i) {
        if (place[i] < 0.0) continue;
        const int64_t bin = static_cast<int64_t>(place[i]);
        ++histogram[bin < bins ? bin : bins - 1];
      }
    });
  });
  return total_of(sum);
}
