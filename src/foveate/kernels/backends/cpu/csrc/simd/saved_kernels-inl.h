// The kernels of one instruction set on saved tensors, made of its vector primitives `V`.
//
// The source file of an instruction set includes this file after `V` (simd/kernels-inl.h has the rule for -inl.h). The
// order of the includes below matters. `V` gives: kLanes; Floats and Words (vectors of the compiler); load and store;
// stream and fence (stores that bypass the caches); min and max; to_words (rounds to nearest even); minimum, maximum and
// total of a vector; lanes (0, 1, ...); store_codes and Decoder.

#include "saved/groups-inl.h"
#include "saved/bits-inl.h"
#include "saved/moments-inl.h"

template <class V>
constexpr SavedKernels saved_kernels_of() {
  return {pack<V>, unpack<V>, variance<V>, mask<V>, two_values<V>, choose<V>, narrow<V>, widen<V>, moments<V>, spread<V>};
}
