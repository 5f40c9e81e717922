// The kernels of one instruction set on bit planes and on codes, made of its vector primitives `V`.
//
// A file that ends in -inl.h is not a header of its own: each instruction set's source file includes its text, after
// `V`, inside an anonymous namespace. So the same text is compiled once for each instruction set, and nothing of it is
// shared between files that are compiled for different machines. The order of the includes below matters.
//
// `V` gives: kRows (rows of a tile in a vector), kLanes (lanes of x that a pass over a strip takes), kByteCodes
// (products take codes up to 255), the types Words, Ints, Floats and Sums, and the functions that the files below use.
// All instruction sets give the same bits.

#include "planes/tile-inl.h"
#include "planes/exact-inl.h"
#include "planes/rows-inl.h"
#include "planes/strip-inl.h"
#include "planes/panel-inl.h"
#include "rounding/choose_codes-inl.h"
#include "rounding/search_grids-inl.h"
#include "collect/collect-inl.h"
#include "convert/convert-inl.h"
#include "decoder/decoder-inl.h"
#include "decoder/attention-inl.h"

template <class V>
Fault product(const Weight& w, const Inputs& x, const Output& y, int64_t strip, int64_t strip_end, int64_t row, int64_t row_end) {
  if constexpr (V::kByteCodes) {
    if ((row_end - row) * (x.wide ? 2 : 1) > V::kLanes) return panel_strips<V>(w, x, y, strip, strip_end, row, row_end);
  }
  TileCursor cursor(w);
  TilePrefetcher ahead(w);
  for (; strip < strip_end; ++strip) {
    const Fault fault = x.wide ? strip_rows<V, true>(w, x, y, cursor, ahead, strip, row, row_end)
                               : strip_rows<V, false>(w, x, y, cursor, ahead, strip, row, row_end);
    if (fault != Fault::kNone) return fault;
  }
  return Fault::kNone;
}

template <class V>
Kernels kernels_of(const char* name, const SavedKernels* saved) {
  const int64_t lean_lanes = V::kByteCodes ? V::kLanes : INT64_MAX;
  return {name, lean_lanes, quantize<V>, product<V>, unpack<V>, embed<V>, coordinate_descent<V>, error_feedback<V>, search_grids<V>,
          saved, collect_kernels_of<V>(), decoder_kernels_of<V>(), convert_kernels_of<V>()};
}
