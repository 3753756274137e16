// The kernels for Avx512Vbmi2: those of Avx512, but for the ones that make lists.
#include "kernels_masked.h"
#include "kernels_weights.h"
#include "simd_avx512_vbmi2.h"

namespace sparsetrain {
namespace {

template <class T>
void offer_lists(Kernels& kernels) {
  kernels.weights.pack_lists[kIndexOf<T>] = weights_pack_lists<Avx512Vbmi2, T>;
  kernels.masked.lists[kIndexOf<T>] = masked_lists<Avx512Vbmi2, T>;
  kernels.masked.point_lists[kIndexOf<T>] = point_lists<Avx512Vbmi2, T>;
}

Kernels with_vbmi2(Kernels kernels) {
  kernels.isa = "avx512_vbmi2";
  kernels.weights.list = weights_list_together<Avx512Vbmi2>;
  offer_lists<float>(kernels);
  offer_lists<Bf16>(kernels);
  offer_lists<F16>(kernels);
  return kernels;
}

}  // namespace

// kKernelsAvx512 needs no code to run first: it is there before anything is copied.
const Kernels kKernelsAvx512Vbmi2 = with_vbmi2(kKernelsAvx512);

}  // namespace sparsetrain
