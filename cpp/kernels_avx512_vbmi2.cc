// The kernels for Avx512Vbmi2 that differ from those for Avx512: the ones that make lists.
#include "kernels_masked.h"
#include "kernels_weights.h"
#include "simd_avx512_vbmi2.h"

namespace sparsetrain {
namespace {

template <class T>
constexpr void offer_lists(ListKernels& table) {
  table.pack_lists[kIndexOf<T>] = weights_pack_lists<Avx512Vbmi2, T>;
  table.lists[kIndexOf<T>] = masked_lists<Avx512Vbmi2, T>;
  table.point_lists[kIndexOf<T>] = point_lists<Avx512Vbmi2, T>;
}

constexpr ListKernels list_kernels() {
  ListKernels table{};
  table.list = weights_list_together<Avx512Vbmi2>;
  offer_lists<float>(table);
  offer_lists<Bf16>(table);
  offer_lists<F16>(table);
  return table;
}

}  // namespace

const ListKernels kListsAvx512Vbmi2 = list_kernels();

}  // namespace sparsetrain
