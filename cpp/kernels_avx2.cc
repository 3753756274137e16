// The kernels for Avx2.
#include "kernels_both.h"
#include "kernels_data.h"
#include "kernels_masked.h"
#include "kernels_weights.h"
#include "simd_avx2.h"

namespace sparsetrain {

const Kernels kKernelsAvx2 = {"avx2",
                              Avx2::kLanes,
                              Avx2::kRegisters,
                              data_kernels<Avx2>(),
                              weights_kernels<Avx2>(),
                              masked_kernels<Avx2>(),
                              both_kernels<Avx2>(),
                              nullptr};

}  // namespace sparsetrain
