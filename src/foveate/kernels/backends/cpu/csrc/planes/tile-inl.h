// From planes to codes, in registers: the part every kernel shares.
//
// A chunk of 64 bytes is 16 rows x 4 bytes, and a vector of any instruction set is some of those rows: `V::kRows` words
// of 32 bits. In a 2-bit chunk, bits 2j and 2j+1 of byte i of a row are column 4j + i ("field j"). So a field masked out
// of a chunk lies as the products want it, four columns of a row in a word, rows in lanes. Planes are merged before
// fields are taken apart, which halves the work at each step:
//
//     two 1-bit chunks (32 columns)          -> two chunks of 2-bit fields      (one shift, one select each)
//     2-bit chunks `high`, `low`             -> nibbles: fields 0|2 and 1|3     (one shift, one select each)
//     nibbles A (planes 0-2) and B (3-4)     -> bytes, one field each           (one shift, one select each)
//
// At level 3 the nibbles are 2c, at level 6 the bytes are 4c: the plane that is not read is zero. The sums are put right
// once a tile, by a shift.
//
// simd/kernels-inl.h says where this file is included, and in which order.

// How many planes a level reads; 0xFF for what is no level.
constexpr uint8_t kPlanesOf[9] = {0, 0xFF, 1, 2, 3, 0xFF, 4, 0xFF, 5};
constexpr uint8_t kFloors[6] = {1, 2, 3, 4, 6, 8};  // the least stored level that has scales, plane 0, plane 1...
constexpr int kCodeShift[6] = {0, 0, 1, 0, 2, 0};    // codes come out 2^shift too large where planes read are 2 and 4

// How far ahead streams are prefetched, in bytes: fewer planes are fewer streams, which must be further ahead.
// A strip keeps to one distance: were it another from tile to tile, bytes between would never be asked for.
constexpr int64_t kAhead[6] = {0, 6144, 4096, 3072, 2048, 2048};
constexpr int64_t kAheadMixed = 2048;
constexpr int64_t kScalesAhead = 1024;

// To the second cache: six streams this far ahead would crowd the first.
inline void prefetch(const void* p, int64_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(ahead)), 0, 2);
}

// Where a plane's tile is, if it is stored: of a plane that is not read nothing is known, and it is only a number.
inline const uint8_t* tile_at(const uint8_t* plane, uint64_t bytes) {
  return reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(plane) + bytes);
}

// The greatest code of a level that reads `planes` planes.
inline int32_t code_range(int planes, int anchor_step) {
  switch (planes) {
    case 1: return 3;
    case 2: return 7;
    case 3: return 15;
    case 4: return 15 * (anchor_step / 4) + 3;
    default: return 15 * anchor_step + 15;
  }
}

// The level at which a tile's planes are read: none where its exact values are read in their place.
inline uint8_t nested_level(uint8_t stored, uint8_t active) {
  if (active > kTopNested) return active == 16 || active == 32 ? 0 : 0xFF;
  return stored < active ? stored : active;
}

struct Tile {
  const uint8_t* planes[kPlanes];
  const uint8_t* scales;
  float offset_unit;
  int kind;  // planes to read; 0: skip the tile
};

// Whether all of some levels are the same one.
inline bool alike(const uint8_t* levels, int64_t count) {
  if (count < 8) {
    for (int64_t i = 1; i < count; ++i)
      if (levels[i] != levels[0]) return false;
    return true;
  }
  const uint64_t first = levels[0] * 0x0101010101010101u;
  uint64_t word, differ = 0;
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    std::memcpy(&word, levels + i, 8);
    differ |= word ^ first;
  }
  std::memcpy(&word, levels + count - 8, 8);
  return (differ | (word ^ first)) == 0;
}

// The place in each plane while a product goes along a strip. A plane's place moves on by one tile wherever the tile
// stores that plane, whether it is read or not.
struct TileCursor {
  const Weight& w;
  bool mixed = false;  // whether the strip's levels differ
  bool gaps = false;   // whether the strip stores bytes, amid those that are read, that are not
  const uint8_t* stored_levels = nullptr;
  const uint8_t* active_levels = nullptr;
  uint64_t bytes[6], limit[6], at[6];  // of the scales, then of each plane

  explicit TileCursor(const Weight& weight) : w(weight) {
    for (int i = 0; i < 6; ++i) {
      bytes[i] = static_cast<uint64_t>(i ? tile_bytes(i - 1, w.group) : 2 * kTileRows);
      limit[i] = bytes[i] * w.tiles[i];
    }
  }

  void begin(int64_t strip) {
    stored_levels = w.stored_levels + strip * w.groups;
    active_levels = w.active_levels + strip * w.groups;
    const int64_t* tile_offsets = w.tile_offsets + strip * 6;
    for (int i = 0; i < 6; ++i) at[i] = bytes[i] * static_cast<uint64_t>(tile_offsets[i]);
    // the next strips' index: little, but each line of it would be waited for
    prefetch(stored_levels, 64 + 2 * w.groups);
    prefetch(active_levels, 64 + 2 * w.groups);
    prefetch(tile_offsets, 64 + 2 * 48);
    const bool active_differ = !alike(active_levels, w.groups), stored_differ = !alike(stored_levels, w.groups);
    mixed = active_differ || stored_differ;
    gaps = false;
    for (int64_t group = 0; active_differ && !gaps && group < w.groups; ++group) gaps = nested_level(stored_levels[group], active_levels[group]) < stored_levels[group];
  }

  int64_t ahead(int kind) const { return mixed ? kAheadMixed : kAhead[kind]; }

  // Whether a run is worth its own loop: the next few tiles are alike.
  inline __attribute__((always_inline)) bool at_uniform_run(int64_t group) const {
    uint32_t stored, active;
    if (group + 4 > w.groups) return false;
    std::memcpy(&stored, stored_levels + group, 4);
    std::memcpy(&active, active_levels + group, 4);
    return stored == stored_levels[group] * 0x01010101u && active == active_levels[group] * 0x01010101u;
  }

  // The tiles from `group` on that are alike: `tile` is the first, `end` is behind the last.
  inline __attribute__((always_inline)) Fault run(int64_t group, Tile& tile, int64_t& end) {
    const uint8_t stored = stored_levels[group], active = active_levels[group];
    for (end = group + 1; end < w.groups && stored_levels[end] == stored && active_levels[end] == active;) ++end;
    const uint64_t more = static_cast<uint64_t>(end - group - 1);
    const uint8_t level = nested_level(stored, active);
    tile.kind = level < 9 ? kPlanesOf[level] : 0xFF;
    if (tile.kind == 0xFF) return Fault::kLevel;
    if (tile.kind > 0) {
      bool outside = false;  // the first or the last: a sum alone may wrap around
      for (int i = 0; i <= tile.kind; ++i) outside |= at[i] >= limit[i] || at[i] + more * bytes[i] >= limit[i];
      if (outside) return Fault::kOutside;
      tile.scales = w.scales + at[0];
      tile.offset_unit = w.offset_unit;
      for (int p = 0; p < kPlanes; ++p) tile.planes[p] = tile_at(w.planes[p], at[p + 1]);
    }
    for (int i = 0; i < 6; ++i) at[i] += stored >= kFloors[i] ? (more + 1) * bytes[i] : 0;
    return Fault::kNone;
  }

  inline __attribute__((always_inline)) Fault next(int64_t group, Tile& tile) {
    const uint8_t stored = stored_levels[group];
    const uint8_t level = nested_level(stored, active_levels[group]);
    tile.kind = level < 9 ? kPlanesOf[level] : 0xFF;
    if (tile.kind == 0xFF) return Fault::kLevel;
    if (tile.kind > 0) {
      bool outside = at[0] >= limit[0];
      for (int p = 0; p < tile.kind; ++p) outside |= at[p + 1] >= limit[p + 1];
      if (outside) return Fault::kOutside;
      tile.scales = w.scales + at[0];
      tile.offset_unit = w.offset_unit;
      for (int p = 0; p < kPlanes; ++p) tile.planes[p] = tile_at(w.planes[p], at[p + 1]);
    }
    for (int i = 0; i < 6; ++i) at[i] += stored >= kFloors[i] ? bytes[i] : 0;
    return Fault::kNone;
  }
};

// Prefetches the tiles that will be read, a dozen tiles ahead. Where tiles between them are skipped, the machine's own
// prefetcher cannot predict the next address.
class TilePrefetcher {
 public:
  explicit TilePrefetcher(const Weight& w) : cursor_(w) {}

  void begin(int64_t strip) {
    strip_ = strip;
    group_ = 0;
    cursor_.begin(strip);
    for (int i = 0; i < kTilesAhead; ++i) step();
  }

  // One tile on.
  void step() {
    const Weight& w = cursor_.w;
    if (group_ == w.groups) {
      if (strip_ + 1 >= w.strips) return;
      cursor_.begin(++strip_);
      group_ = 0;
    }
    Tile tile;
    if (cursor_.next(group_++, tile) != Fault::kNone || tile.kind == 0) return;
    prefetch(tile.scales, 0);
    for (int p = 0; p < tile.kind; ++p)
      for (int64_t line = 0; line < tile_bytes(p, w.group); line += 64) prefetch(tile.planes[p], line);
  }

 private:
  static constexpr int kTilesAhead = 12;
  TileCursor cursor_;
  int64_t strip_ = 0, group_ = 0;
};

template <class V>
struct Nibbles {
  typename V::Words even, odd;  // low nibbles: fields 0 and 1; high nibbles: fields 2 and 3
};

template <class V>
inline Nibbles<V> merge(typename V::Words high, typename V::Words low) {
  return {V::select(0xCCCCCCCCu, high << 2, low), V::select(0xCCCCCCCCu, high, low >> 2)};
}

// What one step of 16 columns needs of a tile, for `V::kRows` of its rows.
template <class V, int KIND>
struct Reader {
  using Words = typename V::Words;
  const uint8_t* p[kPlanes];
  const int byte;       // where its rows are in a chunk
  const int64_t ahead;  // how far to prefetch; 0: not
  Words one, two;       // the chunks of 1-bit planes, 32 columns

  inline __attribute__((always_inline)) Reader(const Tile& tile, int first, int64_t bytes_ahead) : byte(first), ahead(bytes_ahead) {
    for (int i = 0; i < KIND; ++i) p[i] = tile.planes[i] + first;
  }

  // A chunk of the first plane as it is: fields of two bits.
  inline __attribute__((always_inline)) Words pairs(int chunk) { return load(0, chunk); }

  // Before the two steps of a pair of chunks.
  inline __attribute__((always_inline)) void begin_pair(int pair) {
    if constexpr (KIND >= 2) one = load(1, pair);
    if constexpr (KIND >= 3) two = load(2, pair);
  }

  // Fields of the 4-bit code (planes 0-2), or of what is read of it.
  template <int ODD>
  inline __attribute__((always_inline)) Nibbles<V> anchor(int pair) {
    const Words high = load(0, 2 * pair + ODD);
    if constexpr (KIND == 1) return {high & 0x33333333u, (high >> 2) & 0x33333333u};
    Words low;
    if constexpr (KIND == 2) low = (ODD ? one : one << 1) & 0xAAAAAAAAu;
    if constexpr (KIND >= 3) low = ODD ? V::select(0xAAAAAAAAu, one, two >> 1) : V::select(0xAAAAAAAAu, one << 1, two);
    return merge<V>(high, low);
  }

  // Fields of the residual code (planes 3-4).
  template <int ODD>
  inline __attribute__((always_inline)) Nibbles<V> residual(int pair) {
    const Words high = load(3, 2 * pair + ODD);
    if constexpr (KIND == 4) return {(high << 2) & 0xCCCCCCCCu, high & 0xCCCCCCCCu};
    else return merge<V>(high, load(4, 2 * pair + ODD));
  }

 private:
  inline __attribute__((always_inline)) Words load(int plane, int chunk) {
    const uint8_t* at = p[plane] + 64 * chunk;
    if (byte == 0) prefetch(at, ahead);
    return V::load(at);
  }
};

// Fields 0-3 of a nibble code, one a byte.
template <class V>
inline void nibble_fields(const Nibbles<V>& a, typename V::Words (&field)[4]) {
  field[0] = a.even & 0x0F0F0F0Fu;
  field[1] = a.odd & 0x0F0F0F0Fu;
  field[2] = (a.even >> 4) & 0x0F0F0F0Fu;
  field[3] = (a.odd >> 4) & 0x0F0F0F0Fu;
}

// Fields 0-3 of anchor_step * A + B, one a byte. Without reach that step is 16, and the two do not overlap.
template <class V, bool REACHED>
inline void byte_fields(const Nibbles<V>& a, const Nibbles<V>& b, int anchor_step, typename V::Words (&field)[4]) {
  if constexpr (REACHED) {
    using Words = typename V::Words;
    typedef uint16_t Halves __attribute__((vector_size(sizeof(Words))));  // no product of a byte is above 255
    Words low[4];
    nibble_fields<V>(a, field);
    nibble_fields<V>(b, low);
    for (int j = 0; j < 4; ++j) field[j] = (Words)((Halves)field[j] * static_cast<uint16_t>(anchor_step)) + low[j];
  } else {
    field[0] = V::select(0xF0F0F0F0u, a.even << 4, b.even);
    field[1] = V::select(0xF0F0F0F0u, a.odd << 4, b.odd);
    field[2] = V::select(0xF0F0F0F0u, a.even, b.even >> 4);
    field[3] = V::select(0xF0F0F0F0u, a.odd, b.odd >> 4);
  }
}

// The codes times 2^shift, one a byte: [g / 4 quads of columns, 16 rows, 4].
template <class V, int KIND, bool REACHED>
void unpack_kind(const Tile& tile, int group, int anchor_step, uint8_t* codes) {
  for (int part = 0; part < 64; part += 4 * V::kRows) {
    Reader<V, KIND> reader(tile, part, kAhead[KIND]);
    auto step = [&](auto odd, int pair) __attribute__((always_inline)) {
      typename V::Words field[4];
      const Nibbles<V> a = reader.template anchor<decltype(odd)::value>(pair);
      if constexpr (KIND <= 3) nibble_fields<V>(a, field);
      else byte_fields<V, REACHED>(a, reader.template residual<decltype(odd)::value>(pair), anchor_step, field);
      for (int j = 0; j < 4; ++j) V::store(codes + 64 * (8 * pair + 4 * decltype(odd)::value + j) + part, field[j]);
    };
    for (int pair = 0; pair < group / 32; ++pair) {
      reader.begin_pair(pair);
      step(std::integral_constant<int, 0>{}, pair);
      step(std::integral_constant<int, 1>{}, pair);
    }
  }
}

template <class V>
void unpack_tile(const Tile& tile, int group, int anchor_step, uint8_t* codes) {
  const bool reached = anchor_step != kOwnAnchorStep;
  switch (tile.kind) {
    case 1: return unpack_kind<V, 1, false>(tile, group, anchor_step, codes);
    case 2: return unpack_kind<V, 2, false>(tile, group, anchor_step, codes);
    case 3: return unpack_kind<V, 3, false>(tile, group, anchor_step, codes);
    case 4: return reached ? unpack_kind<V, 4, true>(tile, group, anchor_step, codes) : unpack_kind<V, 4, false>(tile, group, anchor_step, codes);
    default: return reached ? unpack_kind<V, 5, true>(tile, group, anchor_step, codes) : unpack_kind<V, 5, false>(tile, group, anchor_step, codes);
  }
}

// What the scales of a strip's rows from `row` on are multiplied with at a level.
template <class V>
inline __attribute__((always_inline)) typename V::Floats unit_of(const Weight& w, int kind, int64_t strip, int row) {
  const typename V::Floats unit = V::splat(w.units[kind - 1]);
  if (w.gains && kind <= 2) return V::halves(w.gains + ((kind - 1) * w.strips + strip) * kTileRows + row) * unit;
  return unit;
}

// The scales of a tile at its level, for rows from `row` on: s * unit (rounded) and m.
template <class V>
struct TileScales {
  typename V::Floats step, offset;

  inline __attribute__((always_inline)) TileScales(const Tile& tile, int row, typename V::Floats unit) {
    const typename V::Floats scale = V::small_floats(tile.scales + row);
    step = scale * unit;
    offset = V::signed_bytes(tile.scales + kTileRows + row) * (scale * V::splat(tile.offset_unit));
  }
};
