// The kernels for Portable.
#include "kernels_both.h"
#include "kernels_data.h"
#include "kernels_masked.h"
#include "kernels_weights.h"
#include "simd_portable.h"

namespace sparsetrain {

const Kernels kKernelsPortable = {"portable",
                                  Portable::kLanes,
                                  Portable::kRegisters,
                                  data_kernels<Portable>(),
                                  weights_kernels<Portable>(),
                                  masked_kernels<Portable>(),
                                  both_kernels<Portable>()};

}  // namespace sparsetrain
