// The product for many lanes of x: two strips of a group are unpacked once to a panel of bytes that stays in the first
// cache, then multiplied by every row, a block of lanes at a time with all sums in registers.
//
// Accumulators of all rows (float32, [rows, 2 strips, 16]) live on the stack for one pass along the strips, so rows
// come in chunks of at most kPanelRows. Only instruction sets whose products take bytes have this (`V::kByteCodes`).
//
// simd/kernels-inl.h includes this file after planes/strip-inl.h.

constexpr int kPanelRows = 256;
constexpr int kPanelStrips = 2;
constexpr int kBlockLanes = 12;  // 2 strips x 12 lanes of sums fill 24 of 32 registers

// Tiles of one group that are not skipped, unpacked.
template <class V>
struct Panel {
  alignas(64) uint8_t codes[kPanelStrips][kTileRows * kMaxGroup];
  Finish<V> finish[kPanelStrips];
  int place[kPanelStrips];  // which of the two strips
};

// STRIPS x LANES sums over a group, then into the rows' accumulators.
template <class V, int STRIPS, int LANES, bool WIDE>
void panel_block(const Panel<V>& panel, const int8_t* x, const float* sums, int group, float* acc) {
  typename V::Ints lane[STRIPS][LANES] = {};
  for (int quad = 0; quad < group / 4; ++quad) {
    typename V::Words code[STRIPS];
#pragma GCC unroll 2
    for (int s = 0; s < STRIPS; ++s) code[s] = V::load(panel.codes[s] + 64 * quad);
#pragma GCC unroll 12
    for (int i = 0; i < LANES; ++i)
#pragma GCC unroll 2
      for (int s = 0; s < STRIPS; ++s) lane[s][i] = V::multiply_add(lane[s][i], code[s], x + i * group + 4 * quad);
  }
#pragma GCC unroll 12
  for (int i = 0; i < (WIDE ? LANES / 2 : LANES); ++i)
#pragma GCC unroll 2
    for (int s = 0; s < STRIPS; ++s) {
      float* at = acc + (i * kPanelStrips + panel.place[s]) * kTileRows;
      V::store_floats(at, panel.finish[s].template add<WIDE>(V::floats(at), lane[s], i, sums[i]));
    }
}

template <class V, int STRIPS, bool WIDE>
void panel_rows(const Panel<V>& panel, const int8_t* x, const float* sums, int group, int64_t rows, float* acc) {
  constexpr int kEach = WIDE ? 2 : 1;
  constexpr int kRows = kBlockLanes / kEach;
  // blocks of nearly equal size: a short last block would wait on its own few sums
  const int64_t blocks = (rows + kRows - 1) / kRows;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = rows * b / blocks;
    const int64_t count = rows * (b + 1) / blocks - row;
    const int8_t* codes = x + row * kEach * group;
    float* to = acc + row * kPanelStrips * kTileRows;
    switch (count * kEach) {
#define FOVEATE_LANES(n)                                                                                       \
  case n:                                                                                                      \
    if constexpr (n % kEach == 0) panel_block<V, STRIPS, n, WIDE>(panel, codes, sums + row, group, to); \
    break;
      FOVEATE_LANES(1)
      FOVEATE_LANES(2)
      FOVEATE_LANES(3)
      FOVEATE_LANES(4)
      FOVEATE_LANES(5)
      FOVEATE_LANES(6)
      FOVEATE_LANES(7)
      FOVEATE_LANES(8)
      FOVEATE_LANES(9)
      FOVEATE_LANES(10)
      FOVEATE_LANES(11)
      FOVEATE_LANES(12)
#undef FOVEATE_LANES
      default: break;
    }
  }
}

// Strips [strip, strip_end) times at most kPanelRows rows.
template <class V, bool WIDE>
Fault panel_product(const Weight& w, const Inputs& x, const Output& y, int64_t strip, int64_t strip_end, int64_t row, int64_t row_end) {
  alignas(64) float acc[kPanelRows * kPanelStrips * kTileRows];
  const int64_t rows = row_end - row;
  TileCursor cursors[kPanelStrips] = {TileCursor(w), TileCursor(w)};
  Panel<V> panel;
  for (; strip < strip_end; strip += kPanelStrips) {
    const int strips = strip_end - strip < kPanelStrips ? 1 : kPanelStrips;
    for (int s = 0; s < strips; ++s) cursors[s].begin(strip + s);
    std::memset(acc, 0, static_cast<size_t>(rows) * kPanelStrips * kTileRows * sizeof(float));
    for (int64_t group = 0; group < w.groups; ++group) {
      int live = 0;
      for (int s = 0; s < strips; ++s) {
        Tile tile;
        const Fault fault = cursors[s].next(group, tile);
        if (fault != Fault::kNone) return fault;
        if (tile.kind == 0) continue;
        prefetch(tile.scales, kScalesAhead);
        unpack_tile<V>(tile, w.group, w.anchor_step, panel.codes[live]);
        panel.finish[live] = Finish<V>(tile, 0, unit_of<V>(w, tile.kind, strip + s, 0), w.anchor_step, WIDE);
        panel.place[live] = s;
        ++live;
      }
      const int8_t* codes = x.codes + (group * x.lanes + row * (WIDE ? 2 : 1)) * w.group;
      const float* sums = x.sums + group * x.rows + row;
      if (live == 2) panel_rows<V, 2, WIDE>(panel, codes, sums, w.group, rows, acc);
      else if (live == 1) panel_rows<V, 1, WIDE>(panel, codes, sums, w.group, rows, acc);
    }
    for (int s = 0; s < strips; ++s) {
      const Fault fault = add_exact_tiles<V, WIDE>(w, x, strip + s, row, row_end, acc + s * kTileRows, kPanelStrips * kTileRows);
      if (fault != Fault::kNone) return fault;
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int s = 0; s < strips; ++s)
        store_row<V>(w, x, y, strip + s, row + i, acc + (i * kPanelStrips + s) * kTileRows);
  }
  return Fault::kNone;
}

template <class V>
Fault panel_strips(const Weight& w, const Inputs& x, const Output& y, int64_t strip, int64_t strip_end, int64_t row, int64_t row_end) {
  for (; row < row_end; row += kPanelRows) {
    const int64_t end = row_end - row < kPanelRows ? row_end : row + kPanelRows;
    const Fault fault = x.wide ? panel_product<V, true>(w, x, y, strip, strip_end, row, end)
                               : panel_product<V, false>(w, x, y, strip, strip_end, row, end);
    if (fault != Fault::kNone) return fault;
  }
  return Fault::kNone;
}
