// Each group's scale and offset of least cost over all levels, for 16 rows at once.
//
// The operations and their order are those of the reference, so every instruction set gives its bits.
// simd/kernels-inl.h includes this file behind choose_codes-inl.h.

inline Sixteen clamped(const Sixteen& v, float low, float high) { return v < low ? sixteen(low) : v > high ? sixteen(high) : v; }

// The nearest integers, even ones of two; for magnitudes below 2^22.
inline Sixteen rounded(const Sixteen& v) { return (v + 0x1.8p23f) - 0x1.8p23f; }

// Scales and offsets as one byte each holds them (formats/grids.py).
struct StoredGrid {
  float up, down, least;  // 2^e, 2^-e, the least scale above 0

  explicit StoredGrid(int exponent)
      : up(__builtin_ldexpf(1.0f, exponent)), down(__builtin_ldexpf(1.0f, -exponent)), least(__builtin_ldexpf(0x1p-18f, exponent)) {}

  // The bytes of the nearest scales: middle bits of a float16.
  SixteenInts encoded(const Sixteen& scale) const {
    const Sixteen value = clamped(scale * down, 0.0f, 1.9375f);
    const SixteenInts bits = (SixteenInts)value;
    const SixteenInts normal = (bits - 0x38000000 + 0xFFF + ((bits >> 13) & 1)) >> 13;
    const SixteenInts subnormal = (SixteenInts)(value + 0.5f) - 0x3F000000;  // 0.5 puts the last place at 2^-24
    const SixteenInts code = ((bits < 0x38800000 ? subnormal : normal) + 32) >> 6;
    return code > 255 ? SixteenInts{} + 255 : code;
  }

  Sixteen decoded(const SixteenInts& code) const {
    const SixteenInts half = code << 6;
    const Sixteen normal = (Sixteen)((half << 13) + 0x38000000), subnormal = __builtin_convertvector(half, Sixteen) * 0x1p-24f;
    return (half < 0x400 ? subnormal : normal) * up;
  }

  // The grid that is stored for this one: each scale large enough that its offset can be stored; 0 stays 0.
  void snap(Sixteen& scale, Sixteen& offset) const {
    const Sixteen magnitude = offset < 0.0f ? -offset : offset, reach = magnitude * static_cast<float>(8.0 / 127.0);
    const Sixteen wanted = scale > 0.0f ? (scale < least ? sixteen(least) : scale) : scale;
    SixteenInts code = encoded(wanted);
    const SixteenInts lacking = (decoded(code) < reach) & (scale > 0.0f);
    const SixteenInts enough = encoded(reach);
    SixteenInts more = enough > code ? enough : code;
    more -= (decoded(more) < reach) & (more < 255);  // true is -1
    code = lacking ? more : code;
    scale = decoded(code);
    const Sixteen part = scale * 0.125f;
    offset = (part > 0.0f ? rounded(clamped(offset / part, -128.0f, 127.0f)) : Sixteen{}) * part;
  }
};

// The search for one group of 16 rows.
class GroupSearch {
 public:
  GroupSearch(const Sixteen* w, const float* importance, int64_t count, const StoredGrid& stored, float clip, float noise)
      : w_(w), importance_(importance), count_(count), stored_(stored), clip_(clip) {
    Sixteen lowest = w[0], highest = w[0];
    for (int64_t k = 1; k < count; ++k) {
      lowest = w[k] < lowest ? w[k] : lowest;
      highest = w[k] > highest ? w[k] : highest;
    }
    centre_ = lowest * 0.5f + highest * 0.5f;
    half_ = highest * 0.5f - lowest * 0.5f;
    const Sixteen farthest = highest > -lowest ? highest : -lowest;
    is_nothing_ = farthest <= stored.least / 2.0f;
    total_ = importance[0];
    for (int64_t k = 1; k < count; ++k) total_ += importance[k];
    noise_ = total_ * noise;
    low_ = high_ = sixteen(1.0f);
    least_ = sixteen(__builtin_inff());
  }

  void run(Sixteen& scale, Sixteen& offset) {
    for (const float clip : {1.0f, 0.93f, 0.86f, 0.78f, 0.7f, 0.6f, 0.48f}) move_ends(sixteen(clip), sixteen(clip));
    constexpr int kDirections[6][2] = {{1, 0}, {-1, 0}, {0, 1}, {0, -1}, {1, -1}, {-1, 1}};
    for (const float step : {0.12f, 0.06f, 0.03f, 0.015f})
      for (const auto& to : kDirections) move_ends(low_ + step * static_cast<float>(to[0]), high_ + step * static_cast<float>(to[1]));
    refit();
    scale = scale_, offset = offset_;
  }

 private:
  static Sixteen inverse(const Sixteen& scale) { return scale > 0.0f ? 1.0f / scale : Sixteen{}; }

  Sixteen cost(const Sixteen& scale, const Sixteen& offset) const {
    const Sixteen per_step = inverse(scale);
    Sixteen sum{};
    for (int64_t k = 0; k < count_; ++k) {
      Sixteen v = (w_[k] - offset) * per_step - 0.5f;  // integers are the middles of 4-bit cells
      Sixteen error = v - rounded(clamped(v, -8.0f, 7.0f));
      const Sixteen over = error - 0.5f, under = error + 0.5f;
      const Sixteen beyond = (over > 0.0f ? over : Sixteen{}) + (under < 0.0f ? under : Sixteen{});
      Sixteen each = beyond * beyond * clip_ + error * error;
      v = v * 0.5f - 0.25f;  // of 3-bit cells, then of 2-bit cells
      error = v - rounded(clamped(v, -4.0f, 3.0f));
      each += error * error;
      v = v * 0.5f - 0.25f;
      error = v - rounded(clamped(v, -2.0f, 1.0f));
      each += error * error;
      sum += each * importance_[k];
    }
    return (sum + noise_) * (scale * scale);
  }

  // Takes these grids where they cost less; whether they do.
  SixteenInts improves(Sixteen step, Sixteen middle) {
    step = is_nothing_ ? Sixteen{} : step < stored_.least ? sixteen(stored_.least) : step;
    middle = is_nothing_ ? Sixteen{} : middle;
    stored_.snap(step, middle);
    const Sixteen now = cost(step, middle);
    const SixteenInts better = now < least_;
    least_ = better ? now : least_;
    scale_ = better ? step : scale_;
    offset_ = better ? middle : offset_;
    return better;
  }

  void move_ends(const Sixteen& lower, const Sixteen& upper) {
    const SixteenInts better = improves(half_ * (lower + upper) / 15.0f, centre_ + half_ * (upper - lower) / 2.0f);
    low_ = better ? lower : low_;
    high_ = better ? upper : high_;
  }

  // Scale and offset by weighted least squares to the 4-bit codes.
  void refit() {
    const Sixteen per_step = inverse(scale_);
    const auto code_of = [&](const Sixteen& from_offset) { return rounded(clamped(from_offset * per_step - 0.5f, -8.0f, 7.0f)) + 0.5f; };
    Sixteen codes{}, values{}, spread{}, slope{};
    for (int64_t k = 0; k < count_; ++k) {
      const Sixteen from_offset = w_[k] - offset_;
      codes += importance_[k] * code_of(from_offset);
      values += importance_[k] * from_offset;
    }
    codes /= total_, values /= total_;
    for (int64_t k = 0; k < count_; ++k) {
      const Sixteen from_offset = w_[k] - offset_, code = code_of(from_offset) - codes, weight = importance_[k] * code;
      slope += weight * from_offset;
      spread += weight * code;
    }
    slope /= spread;
    Sixteen step = (slope > 0.0f) & (slope < __builtin_inff()) ? slope : scale_;
    step = step > 2.0f * scale_ ? 2.0f * scale_ : step;
    improves(step, offset_ + values - step * codes);
  }

  const Sixteen* w_;
  const float* importance_;
  int64_t count_;
  const StoredGrid& stored_;
  float clip_, noise_, total_;
  Sixteen centre_, half_, low_, high_, least_, scale_{}, offset_{};
  SixteenInts is_nothing_;
};

static_assert(kGridRows == kCodes, "a row is a lane");

template <class V>
void search_grids(const GridSearch& d, int64_t strip, int64_t strip_end) {
  const StoredGrid stored(d.exponent);
  alignas(64) float w[kGroupInputs][kCodes];
  float importance[kGroupInputs];
  for (; strip < strip_end; ++strip)
    for (int64_t g = 0; g < d.groups; ++g) {
      const int64_t first = g * d.group, row = strip * kCodes, rows = d.rows - row < kCodes ? d.rows - row : kCodes;
      for (int64_t k = 0; k < d.group; ++k) {  // padding repeats a weight, and counts nothing
        const int64_t from = first + k < d.columns ? first + k : d.columns - 1;
        importance[k] = first + k < d.columns ? d.importance[from] : 0.0f;
        for (int64_t r = 0; r < kCodes; ++r) w[k][r] = d.w[(row + (r < rows ? r : rows - 1)) * d.columns + from];
      }
      Sixteen scale, offset;
      GroupSearch(reinterpret_cast<const Sixteen*>(w), importance, d.group, stored, d.clip, d.noise).run(scale, offset);
      for (int64_t r = 0; r < rows; ++r) {
        d.scales[(row + r) * d.groups + g] = scale[r];
        d.offsets[(row + r) * d.groups + g] = offset[r];
      }
    }
}
