// The kernels for Avx512.
#include "kernels_both.h"
#include "kernels_data.h"
#include "kernels_masked.h"
#include "kernels_weights.h"
#include "simd_avx512.h"

namespace sparsetrain {

const Kernels kKernelsAvx512 = {"avx512",
                                Avx512::kLanes,
                                Avx512::kRegisters,
                                data_kernels<Avx512>(),
                                weights_kernels<Avx512>(),
                                masked_kernels<Avx512>(),
                                both_kernels<Avx512>(),
                                &kKernelsAvx2};

}  // namespace sparsetrain
