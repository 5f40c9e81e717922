// The table of kernels that each instruction set fills in, and the one that is in use.
#pragma once

#include <cstdint>

#include "collect/collect.h"
#include "convert/convert.h"
#include "decoder/decoder.h"
#include "planes/planes.h"
#include "rounding/column_block.h"
#include "rounding/grid_search.h"
#include "saved/saved.h"

namespace foveate {

// The kernels of one instruction set. Ranges are half open; ranges of one call may run on different threads.
struct Kernels {
  const char* name;
  // Lanes above which strips are worth taking two at a time.
  int64_t lean_lanes;
  Fault (*quantize)(const InputRows&, const Inputs&, int64_t row, int64_t row_end);
  Fault (*product)(const Weight&, const Inputs&, const Output&, int64_t strip, int64_t strip_end, int64_t row, int64_t row_end);
  // The dense weight, float32 [rows of the strips, K].
  Fault (*unpack)(const Weight&, float* out, int64_t strip, int64_t strip_end);
  // Rows indices[i] of the dense weight, float32 [.., K].
  Fault (*embed)(const Weight&, const int64_t* indices, float* out, int64_t i, int64_t i_end);
  // The codes of a block of columns: each changed to the best with all others as they are; or chosen for the first time,
  // each error passed on to the elements that follow.
  void (*coordinate_descent)(const ColumnBlock&);
  void (*error_feedback)(const ColumnBlock&);
  // The grids of the groups of strips of 16 rows.
  void (*search_grids)(const GridSearch&, int64_t strip, int64_t strip_end);
  const SavedKernels* saved;
  CollectKernels collect;
  DecoderKernels decoder;
  ConvertKernels convert;
};

// Null where the machine does not have the instructions.
#if defined(__x86_64__)
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
#else
inline const Kernels* avx512_kernels() { return nullptr; }
inline const Kernels* avx2_kernels() { return nullptr; }
#endif
const Kernels* portable_kernels();

// The kernels in use (planes/plane_ops.cpp).
const Kernels& kernels();

}  // namespace foveate
