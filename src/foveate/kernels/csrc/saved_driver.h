// The saved kernels of one instruction set, from its vectors `V`. Included last, after `V`.

#include "saved_groups.h"
#include "saved_bits.h"
#include "saved_moments.h"

template <class V>
constexpr SavedKernels saved_kernels_of() {
  return {pack<V>, unpack<V>, variance<V>, mask<V>, two_values<V>, choose<V>, narrow<V>, widen<V>, moments<V>, spread<V>};
}
